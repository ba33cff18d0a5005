//! Does it pay? Measured time of making a page smaller against measured time of sending what was saved.

use std::time::Duration;

/// A running mean that follows changes within some ten samples.
#[derive(Clone, Copy, Debug)]
struct Mean {
    value: f64,
    known: bool,
}

impl Mean {
    const UNKNOWN: Mean = Mean {
        value: 0.0,
        known: false,
    };

    fn add(&mut self, sample: f64) {
        self.value = if self.known {
            self.value + (sample - self.value) / 8.0
        } else {
            sample
        };
        self.known = true;
    }
}

/// Every so many batches a little is compressed although it does not pay, to notice when it would.
const PROBE_EVERY: u32 = 32;

/// One way of making pages smaller, as measured.
#[derive(Clone, Copy, Debug)]
pub struct Method {
    nanos_per_byte: Mean,
    ratio: Mean,
}

impl Method {
    pub const fn new() -> Self {
        Method {
            nanos_per_byte: Mean::UNKNOWN,
            ratio: Mean::UNKNOWN,
        }
    }

    /// `before` bytes became `after` bytes in `time`.
    pub fn measured(&mut self, before: usize, after: usize, time: Duration) {
        if before > 0 {
            self.nanos_per_byte.add(time.as_nanos() as f64 / before as f64);
            self.ratio.add(after as f64 / before as f64);
        }
    }

    fn saves_time(&self, send_nanos_per_byte: f64) -> bool {
        self.nanos_per_byte.value < (1.0 - self.ratio.value) * send_nanos_per_byte
    }
}

impl Default for Method {
    fn default() -> Self {
        Method::new()
    }
}

/// What a lane's worker knows of its costs.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    pub lz4: Method,
    send: Mean,
    batches: u32,
}

impl Costs {
    pub const fn new() -> Self {
        Costs {
            lz4: Method::new(),
            send: Mean::UNKNOWN,
            batches: 0,
        }
    }

    /// Sending `bytes` took `time`, waiting for the pace included.
    pub fn sent(&mut self, bytes: usize, time: Duration) {
        if bytes > 0 {
            self.send.add(time.as_nanos() as f64 / bytes as f64);
        }
        self.batches = self.batches.wrapping_add(1);
    }

    /// Whether LZ4 makes this lane faster. Before anything was sent: no.
    pub fn lz4_pays(&self) -> bool {
        self.send.known && self.lz4.ratio.known && self.lz4.saves_time(self.send.value)
    }

    /// Whether a few units of this batch are compressed just to measure.
    pub fn probe_now(&self) -> bool {
        !self.lz4.ratio.known || self.batches.is_multiple_of(PROBE_EVERY)
    }
}

impl Default for Costs {
    fn default() -> Self {
        Costs::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn costs(lz4_nanos: u64, ratio: usize, send_nanos: u64) -> Costs {
        let mut costs = Costs::new();
        costs
            .lz4
            .measured(100, ratio, Duration::from_nanos(lz4_nanos * 100));
        costs.sent(1000, Duration::from_nanos(send_nanos * 1000));
        costs
    }

    #[test]
    fn a_slow_link_is_worth_compressing_for_and_a_fast_one_is_not() {
        assert!(costs(3, 50, 8).lz4_pays());
        assert!(!costs(3, 50, 1).lz4_pays());
        // What does not get smaller is never worth it.
        assert!(!costs(3, 100, 80).lz4_pays());
    }

    #[test]
    fn nothing_is_compressed_before_the_link_was_measured() {
        let mut costs = Costs::new();
        assert!(!costs.lz4_pays());
        assert!(costs.probe_now());
        costs.lz4.measured(100, 50, Duration::from_nanos(1));
        assert!(!costs.lz4_pays());
    }
}
