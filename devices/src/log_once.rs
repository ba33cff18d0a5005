//! A guest can cause the same complaint a million times a second; the log gets it once, then at powers of ten.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counts a complaint and logs it the 1st, 10th, 100th, … time.
#[derive(Debug, Default)]
pub struct LogOnce {
    seen: AtomicU64,
}

impl LogOnce {
    pub const fn new() -> Self {
        Self {
            seen: AtomicU64::new(0),
        }
    }

    /// Logs a warning if this is a time to log. The text is only made when it is needed.
    pub fn warn(&self, text: impl FnOnce() -> String) {
        let count = self.seen.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if is_power_of_ten(count) {
            if count == 1 {
                tracing::warn!("{} (further ones are counted, not logged)", text());
            } else {
                tracing::warn!("{} (seen {count} times)", text());
            }
        }
    }

    /// How often it was seen.
    pub fn count(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

fn is_power_of_ten(mut n: u64) -> bool {
    while n >= 10 && n.is_multiple_of(10) {
        n /= 10;
    }
    n == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_complaints_make_seven_lines() {
        assert_eq!((1..=1_000_000u64).filter(|n| is_power_of_ten(*n)).count(), 7);
        let once = LogOnce::new();
        (0..1_000).for_each(|_| once.warn(String::new));
        assert_eq!(once.count(), 1_000);
    }
}
