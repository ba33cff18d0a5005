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
/// Masking is the function's work: it does not trigger while masked, and keeps what is pending. `set` installs
/// what `trigger` sends; without a message, `trigger` does nothing. `set` is dear, `trigger` is cheap.
pub trait MsiController: Send + Sync {
    fn set(&self, slot: usize, message: Option<MsiMessage>) -> Result<(), DeviceError>;
    fn trigger(&self, slot: usize);
}

/// Lets a guest's write to an address wake a device without a trip through the vCPU's thread (ioeventfd).
pub trait NotifyBinder: Send + Sync {
    /// From now on a write of any width to `address` signals `kick`. If it fails, the write arrives the slow way.
    fn bind(&self, address: u64, kick: &EventFd) -> Result<(), DeviceError>;
    /// Undoes a bind of the same address and event.
    fn unbind(&self, address: u64, kick: &EventFd);
}

/// For a machine without ioeventfd: every notification takes the slow way.
pub struct NoBinder;

impl NotifyBinder for NoBinder {
    fn bind(&self, _address: u64, _kick: &EventFd) -> Result<(), DeviceError> {
        Ok(())
    }

    fn unbind(&self, _address: u64, _kick: &EventFd) {}
}
