//! The network device under a driver of our own, against sockets and against real TAP devices.

mod driver;
mod hostile;
mod sockets;
mod tap;
