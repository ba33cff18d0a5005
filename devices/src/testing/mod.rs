//! What the tests of several devices share: a clock that stands still, recorders for interrupts and requests.

pub(crate) mod driver;
pub(crate) mod guest;
pub(crate) mod suspendable;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Clock;
use crate::error::DeviceError;
use crate::irq::{IrqLine, MsiController, MsiMessage};
use crate::request::{MachineEvents, MachineRequest};

/// Remembers what the guest asked for.
#[derive(Default)]
pub(crate) struct Requests(Mutex<Vec<MachineRequest>>);

impl Requests {
    pub(crate) fn take(&self) -> Vec<MachineRequest> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl MachineEvents for Requests {
    fn request(&self, request: MachineRequest) {
        self.0.lock().unwrap().push(request);
    }
}

/// Counts interrupts.
#[derive(Default)]
pub(crate) struct Line(AtomicU64);

impl Line {
    pub(crate) fn take(&self) -> u64 {
        self.0.swap(0, Ordering::SeqCst)
    }
}

impl IrqLine for Line {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// A clock that moves when it is told to.
#[derive(Default)]
pub(crate) struct HandClock {
    monotonic_ns: AtomicU64,
    wall_ns: AtomicU64,
}

impl HandClock {
    pub(crate) fn at(wall: Duration) -> Self {
        Self {
            monotonic_ns: AtomicU64::new(0),
            wall_ns: AtomicU64::new(wall.as_nanos() as u64),
        }
    }

    pub(crate) fn pass(&self, time: Duration) {
        self.monotonic_ns
            .fetch_add(time.as_nanos() as u64, Ordering::SeqCst);
        self.wall_ns.fetch_add(time.as_nanos() as u64, Ordering::SeqCst);
    }
}

impl Clock for HandClock {
    fn monotonic(&self) -> Duration {
        Duration::from_nanos(self.monotonic_ns.load(Ordering::SeqCst))
    }

    fn wall(&self) -> Duration {
        Duration::from_nanos(self.wall_ns.load(Ordering::SeqCst))
    }
}

/// An interrupt controller that remembers what is installed and what was sent.
#[derive(Default)]
pub(crate) struct Messages {
    installed: Mutex<BTreeMap<usize, MsiMessage>>,
    sent: Mutex<Vec<MsiMessage>>,
}

impl Messages {
    pub(crate) fn take(&self) -> Vec<MsiMessage> {
        std::mem::take(&mut self.sent.lock().unwrap())
    }

    pub(crate) fn installed(&self) -> usize {
        self.installed.lock().unwrap().len()
    }
}

impl MsiController for Messages {
    fn set(&self, slot: usize, message: Option<MsiMessage>) -> Result<(), DeviceError> {
        let mut installed = self.installed.lock().unwrap();
        match message {
            Some(message) => installed.insert(slot, message),
            None => installed.remove(&slot),
        };
        Ok(())
    }

    fn trigger(&self, slot: usize) {
        let message = self.installed.lock().unwrap().get(&slot).copied();
        self.sent.lock().unwrap().extend(message);
    }
}
