//! The machine on KVM, and the one place that wires devices and migration to it.

pub mod acpi;
pub mod boot;
pub mod bounded_log;
pub mod config;
pub mod console;
pub mod console_ends;
pub mod control;
pub mod cpu;
pub mod crossing;
#[allow(dead_code)]
mod devices;
pub mod error;
pub mod interrupts;
pub mod kvm;
pub mod layout;
pub mod lifecycle;
#[allow(dead_code)]
pub mod machine;
pub mod memory;
pub mod name;
mod pci;
mod place;
mod reclaim;
mod resources;
pub mod rundir;
pub mod serve;
pub mod size;
#[allow(dead_code)]
pub mod vcpu;
