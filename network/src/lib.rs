//! The machine's place on the network: TAP devices and bridges, announcements, probes.
//!
//! At the switch of a crossing the outgoing side calls [`Tap::leave`] before it gives up the right to run, the
//! incoming side calls [`Tap::join`] and then [`announce::Announcer::start`]. A probe ([`probe::Probe`]) tells what
//! an outside client saw meanwhile.

pub mod announce;
pub mod frames;
pub mod histogram;
mod interface;
pub mod namespace;
pub mod probe;
mod tap;

pub use interface::random_mac;
pub use tap::{FrameSender, GUEST_HEADER_BYTES, Tap, TapConfig, TapError};
