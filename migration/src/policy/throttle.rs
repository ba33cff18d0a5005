//! Who is slowed by how much: a policy says how much less the machine shall write, this says what that means for each vCPU.
//!
//! The vCPUs that write most are brought down to one level, and those below the level are left alone: a machine of which
//! one vCPU writes keeps the others at full speed, and one of which all write alike is slowed evenly.

use serde::{Deserialize, Serialize};

use super::{History, VcpuWrites};

/// Percentages are whole multiples of this: what was seen is not exact, and each change costs a word.
const STEP: u8 = 5;

/// One vCPU and how much it is slowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuThrottle {
    pub vcpu: u32,
    /// Of the time, in which it does not run.
    pub percent: u8,
}

/// Slowing the guest down.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Throttle {
    /// How much less the machine as a whole shall write. 0 ends throttling.
    pub percent: u8,
    /// Those that are slowed, and by how much; empty: all of them, by `percent`.
    pub vcpus: Vec<VcpuThrottle>,
}

impl Throttle {
    /// All vCPUs alike.
    pub fn all(percent: u8) -> Throttle {
        Throttle {
            percent,
            vcpus: Vec::new(),
        }
    }

    /// How much this vCPU is slowed.
    pub fn of(&self, vcpu: u32) -> u8 {
        if self.vcpus.is_empty() || self.percent == 0 {
            return self.percent;
        }
        let named = self.vcpus.iter().find(|named| named.vcpu == vcpu);
        named.map_or(0, |named| named.percent)
    }
}

/// Distributes `percent` over the vCPUs by what they write; none of them by more than `most`, and those that hardly write
/// not at all. All alike where nobody knows who writes.
pub fn spread(percent: u8, history: &History, most: u8) -> Throttle {
    let free: Vec<f64> = history.vcpus.iter().map(unslowed).collect();
    let all: f64 = free.iter().sum();
    if percent == 0 || !all.is_finite() || all <= 0.0 {
        return Throttle::all(percent);
    }
    // A tenth of what each would write if all wrote alike: nothing is gained there.
    let least = all / free.len() as f64 / 10.0;
    let wanted = all * (1.0 - f64::from(percent) / 100.0);
    let slowest = 1.0 - f64::from(most) / 100.0;
    let left = |level: f64| -> f64 {
        let of = |free: &f64| match *free < least {
            true => *free,
            false => free.min(level.max(free * slowest)),
        };
        free.iter().map(of).sum()
    };
    // What is left grows with the level: the highest that leaves no more than is wanted.
    let (mut low, mut high) = (0.0, free.iter().copied().fold(0.0, f64::max));
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        if left(middle) > wanted {
            high = middle;
        } else {
            low = middle;
        }
    }
    let mut vcpus = Vec::new();
    for (seen, free) in history.vcpus.iter().zip(free) {
        let needed = (1.0 - low / free.max(f64::MIN_POSITIVE)) * 100.0;
        // What is too much by a hair is no reason for a step more, and less than one per cent none for the first.
        if free < least || needed < 1.0 {
            continue;
        }
        let steps = ((needed - 0.01) / f64::from(STEP)).ceil() as u8;
        vcpus.push(VcpuThrottle {
            vcpu: seen.vcpu,
            percent: (steps * STEP).min(most),
        });
    }
    Throttle { percent, vcpus }
}

/// What it would write if it were not slowed.
fn unslowed(seen: &VcpuWrites) -> f64 {
    let rate = if seen.bytes_per_sec.is_finite() {
        seen.bytes_per_sec.max(0.0)
    } else {
        0.0
    };
    rate / (1.0 - f64::from(seen.throttle_percent.min(99)) / 100.0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn seen(rates: &[(f64, u8)]) -> History {
        let vcpus = (0..).zip(rates).map(|(vcpu, (rate, percent))| VcpuWrites {
            vcpu,
            bytes_per_sec: *rate,
            throttle_percent: *percent,
        });
        History {
            vcpus: vcpus.collect(),
            ..History::default()
        }
    }

    fn percents(throttle: &Throttle, vcpus: u32) -> Vec<u8> {
        (0..vcpus).map(|vcpu| throttle.of(vcpu)).collect()
    }

    #[test]
    fn one_writer_of_four_is_slowed_alone() {
        let history = seen(&[(1e3, 0), (2e3, 0), (4e7, 0), (0.0, 0)]);
        assert_eq!(percents(&spread(50, &history, 95), 4), [0, 0, 50, 0]);
        // It is slowed already, and writes so much the less for it.
        let history = seen(&[(1e3, 0), (2e3, 0), (2e7, 50), (0.0, 0)]);
        assert_eq!(percents(&spread(60, &history, 95), 4), [0, 0, 60, 0]);
    }

    #[test]
    fn equal_writers_are_slowed_alike_and_the_next_one_helps_where_the_first_may_not_be_slowed_more() {
        let history = seen(&[(1e6, 0), (1e6, 0), (1e6, 0), (0.0, 0)]);
        assert_eq!(percents(&spread(30, &history, 95), 4), [30, 30, 30, 0]);
        // 60 % of the first are 48 of the 50 that are wanted of all.
        let history = seen(&[(8e6, 0), (2e6, 0)]);
        assert_eq!(percents(&spread(50, &history, 60), 2), [60, 10]);
        // One that hardly writes does not help.
        let history = seen(&[(8e6, 0), (1e5, 0)]);
        assert_eq!(percents(&spread(60, &history, 60), 2), [60, 0]);
    }

    #[test]
    fn where_nobody_knows_who_writes_all_are_slowed() {
        for history in [seen(&[]), seen(&[(0.0, 0), (0.0, 0)]), seen(&[(f64::NAN, 0)])] {
            assert_eq!(spread(40, &history, 90), Throttle::all(40));
        }
        assert_eq!(percents(&Throttle::all(40), 2), [40, 40]);
        assert_eq!(percents(&Throttle::all(0), 2), [0, 0]);
    }

    proptest! {
        /// Never above what is allowed, hardly more left than was asked for, and who writes more is not slowed less.
        #[test]
        fn the_machine_writes_as_much_less_as_was_asked_for(
            rates in prop::collection::vec((0.0..1e9f64, 0..=99u8), 1..9),
            percent in 1..=99u8,
            most in 1..=99u8,
        ) {
            let history = seen(&rates);
            let percent = percent.min(most);
            let throttle = spread(percent, &history, most);
            let free: Vec<f64> = history.vcpus.iter().map(unslowed).collect();
            let of = |vcpu: usize| f64::from(throttle.of(vcpu as u32)) / 100.0;
            let left: f64 = free.iter().enumerate().map(|(at, free)| free * (1.0 - of(at))).sum();
            let all: f64 = free.iter().sum();
            // Nor are those that hardly write, nor by less than a per cent.
            let spared: f64 = free.iter().filter(|free| **free < all / rates.len() as f64 / 10.0).sum();
            let wanted = all * (1.0 - f64::from(percent) / 100.0 + 0.011);
            prop_assert!(left <= wanted + spared, "{throttle:?}");
            for at in 0..free.len() {
                prop_assert!(throttle.of(at as u32) <= most);
                for other in 0..free.len() {
                    prop_assert!(free[at] < free[other] || of(at) >= of(other), "{throttle:?} of {free:?}");
                }
            }
        }
    }
}
