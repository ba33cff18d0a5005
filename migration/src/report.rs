//! Every number shown to anyone: what happens now (events) and what happened (the report).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Phase, Whereabouts};
use crate::handover::{MachineId, SessionId};
use crate::machine::{GuestImpact, Loaded};
use crate::pages::encode::PageCounts;
use crate::policy::VcpuThrottle;

/// Something an observer may want to show.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Event {
    Phase {
        phase: Phase,
        at: Duration,
    },
    /// A round begins: how much it will carry and why so.
    Round {
        round: u32,
        at: Duration,
        pages: u64,
        clusters: u64,
        bytes: u64,
        bandwidth_bytes_per_sec: Option<u64>,
        reason: String,
    },
    /// Several times a second while data is carried: sent so far on the lanes, and what remained to be copied at
    /// the last look.
    Progress {
        round: u32,
        at: Duration,
        sent_bytes: u64,
        remaining_bytes: u64,
        /// Of what remains, on disks.
        #[serde(default)]
        disk_remaining_bytes: u64,
        /// How fast what was copied is written again.
        #[serde(default)]
        dirty_bytes_per_sec: u64,
        /// What is expected of the whole crossing now.
        #[serde(default)]
        promise: Option<Promise>,
    },
    RoundDone(Box<Round>),
    /// The link broke and is being made again.
    Reconnecting {
        at: Duration,
        attempt: u32,
        why: String,
    },
    Reconnected {
        at: Duration,
        attempt: u32,
        resent_units: u64,
    },
    Throttle {
        at: Duration,
        percent: u8,
        /// Those that are slowed, and by how much; empty: all, by `percent`.
        #[serde(default)]
        vcpus: Vec<VcpuThrottle>,
    },
    Ended {
        at: Duration,
        outcome: Outcome,
    },
}

/// One round, as measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    pub round: u32,
    /// Since the crossing began.
    pub start: Duration,
    pub took: Duration,
    /// Of `took`: finding out what changed.
    pub survey: Duration,
    pub memory: PageCounts,
    pub disk: PageCounts,
    pub wire_bytes: u64,
    /// What the policy asked for; none: all there is.
    pub bandwidth_bytes_per_sec: Option<u64>,
    /// What was reached.
    pub rate_bytes_per_sec: u64,
    /// What was found changed when the round had ended.
    pub dirty_pages: u64,
    pub dirty_clusters: u64,
    /// What remained to be copied then.
    #[serde(default)]
    pub remaining_bytes: u64,
    /// Units the policy held back for the switch.
    pub held_back_units: u64,
    pub decision: String,
    pub reason: String,
    /// What was expected of the whole crossing at this point, once the link had been seen.
    #[serde(default)]
    pub promise: Option<Promise>,
    pub throttle_percent: u8,
    /// The vCPUs that were slowed, and by how much; empty: all, by `throttle_percent`.
    #[serde(default)]
    pub throttled_vcpus: Vec<VcpuThrottle>,
}

impl Round {
    /// Makes the next round a part of this one.
    pub(crate) fn absorb(&mut self, next: &Round) {
        let Round {
            round: _,
            start: _,
            took,
            survey,
            memory,
            disk,
            wire_bytes,
            bandwidth_bytes_per_sec,
            rate_bytes_per_sec: _,
            dirty_pages,
            dirty_clusters,
            remaining_bytes,
            held_back_units,
            decision,
            reason,
            promise,
            throttle_percent,
            throttled_vcpus,
        } = next.clone();
        self.took += took;
        self.survey += survey;
        self.memory.add(&memory);
        self.disk.add(&disk);
        self.wire_bytes += wire_bytes;
        self.rate_bytes_per_sec = crate::copying::rate(self.wire_bytes, self.took);
        (self.dirty_pages, self.dirty_clusters) = (dirty_pages, dirty_clusters);
        self.remaining_bytes = remaining_bytes;
        (self.held_back_units, self.throttle_percent) = (held_back_units, throttle_percent);
        self.throttled_vcpus = throttled_vcpus;
        (self.decision, self.reason) = (decision, reason);
        self.bandwidth_bytes_per_sec = bandwidth_bytes_per_sec;
        self.promise = promise.or(self.promise.take());
    }
}

/// A moment of the copying, for plots: rounds can be few and long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// Since the crossing began.
    pub at: Duration,
    /// On the wire so far.
    pub wire_bytes: u64,
    pub remaining_bytes: u64,
    /// How fast what was copied is written again.
    pub dirty_bytes_per_sec: u64,
}

/// Moments at even distances, however long the crossing takes: when there are too many, every second one goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Timeline {
    moments: Vec<Moment>,
    spacing: Duration,
}

impl Timeline {
    const MOST: usize = 400;

    pub(crate) fn new() -> Self {
        Timeline {
            moments: Vec::new(),
            spacing: Duration::from_millis(50),
        }
    }

    pub(crate) fn note(&mut self, moment: Moment) {
        let since = |last: &Moment| moment.at.saturating_sub(last.at);
        if self.moments.last().is_some_and(|last| since(last) < self.spacing) {
            return;
        }
        self.moments.push(moment);
        if self.moments.len() >= Self::MOST {
            let mut keep = false;
            self.moments.retain(|_| {
                keep = !keep;
                keep
            });
            self.spacing *= 2;
        }
    }

    pub(crate) fn take(&mut self) -> Vec<Moment> {
        std::mem::take(&mut self.moments)
    }
}

/// The switch, cut into consecutive parts: they add up to the total because each begins where the one before ended.
/// All are measured on the outgoing side's clock except the end of the last one, the moment in which the guest runs
/// again: the outgoing side only hears of it. Of the time between the go-ahead and the answer, the other side says by
/// its own clock how much passed before the guest ran and how much after; of what is left, the way there and back, half
/// is the go-ahead's. So no clocks are compared. What follows that moment is in `answer` and not in the total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Downtime {
    /// vCPUs and devices stopped, disks flushed.
    pub pause: Duration,
    pub save_state: Duration,
    pub last_survey: Duration,
    pub last_clusters: Duration,
    pub last_pages: Duration,
    pub verify: Duration,
    /// The state sent, locks and network place given up.
    pub send_state: Duration,
    /// The other side holds everything and has loaded the state.
    pub load: Duration,
    /// The go-ahead on its way, written down there, and the machine started: until the guest runs.
    pub resume: Duration,
    pub total: Duration,
    /// Of `load`, by the other side's clock.
    pub load_there: Loaded,
    /// Of `resume`, by the other side's clock.
    pub resume_there: Duration,
    /// Not downtime: from the guest's first instruction there until its word was heard here.
    #[serde(default)]
    pub answer: Duration,
}

/// What the incoming side says of the hand over, by its own clock, since the go-ahead came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    pub until_running: Duration,
    pub until_answer: Duration,
}

impl Woken {
    /// Cuts the time between go-ahead and answer, as measured here, into what was downtime and what was not.
    pub(crate) fn cut(&self, heard_after: Duration) -> (Duration, Duration) {
        let there = self.until_answer.max(self.until_running).min(heard_after);
        let way = (heard_after - there) / 2;
        let resume = self.until_running.saturating_add(way).min(heard_after);
        (resume, heard_after - resume)
    }
}

impl Downtime {
    /// The parts, in order, by name.
    pub fn parts(&self) -> [(&'static str, Duration); 9] {
        let Downtime {
            pause,
            save_state,
            last_survey,
            last_clusters,
            last_pages,
            verify,
            send_state,
            load,
            resume,
            total: _,
            load_there: _,
            resume_there: _,
            answer: _,
        } = *self;
        [
            ("pause", pause),
            ("save state", save_state),
            ("last survey", last_survey),
            ("last clusters", last_clusters),
            ("last pages", last_pages),
            ("verify", verify),
            ("send state", send_state),
            ("load", load),
            ("resume", resume),
        ]
    }
}

/// What is expected of a whole crossing, or what became of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    /// When it was said, since the crossing began; zero: before anything was copied.
    #[serde(default)]
    pub at: Duration,
    pub total: Duration,
    pub downtime: Duration,
    pub wire_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    pub whereabouts: Whereabouts,
    /// Why, if it did not go as asked.
    pub failure: Option<Failure>,
}

impl Outcome {
    /// The last line a person reads.
    pub fn sentence(&self) -> String {
        match (&self.failure, self.whereabouts) {
            (Some(failure), _) => failure.to_string(),
            (None, Whereabouts::There) => "the machine is at the other side".into(),
            (None, Whereabouts::Here) => "the machine is here".into(),
            (None, Whereabouts::Ended) => "the machine has ended here and runs nowhere".into(),
            (None, Whereabouts::Unknown) => "nobody knows where the machine is".into(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Checks {
    /// Every frame carried a CRC32C that was checked on arrival.
    pub frames_checked: u64,
    /// All memory and disks were compared by BLAKE3 inside the switch.
    pub compared: Option<bool>,
}

/// How the machine wrote and what the link carried while it was copied: enough to play the crossing again with another
/// policy.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Conduct {
    pub policy: String,
    /// As stated or measured, and no more than was allowed. None: nothing ever showed it.
    pub link_bytes_per_sec: Option<u64>,
    /// What the service in the machine used of the link, at the end of the copying; none: nobody counted.
    pub service_bytes_per_sec: Option<u64>,
    pub memory: Wrote,
    /// All disks together.
    pub disk: Wrote,
}

/// How pages or clusters were written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Wrote {
    pub bytes: u64,
    /// What had to cross at least once.
    pub first_bytes: u64,
    /// By how often they are written, where the policy counts that; empty: the rounds are all that is known.
    pub groups: Vec<Group>,
}

/// Units that are written about equally often.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub bytes: u64,
    /// To each unit.
    pub writes_per_sec: f64,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub session: SessionId,
    pub machine: Option<MachineId>,
    pub name: String,
    pub outcome: Outcome,
    /// The first one: from before the move where the machine was watched, else from the first look at the link.
    pub promise: Option<Promise>,
    /// What became of it: the same numbers as measured, at the end.
    #[serde(default)]
    pub fact: Promise,
    pub total: Duration,
    /// From the beginning to the first byte of data: negotiating and preparing.
    pub prepare: Duration,
    pub downtime: Downtime,
    pub rounds: Vec<Round>,
    pub memory: PageCounts,
    pub disk: PageCounts,
    /// Everything on the lanes.
    pub wire_bytes: u64,
    pub lanes: u16,
    pub reconnects: u32,
    pub resent_units: u64,
    pub impact: GuestImpact,
    /// How far the guest's clock fell behind the wall clock over the switch, as the incoming side measured it when it
    /// loaded the state. None: it could not be measured there.
    #[serde(default)]
    pub clock_behind: Option<Duration>,
    pub checks: Checks,
    #[serde(default)]
    pub timeline: Vec<Moment>,
    /// None: nothing was copied.
    #[serde(default)]
    pub conduct: Option<Conduct>,
    /// What a client saw, if one asked all the time.
    #[serde(default)]
    pub probe: Option<Probe>,
}

/// What somebody saw who kept asking a service of the machine, before, during and after the switch.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    pub target: String,
    pub period: Duration,
    pub sent: u64,
    pub answered: u64,
    pub lost: u64,
    /// The longest time without the arrival of an answer, and when that began, since the crossing began.
    pub longest_silence: Duration,
    pub silence_began: Duration,
    /// The longest run of questions without an answer: the service was away for at least and at most so long.
    pub outage: Option<ProbeOutage>,
    pub latency_median: Option<Duration>,
    pub latency_99: Option<Duration>,
    pub latency_max: Option<Duration>,
    pub first_failure: Option<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbeOutage {
    pub lost: u64,
    /// Since the crossing began.
    pub began: Duration,
    pub at_least: Duration,
    /// None: it had not ended when the asking did.
    pub at_most: Option<Duration>,
}

impl Report {
    /// Adds the rounds up; the report's totals are made here and nowhere else.
    pub(crate) fn total_up(&mut self) {
        self.memory = PageCounts::default();
        self.disk = PageCounts::default();
        for round in &self.rounds {
            self.memory.add(&round.memory);
            self.disk.add(&round.disk);
        }
        self.wire_bytes = self.rounds.iter().map(|round| round.wire_bytes).sum();
        self.fact = Promise {
            at: self.total,
            total: self.total,
            downtime: self.downtime.total,
            wire_bytes: self.wire_bytes,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    /// The outgoing side hears of the guest's first instruction later than it happens. What passes after it is no
    /// downtime, and nothing is lost or counted twice.
    #[test]
    fn the_answers_way_back_is_no_downtime() {
        let woken = Woken {
            until_running: MS(3),
            until_answer: MS(12),
        };
        assert_eq!(woken.cut(MS(16)), (MS(5), MS(11)));
        // Clocks that run differently, and a peer that says what cannot be.
        for (until_running, until_answer) in [(0, 0), (30, 5), (5, 30), (40, 50), (16, 16)] {
            let woken = Woken {
                until_running: MS(until_running),
                until_answer: MS(until_answer),
            };
            let (resume, answer) = woken.cut(MS(16));
            assert_eq!(resume + answer, MS(16), "{woken:?}");
        }
        let far = Woken {
            until_running: Duration::MAX,
            until_answer: Duration::MAX,
        };
        assert_eq!(far.cut(MS(16)), (MS(16), Duration::ZERO));
    }

    /// A crossing of days has a timeline of the same length as one of a minute, evenly spread.
    #[test]
    fn a_timeline_does_not_grow_without_end() {
        let mut timeline = Timeline::new();
        for tenth in 0..1_000_000u64 {
            timeline.note(Moment {
                at: MS(tenth * 100),
                wire_bytes: tenth,
                ..Moment::default()
            });
        }
        let moments = timeline.take();
        assert!(
            (Timeline::MOST / 2 - 1..Timeline::MOST).contains(&moments.len()),
            "{}",
            moments.len()
        );
        assert_eq!(moments.first().map(|moment| moment.at), Some(Duration::ZERO));
        assert!(moments.is_sorted_by_key(|moment| moment.at));
        assert!(moments.last().is_some_and(|last| last.at > MS(99_000_000)));
    }
}
