//! The adapters between the machine and the migration engine: what the engine calls blocks is guest memory and
//! disks here, what it calls a machine is ours.

mod disk_sink;
mod disk_source;
#[cfg(test)]
mod disk_tests;
mod memory_sink;
mod memory_source;
mod notes;
mod region;

pub use disk_sink::{DiskSink, Library};
pub use disk_source::DiskSource;
pub use memory_sink::MemorySink;
pub use memory_source::{DirtyLog, MemorySource};
pub use region::Region;
