//! KVM itself: opening it, what it offers here, and the virtual machine that memory is plugged into.

pub mod caps;
pub mod dirty;
pub mod fault_cost;
pub mod raw;
pub mod ring;
pub mod stats;
pub mod vm;

pub use caps::Capabilities;

use kvm_ioctls::Kvm;

use crate::error::{MachineError, Result};

/// Opens /dev/kvm; each way in which that fails has its own advice.
pub fn open() -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|e| {
        let errno = std::io::Error::from_raw_os_error(e.errno());
        let advice = match e.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => {
                "load the module kvm_intel or kvm_amd, and check that virtualisation is switched on in the firmware \
                 (or, in a virtual machine, that nested virtualisation is)"
            }
            libc::EACCES | libc::EPERM => "add your user to the group kvm, or run as root",
            _ => "check that /dev/kvm is a working KVM device",
        };
        MachineError::Host(format!("/dev/kvm cannot be opened ({errno}); {advice}"))
    })?;
    match kvm.get_api_version() {
        12 => Ok(kvm),
        other => Err(MachineError::Host(format!(
            "/dev/kvm has API version {other}, this program needs 12; is it the Linux KVM?"
        ))),
    }
}
