//! Whether a crossing gets anywhere, and whether the guest's writing or the service's load changes over time.

use std::time::Duration;

use super::{History, Sample};

/// What the last slices of equal throttle and speed have brought: how long they took, and how much less remained
/// on average in their younger half than in their older one (negative: more).
///
/// Slices before a sudden loss of bandwidth do not count: at a slower copy more gets dirty, and what remains is
/// only comparable to what remained at the same speed.
pub fn progress(history: &History) -> (Duration, f64) {
    let Some(last) = history.samples.last().filter(|_| !link_is_silent(history)) else {
        return (Duration::ZERO, 0.0);
    };
    let speed = |s: &Sample| s.wire_bytes as f64 / s.time.as_secs_f64().max(1e-9);
    let now = speed(last);
    let alike = |s: &&Sample| s.throttle_percent == last.throttle_percent && speed(s) < 2.0 * now.max(1.0);
    let like: Vec<&Sample> = history.samples.iter().rev().take_while(alike).collect();
    let since: Duration = like.iter().map(|s| s.time).sum();
    let (mut young, mut old) = ((0.0, 0.0), (0.0, 0.0));
    let mut age = Duration::ZERO;
    for sample in like {
        let half = if age < since / 2 { &mut young } else { &mut old };
        let secs = sample.time.as_secs_f64();
        half.0 += sample.remaining_bytes as f64 * secs;
        half.1 += secs;
        age += sample.time;
    }
    if old.1 <= 0.0 || young.1 <= 0.0 {
        return (Duration::ZERO, 0.0);
    }
    (since, old.0 / old.1 - young.0 / young.1)
}

/// Whether the last slice should have carried something and carried nothing: the link is interrupted, which says
/// nothing of the guest, and is no moment to switch.
pub fn link_is_silent(history: &History) -> bool {
    history.samples.last().is_some_and(|last| {
        let due = last.bandwidth_bytes_per_sec as f64 * last.time.as_secs_f64();
        last.wire_bytes == 0 && last.remaining_bytes > 0 && due > 64.0 * 1024.0
    })
}

/// For how long nothing has been gained, 2 % being nothing. Zero while what remains falls.
pub fn stalled(history: &History) -> Duration {
    let (since, gained) = progress(history);
    if gained > 0.02 * history.remaining_bytes as f64 {
        Duration::ZERO
    } else {
        since
    }
}

/// Half a second or more of the guest's writing.
#[derive(Clone, Copy)]
pub(super) struct Stretch {
    /// Pages that were clean and were written.
    writes: f64,
    /// Clean bytes times seconds.
    exposure: f64,
}

impl Stretch {
    /// Bytes dirtied per clean byte and second.
    pub(super) fn rate(&self) -> f64 {
        self.writes * 4096.0 / self.exposure
    }

    /// Whether the rate jumped between two stretches: by half or more, and by more than chance.
    fn jumps_to(&self, next: &Stretch) -> bool {
        let (before, after) = (self.rate(), next.rate());
        let noise = |s: &Stretch| s.writes.max(1.0).sqrt() * 4096.0 / s.exposure;
        let change = (after - before).abs();
        change > 0.5 * before.max(after) && change > 6.0 * noise(self).hypot(noise(next))
    }
}

/// The guest's writing by stretches, oldest first; the youngest may be short.
pub(super) fn stretches(history: &History) -> Vec<Stretch> {
    let mut list: Vec<Stretch> = Vec::new();
    let mut open = Stretch {
        writes: 0.0,
        exposure: 0.0,
    };
    let mut secs = 0.0;
    for (at, sample) in history.samples.iter().enumerate() {
        let time = sample.time.as_secs_f64();
        open.writes += sample.dirtied_bytes as f64 / 4096.0;
        open.exposure += history.total_bytes.saturating_sub(sample.remaining_bytes) as f64 * time;
        secs += time;
        // A burst that has just begun shows in less than a stretch.
        if secs >= 0.5 || at + 1 == history.samples.len() {
            if open.exposure > 0.0 {
                list.push(open);
            }
            open = Stretch {
                writes: 0.0,
                exposure: 0.0,
            };
            secs = 0.0;
        }
    }
    list
}

/// Whether the writing jumps, or the service's use of the link differs over time.
pub fn conditions_change(history: &History) -> bool {
    let list = stretches(history);
    let pairs = || list.iter().zip(list.iter().skip(1));
    let rises = pairs().any(|(a, b)| a.jumps_to(b) && a.rate() < b.rate());
    let falls = pairs().any(|(a, b)| a.jumps_to(b) && a.rate() > b.rate());
    // When nearly all is copied the hot pages are clean for the first time, and more is written to clean pages
    // without any change in the guest: then only what also falls again is a change.
    let nearly_done = history.remaining_bytes < history.total_bytes / 33;
    let jumps = if nearly_done {
        rises && falls
    } else {
        rises || falls
    };
    let service: Vec<f64> = history.samples.iter().map(|s| s.service_bytes_per_sec).collect();
    jumps || (service.len() >= 20 && differs(&service))
}

fn differs(values: &[f64]) -> bool {
    let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let spread = values.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / values.len().max(1) as f64;
    mean > 0.0 && spread.sqrt() > 0.3 * mean
}
