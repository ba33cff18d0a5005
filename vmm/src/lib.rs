//! The machine on KVM, and the one place that wires devices and migration to it.

pub mod bounded_log;
pub mod config;
pub mod console;
pub mod console_ends;
pub mod control;
pub mod crossing;
pub mod error;
pub mod lifecycle;
pub mod machine;
pub mod name;
pub mod rundir;
pub mod serve;
pub mod size;
