//! Why a policy decided as it did: one sentence for people, one tagged record for traces.

use serde::{Deserialize, Serialize};

/// The cost of a step that gains nothing; finite, so that a trace can hold it.
pub(super) const GAINS_NOTHING_SECS: f64 = 1e6;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "kebab-case")]
pub enum Reason {
    /// The first pass copies everything.
    FirstRound {
        bandwidth_bytes_per_sec: f64,
    },
    /// The bandwidth was given.
    Given {
        bandwidth_bytes_per_sec: f64,
    },
    /// There is no bandwidth rule: all the link gives.
    FullSpeed,
    /// The dirtying rate plus an increment.
    AboveDirtyRate {
        dirty_bytes_per_sec: f64,
        increment_bytes_per_sec: f64,
        bandwidth_bytes_per_sec: f64,
    },
    /// Nothing, or less than a threshold, is left to copy.
    LittleLeft {
        remaining_bytes: u64,
        threshold_bytes: u64,
    },
    /// The rule asks for more than the link (or the maximum) gives.
    BeyondTheLink {
        wanted_bytes_per_sec: f64,
        most_bytes_per_sec: f64,
    },
    /// The rounds grow at full speed.
    RoundsGrow {
        last_bytes: u64,
        before_bytes: u64,
    },
    RoundsUsedUp {
        rounds: usize,
        most: usize,
    },
    SentTooMuch {
        sent_bytes: u64,
        most_bytes: u64,
    },
    /// The rest fits into the downtime.
    DowntimeFits {
        remaining_bytes: u64,
        bandwidth_bytes_per_sec: f64,
        downtime_secs: f64,
        limit_secs: f64,
    },
    DowntimeTooLong {
        remaining_bytes: u64,
        bandwidth_bytes_per_sec: f64,
        downtime_secs: f64,
        limit_secs: f64,
    },
    /// VirtualBox: the dirty counts still fall.
    VoteUnsteady {
        now_units: u64,
        short_units: u64,
        long_units: u64,
    },
    /// VirtualBox: steady, but too much for the allowed downtime.
    VoteTooLong {
        short_secs: f64,
        long_secs: f64,
    },
    VotePassed {
        short_secs: f64,
        long_secs: f64,
    },
    VoteFew {
        short_units: u64,
        long_units: u64,
    },
    /// The guest writes faster than the copy; its vCPUs are slowed.
    Throttle {
        percent: u8,
        dirty_bytes_per_sec: f64,
        bandwidth_bytes_per_sec: f64,
    },
    /// A plan made from the page write rate: so many bytes clean at this bandwidth, then stop.
    Plan {
        clean_bytes: f64,
        planned_bytes: f64,
        bandwidth_bytes_per_sec: f64,
    },
    PlanReached {
        clean_bytes: f64,
        planned_bytes: f64,
    },
    /// One more page costs less than copying it in the switch.
    StepPays {
        bandwidth_bytes_per_sec: f64,
        dirty_bytes_per_sec: f64,
        late: f64,
        step_cost_secs: f64,
        stop_cost_secs: f64,
    },
    StepCostsMore {
        step_cost_secs: f64,
        stop_cost_secs: f64,
    },
    /// The service leaves this much of the link idle.
    TakeWhatIsIdle {
        bandwidth_bytes_per_sec: f64,
        service_bytes_per_sec: f64,
        dirty_bytes_per_sec: f64,
    },
    /// Stopping pays now, but what is written changes over time: a better moment is worth waiting for.
    WaitForALull {
        remaining_bytes: u64,
        least_bytes: u64,
        waited_secs: f64,
        patience_secs: f64,
    },
    /// The promise of downtime does not hold yet; it is worth more than the cost.
    ContractFirst {
        downtime_secs: f64,
        limit_secs: f64,
        bandwidth_bytes_per_sec: f64,
    },
    /// The promise of downtime cannot hold.
    ContractUnreachable {
        dirty_bytes_per_sec: f64,
        bandwidth_bytes_per_sec: f64,
        limit_secs: f64,
    },
    /// The deadline is near: faster than is cheapest.
    Hurry {
        left_secs: f64,
        bandwidth_bytes_per_sec: f64,
    },
    Deadline {
        elapsed_secs: f64,
        limit_secs: f64,
    },
    /// The link is interrupted.
    LinkSilent,
    /// Nothing is known of the link yet.
    Unmeasured,
}

/// A bandwidth as people say it.
pub fn rate(bytes_per_sec: f64) -> String {
    let bits = bytes_per_sec * 8.0;
    match bits {
        b if b >= 1e18 => "all the link gives".into(),
        b if b >= 1e10 => format!("{:.1} Gbit/s", b / 1e9),
        b if b >= 1e6 => format!("{:.1} Mbit/s", b / 1e6),
        b => format!("{:.1} kbit/s", b / 1e3),
    }
}

/// An amount as people say it.
pub fn size(bytes: f64) -> String {
    match bytes {
        b if b >= 1024f64.powi(3) => format!("{:.2} GiB", b / 1024f64.powi(3)),
        b if b >= 1024f64.powi(2) => format!("{:.1} MiB", b / 1024f64.powi(2)),
        b => format!("{:.0} KiB", b / 1024.0),
    }
}

/// A time as people say it.
pub fn time(secs: f64) -> String {
    match secs {
        s if !s.is_finite() => "for ever".into(),
        s if s >= 1.0 => format!("{s:.1} s"),
        s if s >= 0.001 => format!("{:.1} ms", s * 1e3),
        s if s >= 0.05e-6 => format!("{:.1} us", s * 1e6),
        _ => "nothing".into(),
    }
}

/// A part of a whole as people say it. What rounding leaves of nothing is none.
pub fn part(value: f64) -> String {
    match value * 100.0 {
        p if !p.is_finite() => "an unknown part".into(),
        p if p >= 99.95 => "all".into(),
        p if p >= 0.095 => format!("{p:.1} %"),
        p if p >= 0.0005 => format!("{p:.3} %"),
        _ => "none".into(),
    }
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Reason::FirstRound {
                bandwidth_bytes_per_sec,
            } => {
                write!(
                    f,
                    "the first round copies everything at {}",
                    rate(*bandwidth_bytes_per_sec)
                )
            }
            Reason::Given {
                bandwidth_bytes_per_sec,
            } => {
                write!(f, "the bandwidth was set to {}", rate(*bandwidth_bytes_per_sec))
            }
            Reason::FullSpeed => write!(f, "this policy copies as fast as the link goes"),
            Reason::AboveDirtyRate {
                dirty_bytes_per_sec,
                increment_bytes_per_sec,
                bandwidth_bytes_per_sec,
            } => write!(
                f,
                "the machine writes {} and {} more is {}",
                rate(*dirty_bytes_per_sec),
                rate(*increment_bytes_per_sec),
                rate(*bandwidth_bytes_per_sec)
            ),
            Reason::LittleLeft {
                remaining_bytes: 0, ..
            } => write!(f, "nothing is left to copy"),
            Reason::LittleLeft {
                remaining_bytes,
                threshold_bytes,
            } => write!(
                f,
                "{} are left, not more than {}",
                size(*remaining_bytes as f64),
                size(*threshold_bytes as f64)
            ),
            Reason::BeyondTheLink {
                wanted_bytes_per_sec,
                most_bytes_per_sec,
            } => write!(
                f,
                "the rule asks for {} and there are only {}",
                rate(*wanted_bytes_per_sec),
                rate(*most_bytes_per_sec)
            ),
            Reason::RoundsGrow {
                last_bytes,
                before_bytes,
            } => write!(
                f,
                "the last round copied {} and the one before {}, at the highest rate",
                size(*last_bytes as f64),
                size(*before_bytes as f64)
            ),
            Reason::RoundsUsedUp { rounds, most } => {
                write!(f, "{rounds} rounds are done and {most} are allowed")
            }
            Reason::SentTooMuch {
                sent_bytes,
                most_bytes,
            } => write!(
                f,
                "{} were sent and {} are allowed",
                size(*sent_bytes as f64),
                size(*most_bytes as f64)
            ),
            Reason::DowntimeFits {
                remaining_bytes,
                bandwidth_bytes_per_sec,
                downtime_secs,
                limit_secs,
            } => write!(
                f,
                "{} at {} make a downtime of {}, within the limit of {}",
                size(*remaining_bytes as f64),
                rate(*bandwidth_bytes_per_sec),
                time(*downtime_secs),
                time(*limit_secs)
            ),
            Reason::DowntimeTooLong {
                remaining_bytes,
                bandwidth_bytes_per_sec,
                downtime_secs,
                limit_secs,
            } => write!(
                f,
                "{} at {} would make a downtime of {}, above the limit of {}",
                size(*remaining_bytes as f64),
                rate(*bandwidth_bytes_per_sec),
                time(*downtime_secs),
                time(*limit_secs)
            ),
            Reason::VoteUnsteady {
                now_units,
                short_units,
                long_units,
            } => write!(
                f,
                "{now_units} pages are dirty, {short_units} on short and {long_units} on long average: not steady yet"
            ),
            Reason::VoteTooLong {
                short_secs,
                long_secs,
            } => write!(
                f,
                "the dirty pages would take {} by the short and {} by the long average",
                time(*short_secs),
                time(*long_secs)
            ),
            Reason::VotePassed {
                short_secs,
                long_secs,
            } => write!(
                f,
                "the dirty pages take {} by the short and {} by the long average: short enough",
                time(*short_secs),
                time(*long_secs)
            ),
            Reason::VoteFew {
                short_units,
                long_units,
            } => write!(
                f,
                "only {short_units} pages are dirty on short and {long_units} on long average"
            ),
            Reason::Throttle {
                percent,
                dirty_bytes_per_sec,
                bandwidth_bytes_per_sec,
            } => write!(
                f,
                "the machine writes {} against {} copied, so its vCPUs are slowed by {percent} %",
                rate(*dirty_bytes_per_sec),
                rate(*bandwidth_bytes_per_sec)
            ),
            Reason::Plan {
                clean_bytes,
                planned_bytes,
                bandwidth_bytes_per_sec,
            } => write!(
                f,
                "{} of the planned {} are clean, at {}",
                size(*clean_bytes),
                size(*planned_bytes),
                rate(*bandwidth_bytes_per_sec)
            ),
            Reason::PlanReached {
                clean_bytes,
                planned_bytes,
            } => write!(
                f,
                "{} are clean and {} were planned",
                size(*clean_bytes),
                size(*planned_bytes)
            ),
            Reason::StepPays {
                bandwidth_bytes_per_sec,
                dirty_bytes_per_sec,
                late,
                step_cost_secs,
                stop_cost_secs,
            } => write!(
                f,
                "at {} against {} written, {} of the requests are late and a page costs {} now and {} in the switch",
                rate(*bandwidth_bytes_per_sec),
                rate(*dirty_bytes_per_sec),
                part(*late),
                time(*step_cost_secs),
                time(*stop_cost_secs)
            ),
            Reason::StepCostsMore { step_cost_secs, .. } if *step_cost_secs >= GAINS_NOTHING_SECS => {
                write!(f, "copying on would gain nothing")
            }
            Reason::StepCostsMore {
                step_cost_secs,
                stop_cost_secs,
            } => write!(
                f,
                "one more page costs {} now and {} in the switch",
                time(*step_cost_secs),
                time(*stop_cost_secs)
            ),
            Reason::TakeWhatIsIdle {
                bandwidth_bytes_per_sec,
                service_bytes_per_sec,
                dirty_bytes_per_sec,
            } => write!(
                f,
                "the service uses {} and goes first; what it leaves, up to {}, is above the {} written",
                rate(*service_bytes_per_sec),
                rate(*bandwidth_bytes_per_sec),
                rate(*dirty_bytes_per_sec)
            ),
            Reason::WaitForALull {
                remaining_bytes,
                least_bytes,
                waited_secs,
                patience_secs,
            } => write!(
                f,
                "{} are left and it was {} before: waiting for a lull, {} of at most {}",
                size(*remaining_bytes as f64),
                size(*least_bytes as f64),
                time(*waited_secs),
                time(*patience_secs)
            ),
            Reason::ContractFirst {
                downtime_secs,
                limit_secs,
                bandwidth_bytes_per_sec,
            } => write!(
                f,
                "the downtime would be {} and {} is promised: copying on at {}",
                time(*downtime_secs),
                time(*limit_secs),
                rate(*bandwidth_bytes_per_sec)
            ),
            Reason::ContractUnreachable {
                dirty_bytes_per_sec,
                bandwidth_bytes_per_sec,
                limit_secs,
            } => write!(
                f,
                "the machine writes {} and the link carries {}: the promised downtime of {} cannot be kept",
                rate(*dirty_bytes_per_sec),
                rate(*bandwidth_bytes_per_sec),
                time(*limit_secs)
            ),
            Reason::Hurry {
                left_secs,
                bandwidth_bytes_per_sec,
            } => write!(
                f,
                "{} are left until the deadline: copying at {}",
                time(*left_secs),
                rate(*bandwidth_bytes_per_sec)
            ),
            Reason::Deadline {
                elapsed_secs,
                limit_secs,
            } => write!(
                f,
                "the deadline of {} has come after {}",
                time(*limit_secs),
                time(*elapsed_secs)
            ),
            Reason::LinkSilent => write!(f, "the link carries nothing now, which is no moment to switch"),
            Reason::Unmeasured => write!(f, "nothing is known of the link yet"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sums of tiny numbers of both signs come out as -0.0 or 1e-17: a person reads "none", not an exponent.
    #[test]
    fn costs_are_readable() {
        assert_eq!([-0.0, 0.0, 1e-17, -3e-9].map(part), ["none"; 4]);
        assert_eq!(
            [0.053, 0.00004, 1.0, 0.5].map(part),
            ["5.3 %", "0.004 %", "all", "50.0 %"]
        );
        assert_eq!([0.0, -0.0, 1e-12].map(time), ["nothing"; 3]);
        assert_eq!(
            [2.5e-6, 0.0004, 0.25, 3.0].map(time),
            ["2.5 us", "400.0 us", "250.0 ms", "3.0 s"]
        );
        let reason = Reason::StepPays {
            bandwidth_bytes_per_sec: 1e6,
            dirty_bytes_per_sec: 0.0,
            late: -0.0,
            step_cost_secs: 1e-9,
            stop_cost_secs: 3e-5,
        };
        let said = reason.to_string();
        assert!(
            said.contains("none of the requests") && !said.contains("e-"),
            "{said}"
        );
    }
}
