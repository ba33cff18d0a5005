//! The control interface of one machine: HTTP with JSON over a Unix socket in its folder. docs/control-api.md describes
//! it for people; `api` is its vocabulary, `server` answers, `client` asks.

pub mod api;
pub mod client;
mod handlers;
mod lines;
mod server;

pub(crate) use server::may_ask;
pub use server::{Control, listen};
