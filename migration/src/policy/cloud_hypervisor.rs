//! `cloud-hypervisor`: full speed; pause when the next round, at the last round's bandwidth, fits the downtime.
//! Its timeout with cancel or ignore is the deadline that every policy has.

use super::{Decision, History, Limits, Reason, UNLIMITED};

pub(super) fn decide(history: &History, limits: &Limits) -> (Decision, Reason) {
    let Some(last) = history.rounds.last().filter(|_| history.between_rounds) else {
        return (Decision::go_on(UNLIMITED), Reason::FullSpeed);
    };
    let bandwidth = last.copied_bytes as f64 / last.time.as_secs_f64().max(1e-9);
    let remaining_bytes = last.dirty_bytes;
    let downtime_secs = if remaining_bytes == 0 {
        0.0
    } else {
        remaining_bytes as f64 / bandwidth.max(1.0)
    };
    let limit_secs = limits.downtime.as_secs_f64();
    if downtime_secs <= limit_secs {
        let reason = Reason::DowntimeFits {
            remaining_bytes,
            bandwidth_bytes_per_sec: bandwidth,
            downtime_secs,
            limit_secs,
        };
        (Decision::switch(), reason)
    } else {
        let reason = Reason::DowntimeTooLong {
            remaining_bytes,
            bandwidth_bytes_per_sec: bandwidth,
            downtime_secs,
            limit_secs,
        };
        (Decision::go_on(UNLIMITED), reason)
    }
}
