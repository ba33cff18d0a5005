//! `virtualbox`: full speed; after each pass the dirty counts vote, by a short average over four passes and a
//! long one over a ring of 64, whether it gets no better and is good enough.

use super::{Decision, History, Limits, Reason, UNLIMITED};

const RING: usize = 64;
/// What the ring is filled with before a pass has written there.
const NEVER: u64 = (1 << 31) - 1;
/// Passes whose pages do not count for the speed: zero pages would make it look fast.
const WARM_UP: usize = 7;
const PAGE: u64 = 4096;

pub(super) fn decide(history: &History, limits: &Limits) -> (Decision, Reason) {
    if !history.between_rounds || history.rounds.is_empty() {
        return (Decision::go_on(UNLIMITED), Reason::FullSpeed);
    }
    let passes = history.rounds.len();
    let k = passes - 1;
    let counts: Vec<u64> = history.rounds.iter().map(|r| r.dirty_bytes / PAGE).collect();
    let now = counts.last().copied().unwrap_or(0);
    let mut ring = [NEVER; RING];
    for (slot, count) in counts.iter().enumerate().skip(passes.saturating_sub(RING)) {
        if let Some(entry) = ring.get_mut(slot % RING) {
            *entry = *count;
        }
    }
    let short = (0..4)
        .map(|back| {
            counts
                .len()
                .checked_sub(1 + back)
                .and_then(|at| counts.get(at))
                .copied()
        })
        .map(|count| count.unwrap_or(NEVER))
        .sum::<u64>()
        / 4;
    // Divides by 64 even before there were 64 passes, as the original does.
    let long = ring.iter().filter(|c| **c != NEVER).sum::<u64>() / RING as u64;

    let steady = short <= long && (now <= short || now - short < (short / 8).min(16));
    let unsteady = Reason::VoteUnsteady {
        now_units: now,
        short_units: short,
        long_units: long,
    };
    if !steady {
        return (Decision::go_on(UNLIMITED), unsteady);
    }
    if k <= 10 {
        return if (short <= 128 && long <= 1024) || long <= 256 {
            let reason = Reason::VoteFew {
                short_units: short,
                long_units: long,
            };
            (Decision::switch(), reason)
        } else {
            (Decision::go_on(UNLIMITED), unsteady)
        };
    }
    let measured = history.rounds.get(WARM_UP..).unwrap_or(&history.rounds);
    let pages = measured.iter().map(|r| r.copied_bytes / PAGE).sum::<u64>() as f64;
    let secs: f64 = measured.iter().map(|r| r.time.as_secs_f64()).sum();
    let speed = (pages / secs.max(1e-9)).max(1e-9);
    let (short_secs, long_secs) = (short as f64 / speed, long as f64 / speed);
    let allowed = limits.downtime.as_secs_f64().max(0.032);
    if (long_secs <= allowed && short_secs < allowed) || short_secs < allowed / 2.0 {
        (
            Decision::switch(),
            Reason::VotePassed {
                short_secs,
                long_secs,
            },
        )
    } else {
        (
            Decision::go_on(UNLIMITED),
            Reason::VoteTooLong {
                short_secs,
                long_secs,
            },
        )
    }
}
