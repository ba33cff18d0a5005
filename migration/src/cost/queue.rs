//! The M/M/1 form of CALM: requests arrive at random, responses of an average size share what is left.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A service that answers `requests_per_sec` with responses of `response_bytes`, each within `deadline`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Queue {
    pub requests_per_sec: f64,
    pub response_bytes: f64,
    pub deadline: Duration,
}

impl Queue {
    /// F(B_s) = exp(deadline * (arrivals - B_s / size)); 1 where the queue has no steady state.
    pub fn late(&self, residual_bytes_per_sec: f64) -> f64 {
        self.late_after(residual_bytes_per_sec, 1.0, 0.0)
    }

    /// The same with `load` times the arrivals and `delay` seconds of the deadline already spent.
    pub fn late_after(&self, residual_bytes_per_sec: f64, load: f64, delay: f64) -> f64 {
        let arrivals = self.requests_per_sec * load;
        let served = residual_bytes_per_sec / self.response_bytes;
        // Written so that anything that is not a number is "all late".
        if served > arrivals && residual_bytes_per_sec > 0.0 {
            let left = (self.deadline.as_secs_f64() - delay).max(0.0);
            (left * (arrivals - served)).exp()
        } else {
            1.0
        }
    }

    /// What CALM adds to the dirtying rate: the bandwidth at which F falls by e.
    pub fn increment_bytes_per_sec(&self) -> f64 {
        self.response_bytes / self.deadline.as_secs_f64()
    }
}
