//! Counts durations in buckets that are at most one percent wide, so that percentiles need no list of all values.

use std::time::Duration;

/// 64 buckets for each power of two of microseconds.
const SUB_BITS: u32 = 6;
const SUB: u64 = 1 << SUB_BITS;
/// Up to 2^36 us, which is 19 hours; longer ones are counted there.
const BUCKETS: usize = ((36 - SUB_BITS as usize) << SUB_BITS) + SUB as usize;

#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    count: u64,
    sum_us: u128,
    min: Duration,
    max: Duration,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            counts: vec![0; BUCKETS],
            count: 0,
            sum_us: 0,
            min: Duration::MAX,
            max: Duration::ZERO,
        }
    }
}

fn bucket(us: u64) -> usize {
    let shift = (u64::BITS - us.leading_zeros()).saturating_sub(SUB_BITS + 1);
    let index = (u64::from(shift) << SUB_BITS) + (us >> shift);
    (index as usize).min(BUCKETS - 1)
}

/// The middle of a bucket.
fn value_us(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let shift = (bucket >> SUB_BITS).saturating_sub(1);
    let low = (bucket - (shift << SUB_BITS)) << shift;
    low + ((1u64 << shift) >> 1)
}

impl Histogram {
    pub fn record(&mut self, value: Duration) {
        let us = u64::try_from(value.as_micros()).unwrap_or(u64::MAX);
        if let Some(count) = self.counts.get_mut(bucket(us)) {
            *count += 1;
        }
        self.count += 1;
        self.sum_us += u128::from(us);
        self.min = self.min.min(value);
        self.max = self.max.max(value);
    }

    pub fn merge(&mut self, other: &Histogram) {
        for (to, from) in self.counts.iter_mut().zip(&other.counts) {
            *to += from;
        }
        self.count += other.count;
        self.sum_us += other.sum_us;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn max(&self) -> Option<Duration> {
        (self.count > 0).then_some(self.max)
    }

    pub fn mean(&self) -> Option<Duration> {
        let mean = self.sum_us.checked_div(u128::from(self.count))?;
        Some(Duration::from_micros(mean as u64))
    }

    /// The value below which this share (0..=1) of all values lies. None: nothing was recorded.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        if self.count == 0 {
            return None;
        }
        let rank = (share.clamp(0.0, 1.0) * self.count as f64).ceil().max(1.0) as u64;
        let mut below = 0;
        for (index, count) in self.counts.iter().enumerate() {
            below += count;
            if below >= rank {
                return Some(Duration::from_micros(value_us(index)).clamp(self.min, self.max));
            }
        }
        Some(self.max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_falls_into_a_bucket_within_one_percent_of_it() {
        let mut last = 0;
        for us in (0..200_000u64).chain((18..35).map(|bits| (1u64 << bits) + 12_345)) {
            let index = bucket(us);
            assert!(index >= last, "buckets grow with the value");
            last = index;
            let error = value_us(index).abs_diff(us);
            assert!(error * 100 <= us, "{us} us is counted as {} us", value_us(index));
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_are_those_of_the_sorted_list() {
        let mut h = Histogram::default();
        let values: Vec<u64> = (0..10_000u64).map(|i| (i * 7919) % 10_007 * 13).collect();
        for v in &values {
            h.record(Duration::from_micros(*v));
        }
        let mut sorted = values;
        sorted.sort_unstable();
        for share in [0.0, 0.01, 0.5, 0.9, 0.99, 0.999, 1.0] {
            let rank = ((share * 10_000.0) as usize).clamp(1, 10_000);
            let exact = sorted[rank - 1] as f64;
            let got = h.quantile(share).unwrap().as_micros() as f64;
            assert!(
                (got - exact).abs() <= exact * 0.01 + 1.0,
                "{share}: {got} for {exact}"
            );
        }
        assert_eq!(h.quantile(1.0), h.max());
        assert_eq!(Histogram::default().quantile(0.5), None);
    }

    #[test]
    fn merging_is_the_same_as_recording_in_one() {
        let (mut one, mut left, mut right) =
            (Histogram::default(), Histogram::default(), Histogram::default());
        for i in 0..1000u64 {
            let value = Duration::from_micros(i * i);
            one.record(value);
            if i % 3 == 0 { &mut left } else { &mut right }.record(value);
        }
        left.merge(&right);
        assert_eq!(left.count(), one.count());
        assert_eq!(left.quantile(0.9), one.quantile(0.9));
        assert_eq!(left.mean(), one.mean());
    }
}
