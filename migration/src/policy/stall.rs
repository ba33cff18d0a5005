//! Whether a crossing gets anywhere, and whether the guest's writing or the service's load changes over time.

use std::time::Duration;

use super::{History, Sample};

/// For how long nothing has been gained: by the last slices of equal throttle and speed, what remains is not
/// falling. Zero while it falls.
///
/// Slices before a sudden loss of bandwidth do not count: at a slower copy more gets dirty, and what remains is
/// only comparable to what remained at the same speed.
pub fn stalled(history: &History) -> Duration {
    let Some(last) = history.samples.last() else {
        return Duration::ZERO;
    };
    let speed = |s: &Sample| s.wire_bytes as f64 / s.time.as_secs_f64().max(1e-9);
    let now = speed(last);
    let mut since = Duration::ZERO;
    // Two halves of the time looked back on: progress is 2 % less in the younger one.
    let mut like: Vec<&Sample> = Vec::new();
    for sample in history.samples.iter().rev() {
        let same = sample.throttle_percent == last.throttle_percent && speed(sample) < 2.0 * now.max(1.0);
        if !same {
            break;
        }
        since += sample.time;
        like.push(sample);
    }
    let (mut young, mut old) = ((0.0, 0.0), (0.0, 0.0));
    let mut age = Duration::ZERO;
    for sample in like {
        let half = if age < since / 2 { &mut young } else { &mut old };
        let secs = sample.time.as_secs_f64();
        half.0 += sample.remaining_bytes as f64 * secs;
        half.1 += secs;
        age += sample.time;
    }
    if old.1 <= 0.0 || young.1 <= 0.0 || young.0 / young.1 < 0.98 * old.0 / old.1 {
        return Duration::ZERO;
    }
    since
}

/// The rate at which one clean byte gets dirty, by stretches of half a second, oldest first.
pub(super) fn write_rates(history: &History) -> Vec<f64> {
    let mut rates: Vec<f64> = Vec::new();
    let (mut dirtied, mut clean_secs, mut secs) = (0.0, 0.0, 0.0);
    for sample in &history.samples {
        let time = sample.time.as_secs_f64();
        dirtied += sample.dirtied_bytes as f64;
        clean_secs += history.total_bytes.saturating_sub(sample.remaining_bytes) as f64 * time;
        secs += time;
        if secs >= 0.5 {
            if clean_secs > 0.0 {
                rates.push(dirtied / clean_secs);
            }
            (dirtied, clean_secs, secs) = (0.0, 0.0, 0.0);
        }
    }
    // A burst that has just begun shows in less than a stretch.
    if clean_secs > 0.0 {
        rates.push(dirtied / clean_secs);
    }
    rates
}

/// Whether the rate of writing, or the service's use of the link, differs over time by more than chance.
pub fn conditions_change(history: &History) -> bool {
    let use_of_link: Vec<f64> = history.samples.iter().map(|s| s.service_bytes_per_sec).collect();
    differs(&write_rates(history)) || (history.samples.len() >= 20 && differs(&use_of_link))
}

fn differs(values: &[f64]) -> bool {
    if values.len() < 6 {
        return false;
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let spread = values.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / values.len() as f64;
    mean > 0.0 && spread.sqrt() > 0.3 * mean
}
