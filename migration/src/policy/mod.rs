//! Policies: how fast to copy next, what to copy first, and when to stop the machine and switch.
//!
//! A policy is a pure function from what is known to what to do. The engine, the simulator and a replayed
//! trace call the same [`decide`]. It may be asked before every slice of a round (some 100 ms) and must be
//! asked at the end of every round; a policy that only thinks in rounds repeats itself in between.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cost::Cost;

mod calm_adaptive;
mod calm_fixed;
mod calm_live;
mod cloud_hypervisor;
mod fixed;
pub mod heat;
pub mod plan;
mod qemu;
pub mod reason;
mod registry;
pub mod stall;
#[cfg(test)]
mod tests;
pub mod throttle;
mod virtualbox;
mod xen;

pub use heat::{Group, Heat};
pub use reason::Reason;
pub use registry::{ALL, About, Policy, PolicyError};
pub use throttle::{Throttle, VcpuThrottle};

/// "All the link gives": a bandwidth nobody reaches.
pub const UNLIMITED: u64 = u64::MAX;

/// The smallest bandwidth a decision may ask for: below it a round would never end.
pub const LEAST_BANDWIDTH_BYTES_PER_SEC: u64 = 4096;

/// One pass over what had changed, finished or going on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// How long it took, or has been going on.
    pub time: Duration,
    /// What it had to copy when it began.
    pub planned_bytes: u64,
    /// How much of the blocks it copied (pages and clusters at their full size).
    pub copied_bytes: u64,
    /// What that was on the wire.
    pub wire_bytes: u64,
    /// What the machine had written meanwhile: what the next round has to copy.
    pub dirty_bytes: u64,
    /// The bandwidth that was commanded for it, last.
    pub bandwidth_bytes_per_sec: u64,
}

/// What happened in one slice of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// When it ended, since the copying began.
    pub at: Duration,
    pub time: Duration,
    pub copied_bytes: u64,
    pub wire_bytes: u64,
    /// What was clean (sent, or taken to be sent) and was written in it.
    pub dirtied_bytes: u64,
    /// What would have to be copied at its end.
    pub remaining_bytes: u64,
    pub bandwidth_bytes_per_sec: u64,
    /// Whether the pacer held the data back; if not, the link (or the program) was the limit.
    pub paced: bool,
    /// The throttle that was in force.
    pub throttle_percent: u8,
    /// What the service used of the link; 0 if nobody counts.
    pub service_bytes_per_sec: f64,
}

/// How much of the link the service in the machine uses itself, as counted at its network device.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServiceUse {
    /// Averaged over the last seconds.
    pub bytes_per_sec: f64,
    /// Requests that arrive, where they can be counted; the SLA's rate stands in where not.
    pub requests_per_sec: Option<f64>,
    /// Whether the service's packets go before the crossing's on this link (the crossing's data has a lower
    /// priority at the queue, or the pacer looks at the machine's own traffic every few milliseconds). If so,
    /// what the service leaves idle costs it nothing but this much of delay.
    pub goes_first: Option<Duration>,
}

/// How much of memory one vCPU makes dirty, where it is known.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuWrites {
    pub vcpu: u32,
    pub bytes_per_sec: f64,
    /// How much it was slowed then.
    #[serde(default)]
    pub throttle_percent: u8,
}

/// What is known when a decision is due.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// Since the copying began.
    pub elapsed: Duration,
    /// Whether a round has just ended (or none has begun): a survey was made, and `remaining_bytes` is exact.
    pub between_rounds: bool,
    /// What has to cross at least once.
    pub total_bytes: u64,
    /// What would have to be copied if the machine stopped now, as of the last survey.
    pub remaining_bytes: u64,
    /// The rounds that are finished.
    pub rounds: Vec<Round>,
    /// The round going on; all zero before the first.
    pub round: Round,
    /// The last slices, oldest first; the engine keeps at least the last 100.
    pub samples: Vec<Sample>,
    /// Pages and clusters by how often they are written, coldest first. Empty if nobody counts.
    pub groups: Vec<Group>,
    /// What the link carried when nothing held the data back, lately. `None` until it was seen.
    pub link_bytes_per_sec: Option<f64>,
    /// The fastest it went while a limit held the data back, since the link itself was seen last: the link carries at
    /// least that.
    pub carried_bytes_per_sec: Option<f64>,
    pub service: Option<ServiceUse>,
    /// What the switch takes apart from copying the rest: pausing, device state, verifying, resuming.
    pub switch_fixed: Duration,
    /// For how long decisions have said `waiting`, all in all.
    pub waited: Duration,
    /// The throttle in force.
    pub throttle_percent: u8,
    /// Which vCPUs write; empty if that is not known well enough to be believed.
    pub vcpus: Vec<VcpuWrites>,
    /// How much of `remaining_bytes` is on disks, and how fast the machine writes there.
    pub disk_remaining_bytes: u64,
    pub disk_dirty_bytes_per_sec: f64,
}

/// What to do when the deadline has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeadlineAction {
    /// Give up; the machine goes on here.
    #[default]
    Cancel,
    /// Stop the machine and copy the rest, however long that takes.
    PauseAndFinish,
    /// Copy on as if there were no deadline.
    GoOn,
}

/// What the user allows and wants. What is left away takes its default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    pub policy: Policy,
    /// The capacity of the link as the user states it; `None`: as measured.
    pub link_bytes_per_sec: Option<u64>,
    /// No decision asks for more (if there is a cap) or less than these.
    pub least_bandwidth_bytes_per_sec: u64,
    pub most_bandwidth_bytes_per_sec: Option<u64>,
    /// The longest downtime the user accepts; policies that have a downtime rule use it.
    pub downtime: Duration,
    /// Whether `downtime` is a contract that must hold (`calm-live` then never switches above it by choice).
    pub downtime_is_contract: bool,
    pub deadline: Option<Duration>,
    pub on_deadline: DeadlineAction,
    /// What a bandwidth costs the services in the machine.
    pub cost: Cost,
    /// The price of a second of crossing, in seconds of outage.
    pub time_price: f64,
    /// The most a policy may slow the vCPUs; 0 forbids throttling.
    pub most_throttle_percent: u8,
    /// The rate at which one page is written, for the policies that take it as given (CALM's lambda = -ln(1-p));
    /// `None`: estimated from the history.
    pub page_write_rate_per_sec: Option<f64>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            policy: Policy::CalmLive,
            link_bytes_per_sec: None,
            least_bandwidth_bytes_per_sec: LEAST_BANDWIDTH_BYTES_PER_SEC,
            most_bandwidth_bytes_per_sec: None,
            downtime: Duration::from_millis(300),
            downtime_is_contract: false,
            deadline: None,
            on_deadline: DeadlineAction::Cancel,
            cost: Cost::unknown(),
            time_price: 0.01,
            most_throttle_percent: 0,
            page_write_rate_per_sec: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Copy on, as the rest of the decision says.
    GoOn,
    /// Stop the machine, copy the rest with all the link, and hand over.
    Switch,
    /// End the crossing; the machine goes on here.
    GiveUp,
}

/// In which order a round's pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// As they lie in the blocks.
    Address,
    /// Least written first, over all blocks.
    ColdestFirst,
}

/// What to do until the next question.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    pub action: Action,
    /// For all lanes together, on the wire; `UNLIMITED` is all the link gives.
    pub bandwidth_bytes_per_sec: u64,
    /// Within that bandwidth the service's own traffic goes first: the crossing takes what it leaves idle.
    pub yield_to_service: bool,
    pub order: Order,
    /// Groups from this one on (as numbered in `History::groups`) wait; `usize::MAX`: none waits.
    pub hold_back_from: usize,
    /// Survey before the next slice and copy from what is dirty then, instead of finishing the round's plan.
    pub fresh: bool,
    /// Stopping would pay already; this decision waits for a better moment. The engine adds up the time.
    pub waiting: bool,
    /// Ask again after this long, or at the end of the round.
    pub ask_again: Duration,
    pub throttle: Throttle,
    /// Limit the guest's disk writes (all disks together); `None`: no limit.
    pub slow_writes_bytes_per_sec: Option<u64>,
}

impl Decision {
    /// Copy on, round by round, at this bandwidth.
    pub fn go_on(bandwidth_bytes_per_sec: u64) -> Self {
        Decision {
            action: Action::GoOn,
            bandwidth_bytes_per_sec,
            yield_to_service: false,
            order: Order::Address,
            hold_back_from: usize::MAX,
            fresh: false,
            waiting: false,
            ask_again: Duration::from_millis(100),
            throttle: Throttle::default(),
            slow_writes_bytes_per_sec: None,
        }
    }

    pub fn switch() -> Self {
        Decision {
            action: Action::Switch,
            ..Decision::go_on(UNLIMITED)
        }
    }

    pub fn give_up() -> Self {
        Decision {
            action: Action::GiveUp,
            ..Decision::go_on(UNLIMITED)
        }
    }
}

/// What to do now, and why. Never leaves the limits: see [`Limits::clamp`].
pub fn decide(history: &History, limits: &Limits) -> (Decision, Reason) {
    let (mut decision, reason) =
        registry::deadline(history, limits).unwrap_or_else(|| limits.policy.decide(history, limits));
    decision.bandwidth_bytes_per_sec = limits.clamp(decision.bandwidth_bytes_per_sec);
    // However a policy comes to slow the machine, it is done where it helps.
    let percent = limits.clamp_throttle(decision.throttle.percent);
    decision.throttle = throttle::spread(percent, history, limits.most_throttle_percent);
    (decision, reason)
}

impl History {
    /// Nothing held the data back, and this is what the link is now taken to carry. What was concluded under limits before
    /// is out of date.
    pub fn saw_link(&mut self, rate: f64) {
        self.link_bytes_per_sec = Some(rate);
        self.carried_bytes_per_sec = None;
    }

    /// A slice went at `rate` while this decision held it back. Only one that came near its limit says something of the
    /// link; what buffers took at once above it was not carried.
    pub fn saw_under_limit(&mut self, rate: f64, decision: &Decision) {
        let limit = decision.bandwidth_bytes_per_sec as f64;
        if rate >= 0.9 * limit {
            let known = self.carried_bytes_per_sec.unwrap_or(0.0);
            self.carried_bytes_per_sec = Some(rate.min(limit).max(known));
        }
    }

    /// Wire bytes per copied byte, lately: what zero pages and compression make of the data.
    pub fn wire_ratio(&self) -> f64 {
        let (copied, wire) = self
            .samples
            .iter()
            .rev()
            .take(50)
            .fold((0, 0), |sum, s| (sum.0 + s.copied_bytes, sum.1 + s.wire_bytes));
        if copied == 0 {
            return 1.0;
        }
        (wire as f64 / copied as f64).max(1e-3)
    }

    /// How fast clean bytes get dirty now: as seen in the last second, or three where hardly any did; what the
    /// groups foretell before that much was seen.
    pub fn dirty_bytes_per_sec(&self) -> f64 {
        const ENOUGH_BYTES: u64 = 400 * 4096;
        let (mut bytes, mut secs) = (0, 0.0);
        for sample in self.samples.iter().rev() {
            bytes += sample.dirtied_bytes;
            secs += sample.time.as_secs_f64();
            if secs >= 3.0 || (secs >= 1.0 && bytes >= ENOUGH_BYTES) {
                break;
            }
        }
        if secs >= 1.0 {
            return bytes as f64 / secs;
        }
        let flow: f64 = self.groups.iter().map(|g| g.dirty_bytes_per_sec()).sum();
        if flow.is_finite() { flow.max(0.0) } else { 0.0 }
    }

    /// The rate at which one page is written, averaged over all pages.
    pub fn page_write_rate_per_sec(&self) -> Option<f64> {
        let bytes: f64 = self.groups.iter().map(|g| g.bytes as f64).sum();
        if bytes > 0.0 && !self.samples.is_empty() {
            let writes: f64 = self
                .groups
                .iter()
                .map(|g| g.bytes as f64 * g.writes_per_sec)
                .sum();
            return Some(writes / bytes).filter(|rate| rate.is_finite() && *rate >= 0.0);
        }
        let last = self.rounds.last()?;
        let fraction = last.dirty_bytes as f64 / self.total_bytes.max(1) as f64;
        let secs = last.time.as_secs_f64();
        (secs > 0.0).then(|| -(1.0 - fraction.min(0.999_999)).ln() / secs)
    }
}

impl Limits {
    /// What the link carries: as stated, less if less was measured; what it surely carries where a limit never lets it
    /// show more; `None` if nothing is known yet.
    pub fn link(&self, history: &History) -> Option<f64> {
        let sane = |rate: &f64| rate.is_finite() && *rate >= 1.0;
        let measured = history.link_bytes_per_sec.filter(sane);
        let carried = history.carried_bytes_per_sec.filter(sane);
        let seen = match (measured, carried) {
            (Some(measured), Some(carried)) => Some(measured.max(carried)),
            _ => measured.or(carried),
        };
        match (self.link_bytes_per_sec, measured) {
            (Some(stated), Some(_)) => seen.map(|seen| seen.min(stated.max(1) as f64)),
            (Some(stated), None) => Some(stated.max(1) as f64),
            (None, _) => seen,
        }
    }

    /// The most of this that is allowed; nobody is stopped altogether.
    pub fn clamp_throttle(&self, percent: u8) -> u8 {
        percent.min(99).min(self.most_throttle_percent)
    }

    /// Forces a bandwidth into the limits: at least the least, at most the cap and a stated link.
    pub fn clamp(&self, bandwidth_bytes_per_sec: u64) -> u64 {
        let most = self
            .most_bandwidth_bytes_per_sec
            .unwrap_or(UNLIMITED)
            .min(self.link_bytes_per_sec.unwrap_or(UNLIMITED));
        let least = self
            .least_bandwidth_bytes_per_sec
            .max(LEAST_BANDWIDTH_BYTES_PER_SEC)
            .min(most);
        bandwidth_bytes_per_sec.clamp(least, most)
    }
}
