//! Whether a crossing gets anywhere, and whether the guest's writing or the service's load changes over time.

use std::time::Duration;

use super::{History, Sample};

/// What the last slices of equal throttle and speed have brought: how long they took, and how much less remained
/// on average in their younger half than in their older one (negative: more).
///
/// Slices before a sudden loss of bandwidth do not count: at a slower copy more gets dirty, and what remains is
/// only comparable to what remained at the same speed.
pub fn progress(history: &History) -> (Duration, f64) {
    let brought = brought(history);
    (brought.since, brought.on_average)
}

struct Brought {
    since: Duration,
    /// How much less remained in the younger half than in the older one.
    on_average: f64,
    /// The same for the least that remained.
    at_best: f64,
}

impl Brought {
    fn unless(&self, gained: f64, history: &History) -> Duration {
        if gained > 0.02 * history.remaining_bytes as f64 {
            Duration::ZERO
        } else {
            self.since
        }
    }
}

fn brought(history: &History) -> Brought {
    let nothing = Brought {
        since: Duration::ZERO,
        on_average: 0.0,
        at_best: 0.0,
    };
    let Some(last) = history.samples.last().filter(|_| !link_is_silent(history)) else {
        return nothing;
    };
    let speed = |s: &Sample| s.wire_bytes as f64 / s.time.as_secs_f64().max(1e-9);
    let now = speed(last);
    let alike = |s: &&Sample| s.throttle_percent == last.throttle_percent && speed(s) < 2.0 * now.max(1.0);
    let like: Vec<&Sample> = history.samples.iter().rev().take_while(alike).collect();
    let since: Duration = like.iter().map(|s| s.time).sum();
    let (mut young, mut old) = (Half::default(), Half::default());
    let mut age = Duration::ZERO;
    for sample in like {
        if age < since / 2 { &mut young } else { &mut old }.add(sample);
        age += sample.time;
    }
    match (young.mean(), old.mean()) {
        (Some(young_mean), Some(old_mean)) => Brought {
            since,
            on_average: old_mean - young_mean,
            at_best: old.least - young.least,
        },
        _ => nothing,
    }
}

/// What remained in some slices.
struct Half {
    byte_secs: f64,
    secs: f64,
    least: f64,
}

impl Default for Half {
    fn default() -> Self {
        Self {
            byte_secs: 0.0,
            secs: 0.0,
            least: f64::INFINITY,
        }
    }
}

impl Half {
    fn add(&mut self, sample: &Sample) {
        let (bytes, secs) = (sample.remaining_bytes as f64, sample.time.as_secs_f64());
        self.byte_secs += bytes * secs;
        self.secs += secs;
        self.least = self.least.min(bytes);
    }

    fn mean(&self) -> Option<f64> {
        (self.secs > 0.0).then(|| self.byte_secs / self.secs)
    }
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
    let brought = brought(history);
    brought.unless(brought.on_average, history)
}

/// The same, sooner: where what remains goes up and down a better average may be chance, so the least that remained must
/// have fallen, too. Enough to do more for the crossing, too little to give it up.
pub fn stuck(history: &History) -> Duration {
    let brought = brought(history);
    brought.unless(brought.on_average.min(brought.at_best), history)
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
