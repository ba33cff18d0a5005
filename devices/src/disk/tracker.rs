//! Which 64 KiB clusters of a disk were written since somebody last asked.
//!
//! # On writes in flight
//!
//! A crossing copies the disk while the guest writes to it. It takes the dirty clusters (which clears them), reads
//! them, sends them, and asks again. Nothing is lost only if every write is seen as dirty by some `take` whose
//! reader then finds the written bytes in the file. So think of one write and one take:
//!
//! ```text
//!   writer:   mark ──── submit ─ ─ ─ (the bytes land some time) ─ ─ ─ complete ──── mark ── tell the guest
//!   copier:         take ──────────── read the cluster ──── send
//! ```
//!
//! Marking only before the write loses it: the take above clears the mark, the read finds the old bytes, and
//! nothing ever says that the cluster changed afterwards. Therefore a write marks **again when it has completed**.
//! Whatever the copier read before that moment, the next take sees the cluster, and its reader finds the bytes,
//! for they had landed before the mark. This second mark is what makes the copy right, and it is set whether the
//! write succeeded or failed: a write that failed may have changed a part of what it covers.
//!
//! The mark before is for honesty, not for correctness: it lets `count` include what is on its way, so that a
//! policy does not think the disk quiet while a queue full of writes is on the device.
//!
//! The last take comes after the device has stopped. Stopping drains: every write has completed, and so has marked.
//! A take before that can never be the last one.
//!
//! Switching on has its own race. The copier switches on, then reads; the writer's bytes land, then it looks
//! whether it must mark. If the writer saw "off" and the copier read old bytes, the write would be lost. Both
//! sides put a sequentially consistent fence between their two steps, so at least one of them sees the other:
//! either the writer sees "on" and marks, or its bytes were there before the copier began to read.
//!
//! Discards and zeroed ranges are writes like any other here. What the cluster has become, data or a hole, the
//! copier reads from the map of areas.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

pub const CLUSTER_SIZE: u64 = 64 * 1024;

/// Dirty clusters of one disk. Off until somebody starts it.
#[derive(Debug)]
pub struct WriteTracker {
    clusters: u64,
    on: AtomicBool,
    /// Made when first switched on: a disk that never crosses pays nothing.
    words: OnceLock<Vec<AtomicU64>>,
}

impl WriteTracker {
    pub fn new(disk_size: u64) -> Self {
        Self {
            clusters: disk_size.div_ceil(CLUSTER_SIZE),
            on: AtomicBool::new(false),
            words: OnceLock::new(),
        }
    }

    /// How many clusters the disk has.
    pub fn clusters(&self) -> u64 {
        self.clusters
    }

    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::SeqCst)
    }

    /// Starts afresh: nothing is dirty, and every write from now on is. Read the disk only after this returns.
    pub fn start(&self) {
        let words = self.words();
        words.iter().for_each(|word| word.store(0, Ordering::SeqCst));
        self.on.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
    }

    /// Stops and forgets.
    pub fn stop(&self) {
        self.on.store(false, Ordering::SeqCst);
        self.words()
            .iter()
            .for_each(|word| word.store(0, Ordering::Relaxed));
    }

    /// Marks the clusters that these bytes touch. Call before a write is submitted and after it has completed.
    pub fn mark(&self, offset: u64, len: u64) {
        fence(Ordering::SeqCst);
        if len == 0 || !self.on.load(Ordering::SeqCst) {
            return;
        }
        let first = offset / CLUSTER_SIZE;
        let end = offset.saturating_add(len).div_ceil(CLUSTER_SIZE);
        self.set(first..end);
    }

    /// Takes what is dirty, as runs of neighbouring clusters in rising order, and clears it. The caller delivers it
    /// or puts it back.
    pub fn take(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (index, word) in self.words().iter().enumerate() {
            // Most words are clean; a load is cheaper than a swap.
            if word.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::AcqRel);
            let base = index as u64 * 64;
            while bits != 0 {
                let start = u64::from(bits.trailing_zeros());
                let len = u64::from((!(bits >> start)).trailing_zeros());
                push(&mut runs, base + start..base + start + len);
                bits &= u64::MAX.checked_shl((start + len) as u32).unwrap_or(0);
            }
        }
        // What read the bitmap also reads the disk, and must not do so too early.
        fence(Ordering::SeqCst);
        runs
    }

    /// Marks what was taken and not delivered.
    pub fn put_back(&self, clusters: impl IntoIterator<Item = Range<u64>>) {
        clusters.into_iter().for_each(|run| self.set(run));
    }

    /// How many clusters are dirty now.
    pub fn count(&self) -> u64 {
        let words = self.words().iter();
        words
            .map(|word| u64::from(word.load(Ordering::Relaxed).count_ones()))
            .sum()
    }

    fn set(&self, run: Range<u64>) {
        let words = self.words();
        let end = run.end.min(self.clusters);
        let mut at = run.start;
        while at < end {
            let bit = at % 64;
            let len = (64 - bit).min(end - at);
            let mask = (u64::MAX >> (64 - len)) << bit;
            if let Some(word) = words.get((at / 64) as usize) {
                word.fetch_or(mask, Ordering::AcqRel);
            }
            at += len;
        }
    }

    fn words(&self) -> &[AtomicU64] {
        let make = || {
            (0..self.clusters.div_ceil(64))
                .map(|_| AtomicU64::new(0))
                .collect()
        };
        self.words.get_or_init(make)
    }
}

fn push(runs: &mut Vec<Range<u64>>, next: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ => runs.push(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn flat(runs: &[Range<u64>]) -> BTreeSet<u64> {
        runs.iter().cloned().flatten().collect()
    }

    proptest! {
        #[test]
        fn the_tracker_is_a_set_of_clusters(
            size in 1u64..40_000_000,
            writes in prop::collection::vec((0u64..40_000_000, 0u64..9_000_000), 0..20),
        ) {
            let tracker = WriteTracker::new(size);
            tracker.start();
            let mut model = BTreeSet::new();
            for (offset, len) in writes {
                tracker.mark(offset, len);
                let touched = (offset..offset + len).step_by(CLUSTER_SIZE as usize).map(|byte| byte / CLUSTER_SIZE);
                let last = (len > 0).then(|| (offset + len - 1) / CLUSTER_SIZE);
                model.extend(touched.chain(last).filter(|cluster| *cluster < size.div_ceil(CLUSTER_SIZE)));
            }
            prop_assert_eq!(tracker.count(), model.len() as u64);
            let taken = tracker.take();
            prop_assert_eq!(&flat(&taken), &model);
            prop_assert!(taken.windows(2).all(|pair| pair[0].end < pair[1].start), "runs are merged and in order");
            prop_assert_eq!(tracker.count(), 0);
            tracker.put_back(taken);
            prop_assert_eq!(flat(&tracker.take()), model);
        }
    }

    #[test]
    fn what_was_written_while_off_is_not_dirty_and_starting_again_forgets() {
        let tracker = WriteTracker::new(10 * CLUSTER_SIZE);
        tracker.mark(0, 1);
        assert!(tracker.take().is_empty());
        tracker.start();
        tracker.mark(CLUSTER_SIZE - 1, 2);
        tracker.start();
        assert_eq!(tracker.count(), 0);
        tracker.mark(u64::MAX - 5, u64::MAX);
        assert_eq!(
            tracker.count(),
            0,
            "past the end of the disk there is nothing to mark"
        );
    }

    /// The fear: a write in flight while its cluster is taken is never seen again. A file stands for the disk; the
    /// writer counts up in one cluster, the copier follows what the tracker says, and at the end both must agree.
    #[test]
    fn a_cluster_taken_while_a_write_is_in_flight_is_dirty_again_after_it() {
        use std::sync::atomic::AtomicU64 as Cell;
        let disk: Vec<Cell> = (0..128).map(|_| Cell::new(0)).collect();
        let tracker = WriteTracker::new(128 * CLUSTER_SIZE);
        let mut copy = vec![0u64; 128];
        let copy_dirty = |copy: &mut Vec<u64>| {
            for cluster in tracker.take().into_iter().flatten() {
                copy[cluster as usize] = disk[cluster as usize].load(Ordering::Relaxed);
            }
        };
        std::thread::scope(|scope| {
            tracker.start();
            let writer = scope.spawn(|| {
                for n in 1..200_000u64 {
                    let cluster = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 57;
                    tracker.mark(cluster * CLUSTER_SIZE, 1);
                    disk[cluster as usize].store(n, Ordering::Relaxed);
                    tracker.mark(cluster * CLUSTER_SIZE, 1);
                }
            });
            while !writer.is_finished() {
                copy_dirty(&mut copy);
            }
        });
        copy_dirty(&mut copy);
        let disk: Vec<u64> = disk.iter().map(|cell| cell.load(Ordering::Relaxed)).collect();
        assert_eq!(copy, disk);
    }
}
