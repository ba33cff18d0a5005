//! Slowing a guest down: a thread that gets throttled vCPUs out of the guest at regular times, so that each takes its nap.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::vcpu::{Napper, THROTTLE_PERIOD, Vcpu};

/// Exists only as long as there is something to slow down.
#[derive(Default)]
pub(crate) struct Throttle(Arc<Shared>);

#[derive(Default)]
struct Shared {
    slowing: Mutex<Slowing>,
    changed: Condvar,
}

#[derive(Default)]
struct Slowing {
    /// By vCPU, in per cent of the time; those beyond the list run freely.
    percents: Vec<u8>,
    nappers: Vec<Napper>,
    /// The thread is there.
    paced: bool,
}

impl Slowing {
    fn percent(&self, vcpu: usize) -> u8 {
        self.percents.get(vcpu).copied().unwrap_or(0).min(99)
    }

    /// Those that are slowed.
    fn slowed(&self) -> impl Iterator<Item = &Napper> {
        let all = self.nappers.iter().enumerate();
        all.filter(|(vcpu, _)| self.percent(*vcpu) > 0)
            .map(|(_, napper)| napper)
    }

    fn tell(&self) {
        for (vcpu, napper) in self.nappers.iter().enumerate() {
            napper.set_throttle(self.percent(vcpu));
        }
    }
}

impl Throttle {
    /// Other vCPUs from now on; they get the same throttle.
    pub(crate) fn watch(&self, vcpus: &[Vcpu]) {
        let mut slowing = self.0.lock();
        slowing.nappers = vcpus.iter().map(Vcpu::napper).collect();
        slowing.tell();
    }

    pub(crate) fn set(&self, percents: &[u8]) {
        let mut slowing = self.0.lock();
        slowing.percents = percents.to_vec();
        slowing.tell();
        self.0.changed.notify_all();
        if percents.iter().any(|percent| *percent > 0) && !slowing.paced {
            let shared = self.0.clone();
            let begun = std::thread::Builder::new()
                .name("throttle".into())
                .stack_size(128 << 10)
                .spawn(move || shared.pace());
            match begun {
                Ok(_) => slowing.paced = true,
                Err(error) => {
                    tracing::warn!("the guest is not slowed down, no thread could be started: {error}")
                }
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Slowing> {
        self.slowing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pace(&self) {
        let mut slowing = self.lock();
        while slowing.percents.iter().any(|percent| *percent > 0) {
            slowing = self
                .changed
                .wait_timeout(slowing, THROTTLE_PERIOD)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            // The others are not disturbed.
            slowing.slowed().for_each(Napper::kick);
        }
        slowing.paced = false;
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.set(&[]);
    }
}
