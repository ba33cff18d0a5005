//! The side that has the machine: the phases of a crossing, in order, and the one way back.

mod building;
mod giving;
mod live;
mod mending;
mod switch;
mod writers;

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use crate::block::{BlockId, BlockKind};
use crate::carrier::{Cargo, Carrier, CarryError};
use crate::clock::Clock;
use crate::copying::Copying;
use crate::custody::Custody;
use crate::failure::{Cause, Failure, Phase, Reason, Side, Whereabouts};
use crate::handover::{Departure, Ledger, LedgerId, RunPermit};
use crate::link::{Link, LinkErrorKind};
use crate::machine::{Observer, OutgoingMachine};
use crate::options::{Handle, Options};
use crate::pacing::Pace;
use crate::pages::cache::DeltaCache;
use crate::pages::encode::Memory;
use crate::pages::sent::SentHashes;
use crate::policy::{self, DeadlineAction, Throttle};
use crate::report::{Checks, Downtime, Event, Outcome, Promise, Report, Timeline, Woken};
use crate::talk::{Broke, Talk};
use crate::wire::{Message, Stage};
use writers::Writers;

/// What a crossing needs of the world.
pub struct World<'a> {
    pub machine: &'a mut dyn OutgoingMachine,
    pub link: &'a mut dyn Link,
    pub ledger: &'a mut dyn Ledger,
    pub clock: &'a dyn Clock,
    pub observer: &'a dyn Observer,
    pub handle: &'a Handle,
}

/// Carries the machine to the other side. Whatever happens, the report says where the machine is afterwards.
pub fn cross<'a>(world: World<'a>, options: &'a Options) -> Report {
    Crossing::new(world, options).cross()
}

struct Crossing<'a> {
    world: World<'a>,
    options: &'a Options,
    start: Duration,
    phase: Phase,
    talk: Talk,
    /// Somebody answered at the other side's address.
    reached: bool,
    attempt: u32,
    /// The attempt whose frames are not settled yet.
    sent_in: u32,
    version: u16,
    peer_ledger: Option<LedgerId>,
    lanes: u16,
    libraries: Vec<BlockId>,
    cargo: Vec<Cargo>,
    memory: Arc<Memory>,
    custody: Option<Custody>,
    carrier: Carrier,
    copying: Option<Copying>,
    pace: Mutex<Pace>,
    state: Vec<u8>,
    /// The last `RoundEnd` was said and its answer not heard yet.
    rest_unheard: bool,
    /// How far the other side said it is, at the last reconnect.
    stage: Stage,
    departure: Option<Departure>,
    /// The right to run the machine, until the go-ahead consumes it.
    permit: Option<RunPermit>,
    /// The round kept last was of a policy that plans anew all the time.
    fresh: bool,
    throttled: Throttle,
    writers: Writers,
    slowed: Option<u64>,
    /// What is expected now, and when that was last thought about.
    promise: Option<Promise>,
    foreseen_at: Option<Duration>,
    timeline: Timeline,
    /// What the other side said of the start there, if this was the first go-ahead.
    woken: Option<Woken>,
    /// When the last part of the switch ended.
    marked: Duration,
    report: Report,
}

impl<'a> Crossing<'a> {
    fn new(world: World<'a>, options: &'a Options) -> Self {
        let (start, parallel) = (world.clock.now(), world.link.parallel());
        let report = Report {
            session: options.session,
            machine: None,
            name: String::new(),
            outcome: Outcome {
                whereabouts: Whereabouts::Here,
                failure: None,
            },
            promise: options.promise,
            fact: Default::default(),
            total: Duration::ZERO,
            prepare: Duration::ZERO,
            downtime: Downtime::default(),
            rounds: Vec::new(),
            memory: Default::default(),
            disk: Default::default(),
            wire_bytes: 0,
            lanes: 0,
            reconnects: 0,
            resent_units: 0,
            impact: Default::default(),
            clock_behind: None,
            timeline: Vec::new(),
            conduct: None,
            probe: None,
            checks: Checks {
                frames_checked: 0,
                compared: None,
            },
        };
        Crossing {
            world,
            options,
            start,
            phase: Phase::Negotiate,
            talk: Talk::default(),
            reached: false,
            attempt: 0,
            sent_in: 0,
            version: 0,
            peer_ledger: None,
            lanes: 0,
            libraries: Vec::new(),
            cargo: Vec::new(),
            memory: Arc::new(Memory {
                cache: DeltaCache::new(0),
                sent: SentHashes::new(0, &[]),
            }),
            custody: None,
            carrier: Carrier::new(options.compression, parallel),
            copying: None,
            pace: Mutex::new(Pace::new(None)),
            state: Vec::new(),
            rest_unheard: false,
            stage: Stage::Copying,
            departure: None,
            permit: None,
            fresh: false,
            throttled: Throttle::default(),
            writers: Writers::default(),
            slowed: None,
            promise: options.promise,
            foreseen_at: None,
            timeline: Timeline::new(),
            woken: None,
            marked: start,
            report,
        }
    }

    /// The whole crossing, and the one way back.
    fn cross(mut self) -> Report {
        let outcome = self.run();
        self.report.outcome = match outcome {
            Ok(()) => Outcome {
                whereabouts: Whereabouts::There,
                failure: None,
            },
            Err(failure) => self.unwind(failure),
        };
        self.end()
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.negotiate()?;
        self.prepare()?;
        self.copy_live()?;
        self.pause()?;
        self.copy_rest()?;
        self.verify()?;
        self.send_state()?;
        self.hand_over()?;
        self.finish();
        Ok(())
    }

    /// Nothing was handed over, or it came back: the machine goes on here as if nothing had happened. If nobody
    /// knows, it stays stopped and is kept.
    fn unwind(&mut self, mut failure: Failure) -> Outcome {
        self.carrier.drop_lanes();
        match self.permit.take() {
            Some(permit) => {
                self.say_farewell(&failure);
                drop(self.custody.take());
                self.cargo.iter().for_each(|cargo| cargo.source.stop_tracking());
                let eased = self.throttle(&Throttle::default()).and(self.slow_writes(None));
                let resumed = self.world.machine.resume(&permit);
                if self.phase >= Phase::Pause {
                    // The machine stood still up to here.
                    let took = self.mark();
                    self.report.downtime.resume += took;
                }
                failure.whereabouts = self.whereabouts();
                // It runs again; now there is time for the book.
                let noted = match self.departure.as_mut() {
                    Some(departure) => departure.step_back(self.world.ledger),
                    None => Ok(()),
                };
                if let Err(reason) = &noted {
                    failure.message = format!(
                        "{}; the ledger still says that the machine may be gone, and `ferry resolve` mends that: {reason}",
                        failure.message
                    );
                }
                if let Err(reason) = resumed.and(eased)
                    && failure.whereabouts == Whereabouts::Here
                {
                    failure.message = format!(
                        "{}; the machine could not be set going again: {reason}",
                        failure.message
                    );
                }
            }
            None if self.departure.is_none() => failure.whereabouts = self.whereabouts(),
            None => {
                drop(self.custody.take());
                self.cargo.iter().for_each(|cargo| cargo.source.stop_tracking());
                self.world.machine.stranded();
                failure.whereabouts = Whereabouts::Unknown;
            }
        }
        Outcome {
            whereabouts: failure.whereabouts,
            failure: Some(failure),
        }
    }

    /// Of a machine that was not given away.
    fn whereabouts(&self) -> Whereabouts {
        match self.world.machine.has_ended() {
            true => Whereabouts::Ended,
            false => Whereabouts::Here,
        }
    }

    fn end(mut self) -> Report {
        self.talk.end();
        self.report.total = self.now();
        // May take a while to find out, and is no part of the crossing.
        self.report.impact = self.world.machine.impact();
        self.report.downtime.total = self.report.downtime.parts().iter().map(|(_, part)| *part).sum();
        self.report.timeline = self.timeline.take();
        let (limits, capped) = (&self.options.limits, self.world.handle.capped());
        let copying = self.copying.as_ref();
        self.report.conduct = copying.map(|copying| copying.conduct(&self.cargo, limits, capped));
        self.report.total_up();
        let outcome = self.report.outcome.clone();
        self.world.observer.event(&Event::Ended {
            at: self.now(),
            outcome,
        });
        self.report
    }

    fn now(&self) -> Duration {
        self.world.clock.now().saturating_sub(self.start)
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.world.observer.event(&Event::Phase {
            phase,
            at: self.now(),
        });
    }

    /// The time since the last mark: the parts of the switch follow one another without a gap.
    fn mark(&mut self) -> Duration {
        let now = self.world.clock.now();
        now.saturating_sub(std::mem::replace(&mut self.marked, now))
    }

    fn hear(&mut self, _asked: &str, within: Duration) -> Result<Message, Broke> {
        let (handle, clock, late) = (self.world.handle, self.world.clock, self.late_at());
        self.talk.hear(clock, within, &|| {
            cancelled(handle).or_else(|| is_late(clock, late))
        })
    }

    /// Why the crossing must not go on, if so: looked at wherever something is waited for.
    fn interrupted(&self) -> Option<Reason> {
        cancelled(self.world.handle).or_else(|| is_late(self.world.clock, self.late_at()))
    }

    /// When a deadline ends the crossing, and what it was. From the switch on nothing is gained by giving up: the rest
    /// takes no longer than the way back.
    fn late_at(&self) -> Option<Late> {
        let limit = self.options.limits.deadline?;
        let ends = self.phase < Phase::Pause && self.options.limits.on_deadline == DeadlineAction::Cancel;
        ends.then_some(Late {
            limit,
            start: self.start,
        })
    }

    fn throttle(&mut self, throttle: &Throttle) -> Result<(), Reason> {
        if *throttle != self.throttled {
            self.world.machine.throttle(throttle)?;
            self.throttled = throttle.clone();
            self.writers.throttle_changes();
            self.world.observer.event(&Event::Throttle {
                at: self.now(),
                percent: throttle.percent,
                vcpus: throttle.vcpus.clone(),
            });
        }
        Ok(())
    }

    fn slow_writes(&mut self, bytes_per_sec: Option<u64>) -> Result<(), Reason> {
        if bytes_per_sec != self.slowed {
            let disks: Vec<BlockId> = self
                .cargo
                .iter()
                .filter(|cargo| cargo.info.kind == BlockKind::Disk)
                .map(|cargo| cargo.info.id)
                .collect();
            for disk in disks {
                self.world.machine.slow_writes(disk, bytes_per_sec)?;
            }
            self.slowed = bytes_per_sec;
        }
        Ok(())
    }

    fn or_fail<T>(&self, outcome: Result<T, Reason>) -> Result<T, Failure> {
        outcome.map_err(|reason| self.fail(Side::Outgoing, reason))
    }

    fn fail(&self, side: Side, reason: Reason) -> Failure {
        let Reason { cause, message } = reason;
        Failure {
            side,
            phase: self.phase,
            cause,
            whereabouts: Whereabouts::Here,
            message,
        }
    }

    fn broke(&self, broke: Broke) -> Failure {
        match broke {
            Broke::Link(error) => {
                let cause = match error.kind {
                    LinkErrorKind::Stalled => Cause::Stalled,
                    LinkErrorKind::Malformed => Cause::Protocol,
                    LinkErrorKind::Refused => Cause::NotAllowed,
                    LinkErrorKind::Closed => Cause::Link,
                };
                self.fail(Side::Outgoing, Reason::new(cause, error.message))
            }
            Broke::For(side, reason) => self.fail(side, reason),
            Broke::Word {
                why: Some(reason), ..
            } => self.fail(Side::Incoming, reason),
            Broke::Word { taken, .. } => {
                let said = match taken {
                    true => "the other side says that it already has the machine",
                    false => "the other side has ended the crossing, or was restarted",
                };
                self.fail(Side::Incoming, Reason::new(Cause::Declined, said))
            }
        }
    }
}

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A long crossing is not played through each second, but after each such part of the time that it has taken.
const FORESEE_PART: u32 = 16;
/// Writing the ledger for longer than this is worth another look at what the machine wrote meanwhile.
const SLOW_BOOK: Duration = Duration::from_millis(5);
const SHOW_EVERY: Duration = Duration::from_millis(200);
const REPORT_ROUND: Duration = Duration::from_secs(1);
const RETRY_AFTER: Duration = Duration::from_millis(200);
const FAREWELL: Duration = Duration::from_secs(2);
/// How long a side that gives up may take to say why after it closed a lane.
const LAST_WORD: Duration = Duration::from_secs(1);
const NAMES_AT_ONCE: u64 = 1024;

/// The deadline of a crossing that is to end at it.
#[derive(Clone, Copy)]
struct Late {
    limit: Duration,
    start: Duration,
}

fn is_late(clock: &dyn Clock, late: Option<Late>) -> Option<Reason> {
    let Late { limit, start } = late?;
    let took = clock.now().saturating_sub(start);
    (took >= limit).then(|| {
        let sentence = policy::Reason::Deadline {
            elapsed_secs: took.as_secs_f64(),
            limit_secs: limit.as_secs_f64(),
        };
        Reason::new(Cause::Deadline, sentence.to_string())
    })
}

fn cancelled(handle: &Handle) -> Option<Reason> {
    handle
        .is_cancelled()
        .then(|| Reason::new(Cause::Cancelled, "the crossing was cancelled"))
}

fn carry_broke(error: CarryError) -> Broke {
    match error {
        CarryError::Link(error) => Broke::Link(error),
        CarryError::Data(error) => Broke::here(Reason::from(error)),
        CarryError::Stopped => Broke::here(Reason::new(Cause::Cancelled, "the crossing was stopped")),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// The session is random and the guest does not know it.
fn seed(options: &Options) -> u64 {
    options
        .session
        .0
        .iter()
        .fold(0, |seed, byte| seed << 4 ^ seed >> 60 ^ u64::from(*byte))
}
