//! The simulator: a guest that writes, a link that is shared, a clock that is told, and a seed.
//!
//! [`crossing`] runs the engine's real code, both sides of it, with memory and disks; [`pages`] runs a policy at the
//! level of single pages and is fast enough for thousands of runs. The guest, the link and the numbers are the same for
//! both and for every policy, and a seed repeats to the byte.

pub mod crossing;
pub mod disk;
pub mod guest;
pub mod link;
pub mod pages;
pub mod paper;
pub mod replay;
mod rng;
#[cfg(test)]
mod tests;
pub mod trace;

pub use rng::Rng;
