//! The side that has the machine: the phases of a crossing, in order, and the one way back.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use crate::block::{BlockId, BlockKind, Name, Span, name_of_block};
use crate::carrier::{Cargo, Carrier, CarryError};
use crate::clock::Clock;
use crate::copying::{Copying, Means, Tick};
use crate::custody::Custody;
use crate::failure::{Cause, Failure, Phase, Reason, Side, Whereabouts};
use crate::handover::{Departure, Ledger, LedgerId, RunPermit, Verdict};
use crate::link::{Link, LinkError, LinkErrorKind};
use crate::machine::{Observer, Offer, OutgoingMachine};
use crate::options::{Handle, Options};
use crate::pacing::Pace;
use crate::pages::cache::DeltaCache;
use crate::pages::encode::Memory;
use crate::pages::sent::SentHashes;
use crate::policy::{self, Action, Decision, UNLIMITED};
use crate::report::{Checks, Downtime, Event, Outcome, Report};
use crate::talk::{Broke, Talk};
use crate::units::UnitSet;
use crate::wire::{Message, Purpose, STATE_PART_BYTES, Stage, VERSION_WITH_NAMES};

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
    throttled: u8,
    slowed: Option<u64>,
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
            promise: options.promise.clone(),
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
            throttled: 0,
            slowed: None,
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
                let eased = self.throttle(0).and(self.slow_writes(None));
                let resumed = self.world.machine.resume(&permit);
                if self.phase >= Phase::Pause {
                    // The machine stood still up to here.
                    let took = self.mark();
                    self.report.downtime.resume += took;
                }
                failure.whereabouts = Whereabouts::Here;
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
                if let Err(reason) = resumed.and(eased) {
                    failure.message = format!(
                        "{}; the machine could not be set going again: {reason}",
                        failure.message
                    );
                }
            }
            None if self.departure.is_none() => failure.whereabouts = Whereabouts::Here,
            None => {
                drop(self.custody.take());
                self.world.machine.stranded();
                failure.whereabouts = Whereabouts::Unknown;
            }
        }
        Outcome {
            whereabouts: failure.whereabouts,
            failure: Some(failure),
        }
    }

    fn end(mut self) -> Report {
        self.talk.end();
        self.report.impact = self.world.machine.impact();
        self.report.total = self.now();
        self.report.downtime.total = self.report.downtime.parts().iter().map(|(_, part)| *part).sum();
        self.report.total_up();
        let outcome = self.report.outcome.clone();
        self.world.observer.event(&Event::Ended {
            at: self.now(),
            outcome,
        });
        self.report
    }

    // ---- Negotiate and prepare: until the other side is built, a broken link means beginning again.

    fn negotiate(&mut self) -> Result<(), Failure> {
        self.enter(Phase::Negotiate);
        let card = self.world.machine.card();
        let card = self.or_fail(card)?;
        self.report.machine = Some(card.machine);
        self.report.name.clone_from(&card.name);
        let opened = Departure::begin(self.world.ledger, self.options.session, card.machine);
        let (departure, permit) = self.or_fail(opened)?;
        (self.departure, self.permit) = (Some(departure), Some(permit));
        let sources = self.world.machine.sources();
        let sources = self.or_fail(sources)?;
        self.cargo = sources
            .into_iter()
            .map(|source| Cargo {
                info: source.info(),
                source,
            })
            .collect();
        let blocks: Vec<_> = self.cargo.iter().map(|cargo| cargo.info.clone()).collect();
        self.memory = Arc::new(Memory {
            cache: DeltaCache::new(self.options.delta_cache_bytes),
            sent: SentHashes::new(seed(self.options), &blocks),
        });
        let offer = Offer { card, blocks };
        self.until_built(|crossing| crossing.greet_and_offer(&offer))
    }

    fn greet_and_offer(&mut self, offer: &Offer) -> Result<(), Broke> {
        self.connect(Purpose::Begin)?;
        let (version, ledger) = match self.hear("Hello", self.options.stall)? {
            Message::Welcome { version, ledger } => (version, ledger),
            other => return Err(Broke::unexpected(&other, "Hello")),
        };
        if !(self.options.oldest_version..=self.options.newest_version).contains(&version) {
            let reason = format!("the other side chose protocol version {version}, which was not offered");
            return Err(Broke::here(Reason::new(Cause::Version, reason)));
        }
        (self.version, self.peer_ledger) = (version, Some(ledger));
        let Some(departure) = self.departure.as_mut() else {
            return Ok(());
        };
        departure.peer_is(ledger);
        let epoch = departure.epoch();
        let lanes = self.options.lanes.clamp(1, self.world.link.most_lanes().max(1));
        self.talk.say(&Message::Offer {
            epoch,
            lanes,
            offer: offer.clone(),
        })?;
        match self.hear("Offer", self.options.stall)? {
            Message::Accepted { lanes: agreed } if (1..=lanes).contains(&agreed) => self.lanes = agreed,
            other => return Err(Broke::unexpected(&other, "Offer")),
        }
        self.report.lanes = self.lanes;
        Ok(())
    }

    fn prepare(&mut self) -> Result<(), Failure> {
        self.enter(Phase::Prepare);
        let card = self.world.machine.card();
        let card = self.or_fail(card)?;
        let blocks: Vec<_> = self.cargo.iter().map(|cargo| cargo.info.clone()).collect();
        let offer = Offer { card, blocks };
        let mut first = true;
        self.until_built(|crossing| {
            if !std::mem::take(&mut first) {
                crossing.greet_and_offer(&offer)?;
            }
            crossing.talk.say(&Message::Prepare)?;
            match crossing.hear("Prepare", crossing.options.patience)? {
                Message::Prepared { libraries } => crossing.libraries = libraries,
                other => return Err(Broke::unexpected(&other, "Prepare")),
            }
            Ok(())
        })?;
        self.sent_in = self.attempt;
        if let Err(broke) = self.open_lanes() {
            self.mend(broke)?;
        }
        self.report.prepare = self.now();
        Ok(())
    }

    /// Tries a step again from the start while only the link is to blame.
    fn until_built(&mut self, mut step: impl FnMut(&mut Self) -> Result<(), Broke>) -> Result<(), Failure> {
        let until = self.world.clock.now() + self.options.reconnect_for;
        loop {
            match step(self) {
                Ok(()) => return Ok(()),
                // The receiver was never reached: trying again is the user's decision.
                Err(Broke::Link(error)) if !self.reached => {
                    return Err(self.broke(Broke::Link(error)));
                }
                Err(Broke::Link(error)) if self.world.clock.now() < until => self.wait_to_retry(&error)?,
                Err(broke) => return Err(self.broke(broke)),
            }
        }
    }

    fn connect(&mut self, purpose: Purpose) -> Result<(), Broke> {
        self.talk.end();
        self.carrier.drop_lanes();
        self.attempt += 1;
        let peer = self.world.link.control()?;
        self.reached = true;
        self.talk.begin(peer);
        self.talk.say(&Message::Hello {
            oldest: self.options.oldest_version,
            newest: self.options.newest_version,
            session: self.options.session,
            attempt: self.attempt,
            ledger: self.world.ledger.id(),
            purpose,
        })
    }

    fn open_lanes(&mut self) -> Result<(), Broke> {
        let mut lanes = Vec::with_capacity(usize::from(self.lanes));
        for index in 0..self.lanes {
            lanes.push(self.world.link.lane(self.options.session, self.attempt, index)?);
        }
        self.carrier.lanes(lanes);
        Ok(())
    }

    // ---- Copy live: slices and rounds, as the policy says.

    fn copy_live(&mut self) -> Result<(), Failure> {
        self.enter(Phase::CopyLive);
        let sources: Vec<_> = self.cargo.iter().map(|cargo| Arc::clone(&cargo.source)).collect();
        self.custody = Some(Custody::new(
            &sources,
            usize::from(self.lanes),
            Arc::clone(&self.memory),
        ));
        let copying = Copying::begin(&self.cargo, self.world.clock, &self.options.limits);
        self.copying = Some(self.or_fail(copying.map_err(Reason::from))?);
        self.copy_known()?;
        while let Some((decision, reason)) = self.decide()? {
            if let Err(broke) = self.slice(&decision, &reason) {
                self.mend(broke)?;
            }
        }
        Ok(())
    }

    /// What next? `None`: switch.
    fn decide(&mut self) -> Result<Option<(Decision, String)>, Failure> {
        let fit = self.world.machine.check();
        self.or_fail(fit)?;
        if let Some(reason) = cancelled(self.world.handle) {
            return Err(self.fail(Side::Outgoing, reason));
        }
        let fixed = self.options.switch_fixed;
        let (clock, service) = (self.world.clock, self.world.machine.service());
        let Some(copying) = self.copying.as_mut() else {
            return Ok(None);
        };
        copying.history.switch_fixed = fixed;
        copying.history.throttle_percent = self.throttled;
        copying.history.service = service;
        let (decision, reason) = policy::decide(copying.look(&self.cargo, clock), &self.options.limits);
        let reason = reason.to_string();
        if self.world.handle.wants_switch() {
            return Ok(None);
        }
        match decision.action {
            // Nothing is left to decide about.
            Action::GoOn if copying.history.between_rounds && copying.history.remaining_bytes == 0 => {
                return Ok(None);
            }
            Action::Switch => {
                if let Some(last) = self.report.rounds.last_mut() {
                    last.decision = "switch".into();
                    last.reason = reason;
                }
                return Ok(None);
            }
            Action::GiveUp => {
                let late = self
                    .options
                    .limits
                    .deadline
                    .is_some_and(|limit| self.now() >= limit);
                let cause = if late {
                    Cause::Deadline
                } else {
                    Cause::NotConverging
                };
                return Err(self.fail(Side::Outgoing, Reason::new(cause, reason)));
            }
            Action::GoOn => {}
        }
        let eased = self
            .throttle(decision.throttle.percent)
            .and(self.slow_writes(decision.slow_writes_bytes_per_sec));
        self.or_fail(eased)?;
        self.set_pace(&decision);
        Ok(Some((decision, reason)))
    }

    fn set_pace(&self, decision: &Decision) {
        let mut rate = decision
            .bandwidth_bytes_per_sec
            .min(self.world.handle.capped().unwrap_or(UNLIMITED));
        if decision.yield_to_service
            && rate != UNLIMITED
            && let Some(service) = self.copying.as_ref().and_then(|copying| copying.history.service)
        {
            let least = self.options.limits.least_bandwidth_bytes_per_sec;
            rate = rate.saturating_sub(service.bytes_per_sec as u64).max(least);
        }
        lock(&self.pace).set(Some(rate).filter(|rate| *rate != UNLIMITED));
    }

    fn slice(&mut self, decision: &Decision, reason: &str) -> Result<(), Broke> {
        let at = self.now();
        let Some(copying) = self.copying.as_mut() else {
            return Ok(());
        };
        let round = copying.round;
        if !copying.in_round() {
            let plan = copying.plan(&self.cargo, decision, self.world.clock);
            self.world.observer.event(&Event::Round {
                round,
                at,
                pages: plan.units(&self.cargo, BlockKind::Memory),
                clusters: plan.units(&self.cargo, BlockKind::Disk),
                bytes: plan.bytes(&self.cargo),
                bandwidth_bytes_per_sec: Some(decision.bandwidth_bytes_per_sec)
                    .filter(|rate| *rate != UNLIMITED),
                reason: reason.to_owned(),
            });
        }
        let Some(custody) = self.custody.as_ref() else {
            return Ok(());
        };
        let mut stopped = None;
        let mut shown = Duration::ZERO;
        let mut checked = self.world.clock.now();
        let (clock, handle, observer) = (self.world.clock, self.world.handle, self.world.observer);
        let machine = &mut *self.world.machine;
        let start = self.start;
        let remaining_bytes = copying.history.remaining_bytes;
        let sent_before = copying.history.round.wire_bytes
            + self
                .report
                .rounds
                .iter()
                .map(|round| round.wire_bytes)
                .sum::<u64>();
        let mut tick = |sent_bytes: u64| {
            if let Some(reason) = cancelled(handle) {
                stopped = Some(reason);
                return Tick::Stop;
            }
            let now = clock.now();
            if now.saturating_sub(checked) >= LOOK_EVERY {
                checked = now;
                if let Err(reason) = machine.check() {
                    stopped = Some(reason);
                    return Tick::Stop;
                }
            }
            if now.saturating_sub(shown) >= SHOW_EVERY {
                shown = now;
                let at = now.saturating_sub(start);
                let sent_bytes = sent_before + sent_bytes;
                observer.event(&Event::Progress {
                    round,
                    at,
                    sent_bytes,
                    remaining_bytes,
                });
            }
            if handle.wants_switch() {
                Tick::Enough
            } else {
                Tick::GoOn
            }
        };
        let mut means = Means {
            cargo: &self.cargo,
            custody,
            memory: &self.memory,
            carrier: &mut self.carrier,
            pace: &self.pace,
            clock,
        };
        let outcome = copying.slice(&mut means, decision, &mut tick);
        if let Some(reason) = stopped {
            return Err(Broke::here(reason));
        }
        if outcome.map_err(carry_broke)? {
            self.close_round(decision, reason)?;
        }
        Ok(())
    }

    /// The other side says that it holds everything that was sent.
    fn close_round(&mut self, decision: &Decision, reason: &str) -> Result<(), Broke> {
        let Some(round) = self.copying.as_ref().map(|copying| copying.round) else {
            return Ok(());
        };
        let frames = self.carrier.frames();
        self.talk.say(&Message::RoundEnd { round, frames })?;
        self.hear_round_held(round)?;
        let (Some(copying), Some(custody)) = (self.copying.as_mut(), self.custody.as_ref()) else {
            return Ok(());
        };
        self.report.checks.frames_checked += copying.frames();
        let mut done = copying.report(&self.cargo, self.start, decision, reason);
        copying
            .round_held(&self.cargo, custody, self.world.clock)
            .map_err(|error| Broke::here(Reason::from(error)))?;
        done.took = copying
            .history
            .rounds
            .last()
            .map_or(done.took, |round| round.time);
        done.rate_bytes_per_sec = crate::copying::rate(done.wire_bytes, done.took);
        self.world
            .observer
            .event(&Event::RoundDone(Box::new(done.clone())));
        self.report.rounds.push(done);
        Ok(())
    }

    fn hear_round_held(&mut self, round: u32) -> Result<(), Broke> {
        match self.hear("RoundEnd", self.options.stall)? {
            Message::RoundHeld { round: held } if held == round => Ok(()),
            other => Err(Broke::unexpected(&other, "RoundEnd")),
        }
    }

    /// Where the other side may hold content from before, names go first, and what it has need not travel.
    fn copy_known(&mut self) -> Result<(), Failure> {
        if self.version < VERSION_WITH_NAMES {
            return Ok(());
        }
        for block in std::mem::take(&mut self.libraries) {
            if let Err(broke) = self.announce(block) {
                self.mend(broke)?;
            }
        }
        Ok(())
    }

    fn announce(&mut self, block: BlockId) -> Result<(), Broke> {
        let Some(at) = self.cargo.iter().position(|cargo| cargo.info.id == block) else {
            return Ok(());
        };
        let (mut asked, mut known) = (0u64, 0u64);
        let batch = NAMES_AT_ONCE;
        let mut unit = 0;
        loop {
            let (Some(cargo), Some(custody), Some(copying)) =
                (self.cargo.get(at), self.custody.as_ref(), self.copying.as_ref())
            else {
                return Ok(());
            };
            let Some((first, count)) = copying
                .remaining()
                .as_slice()
                .get(at)
                .and_then(|s| s.next_run(unit))
            else {
                return Ok(());
            };
            let count = count.min(batch);
            unit = first + count;
            let span = Span {
                block,
                first,
                count: count as u32,
            };
            let data = |error| Broke::here(Reason::from(error));
            custody.take(block, &[span]).map_err(data)?;
            let mut names = Vec::with_capacity(count as usize);
            let mut content = vec![0; cargo.info.unit_bytes() as usize];
            for number in first..first + count {
                let one = Span {
                    block,
                    first: number,
                    count: 1,
                };
                let room = content.get_mut(..cargo.info.span_bytes(one)).unwrap_or_default();
                cargo.source.read(one, room).map_err(data)?;
                names.push(Name::of(room));
            }
            self.talk.say(&Message::Announce { block, first, names })?;
            let wanted = match self.hear("Announce", self.options.stall)? {
                Message::Wanted { units } => units,
                other => return Err(Broke::unexpected(&other, "Announce")),
            };
            let (Some(custody), Some(copying)) = (self.custody.as_ref(), self.copying.as_mut()) else {
                return Ok(());
            };
            let lacks = |at: u64| {
                wanted
                    .get((at / 64) as usize)
                    .is_none_or(|word| word >> (at % 64) & 1 == 1)
            };
            let mut there = UnitSet::empty(self.cargo.get(at).map_or(0, |cargo| cargo.info.units()));
            (0..count)
                .filter(|at| !lacks(*at))
                .for_each(|at| there.insert(first + at));
            custody.delivered(block, &there);
            custody.put_back_owed_of(block);
            asked += count;
            known += there.count();
            copying.known(&self.cargo, at, &there);
            // Hardly anything is there: names only cost time.
            if asked >= 4 * batch && known * 20 < asked {
                return Ok(());
            }
        }
    }

    // ---- The switch: the machine runs nowhere.

    fn pause(&mut self) -> Result<(), Failure> {
        self.enter(Phase::Pause);
        if let Some(reason) = cancelled(self.world.handle) {
            return Err(self.fail(Side::Outgoing, reason));
        }
        // What takes a disk its time is done while the machine still runs.
        if let Some(departure) = self.departure.as_mut() {
            let armed = departure.arm(self.world.ledger);
            self.or_fail(armed)?;
        }
        self.marked = self.world.clock.now();
        let paused = self.world.machine.pause();
        self.or_fail(paused)?;
        let took = self.mark();
        self.report.downtime.pause = took;
        let state = self.world.machine.save();
        self.state = self.or_fail(state)?;
        let took = self.mark();
        self.report.downtime.save_state = took;
        Ok(())
    }

    fn copy_rest(&mut self) -> Result<(), Failure> {
        self.enter(Phase::CopyRest);
        self.in_switch(Self::copy_rest_once)
    }

    fn copy_rest_once(&mut self) -> Result<(), Broke> {
        let clock = self.world.clock;
        let data = |error| Broke::here(Reason::from(error));
        if let Some(copying) = self.copying.as_mut() {
            copying.last_survey(&self.cargo, clock).map_err(data)?;
        }
        let took = self.mark();
        self.report.downtime.last_survey += took;
        let mut round = crate::report::Round {
            start: self.now(),
            decision: "switch".into(),
            reason: "the machine is stopped: everything that is left".into(),
            ..Default::default()
        };
        for kind in [BlockKind::Disk, BlockKind::Memory] {
            let handle = self.world.handle;
            let (Some(copying), Some(custody)) = (self.copying.as_mut(), self.custody.as_ref()) else {
                return Ok(());
            };
            let mut means = Means {
                cargo: &self.cargo,
                custody,
                memory: &self.memory,
                carrier: &mut self.carrier,
                pace: &self.pace,
                clock,
            };
            round.round = copying.round;
            let carried = copying
                .rest(&mut means, kind, &mut || handle.is_cancelled())
                .map_err(|error| match (error, cancelled(handle)) {
                    (CarryError::Stopped, Some(reason)) => Broke::here(reason),
                    (error, _) => carry_broke(error),
                })?;
            round.memory.add(&carried.memory);
            round.disk.add(&carried.disk);
            self.report.checks.frames_checked += carried.frames;
            let took = self.mark();
            match kind {
                BlockKind::Disk => self.report.downtime.last_clusters += took,
                BlockKind::Memory => self.report.downtime.last_pages += took,
            }
        }
        round.wire_bytes = round.memory.wire_bytes + round.disk.wire_bytes;
        round.took = self.now().saturating_sub(round.start);
        round.rate_bytes_per_sec = crate::copying::rate(round.wire_bytes, round.took);
        // The answer is heard after the state was sent: no round trip is waited for here.
        let frames = self.carrier.frames();
        self.talk.say(&Message::RoundEnd {
            round: round.round,
            frames,
        })?;
        self.rest_unheard = true;
        self.report.rounds.push(round);
        Ok(())
    }

    fn verify(&mut self) -> Result<(), Failure> {
        if !self.options.verify {
            return Ok(());
        }
        self.enter(Phase::Verify);
        self.in_switch(|crossing| {
            crossing.talk.say(&Message::Verify)?;
            let ours = crossing
                .names()
                .map_err(|error| Broke::here(Reason::from(error)))?;
            crossing.hear_rest_held()?;
            let theirs = match crossing.hear("Verify", crossing.options.patience)? {
                Message::Hashes { names, .. } => names,
                other => return Err(Broke::unexpected(&other, "Verify")),
            };
            crossing.report.checks.compared = Some(ours == theirs);
            let took = crossing.mark();
            crossing.report.downtime.verify += took;
            if ours != theirs {
                return Err(Broke::For(
                    Side::Incoming,
                    Reason::new(
                        Cause::Damaged,
                        "the memory or disks of both sides differ after copying",
                    ),
                ));
            }
            Ok(())
        })
    }

    /// The hash of every block, in the order of their ids, as the other side makes it.
    fn names(&self) -> Result<Vec<Name>, crate::block::DataError> {
        let mut cargo: Vec<&Cargo> = self.cargo.iter().collect();
        cargo.sort_by_key(|cargo| cargo.info.id);
        cargo
            .iter()
            .map(|cargo| name_of_block(&cargo.info, |span, out| cargo.source.read(span, out)))
            .collect()
    }

    fn send_state(&mut self) -> Result<(), Failure> {
        self.enter(Phase::SendState);
        let released = self.world.machine.release();
        self.or_fail(released)?;
        self.in_switch(|crossing| {
            let mut offset = 0;
            for part in crossing.state.chunks(STATE_PART_BYTES) {
                crossing.talk.say(&Message::StatePart {
                    offset,
                    bytes: part.to_vec(),
                })?;
                offset += part.len() as u64;
            }
            crossing.talk.say(&Message::Load {
                total: offset,
                name: Name::of(&crossing.state),
            })?;
            let took = crossing.mark();
            crossing.report.downtime.send_state += took;
            crossing.hear_rest_held()?;
            match crossing.hear("Load", crossing.options.patience)? {
                Message::Loaded { loaded } => crossing.report.downtime.load_there = loaded,
                other => return Err(Broke::unexpected(&other, "Load")),
            }
            crossing.stage = Stage::Loaded;
            Ok(())
        })?;
        let took = self.mark();
        self.report.downtime.load += took;
        Ok(())
    }

    /// The answer to the last `RoundEnd`, if it was not heard yet.
    fn hear_rest_held(&mut self) -> Result<(), Broke> {
        let Some(round) = self.copying.as_ref().map(|copying| copying.round) else {
            return Ok(());
        };
        if !std::mem::take(&mut self.rest_unheard) {
            return Ok(());
        }
        self.hear_round_held(round)?;
        let (Some(copying), Some(custody)) = (self.copying.as_mut(), self.custody.as_ref()) else {
            return Ok(());
        };
        copying.rest_held(custody);
        Ok(())
    }

    /// A step of the switch. If the link breaks and comes back, what is missing is copied before it is tried
    /// again - unless the other side has already loaded everything.
    fn in_switch(&mut self, mut step: impl FnMut(&mut Self) -> Result<(), Broke>) -> Result<(), Failure> {
        loop {
            let mut broke = match step(self) {
                Ok(()) => return Ok(()),
                Err(broke) => broke,
            };
            loop {
                self.mend(broke)?;
                if self.stage == Stage::Loaded {
                    return Ok(());
                }
                if self.phase == Phase::CopyRest {
                    break;
                }
                match self.copy_rest_once() {
                    Ok(()) => break,
                    Err(again) => broke = again,
                }
            }
        }
    }

    // ---- Hand over: see `handover` for why it is done like this.

    fn hand_over(&mut self) -> Result<(), Failure> {
        self.enter(Phase::HandOver);
        if let Some(reason) = cancelled(self.world.handle) {
            return Err(self.fail(Side::Outgoing, reason));
        }
        let (Some(departure), Some(permit)) = (self.departure.as_mut(), self.permit.take()) else {
            return Err(self.fail(
                Side::Outgoing,
                Reason::new(Cause::Ledger, "there is no permit to give away"),
            ));
        };
        let epoch = departure.epoch();
        if let Err((permit, reason)) = departure.go_ahead(permit) {
            self.permit = Some(permit);
            return Err(self.fail(Side::Outgoing, reason));
        }
        let go = Message::Go {
            session: self.options.session,
            epoch,
        };
        let until = self.world.clock.now() + self.options.doubt_for;
        let mut broke = self.ask_to_run(&go);
        loop {
            broke = match broke {
                Broke::Word { from, taken, why } => {
                    // It runs there, or provably nowhere: the rest is bookkeeping.
                    let took = self.mark();
                    self.report.downtime.resume += took;
                    match self.heard(from, taken, why)? {
                        None => return Ok(()),
                        Some(doubt) => Broke::here(Reason::new(Cause::Link, doubt)),
                    }
                }
                broke if self.world.clock.now() >= until => {
                    let mut failure = self.broke(broke);
                    failure.whereabouts = Whereabouts::Unknown;
                    return Err(failure);
                }
                _ => {
                    self.world.clock.sleep(RETRY_AFTER);
                    self.ask_again_to_run(&go)
                }
            };
        }
    }

    fn ask_to_run(&mut self, go: &Message) -> Broke {
        if let Err(broke) = self.talk.say(go) {
            return broke;
        }
        // Cancelling has no effect any more.
        match self.talk.hear(
            self.world.clock,
            self.options.patience.min(self.options.doubt_for),
            &|| None,
        ) {
            Ok(Message::Running { took }) => {
                self.report.downtime.resume_there = took;
                match self.peer_ledger {
                    Some(from) => Broke::Word {
                        from,
                        taken: true,
                        why: None,
                    },
                    None => Broke::here(Reason::new(Cause::Protocol, "the other side has no ledger")),
                }
            }
            Ok(other) => Broke::unexpected(&other, "Go"),
            Err(broke) => broke,
        }
    }

    /// In doubt: a new connection, and either its word or the go-ahead again.
    fn ask_again_to_run(&mut self, go: &Message) -> Broke {
        if let Err(broke) = self.connect(Purpose::Resume { since: self.sent_in }) {
            return broke;
        }
        match self.talk.hear(self.world.clock, self.options.stall, &|| None) {
            Ok(Message::Holding {
                stage: Stage::Loaded, ..
            }) => self.ask_to_run(go),
            Ok(other) => Broke::unexpected(&other, "Hello"),
            Err(broke) => broke,
        }
    }

    /// `None`: it is there. `Some`: the word proves nothing.
    fn heard(&mut self, from: LedgerId, taken: bool, why: Option<Reason>) -> Result<Option<String>, Failure> {
        let Some(departure) = self.departure.as_mut() else {
            return Ok(None);
        };
        match departure.heard(self.world.ledger, from, taken) {
            Ok(Verdict::Gone) => Ok(None),
            Ok(Verdict::Back(permit)) => {
                self.permit = Some(permit);
                let why = why.map_or_else(String::new, |reason| format!(": {reason}"));
                let reason = format!("the other side did not take the machine{why}");
                Err(self.fail(Side::Incoming, Reason::new(Cause::Declined, reason)))
            }
            Ok(Verdict::InDoubt(doubt)) => Ok(Some(doubt)),
            // It is there, only our own book does not say so yet.
            Err(_) if taken => Ok(None),
            Err(reason) => {
                let mut failure = self.fail(Side::Outgoing, reason);
                failure.whereabouts = Whereabouts::Unknown;
                Err(failure)
            }
        }
    }

    fn finish(&mut self) {
        self.enter(Phase::Finish);
        if let Some(custody) = &self.custody {
            custody.delivered_all();
        }
        self.cargo.iter().for_each(|cargo| cargo.source.stop_tracking());
        let _ = self.talk.say(&Message::Finish);
        self.world.machine.departed();
    }

    // ---- When the link breaks.

    /// Mends the link, or says why not.
    fn mend(&mut self, broke: Broke) -> Result<(), Failure> {
        let mut why = match broke {
            Broke::Link(error) => error,
            broke => return Err(self.broke(broke)),
        };
        let until = self.world.clock.now() + self.options.reconnect_for;
        loop {
            if self.world.clock.now() >= until {
                return Err(self.broke(Broke::Link(why)));
            }
            self.wait_to_retry(&why)?;
            match self.resume_link() {
                Ok(()) => return Ok(()),
                Err(Broke::Link(error)) => why = error,
                Err(broke) => return Err(self.broke(broke)),
            }
        }
    }

    fn wait_to_retry(&mut self, why: &LinkError) -> Result<(), Failure> {
        self.talk.end();
        self.carrier.drop_lanes();
        let attempt = self.attempt + 1;
        self.world.observer.event(&Event::Reconnecting {
            at: self.now(),
            attempt,
            why: why.to_string(),
        });
        // The first try comes at once; a peer that is being restarted gets its time.
        if self.report.reconnects > 0 || why.kind != LinkErrorKind::Closed {
            self.world.clock.sleep(RETRY_AFTER);
        }
        self.report.reconnects += 1;
        match cancelled(self.world.handle) {
            Some(reason) => Err(self.fail(Side::Outgoing, reason)),
            None => Ok(()),
        }
    }

    fn resume_link(&mut self) -> Result<(), Broke> {
        self.connect(Purpose::Resume { since: self.sent_in })?;
        let (stage, frames) = match self.hear("Hello", self.options.stall)? {
            Message::Holding { stage, frames, .. } => (stage, frames),
            other => return Err(Broke::unexpected(&other, "Hello")),
        };
        self.stage = stage;
        self.rest_unheard = false;
        let mut resent = 0;
        if let (Some(copying), Some(custody)) = (self.copying.as_mut(), self.custody.as_ref()) {
            resent = if stage == Stage::Loaded {
                // It holds everything, or it would not have loaded.
                copying.rest_held(custody);
                0
            } else {
                copying
                    .settled(&self.cargo, custody, &frames, self.world.clock)
                    .map_err(|error| Broke::here(Reason::from(error)))?
            };
        }
        self.sent_in = self.attempt;
        self.report.resent_units += resent;
        self.open_lanes()?;
        let (at, attempt) = (self.now(), self.attempt);
        self.world.observer.event(&Event::Reconnected {
            at,
            attempt,
            resent_units: resent,
        });
        Ok(())
    }

    /// Tells the other side, if it can still hear, so that it need not wait.
    fn say_farewell(&mut self, failure: &Failure) {
        let Failure {
            cause,
            phase,
            message,
            ..
        } = failure.clone();
        if self
            .talk
            .say(&Message::Cancel {
                cause,
                phase,
                message,
            })
            .is_ok()
        {
            let _ = self.talk.hear(self.world.clock, FAREWELL, &|| None);
        }
        self.talk.end();
    }

    // ---- Small things.

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
        let handle = self.world.handle;
        self.talk.hear(self.world.clock, within, &|| cancelled(handle))
    }

    fn throttle(&mut self, percent: u8) -> Result<(), Reason> {
        if percent != self.throttled {
            self.world.machine.throttle(percent)?;
            self.throttled = percent;
            self.world.observer.event(&Event::Throttle {
                at: self.now(),
                percent,
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
const SHOW_EVERY: Duration = Duration::from_millis(200);
const RETRY_AFTER: Duration = Duration::from_millis(200);
const FAREWELL: Duration = Duration::from_secs(2);
const NAMES_AT_ONCE: u64 = 1024;

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
