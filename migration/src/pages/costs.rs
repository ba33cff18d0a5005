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

/// What a glance tells of a unit's content. What LZ4 costs and saves is measured for each apart: content that repeats
/// itself is worth compressing even for a link at which ordinary content is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    Repetitive,
    Ordinary,
}

impl Look {
    pub const ALL: [Look; 2] = [Look::Repetitive, Look::Ordinary];

    /// Compares neighbouring words at some places.
    pub fn at(content: &[u8]) -> Look {
        const PLACES: usize = 16;
        let stride = (content.len() / PLACES).max(16);
        let repeats = content
            .chunks(stride)
            .filter(|chunk| {
                let neighbours = chunk.get(..8).zip(chunk.get(8..16));
                neighbours.is_some_and(|(one, other)| one == other)
            })
            .count();
        if repeats * 4 >= PLACES {
            Look::Repetitive
        } else {
            Look::Ordinary
        }
    }
}

/// What a lane's worker knows of its costs.
#[derive(Clone, Copy, Debug)]
pub struct Costs {
    lz4: [Method; Look::ALL.len()],
    send: Mean,
    batches: u32,
}

impl Costs {
    pub const fn new() -> Self {
        Costs {
            lz4: [Method::new(); Look::ALL.len()],
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

    /// `before` bytes of this look became `after` bytes in `time`.
    pub fn compressed(&mut self, look: Look, before: usize, after: usize, time: Duration) {
        if let Some(method) = self.lz4.get_mut(look as usize) {
            method.measured(before, after, time);
        }
    }

    /// Whether LZ4 makes this lane faster for such content. Before anything was sent: no.
    pub fn lz4_pays(&self, look: Look) -> bool {
        let method = self.lz4.get(look as usize);
        self.send.known && method.is_some_and(|lz4| lz4.ratio.known && lz4.saves_time(self.send.value))
    }

    /// Whether a few units of this batch are compressed just to measure.
    pub fn probe_now(&self, look: Look) -> bool {
        let known = self.lz4.get(look as usize).is_some_and(|lz4| lz4.ratio.known);
        !known || self.batches.is_multiple_of(PROBE_EVERY)
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
        costs.compressed(Look::Ordinary, 100, ratio, Duration::from_nanos(lz4_nanos * 100));
        costs.sent(1000, Duration::from_nanos(send_nanos * 1000));
        costs
    }

    #[test]
    fn a_slow_link_is_worth_compressing_for_and_a_fast_one_is_not() {
        assert!(costs(3, 50, 8).lz4_pays(Look::Ordinary));
        assert!(!costs(3, 50, 1).lz4_pays(Look::Ordinary));
        // What does not get smaller is never worth it.
        assert!(!costs(3, 100, 80).lz4_pays(Look::Ordinary));
    }

    #[test]
    fn what_repeats_itself_is_judged_apart() {
        let mut costs = costs(3, 100, 1);
        costs.compressed(Look::Repetitive, 1000, 20, Duration::from_nanos(300));
        assert!(costs.lz4_pays(Look::Repetitive));
        assert!(!costs.lz4_pays(Look::Ordinary));
    }

    #[test]
    fn nothing_is_compressed_before_the_link_was_measured() {
        let mut costs = Costs::new();
        assert!(!costs.lz4_pays(Look::Ordinary));
        assert!(costs.probe_now(Look::Ordinary));
        costs.compressed(Look::Ordinary, 100, 50, Duration::from_nanos(1));
        assert!(!costs.lz4_pays(Look::Ordinary));
    }

    #[test]
    fn a_glance_tells_repetition_from_noise() {
        let mut page = vec![7u8; 4096];
        page[..40].fill(1);
        assert_eq!(Look::at(&page), Look::Repetitive);
        let half: Vec<u8> = (0..4096u32)
            .map(|i| if i < 2048 { ((i * i) >> 3) as u8 } else { 0 })
            .collect();
        assert_eq!(Look::at(&half), Look::Repetitive);
        let noise: Vec<u8> = (0..4096u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect();
        assert_eq!(Look::at(&noise), Look::Ordinary);
        assert_eq!(Look::at(&[]), Look::Ordinary);
    }
}
