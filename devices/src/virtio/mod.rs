//! Virtio devices: what each one does with its queues. How the guest finds and sets them up is `pci`'s matter.

pub mod balloon;
pub mod block;
pub mod console;
pub mod device;
pub mod net;
pub mod rng;
pub mod serve;
#[cfg(test)]
mod tests;
pub mod worker;
