//! Where a vCPU thread asks what it may do, and waits while it may not run.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Wish {
    Park = 0,
    Run = 1,
    Quit = 2,
}

/// One per vCPU. The wish is an atomic because the vCPU's loop reads it at every exit.
pub(super) struct Gate {
    wish: AtomicU8,
    parked: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    pub(super) fn new() -> Gate {
        Gate {
            wish: AtomicU8::new(Wish::Park as u8),
            parked: Mutex::new(false),
            changed: Condvar::new(),
        }
    }

    pub(super) fn wish(&self) -> Wish {
        match self.wish.load(Ordering::SeqCst) {
            1 => Wish::Run,
            2 => Wish::Quit,
            _ => Wish::Park,
        }
    }

    fn lock(&self) -> MutexGuard<'_, bool> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what the thread shall do. Quit is final.
    pub(super) fn set(&self, wish: Wish) {
        let _parked = self.lock();
        if self.wish() != Wish::Quit {
            self.wish.store(wish as u8, Ordering::SeqCst);
        }
        self.changed.notify_all();
    }

    /// The thread's side: says that it has stopped, and waits for a wish other than Park.
    pub(super) fn park(&self) -> Wish {
        let mut parked = self.lock();
        *parked = true;
        self.changed.notify_all();
        while self.wish() == Wish::Park {
            parked = self.changed.wait(parked).unwrap_or_else(PoisonError::into_inner);
        }
        *parked = false;
        self.wish()
    }

    /// The thread's side: sleeps for `nap`, or until it shall do something else than run.
    pub(super) fn nap(&self, nap: Duration) {
        let end = Instant::now() + nap;
        let mut guard = self.lock();
        while self.wish() == Wish::Run {
            let Some(left) = end
                .checked_duration_since(Instant::now())
                .filter(|d| !d.is_zero())
            else {
                return;
            };
            guard = self
                .changed
                .wait_timeout(guard, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// The thread has ended: whoever waits for it to park need not wait longer.
    pub(super) fn gone(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    /// Waits until the thread has stopped; false when it has not in time.
    pub(super) fn wait_parked(&self, until: Instant) -> bool {
        let mut parked = self.lock();
        while !*parked {
            let Some(left) = until
                .checked_duration_since(Instant::now())
                .filter(|d| !d.is_zero())
            else {
                return false;
            };
            parked = self
                .changed
                .wait_timeout(parked, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_nap_ends_at_once_when_the_wish_changes() {
        let gate = Arc::new(Gate::new());
        gate.set(Wish::Run);
        let other = gate.clone();
        let begun = Instant::now();
        let sleeper = std::thread::spawn(move || other.nap(Duration::from_secs(30)));
        gate.set(Wish::Park);
        sleeper.join().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn nobody_waits_for_a_thread_that_has_gone_and_quit_is_final() {
        let gate = Gate::new();
        assert!(!gate.wait_parked(Instant::now() + Duration::from_millis(5)));
        gate.gone();
        assert!(gate.wait_parked(Instant::now()));
        gate.set(Wish::Quit);
        gate.set(Wish::Run);
        assert_eq!(gate.wish(), Wish::Quit);
    }
}
