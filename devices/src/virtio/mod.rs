//! Virtio devices: what each one does with its queues. How the guest finds and sets them up is `pci`'s matter.

pub mod block;
pub mod device;
pub mod net;
pub mod serve;
pub mod worker;
