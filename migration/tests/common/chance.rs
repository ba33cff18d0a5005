//! Numbers that look random and time that passes on demand: both repeat by seed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ferry_migration::clock::Clock;

/// A small generator of numbers that look random and repeat by seed.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn roll(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.roll() >> 16) % end.max(1)
    }
}

/// Time that passes only when somebody waits or looks.
#[derive(Default)]
pub struct StepClock {
    nanos: AtomicU64,
}

impl Clock for StepClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.nanos.fetch_add(1_000, Ordering::AcqRel))
    }

    fn sleep(&self, time: Duration) {
        self.nanos.fetch_add(time.as_nanos() as u64, Ordering::AcqRel);
    }
}
