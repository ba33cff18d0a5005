//! What a peer, a guest or a file may do to Ferry: one function for each kind of hostile input.
//!
//! Each takes any bytes and must return: no panic in any thread, no access outside guest memory, no allocation that the
//! input sizes, no endless loop. The fuzzer calls them (`fuzz/`, `make fuzz`), and a plain test calls them with every
//! input that is kept (`hostile/tests/corpus.rs`).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // finding out is what this is for: a panic is a find

mod incoming;
mod input;
mod kernel;
mod pci;
mod qcow2;
mod records;
mod rig;
mod seeds;
mod virtio;
mod wire;

pub use seeds::{Seed, seeds};

/// One kind of hostile input.
pub struct Target {
    /// The name of the fuzz target and of its folder in the corpus.
    pub name: &'static str,
    pub run: fn(&[u8]),
}

/// Every target there is.
pub const TARGETS: [Target; 13] = [
    target("wire", wire::messages),
    target("frames", wire::frames),
    target("incoming", incoming::conversation),
    target("records", records::records),
    target("block", virtio::block),
    target("net", virtio::net),
    target("rng", virtio::rng),
    target("console", virtio::console),
    target("balloon", virtio::balloon),
    target("pci", pci::config),
    target("elf", kernel::elf),
    target("bzimage", kernel::bzimage),
    target("qcow2", qcow2::image),
];

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

/// Runs the target of this name; for the fuzzer's stubs.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|target| target.name == name);
    (target.unwrap_or_else(|| panic!("there is no target {name}")).run)(bytes);
}
