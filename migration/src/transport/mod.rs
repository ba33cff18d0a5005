//! How bytes get to the other side: TCP and Unix sockets, TLS over TCP, and one pipe for everything (ssh).

pub mod address;
pub mod faulty;
pub mod listener;
pub mod loopback;
pub mod pipe;
pub mod socket;
pub mod stream;
#[cfg(test)]
mod tests;
pub mod tls;

pub use address::Address;
pub use listener::{Arrival, Listener};
pub use loopback::Loopback;
pub use pipe::{PipeLink, PipeListener};
pub use socket::SocketLink;
pub use stream::{Stream, StreamLane, StreamPeer};
pub use tls::Tls;
