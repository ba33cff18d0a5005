//! The state of everything that is in KVM, as records: vCPUs, interrupt chips, timer and clock. Devices save themselves.

pub mod blob;
pub mod chips;
pub mod clock;
pub mod msrs;
pub mod vcpu;

use crate::error::MachineError;

/// A state error as the machine's.
pub(crate) fn saved(error: impl std::fmt::Display) -> MachineError {
    MachineError::Saved(error.to_string())
}
