//! The harness that end-to-end tests share.

pub mod bench;
pub mod nested;
