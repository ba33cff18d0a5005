//! The devices of a Ferry machine: buses, serial, virtio over PCI. Neither KVM nor migration.

pub mod bus;
pub mod error;
pub mod irq;
pub mod log_once;
pub mod ram;
pub mod state;
pub mod virtio;
