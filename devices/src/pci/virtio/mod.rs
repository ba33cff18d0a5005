//! The virtio transport over PCI (virtio 1.2, section 4.1, modern only): carries any `VirtioDevice`.

mod common;
mod function;
mod interrupts;
mod layout;
mod queue;

pub use function::VirtioPci;
pub use layout::{BAR_SIZE, MAX_QUEUES};
