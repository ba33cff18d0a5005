//! Time, as the engine's caller gives it: monotonic, and the caller's to simulate.

use std::time::{Duration, Instant};

/// A monotonic clock. `now` counts from any fixed instant of the clock's own choosing.
pub trait Clock: Send + Sync {
    fn now(&self) -> Duration;
    fn sleep(&self, time: Duration);
}

/// The host's monotonic clock, for callers that move real machines.
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        HostClock {
            start: Instant::now(),
        }
    }
}

impl Clock for HostClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}
