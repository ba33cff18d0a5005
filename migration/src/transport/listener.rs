//! The receiver's ear: connections as they arrive, each with its greeting.

use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::time::Duration;

use crate::failure::{Cause, Phase, Reason};
use crate::link::{LinkError, LinkErrorKind};
use crate::wire::{Greeting, Message, envelope};

use super::address::Address;
use super::socket::Socket;
use super::stream::{Stream, link_error};
use super::tls::{Tls, TlsStream};

/// How long a stranger that was turned away is listened to.
const READ_ON: Duration = Duration::from_secs(1);

/// A connection that greeted as a peer of ours does.
pub struct Arrival {
    pub greeting: Greeting,
    pub stream: Box<dyn Stream>,
}

enum Ear {
    Tcp(TcpListener),
    Unix(UnixListener),
}

pub struct Listener {
    ear: Ear,
    tls: Option<Tls>,
    stall: Duration,
    /// A Unix socket's file, which we made and remove.
    made: Option<PathBuf>,
}

impl Listener {
    pub fn bind(address: &Address, tls: Option<Tls>, stall: Duration) -> Result<Listener, LinkError> {
        let failed = |error: io::Error| {
            LinkError::new(
                LinkErrorKind::Refused,
                format!("{address} cannot be listened at: {error}"),
            )
        };
        let (ear, made) = match address {
            Address::Tcp { host, port } => (
                Ear::Tcp(TcpListener::bind((host.as_str(), *port)).map_err(failed)?),
                None,
            ),
            Address::Unix(path) => (
                Ear::Unix(UnixListener::bind(path).map_err(failed)?),
                Some(path.clone()),
            ),
        };
        Ok(Listener {
            ear,
            tls,
            stall,
            made,
        })
    }

    /// Over a socket that listens already; who made its file, if it has one, removes it.
    pub fn from_socket(socket: OwnedFd, unix: bool, tls: Option<Tls>, stall: Duration) -> Listener {
        let ear = if unix {
            Ear::Unix(socket.into())
        } else {
            Ear::Tcp(socket.into())
        };
        Listener {
            ear,
            tls,
            stall,
            made: None,
        }
    }

    /// Where it listens; with port 0, this tells which port it became.
    pub fn address(&self) -> io::Result<Address> {
        match &self.ear {
            Ear::Tcp(listener) => {
                let local = listener.local_addr()?;
                Ok(Address::Tcp {
                    host: local.ip().to_string(),
                    port: local.port(),
                })
            }
            Ear::Unix(listener) => Ok(Address::Unix(
                listener
                    .local_addr()?
                    .as_pathname()
                    .unwrap_or(std::path::Path::new(""))
                    .into(),
            )),
        }
    }

    /// The next connection's socket, as it came. [`greet`](Self::greet) it on a thread of its own: a stranger may
    /// take its time.
    pub fn accept(&self) -> Result<Socket, LinkError> {
        let failed = |error| link_error("no connection could be accepted", error);
        match &self.ear {
            Ear::Tcp(listener) => {
                let (stream, _) = listener.accept().map_err(failed)?;
                Socket::tcp(stream).map_err(failed)
            }
            Ear::Unix(listener) => {
                let (stream, _) = listener.accept().map_err(failed)?;
                Ok(Socket::unix(stream))
            }
        }
    }

    /// Reads the greeting, then makes the connection safe if that was asked for.
    pub fn greet(&self, mut socket: Socket) -> Result<Arrival, LinkError> {
        let failed = |error| link_error("a connection did not greet", error);
        socket.set_read_limit(self.stall).map_err(failed)?;
        socket.set_write_limit(self.stall).map_err(failed)?;
        let mut bytes = [0; Greeting::BYTES];
        socket.read_exact(&mut bytes).map_err(failed)?;
        let greeting = Greeting::decode(&bytes).map_err(|error| {
            LinkError::new(
                LinkErrorKind::Malformed,
                format!("a connection greeted as no peer of ours does: {error}"),
            )
        })?;
        let stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(socket),
            Some(tls) => {
                let mut stream = tls.accept(socket, self.stall)?;
                if let Err(stranger) = tls.check_allowed(&stream) {
                    if matches!(greeting, Greeting::Control { .. }) {
                        turn_away(&mut stream);
                    }
                    return Err(stranger);
                }
                Box::new(stream)
            }
        };
        Ok(Arrival { greeting, stream })
    }
}

/// A host that is known and not allowed hears so, instead of finding a closed door.
fn turn_away(stream: &mut TlsStream) {
    let message = Message::Refused {
        phase: Phase::Negotiate,
        reason: Reason::new(
            Cause::NotAllowed,
            "this host's certificate has a name that is not one of those that may send machines there",
        ),
    }
    .encode();
    let said = stream
        .write_all(&envelope(&message))
        .and_then(|()| stream.write_all(&message))
        .and_then(|()| stream.flush())
        .and_then(|()| stream.set_read_limit(READ_ON));
    if said.is_ok() {
        // What it says meanwhile is read, so that closing does not take the answer away from it.
        let _ = stream.read(&mut [0; 4096]);
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.ear {
            Ear::Tcp(listener) => listener.as_fd(),
            Ear::Unix(listener) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(path) = &self.made {
            let _ = std::fs::remove_file(path);
        }
    }
}
