//! The devices of a Ferry machine: buses, serial, virtio over PCI. Neither KVM nor migration.

pub mod bus;
pub mod clock;
pub mod console_io;
pub mod disk;
pub mod error;
#[cfg(test)]
mod golden;
pub mod irq;
pub mod legacy;
pub mod log_once;
pub mod pci;
pub mod ram;
pub mod records;
pub mod request;
pub mod state;
#[cfg(test)]
mod testing;
pub mod virtio;
