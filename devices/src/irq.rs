//! How a device interrupts the guest. The machine implements these over KVM; tests over a recorder.

use vmm_sys_util::eventfd::EventFd;

use crate::error::DeviceError;
use crate::log_once::LogOnce;

/// One edge-triggered interrupt line.
pub trait IrqLine: Send + Sync {
    fn trigger(&self);
}

/// An interrupt line that is an event file descriptor registered with KVM (irqfd).
pub struct EventFdLine {
    event: EventFd,
    failed: LogOnce,
}

impl EventFdLine {
    pub fn new(event: EventFd) -> Self {
        Self {
            event,
            failed: LogOnce::new(),
        }
    }
}

impl IrqLine for EventFdLine {
    fn trigger(&self) {
        if let Err(error) = self.event.write(1) {
            self.failed
                .warn(|| format!("an interrupt was not delivered: {error}"));
        }
    }
}

/// What the guest wrote into one MSI-X table entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// The message interrupts of one PCI function. Slot n is entry n of its MSI-X table.
///
/// Masking is the PCI function's work: a slot that is masked is `set(slot, None)`, and the function itself keeps
/// what is pending meanwhile. `trigger` on a slot without a message does nothing.
pub trait MsiController: Send + Sync {
    fn set(&self, slot: usize, message: Option<MsiMessage>) -> Result<(), DeviceError>;
    fn trigger(&self, slot: usize);
}
