//! `qemu`: full speed; complete when what is pending fits into the downtime limit at the measured bandwidth.
//! With throttling allowed, auto-converge: 20 % when twice more than half of what was sent got dirty again,
//! then 10 % more each time.

use std::time::Duration;

use super::{Decision, History, Limits, Reason, Throttle, UNLIMITED};

pub(super) fn decide(history: &History, limits: &Limits) -> (Decision, Reason) {
    let bandwidth = measured(history);
    let limit_secs = limits.downtime.as_secs_f64();
    let threshold = bandwidth * limit_secs;
    let mut go_on = Decision::go_on(UNLIMITED);
    go_on.throttle = throttle(history, limits);
    if history.between_rounds && !history.rounds.is_empty() {
        let pending = history.remaining_bytes;
        let downtime_secs = pending as f64 / bandwidth.max(1.0);
        if pending == 0 || pending as f64 <= threshold {
            let reason = Reason::DowntimeFits {
                remaining_bytes: pending,
                bandwidth_bytes_per_sec: bandwidth,
                downtime_secs,
                limit_secs,
            };
            return (Decision::switch(), reason);
        }
        let percent = go_on.throttle.percent;
        let reason = if percent > 0 {
            Reason::Throttle {
                percent,
                dirty_bytes_per_sec: history.dirty_bytes_per_sec(),
                bandwidth_bytes_per_sec: bandwidth,
            }
        } else {
            Reason::DowntimeTooLong {
                remaining_bytes: pending,
                bandwidth_bytes_per_sec: bandwidth,
                downtime_secs,
                limit_secs,
            }
        };
        return (go_on, reason);
    }
    // Within a round the pending bytes are an estimate; below the threshold the bitmap is read again.
    let unsent = history
        .round
        .planned_bytes
        .saturating_sub(history.round.copied_bytes);
    go_on.fresh = history.round.copied_bytes > 0 && unsent as f64 <= threshold;
    (go_on, Reason::FullSpeed)
}

/// QEMU measures in windows of this length.
const WINDOW: Duration = Duration::from_millis(100);

/// Bytes over time in the last window, on the wire: pages of zeroes are copied at any rate. And the rest of a round may be a
/// slice of a few milliseconds, which says how fast the sockets' buffers take data.
fn measured(history: &History) -> f64 {
    let (mut bytes, mut time) = (0u64, Duration::ZERO);
    for sample in history.samples.iter().rev().filter(|s| s.copied_bytes > 0) {
        bytes += sample.wire_bytes;
        time += sample.time;
        if time >= WINDOW {
            break;
        }
    }
    if time.is_zero() {
        0.0
    } else {
        bytes as f64 / time.as_secs_f64()
    }
}

fn throttle(history: &History, limits: &Limits) -> Throttle {
    let (mut percent, mut high) = (0u8, 0);
    for round in &history.rounds {
        if round.dirty_bytes > round.copied_bytes / 2 {
            high += 1;
        }
        if high >= 2 {
            high = 0;
            percent = if percent == 0 {
                20
            } else {
                percent.saturating_add(10)
            };
        }
    }
    Throttle::all(limits.clamp_throttle(percent))
}
