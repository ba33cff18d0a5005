//! `xen-basic` and `xen-code`: the dirtying rate plus an increment, once as Clark et al. (and CALM) describe it
//! and once as Xen's own source does it.

use super::{Decision, History, Limits, Reason};

/// A Mbit/s as CALM counts, in bytes per second.
const MBIT: f64 = 1_048_576.0 / 8.0;
const START: f64 = 100.0 * MBIT;
const INCREMENT: f64 = 50.0 * MBIT;
const STOP_BELOW_BYTES: u64 = 256 * 1024;

pub(super) fn decide_basic(history: &History, limits: &Limits) -> (Decision, Reason) {
    let Some(last) = history.rounds.last() else {
        return first();
    };
    let dirty = last.dirty_bytes as f64 / last.time.as_secs_f64().max(1e-9);
    let wanted = dirty + INCREMENT;
    let most = limits
        .most_bandwidth_bytes_per_sec
        .map_or(f64::INFINITY, |b| b as f64)
        .min(limits.link(history).unwrap_or(f64::INFINITY));
    if history.between_rounds && last.dirty_bytes < STOP_BELOW_BYTES {
        let reason = Reason::LittleLeft {
            remaining_bytes: last.dirty_bytes,
            threshold_bytes: STOP_BELOW_BYTES,
        };
        return (Decision::switch(), reason);
    }
    if history.between_rounds && wanted > most {
        let reason = Reason::BeyondTheLink {
            wanted_bytes_per_sec: wanted,
            most_bytes_per_sec: most,
        };
        return (Decision::switch(), reason);
    }
    above(dirty, wanted)
}

fn first() -> (Decision, Reason) {
    let reason = Reason::FirstRound {
        bandwidth_bytes_per_sec: START,
    };
    (Decision::go_on(START as u64), reason)
}

fn above(dirty: f64, bandwidth: f64) -> (Decision, Reason) {
    let reason = Reason::AboveDirtyRate {
        dirty_bytes_per_sec: dirty,
        increment_bytes_per_sec: INCREMENT,
        bandwidth_bytes_per_sec: bandwidth,
    };
    (Decision::go_on(bandwidth as u64), reason)
}

const CODE_MOST: f64 = 500.0 * MBIT;
const CODE_ROUNDS: usize = 29;
const CODE_FEW_BYTES: u64 = 50 * 4096;

pub(super) fn decide_code(history: &History, limits: &Limits) -> (Decision, Reason) {
    let Some(last) = history.rounds.last() else {
        return first();
    };
    let most = CODE_MOST.min(
        limits
            .most_bandwidth_bytes_per_sec
            .map_or(f64::INFINITY, |b| b as f64),
    );
    let (mut rate, mut dirty) = (START, 0.0);
    for round in &history.rounds {
        dirty = round.dirty_bytes as f64 / round.time.as_secs_f64().max(1e-9);
        if dirty > rate {
            rate = (dirty + INCREMENT).min(most);
        }
    }
    let before = history.rounds.iter().rev().nth(1);
    let sent: u64 = history.rounds.iter().map(|r| r.copied_bytes).sum();
    let rounds = history.rounds.len();
    let stop = if !history.between_rounds {
        None
    } else if let Some(before) = before
        && last.copied_bytes > before.copied_bytes
        && rate >= most
    {
        Some(Reason::RoundsGrow {
            last_bytes: last.copied_bytes,
            before_bytes: before.copied_bytes,
        })
    } else if rounds >= CODE_ROUNDS {
        Some(Reason::RoundsUsedUp {
            rounds,
            most: CODE_ROUNDS,
        })
    } else if last.copied_bytes < CODE_FEW_BYTES {
        Some(Reason::LittleLeft {
            remaining_bytes: last.copied_bytes,
            threshold_bytes: CODE_FEW_BYTES,
        })
    } else if sent > history.total_bytes.saturating_mul(3) {
        Some(Reason::SentTooMuch {
            sent_bytes: sent,
            most_bytes: history.total_bytes.saturating_mul(3),
        })
    } else {
        None
    };
    match stop {
        Some(reason) => (Decision::switch(), reason),
        None => above(dirty, rate),
    }
}
