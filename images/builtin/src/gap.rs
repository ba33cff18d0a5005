//! How long the vCPUs stood still: the longest time between when one expected to run and when it did.

use core::sync::atomic::{AtomicU64, Ordering};

static LATEST: AtomicU64 = AtomicU64::new(0);
static WORST: AtomicU64 = AtomicU64::new(0);

/// A vCPU that meant to be here at `due` is here at `now`.
pub fn passed(due: u64, now: u64) {
    let gap = now.saturating_sub(due);
    if gap > LATEST.load(Ordering::Relaxed) {
        LATEST.fetch_max(gap, Ordering::Relaxed);
        WORST.fetch_max(gap, Ordering::Relaxed);
    }
}

/// The longest since the last call, and the longest ever.
pub fn take() -> (u64, u64) {
    (LATEST.swap(0, Ordering::Relaxed), WORST.load(Ordering::Relaxed))
}
