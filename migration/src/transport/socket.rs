//! TCP and Unix sockets, and the link over them: the control connection and each lane is a connection of its own.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::handover::SessionId;
use crate::link::{Lane, Link, LinkError, LinkErrorKind, Peer};
use crate::wire::{Greeting, MAX_LANES};

use super::address::Address;
use super::stream::{Stream, StreamLane, StreamPeer, at_least_a_moment, link_error};
use super::tls::Tls;

/// A connected socket of either kind.
#[derive(Debug)]
pub enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    pub(super) fn tcp(stream: TcpStream) -> io::Result<Socket> {
        stream.set_nodelay(true)?;
        let socket = socket2::SockRef::from(&stream);
        socket.set_keepalive(true)?;
        // Big enough for a fast link, and not so big that what is queued makes the switch wait.
        let _ = socket.set_send_buffer_size(4 << 20);
        let _ = socket.set_recv_buffer_size(4 << 20);
        Ok(Socket::Tcp(stream))
    }

    pub(super) fn unix(stream: UnixStream) -> Socket {
        let socket = socket2::SockRef::from(&stream);
        let _ = socket.set_send_buffer_size(4 << 20);
        Socket::Unix(stream)
    }

    pub fn connect(address: &Address, timeout: Duration) -> Result<Socket, LinkError> {
        let failed = |error: &dyn std::fmt::Display| {
            LinkError::new(
                LinkErrorKind::Closed,
                format!("nobody answers at {address}: {error}"),
            )
        };
        match address {
            Address::Unix(path) => UnixStream::connect(path)
                .map(Socket::unix)
                .map_err(|error| failed(&error)),
            Address::Tcp { host, port } => {
                let found = (host.as_str(), *port)
                    .to_socket_addrs()
                    .map_err(|error| failed(&error))?;
                let mut last = None;
                for address in found {
                    match TcpStream::connect_timeout(&address, timeout) {
                        Ok(stream) => return Socket::tcp(stream).map_err(|error| failed(&error)),
                        Err(error) => last = Some(error),
                    }
                }
                Err(last.map_or_else(|| failed(&"the name has no address"), |error| failed(&error)))
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.read(buffer),
            Socket::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Tcp(stream) => stream.write(buffer),
            Socket::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Socket {
    fn set_read_limit(&mut self, limit: Duration) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.set_read_timeout(at_least_a_moment(limit)),
            Socket::Unix(stream) => stream.set_read_timeout(at_least_a_moment(limit)),
        }
    }

    fn set_write_limit(&mut self, limit: Duration) -> io::Result<()> {
        match self {
            Socket::Tcp(stream) => stream.set_write_timeout(at_least_a_moment(limit)),
            Socket::Unix(stream) => stream.set_write_timeout(at_least_a_moment(limit)),
        }
    }
}

/// The link to a receiver that listens at an address.
pub struct SocketLink {
    session: SessionId,
    address: Address,
    tls: Option<Tls>,
    stall: Duration,
    attempts: u32,
}

impl SocketLink {
    /// `stall` limits connecting, and how long either side may make no progress.
    pub fn new(session: SessionId, address: Address, tls: Option<Tls>, stall: Duration) -> SocketLink {
        SocketLink {
            session,
            address,
            tls,
            stall,
            attempts: 0,
        }
    }

    fn open(&self, greeting: Greeting) -> Result<Box<dyn Stream>, LinkError> {
        let mut socket = Socket::connect(&self.address, self.stall)?;
        let failed = |error| link_error(&format!("{} could not be greeted", self.address), error);
        socket.set_write_limit(self.stall).map_err(failed)?;
        socket.set_read_limit(self.stall).map_err(failed)?;
        // The greeting goes in the clear, so that a receiver of several machines knows whom the connection is for.
        socket.write_all(&greeting.encode()).map_err(failed)?;
        match (&self.tls, &self.address) {
            (None, _) => Ok(Box::new(socket)),
            (Some(tls), Address::Tcp { host, .. }) => Ok(Box::new(tls.connect(socket, host, self.stall)?)),
            (Some(_), Address::Unix(_)) => Err(LinkError::new(
                LinkErrorKind::Refused,
                "TLS needs a host's name, and a Unix socket has none",
            )),
        }
    }
}

impl Link for SocketLink {
    fn control(&mut self) -> Result<Box<dyn Peer>, LinkError> {
        let greeting = Greeting::Control {
            session: self.session,
            attempt: self.attempts,
        };
        let stream = self.open(greeting)?;
        self.attempts += 1;
        Ok(Box::new(StreamPeer::new(stream, self.stall)?))
    }

    fn lane(&mut self, session: SessionId, attempt: u32, index: u16) -> Result<Box<dyn Lane>, LinkError> {
        let stream = self.open(Greeting::Lane {
            session,
            attempt,
            index,
        })?;
        Ok(Box::new(StreamLane::new(stream, self.stall)?))
    }

    fn most_lanes(&self) -> u16 {
        MAX_LANES
    }
}
