//! The adapters between the machine and the migration engine: what the engine calls blocks is guest memory and
//! disks here, what it calls a machine is ours.

pub mod arrive;
mod card;
pub mod depart;
mod disk_sink;
mod disk_source;
#[cfg(test)]
mod disk_tests;
mod free_memory;
mod images;
mod incoming;
pub mod ledger;
mod limits;
mod memory_sink;
mod memory_source;
mod notes;
mod outgoing;
mod pipe;
mod region;
pub mod rehearse;
pub mod request;
mod returning;
pub mod settle;

pub use disk_sink::{DiskSink, Library};
pub use disk_source::DiskSource;
pub use free_memory::{FreeMemory, Unused};
pub use incoming::{Arrived, Arriving, Reception};
pub use limits::Allowed;
pub use memory_sink::MemorySink;
pub use memory_source::{DirtyLog, MemorySource};
pub use outgoing::Leaving;
pub use region::Region;
