//! How fast bytes may leave: a rate that can change at any time, as a pure function of the time it is given.

use std::time::Duration;

/// What may be caught up after a pause.
const BURST: Duration = Duration::from_millis(10);

/// Shared by all lanes of a crossing, so that the rate is the crossing's.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    bytes_per_sec: Option<u64>,
    /// When the next byte may leave.
    free_at: Duration,
}

impl Pace {
    pub fn new(bytes_per_sec: Option<u64>) -> Self {
        Pace {
            bytes_per_sec,
            free_at: Duration::ZERO,
        }
    }

    pub fn bytes_per_sec(&self) -> Option<u64> {
        self.bytes_per_sec
    }

    /// Changes the rate; what was already promised stands.
    pub fn set(&mut self, bytes_per_sec: Option<u64>) {
        self.bytes_per_sec = bytes_per_sec;
    }

    /// Books `bytes` and says how long to wait before sending them.
    pub fn book(&mut self, now: Duration, bytes: usize) -> Duration {
        let Some(rate) = self.bytes_per_sec else {
            self.free_at = now;
            return Duration::ZERO;
        };
        let begin = self.free_at.max(now.saturating_sub(BURST));
        let takes = bytes as u128 * 1_000_000_000 / u128::from(rate.max(1));
        self.free_at = begin + Duration::from_nanos(u64::try_from(takes).unwrap_or(u64::MAX / 4));
        begin.saturating_sub(now)
    }

    /// How much to send at once, so that the rate is even within a second and a change is felt soon.
    pub fn piece_bytes(&self) -> usize {
        match self.bytes_per_sec {
            None => usize::MAX,
            Some(rate) => (rate / 100).clamp(1500, 1 << 20) as usize,
        }
    }

    /// How many plain bytes a batch may have, so that a batch is a matter of tens of milliseconds.
    pub fn batch_bytes(&self, most: usize) -> usize {
        match self.bytes_per_sec {
            None => most,
            Some(rate) => usize::try_from(rate / 40).unwrap_or(usize::MAX).clamp(4096, most),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Sends pieces as fast as the pace allows and counts the bytes of each second.
    fn seconds(rate: u64, count: u64) -> Vec<u64> {
        let mut pace = Pace::new(Some(rate));
        let mut now = Duration::from_secs(100);
        let mut sent = vec![0u64; count as usize + 1];
        while now < Duration::from_secs(100 + count) {
            let piece = pace.piece_bytes();
            now += pace.book(now, piece);
            let second = now.as_secs() - 100;
            sent[second.min(count) as usize] += piece as u64;
        }
        sent.truncate(count as usize);
        sent
    }

    proptest! {
        #[test]
        fn every_second_is_within_five_percent(rate in 125_000u64..1_250_000_000) {
            for bytes in seconds(rate, 3) {
                let off = bytes.abs_diff(rate) as f64 / rate as f64;
                prop_assert!(off < 0.05, "{bytes} bytes in a second at {rate}");
            }
        }
    }

    #[test]
    fn a_new_rate_holds_at_once_and_a_pause_is_not_caught_up() {
        let mut pace = Pace::new(Some(1000));
        let start = Duration::from_secs(9);
        assert_eq!(pace.book(start, 10), Duration::ZERO);
        pace.set(Some(1_000_000));
        pace.book(start, 1000);
        let later = start + Duration::from_secs(60);
        let waits: Duration = (0..1000).map(|_| pace.book(later, 1000)).max().unwrap();
        assert!(waits > Duration::from_millis(980), "{waits:?}");
        pace.set(None);
        assert_eq!(pace.book(later, 1 << 30), Duration::ZERO);
    }
}
