//! How much each vCPU wrote lately, from counts that only grow.
//!
//! The counts are believed while they explain at least half of what was found written in memory. On some hosts the
//! processor notes writes by itself, and what is counted has little to do with them.

use std::time::Duration;

use crate::policy::{Throttle, VcpuWrites};

/// Shorter than this says little of a vCPU that writes in bursts,
const WINDOW: Duration = Duration::from_secs(1);
/// but is better than nothing.
const FIRST_WINDOW: Duration = Duration::from_millis(100);
const PAGE_BYTES: u64 = 4096;

#[derive(Default)]
pub(super) struct Writers {
    /// Pages counted and bytes found when it was asked first.
    first: Option<(u64, u64)>,
    /// The count of pages of each vCPU when the window began.
    since: Option<(Duration, Vec<u64>)>,
    seen: Vec<VcpuWrites>,
}

impl Writers {
    /// Asks for the counts when a window ends; `throttle` was in force in it. `found`: how many bytes of memory were found
    /// written so far, which only grows too.
    pub(super) fn look(
        &mut self,
        now: Duration,
        throttle: &Throttle,
        found: u64,
        pages: impl FnOnce() -> Option<Vec<u64>>,
    ) -> Vec<VcpuWrites> {
        let began = self.since.as_ref().map(|(began, _)| *began);
        let window = if self.seen.is_empty() {
            FIRST_WINDOW
        } else {
            WINDOW
        };
        if began.is_some_and(|began| now.saturating_sub(began) < window) {
            return self.seen.clone();
        }
        let Some(pages) = pages() else {
            *self = Writers::default();
            return Vec::new();
        };
        let all: u64 = pages.iter().sum();
        let (counted_first, found_first) = *self.first.get_or_insert((all, found));
        let counted = all.saturating_sub(counted_first).saturating_mul(PAGE_BYTES);
        if counted.saturating_mul(2) < found.saturating_sub(found_first) {
            self.seen.clear();
        } else if let Some((began, before)) = &self.since {
            let secs = now.saturating_sub(*began).as_secs_f64();
            let counts = (0..).zip(pages.iter().zip(before));
            self.seen = counts
                .map(|(vcpu, (now, before))| VcpuWrites {
                    vcpu,
                    bytes_per_sec: (now.saturating_sub(*before) * PAGE_BYTES) as f64 / secs,
                    throttle_percent: throttle.of(vcpu),
                })
                .collect();
        }
        self.since = Some((now, pages));
        self.seen.clone()
    }

    /// The throttle changes: what is seen from now on belongs to the new one.
    pub(super) fn throttle_changes(&mut self) {
        self.since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_whole_windows_under_one_throttle() {
        let at = Duration::from_millis;
        let mut writers = Writers::default();
        let none = Throttle::default();
        assert_eq!(writers.look(at(0), &none, 0, || Some(vec![100, 0])), []);
        assert_eq!(writers.look(at(50), &none, 0, || panic!("too early")), []);
        let seen = writers.look(at(2000), &none, 0, || Some(vec![100, 2000]));
        assert_eq!(writers.look(at(2500), &none, 0, || panic!("too early")), seen);
        assert_eq!(
            seen.iter().map(|v| v.bytes_per_sec).collect::<Vec<_>>(),
            [0.0, 4_096_000.0]
        );
        writers.throttle_changes();
        let slowed = Throttle::all(50);
        // What was written in between is of neither.
        assert_eq!(writers.look(at(2100), &slowed, 0, || Some(vec![900, 9000])), seen);
        let seen = writers.look(at(3100), &slowed, 0, || Some(vec![900, 9500]));
        assert_eq!(
            (seen[1].bytes_per_sec, seen[1].throttle_percent),
            (2_048_000.0, 50)
        );
        assert_eq!(writers.look(at(9000), &slowed, 0, || None), []);
    }

    #[test]
    fn counts_that_explain_little_are_not_believed() {
        let at = Duration::from_secs;
        let mut writers = Writers::default();
        let none = Throttle::default();
        let pages = |pages: u64| pages * 4096;
        assert_eq!(writers.look(at(0), &none, pages(500), || Some(vec![0, 0])), []);
        assert_eq!(writers.look(at(1), &none, pages(900), || Some(vec![10, 100])), []);
        // 210 of the 400 that were found since.
        assert_eq!(
            writers
                .look(at(2), &none, pages(900), || Some(vec![10, 200]))
                .len(),
            2
        );
        assert_eq!(
            writers.look(at(3), &none, pages(1900), || Some(vec![10, 300])),
            []
        );
    }
}
