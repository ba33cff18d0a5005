//! PCI: one bus with its host bridge, configuration space by ECAM and by ports, and virtio functions with MSI-X.

pub mod access;
mod bridge;
mod config;
mod msix;
pub mod root;
#[cfg(test)]
mod tests;
pub mod virtio;
