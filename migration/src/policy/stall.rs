//! Whether a crossing gets anywhere, and whether the guest's writing changes over time.

use super::History;

/// How many rounds without progress are a stall.
const ROUNDS: usize = 5;

/// How many rounds, at least five, brought no progress: after none of them was less left than before them.
/// Rounds before a sudden loss of bandwidth do not count: more dirties in a slow round, and a round's
/// rest is only comparable to one of the same speed.
pub fn stalled(history: &History) -> Option<usize> {
    let speed = |at: usize| {
        history
            .rounds
            .get(at)
            .map_or(0.0, |r| r.wire_bytes as f64 / r.time.as_secs_f64().max(1e-9))
    };
    let count = history.rounds.len();
    let mut from = 0;
    for at in 1..count {
        if speed(at) < 0.5 * speed(at - 1) {
            from = at;
        }
    }
    let rounds = history.rounds.get(from..)?;
    let (mut best, mut since) = (u64::MAX, 0);
    for round in rounds {
        // 2 % less is progress; noise is not.
        if round.dirty_bytes < best.saturating_sub(best / 50) {
            best = round.dirty_bytes;
            since = 0;
        } else {
            since += 1;
        }
    }
    (since >= ROUNDS).then_some(since)
}

/// Whether the share of clean pages that gets dirty differs from second to second by more than chance.
pub fn writing_changes(history: &History) -> bool {
    let mut seconds: Vec<f64> = Vec::new();
    let (mut dirtied, mut clean_secs, mut secs) = (0.0, 0.0, 0.0);
    for sample in &history.samples {
        let time = sample.time.as_secs_f64();
        dirtied += sample.dirtied_bytes as f64;
        clean_secs += history.total_bytes.saturating_sub(sample.remaining_bytes) as f64 * time;
        secs += time;
        if secs >= 0.5 {
            if clean_secs > 0.0 {
                seconds.push(dirtied / clean_secs);
            }
            (dirtied, clean_secs, secs) = (0.0, 0.0, 0.0);
        }
    }
    if seconds.len() < 6 {
        return false;
    }
    let mean = seconds.iter().sum::<f64>() / seconds.len() as f64;
    let spread = seconds.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / seconds.len() as f64;
    mean > 0.0 && spread.sqrt() > 0.3 * mean
}
