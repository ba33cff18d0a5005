//! What can go wrong with a machine, said in one sentence that a person can act on.

use std::fmt;

use crate::config::ConfigError;
use crate::lifecycle::Refused;

#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The user asked for something that cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The lifecycle does not allow it now.
    #[error(transparent)]
    State(#[from] Refused),
    /// This host cannot do it.
    #[error("{0}")]
    Host(String),
    /// Saved state that does not fit; the machine it came from is not touched.
    #[error("{0}")]
    Saved(String),
    /// KVM refused something.
    #[error("KVM refused to {doing}: {errno}")]
    Kvm { doing: String, errno: std::io::Error },
}

pub type Result<T, E = MachineError> = std::result::Result<T, E>;

/// `.doing("set the registers of CPU 0")` on a KVM result.
pub(crate) trait Doing<T> {
    fn doing(self, what: impl fmt::Display) -> Result<T>;
}

impl<T> Doing<T> for std::result::Result<T, kvm_ioctls::Error> {
    fn doing(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|e| MachineError::Kvm {
            doing: what.to_string(),
            errno: std::io::Error::from_raw_os_error(e.errno()),
        })
    }
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|errno| MachineError::Kvm {
            doing: what.to_string(),
            errno,
        })
    }
}
