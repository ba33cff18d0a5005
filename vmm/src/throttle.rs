//! Slowing a guest down: a thread that gets throttled vCPUs out of the guest at regular times, so that each takes its nap.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::vcpu::{Napper, THROTTLE_PERIOD, Vcpu};

/// Exists only as long as there is something to slow down.
#[derive(Default)]
pub(crate) struct Throttle(Arc<Shared>);

#[derive(Default)]
struct Shared {
    percent: AtomicU8,
    nappers: Mutex<Vec<Napper>>,
    pacing: Mutex<bool>,
    changed: Condvar,
}

impl Throttle {
    /// Other vCPUs from now on; they get the same throttle.
    pub(crate) fn watch(&self, vcpus: &[Vcpu]) {
        let percent = self.0.percent.load(Ordering::Acquire);
        let nappers: Vec<Napper> = vcpus.iter().map(Vcpu::napper).collect();
        nappers.iter().for_each(|napper| napper.set_throttle(percent));
        *self.0.nappers.lock().unwrap_or_else(PoisonError::into_inner) = nappers;
    }

    pub(crate) fn set(&self, percent: u8) {
        let percent = percent.min(99);
        self.0.percent.store(percent, Ordering::Release);
        self.0
            .nappers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .for_each(|n| n.set_throttle(percent));
        self.0.changed.notify_all();
        let mut pacing = self.0.pacing.lock().unwrap_or_else(PoisonError::into_inner);
        if percent > 0 && !*pacing {
            let shared = self.0.clone();
            let begun = std::thread::Builder::new()
                .name("throttle".into())
                .stack_size(128 << 10)
                .spawn(move || shared.pace());
            match begun {
                Ok(_) => *pacing = true,
                Err(error) => {
                    tracing::warn!("the guest is not slowed down, no thread could be started: {error}")
                }
            }
        }
    }
}

impl Shared {
    fn pace(&self) {
        let mut pacing = self.pacing.lock().unwrap_or_else(PoisonError::into_inner);
        while self.percent.load(Ordering::Acquire) > 0 {
            pacing = self
                .changed
                .wait_timeout(pacing, THROTTLE_PERIOD)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            self.nappers
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .for_each(Napper::kick);
        }
        *pacing = false;
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.set(0);
    }
}
