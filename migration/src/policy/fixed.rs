//! `fixed` and `max`: a bandwidth and no thought about the service; stop when the rest fits into the downtime.

use super::{Decision, History, Limits, Reason, UNLIMITED};

pub(super) fn decide(bandwidth: u64, history: &History, limits: &Limits) -> (Decision, Reason) {
    if let Some(stop) = stop(history, limits) {
        return stop;
    }
    let reason = Reason::Given {
        bandwidth_bytes_per_sec: bandwidth as f64,
    };
    (Decision::go_on(bandwidth), reason)
}

pub(super) fn decide_max(history: &History, limits: &Limits) -> (Decision, Reason) {
    stop(history, limits).unwrap_or((Decision::go_on(UNLIMITED), Reason::FullSpeed))
}

/// Stops between rounds, when the rest and the fixed part of the switch fit into the downtime at full speed.
fn stop(history: &History, limits: &Limits) -> Option<(Decision, Reason)> {
    if !history.between_rounds || history.rounds.is_empty() {
        return None;
    }
    let link = limits.link(history).unwrap_or(0.0);
    let wire = history.remaining_bytes as f64 * history.wire_ratio();
    let downtime = history.switch_fixed.as_secs_f64() + wire / link.max(1.0);
    let limit_secs = limits.downtime.as_secs_f64();
    let reason = if downtime <= limit_secs {
        Reason::DowntimeFits {
            remaining_bytes: history.remaining_bytes,
            bandwidth_bytes_per_sec: link,
            downtime_secs: downtime,
            limit_secs,
        }
    } else if history.remaining_bytes == 0 {
        // It takes longer than is wanted, and waiting makes it no shorter.
        Reason::LittleLeft {
            remaining_bytes: 0,
            threshold_bytes: 0,
        }
    } else {
        return None;
    };
    Some((Decision::switch(), reason))
}
