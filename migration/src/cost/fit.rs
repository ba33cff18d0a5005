//! The M/M/1 form from measured points.

use std::time::Duration;

use super::Queue;

/// Fits the queue to measured (bandwidth, fraction late) at a known arrival rate: ln(late) is a line over the
/// bandwidth where neither nearly all nor nearly none are late. `None` if fewer than two such points, or if
/// the line does not fall.
pub fn fit_queue(points: &[(f64, f64)], requests_per_sec: f64) -> Option<Queue> {
    let useful: Vec<(f64, f64)> = points
        .iter()
        .filter(|(b, late)| b.is_finite() && *late > 0.001 && *late < 0.99)
        .map(|(b, late)| (*b, late.ln()))
        .collect();
    let n = useful.len() as f64;
    if useful.len() < 2 {
        return None;
    }
    let mean_x = useful.iter().map(|p| p.0).sum::<f64>() / n;
    let mean_y = useful.iter().map(|p| p.1).sum::<f64>() / n;
    let spread: f64 = useful.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
    let slope = useful
        .iter()
        .map(|p| (p.0 - mean_x) * (p.1 - mean_y))
        .sum::<f64>()
        / spread;
    // ln F = deadline * arrivals - (deadline / size) * B_s
    let at_zero = mean_y - slope * mean_x;
    let deadline = at_zero / requests_per_sec;
    let response_bytes = -deadline / slope;
    let sound = |x: f64| x.is_finite() && x > 0.0;
    (sound(deadline) && sound(response_bytes) && sound(requests_per_sec)).then(|| Queue {
        requests_per_sec,
        response_bytes,
        deadline: Duration::try_from_secs_f64(deadline).unwrap_or(Duration::MAX),
    })
}
