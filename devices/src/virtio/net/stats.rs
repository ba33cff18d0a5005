//! What a network device has carried: totals and smoothed rates, as plain numbers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The rates follow a change within some of these.
const MEMORY: Duration = Duration::from_secs(1);

/// Seen from the guest: received is what went into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetTotals {
    pub received_bytes: u64,
    pub received_packets: u64,
    /// Read from the host and not deliverable: too long for the guest's buffers, or malformed.
    pub received_dropped: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
    /// Taken from the guest and not sent: malformed, refused by the host, link down.
    pub sent_dropped: u64,
}

/// A policy reads from this how much of the link the service itself uses.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct NetStats {
    pub totals: NetTotals,
    pub received_bytes_per_sec: f64,
    pub received_packets_per_sec: f64,
    pub sent_bytes_per_sec: f64,
    pub sent_packets_per_sec: f64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    received_bytes: AtomicU64,
    received_packets: AtomicU64,
    received_dropped: AtomicU64,
    sent_bytes: AtomicU64,
    sent_packets: AtomicU64,
    sent_dropped: AtomicU64,
}

impl Counters {
    /// Adds what one batch did.
    pub(super) fn add(&self, batch: NetTotals) {
        let NetTotals {
            received_bytes,
            received_packets,
            received_dropped,
            sent_bytes,
            sent_packets,
            sent_dropped,
        } = batch;
        let add = |counter: &AtomicU64, by: u64| {
            if by != 0 {
                counter.fetch_add(by, Ordering::Relaxed);
            }
        };
        add(&self.received_bytes, received_bytes);
        add(&self.received_packets, received_packets);
        add(&self.received_dropped, received_dropped);
        add(&self.sent_bytes, sent_bytes);
        add(&self.sent_packets, sent_packets);
        add(&self.sent_dropped, sent_dropped);
    }

    pub(super) fn totals(&self) -> NetTotals {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetTotals {
            received_bytes: get(&self.received_bytes),
            received_packets: get(&self.received_packets),
            received_dropped: get(&self.received_dropped),
            sent_bytes: get(&self.sent_bytes),
            sent_packets: get(&self.sent_packets),
            sent_dropped: get(&self.sent_dropped),
        }
    }
}

/// Turns totals, looked at from time to time, into rates. Whoever looks often sees them smoothed over a second;
/// whoever looks rarely sees the average since he last looked.
#[derive(Debug, Default)]
pub(super) struct Meter {
    last: Option<(Duration, NetTotals)>,
    rates: [f64; 4],
}

impl Meter {
    pub(super) fn look(&mut self, now: Duration, totals: NetTotals) -> NetStats {
        let of = |t: &NetTotals| [t.received_bytes, t.received_packets, t.sent_bytes, t.sent_packets];
        match self.last {
            None => self.last = Some((now, totals)),
            Some((then, before)) if now > then => {
                let elapsed = (now - then).as_secs_f64();
                let weight = 1.0 - (-elapsed / MEMORY.as_secs_f64()).exp();
                for ((rate, new), old) in self.rates.iter_mut().zip(of(&totals)).zip(of(&before)) {
                    let current = new.saturating_sub(old) as f64 / elapsed;
                    *rate += (current - *rate) * weight;
                }
                self.last = Some((now, totals));
            }
            Some(_) => {}
        }
        let [
            received_bytes_per_sec,
            received_packets_per_sec,
            sent_bytes_per_sec,
            sent_packets_per_sec,
        ] = self.rates;
        NetStats {
            totals,
            received_bytes_per_sec,
            received_packets_per_sec,
            sent_bytes_per_sec,
            sent_packets_per_sec,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_flow_is_seen_as_its_rate_however_often_one_looks() {
        for period_ms in [1, 10, 100, 1_000, 7_000] {
            let mut meter = Meter::default();
            let mut stats = NetStats::default();
            for step in 0..=(20_000 / period_ms) {
                let ms = step * period_ms;
                let totals = NetTotals {
                    sent_bytes: ms * 5_000,
                    received_packets: ms * 2,
                    ..NetTotals::default()
                };
                stats = meter.look(Duration::from_millis(ms), totals);
            }
            assert!(
                (stats.sent_bytes_per_sec - 5_000_000.0).abs() < 10_000.0,
                "{period_ms} ms: {stats:?}"
            );
            assert!((stats.received_packets_per_sec - 2_000.0).abs() < 10.0);
        }
    }

    #[test]
    fn a_flow_that_ends_is_forgotten_within_seconds() {
        let mut meter = Meter::default();
        let mut sent = 0;
        for step in 0..200u64 {
            if step < 100 {
                sent += 1_000;
            }
            let totals = NetTotals {
                sent_bytes: sent,
                ..NetTotals::default()
            };
            let stats = meter.look(Duration::from_millis(step * 100), totals);
            if step == 99 {
                assert!(stats.sent_bytes_per_sec > 9_900.0);
            }
            if step == 150 {
                assert!(stats.sent_bytes_per_sec < 100.0, "{stats:?}");
            }
        }
    }

    #[test]
    fn looking_twice_at_one_instant_does_no_harm() {
        let mut meter = Meter::default();
        let totals = NetTotals::default();
        meter.look(Duration::from_secs(1), totals);
        let stats = meter.look(Duration::from_secs(1), totals);
        assert!(stats.sent_bytes_per_sec.is_finite());
    }
}
