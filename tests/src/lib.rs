//! The harness that end-to-end tests share.

pub mod nested;
