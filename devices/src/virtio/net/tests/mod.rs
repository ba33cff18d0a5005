//! The network device under a driver of our own, against sockets and against real TAP devices.

mod driver;
mod frames;
mod hostile;
mod settings;
mod sockets;
mod tap;
