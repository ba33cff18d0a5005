//! Every number shown to anyone: what happens now (events) and what happened (the report).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::failure::{Failure, Phase, Whereabouts};
use crate::handover::{MachineId, SessionId};
use crate::machine::{GuestImpact, Loaded};
use crate::pages::encode::PageCounts;

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
    /// Units the policy held back for the switch.
    pub held_back_units: u64,
    pub decision: String,
    pub reason: String,
    /// What the policy expected at this point, if it said.
    pub predicted_downtime: Option<Duration>,
    pub throttle_percent: u8,
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
            held_back_units,
            decision,
            reason,
            predicted_downtime,
            throttle_percent,
        } = next.clone();
        self.took += took;
        self.survey += survey;
        self.memory.add(&memory);
        self.disk.add(&disk);
        self.wire_bytes += wire_bytes;
        self.rate_bytes_per_sec = crate::copying::rate(self.wire_bytes, self.took);
        (self.dirty_pages, self.dirty_clusters) = (dirty_pages, dirty_clusters);
        (self.held_back_units, self.throttle_percent) = (held_back_units, throttle_percent);
        (self.decision, self.reason) = (decision, reason);
        (self.bandwidth_bytes_per_sec, self.predicted_downtime) =
            (bandwidth_bytes_per_sec, predicted_downtime);
    }
}

/// The switch, cut into consecutive parts that are measured one behind the other on the outgoing side's clock:
/// they add up to the total because each begins where the one before ended.
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
    /// The go-ahead written down and sent, the machine started there, and its word received.
    pub resume: Duration,
    pub total: Duration,
    /// Of `load`, by the other side's clock.
    pub load_there: Loaded,
    /// Of `resume`, by the other side's clock.
    pub resume_there: Duration,
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

/// What was said before the move.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Promise {
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

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    pub session: SessionId,
    pub machine: Option<MachineId>,
    pub name: String,
    pub outcome: Outcome,
    pub promise: Option<Promise>,
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
    pub checks: Checks,
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
    }
}
