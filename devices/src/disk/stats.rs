//! What a disk has done, as plain numbers.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Everything since the disk was opened here. Requests count when they have completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskStats {
    pub reads: u64,
    pub read_bytes: u64,
    pub writes: u64,
    pub written_bytes: u64,
    pub flushes: u64,
    pub discards: u64,
    pub discarded_bytes: u64,
    pub zeroings: u64,
    pub zeroed_bytes: u64,
    pub errors: u64,
    /// How long requests waited because of the user's limits.
    pub held_by_limits: Duration,
    /// How long requests waited because a crossing slowed the guest's writes.
    pub held_by_crossing: Duration,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) reads: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) written_bytes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) discarded_bytes: AtomicU64,
    pub(crate) zeroings: AtomicU64,
    pub(crate) zeroed_bytes: AtomicU64,
    pub(crate) errors: AtomicU64,
    pub(crate) by_limits: Waiting,
    pub(crate) by_crossing: Waiting,
}

impl Counters {
    pub(crate) fn snapshot(&self, now: Duration) -> DiskStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DiskStats {
            reads: get(&self.reads),
            read_bytes: get(&self.read_bytes),
            writes: get(&self.writes),
            written_bytes: get(&self.written_bytes),
            flushes: get(&self.flushes),
            discards: get(&self.discards),
            discarded_bytes: get(&self.discarded_bytes),
            zeroings: get(&self.zeroings),
            zeroed_bytes: get(&self.zeroed_bytes),
            errors: get(&self.errors),
            held_by_limits: self.by_limits.total(now),
            held_by_crossing: self.by_crossing.total(now),
        }
    }
}

/// The time during which at least one queue was held. Two queues held at once lose the guest that time once.
#[derive(Debug, Default)]
pub(crate) struct Waiting {
    state: Mutex<WaitingState>,
}

#[derive(Debug, Default)]
struct WaitingState {
    waiters: u32,
    since: Duration,
    total: Duration,
}

impl Waiting {
    pub(crate) fn begin(&self, now: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.waiters == 0 {
            state.since = now;
        }
        state.waiters += 1;
    }

    pub(crate) fn end(&self, now: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.waiters = state.waiters.saturating_sub(1);
        if state.waiters == 0 {
            let held = now.saturating_sub(state.since);
            state.total += held;
        }
    }

    fn total(&self, now: Duration) -> Duration {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let running = if state.waiters > 0 {
            now.saturating_sub(state.since)
        } else {
            Duration::ZERO
        };
        state.total + running
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_queues_held_at_once_count_once() {
        let waiting = Waiting::default();
        let at = Duration::from_secs;
        waiting.begin(at(1));
        waiting.begin(at(2));
        waiting.end(at(4));
        assert_eq!(waiting.total(at(5)), at(4));
        waiting.end(at(6));
        assert_eq!(waiting.total(at(9)), at(5));
    }
}
