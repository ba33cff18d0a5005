//! The harness that end-to-end tests share.

pub mod bench;
pub mod crossing;
pub mod guest;
pub mod host;
pub mod nested;
pub mod proxy;
pub mod relay;
pub mod schema;
pub mod shell;
