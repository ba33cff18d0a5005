//! When requests come: a Poisson process from a seed. Pure.

use std::time::Duration;

/// Arrival times as seen from the start of the load, without end.
#[derive(Debug, Clone)]
pub struct Arrivals {
    random: Random,
    mean_gap_secs: f64,
    /// In seconds; adding up rounded durations would drift.
    at_secs: f64,
}

impl Arrivals {
    /// `rate_per_sec` must be positive and finite.
    pub fn new(rate_per_sec: f64, seed: u64) -> Self {
        Self {
            random: Random(seed),
            mean_gap_secs: 1.0 / rate_per_sec,
            at_secs: 0.0,
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        // In (0, 1], so that its logarithm is finite.
        let uniform = 1.0 - self.random.fraction();
        self.at_secs -= self.mean_gap_secs * uniform.ln();
        Duration::try_from_secs_f64(self.at_secs).ok()
    }
}

/// splitmix64: small, seedable, the same everywhere.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    /// In [0, 1).
    fn fraction(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        (mix(self.0) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// The finaliser of splitmix64.
pub fn mix(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_are_poisson_at_the_rate_and_repeatable() {
        let times: Vec<f64> = Arrivals::new(20.0, 7)
            .take(100_000)
            .map(|at| at.as_secs_f64())
            .collect();
        assert!((times[99_999] / 5_000.0 - 1.0).abs() < 0.02, "the mean rate");
        let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
        // Exponential gaps have a standard deviation equal to their mean, and a share 1/e above it.
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        assert!((variance.sqrt() / mean - 1.0).abs() < 0.03);
        let above = gaps.iter().filter(|gap| **gap > mean).count() as f64 / gaps.len() as f64;
        assert!((above - (-1.0f64).exp()).abs() < 0.01);
        assert!(Arrivals::new(20.0, 7).take(9).eq(Arrivals::new(20.0, 7).take(9)));
        assert!(!Arrivals::new(20.0, 7).take(9).eq(Arrivals::new(20.0, 8).take(9)));
    }
}
