//! The simulator: a guest that writes, a link that is shared, a clock that is told, and a seed.
//!
//! [`pages`] runs a policy at the level of single pages and is fast enough for thousands of runs; the guest,
//! the link and the numbers are the same for every policy, and a seed repeats to the byte.

pub mod crossing;
pub mod guest;
pub mod link;
pub mod pages;
pub mod paper;
mod rng;
#[cfg(test)]
mod tests;
pub mod trace;

pub use rng::Rng;
