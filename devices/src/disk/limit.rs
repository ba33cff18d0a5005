//! How fast a disk may be used: the user's limits, and the slow-down of writes that a crossing may ask for.
//!
//! A pure function of the time it is given. A request passes as soon as the bucket holds anything at all and is
//! charged in full, so a request larger than the bucket passes too and the next ones wait for its debt.

use std::num::NonZeroU64;
use std::time::Duration;

use super::options::DiskLimits;

const NANOS: i128 = 1_000_000_000;
/// A bucket holds what flows in during this time: short bursts pass, the average holds.
const BURST: Duration = Duration::from_millis(100);

/// A token bucket that may go into debt.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    rate_per_sec: u64,
    /// In billionths of a token, so that no rate is too slow to add anything.
    level: i128,
    filled_at: Duration,
}

impl Bucket {
    pub(crate) fn new(rate_per_sec: NonZeroU64, now: Duration) -> Self {
        let rate_per_sec = rate_per_sec.get();
        Self {
            rate_per_sec,
            level: capacity(rate_per_sec),
            filled_at: now,
        }
    }

    /// How long to wait until a request may pass; zero is now.
    pub(crate) fn wait(&mut self, now: Duration) -> Duration {
        self.fill(now);
        if self.level > 0 {
            return Duration::ZERO;
        }
        // One more billionth than the debt makes the level positive.
        let nanos = self
            .level
            .unsigned_abs()
            .saturating_add(1)
            .div_ceil(u128::from(self.rate_per_sec));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    pub(crate) fn charge(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * NANOS);
    }

    fn fill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.filled_at).as_nanos();
        self.filled_at = self.filled_at.max(now);
        let gained = i128::try_from(elapsed)
            .unwrap_or(i128::MAX)
            .saturating_mul(i128::from(self.rate_per_sec));
        self.level = self.level.saturating_add(gained).min(capacity(self.rate_per_sec));
    }

    /// The same debt or credit at another rate.
    fn with_rate(mut self, rate_per_sec: NonZeroU64, now: Duration) -> Self {
        self.fill(now);
        self.rate_per_sec = rate_per_sec.get();
        self.level = self.level.min(capacity(self.rate_per_sec));
        self
    }
}

fn capacity(rate_per_sec: u64) -> i128 {
    (i128::from(rate_per_sec) * BURST.as_nanos() as i128).max(NANOS)
}

/// Who makes a request wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldBy {
    User,
    Crossing,
}

/// All the limits of one disk.
#[derive(Debug, Clone, Default)]
pub(crate) struct Throttle {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    writes: Option<Bucket>,
}

impl Throttle {
    pub(crate) fn set_user(&mut self, limits: DiskLimits, now: Duration) {
        let DiskLimits {
            bandwidth_bytes_per_sec,
            operations_per_sec,
        } = limits;
        change(&mut self.bytes, bandwidth_bytes_per_sec, now);
        change(&mut self.operations, operations_per_sec, now);
    }

    /// A crossing's limit on what the guest writes, in bytes per second.
    pub(crate) fn set_crossing(&mut self, write_bytes_per_sec: Option<NonZeroU64>, now: Duration) {
        change(&mut self.writes, write_bytes_per_sec, now);
    }

    pub(crate) fn is_unlimited(&self) -> bool {
        let Self {
            bytes,
            operations,
            writes,
        } = self;
        bytes.is_none() && operations.is_none() && writes.is_none()
    }

    /// Lets a request pass and charges it, or says how long to wait and for whom.
    pub(crate) fn admit(
        &mut self,
        now: Duration,
        bytes: u64,
        is_write: bool,
    ) -> Result<(), (Duration, HeldBy)> {
        let user = wait(&mut self.bytes, now).max(wait(&mut self.operations, now));
        let crossing = if is_write {
            wait(&mut self.writes, now)
        } else {
            Duration::ZERO
        };
        let longest = user.max(crossing);
        if !longest.is_zero() {
            let by = if crossing > user {
                HeldBy::Crossing
            } else {
                HeldBy::User
            };
            return Err((longest, by));
        }
        charge(&mut self.bytes, bytes);
        charge(&mut self.operations, 1);
        if is_write {
            charge(&mut self.writes, bytes);
        }
        Ok(())
    }
}

pub(crate) fn change(bucket: &mut Option<Bucket>, rate: Option<NonZeroU64>, now: Duration) {
    *bucket = match (bucket.take(), rate) {
        (_, None) => None,
        (None, Some(rate)) => Some(Bucket::new(rate, now)),
        (Some(old), Some(rate)) => Some(old.with_rate(rate, now)),
    };
}

pub(crate) fn wait(bucket: &mut Option<Bucket>, now: Duration) -> Duration {
    bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(now))
}

pub(crate) fn charge(bucket: &mut Option<Bucket>, tokens: u64) {
    if let Some(bucket) = bucket {
        bucket.charge(tokens);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rate(n: u64) -> Option<NonZeroU64> {
        NonZeroU64::new(n)
    }

    /// Passes requests of one size for ten seconds, always waiting as told; returns how many passed.
    fn passed_in_ten_seconds(throttle: &mut Throttle, bytes: u64, is_write: bool) -> u64 {
        let (mut now, mut passed) = (Duration::ZERO, 0);
        while now < Duration::from_secs(10) {
            match throttle.admit(now, bytes, is_write) {
                Ok(()) => passed += 1,
                Err((wait, _)) => {
                    assert!(!wait.is_zero(), "a wait of nothing is a busy loop");
                    now += wait;
                }
            }
        }
        passed
    }

    proptest! {
        #[test]
        fn the_average_is_the_rate(rate_per_sec in 1u64..1_000_000_000, bytes in 1u64..1_000_000) {
            prop_assume!(rate_per_sec / bytes < 5_000);
            let mut throttle = Throttle::default();
            throttle.set_user(DiskLimits { bandwidth_bytes_per_sec: rate(rate_per_sec), ..Default::default() }, Duration::ZERO);
            let passed = passed_in_ten_seconds(&mut throttle, bytes, false) * bytes;
            let allowed = rate_per_sec * 10 + rate_per_sec / 10;
            prop_assert!(passed <= allowed + 2 * bytes, "{passed} of {allowed}");
            prop_assert!(passed + 2 * bytes + 1 >= rate_per_sec * 10, "{passed} of {allowed}");
        }
    }

    #[test]
    fn a_crossing_slows_writes_and_not_reads() {
        let mut throttle = Throttle::default();
        throttle.set_crossing(rate(10_000), Duration::ZERO);
        let (now, by) = loop {
            match throttle.admit(Duration::ZERO, 4096, true) {
                Ok(()) => {}
                Err(held) => break held,
            }
        };
        assert!(by == HeldBy::Crossing && now > Duration::ZERO);
        assert_eq!(throttle.admit(Duration::ZERO, 1 << 30, false), Ok(()));
        throttle.set_crossing(None, Duration::ZERO);
        assert!(throttle.is_unlimited());
    }

    #[test]
    fn operations_are_limited_whatever_their_size() {
        let mut throttle = Throttle::default();
        let limits = DiskLimits {
            operations_per_sec: rate(100),
            ..Default::default()
        };
        throttle.set_user(limits, Duration::ZERO);
        let passed = passed_in_ten_seconds(&mut throttle, 0, false);
        assert!((1_000..=1_012).contains(&passed), "{passed}");
    }

    #[test]
    fn raising_the_rate_helps_those_who_wait_already() {
        let mut throttle = Throttle::default();
        let limits = |n| DiskLimits {
            bandwidth_bytes_per_sec: rate(n),
            ..Default::default()
        };
        throttle.set_user(limits(1), Duration::ZERO);
        throttle.admit(Duration::ZERO, 1_000_000, false).unwrap();
        let (slow, _) = throttle.admit(Duration::ZERO, 1, false).unwrap_err();
        throttle.set_user(limits(10_000_000), Duration::ZERO);
        let (fast, _) = throttle.admit(Duration::ZERO, 1, false).unwrap_err();
        assert!(
            slow > Duration::from_secs(900_000) && fast < Duration::from_millis(110),
            "{slow:?} {fast:?}"
        );
    }

    #[test]
    fn a_clock_that_steps_back_and_huge_requests_do_no_harm() {
        let mut throttle = Throttle::default();
        throttle.set_user(
            DiskLimits {
                bandwidth_bytes_per_sec: rate(u64::MAX),
                ..Default::default()
            },
            Duration::MAX,
        );
        throttle.admit(Duration::ZERO, u64::MAX, true).unwrap();
        let _ = throttle.admit(Duration::MAX, u64::MAX, true);
    }
}
