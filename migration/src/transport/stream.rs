//! Messages and frames over any stream of bytes with timeouts.

use std::io::{self, Read, Write};
use std::time::Duration;

use crate::link::{Lane, LinkError, LinkErrorKind, Peer};
use crate::wire::{ENVELOPE_BYTES, envelope, open_envelope};

/// A connection: bytes in both directions, with limits on how long either may take without progress.
pub trait Stream: Read + Write + Send {
    /// How long a read may wait for its first byte.
    fn set_read_limit(&mut self, limit: Duration) -> io::Result<()>;

    /// How long a write may wait for room.
    fn set_write_limit(&mut self, limit: Duration) -> io::Result<()>;
}

/// Zero would mean "for ever" to a socket.
pub(super) fn at_least_a_moment(limit: Duration) -> Option<Duration> {
    Some(limit.max(Duration::from_millis(1)))
}

pub(super) fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// What an I/O error says about the link.
pub(super) fn link_error(doing: &str, error: io::Error) -> LinkError {
    let (kind, what) = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => (
            LinkErrorKind::Stalled,
            "the other side said nothing for too long".to_owned(),
        ),
        io::ErrorKind::UnexpectedEof => (
            LinkErrorKind::Closed,
            "the other side closed the connection".to_owned(),
        ),
        io::ErrorKind::InvalidData | io::ErrorKind::PermissionDenied => {
            (LinkErrorKind::Refused, error.to_string())
        }
        _ => (LinkErrorKind::Closed, error.to_string()),
    };
    LinkError::new(kind, format!("{doing}: {what}"))
}

/// One end of the control connection over a stream.
pub struct StreamPeer<S> {
    stream: S,
    stall: Duration,
    heard: bool,
}

impl<S: Stream> StreamPeer<S> {
    /// `stall` is how long the other side may leave a message half sent, or not take ours.
    pub fn new(mut stream: S, stall: Duration) -> Result<Self, LinkError> {
        stream
            .set_write_limit(stall)
            .map_err(|error| link_error("the connection could not be set up", error))?;
        Ok(StreamPeer {
            stream,
            stall,
            heard: false,
        })
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), LinkError> {
        self.stream
            .read_exact(buffer)
            .map_err(|error| link_error("a message could not be received", error))
    }
}

impl<S: Stream> Peer for StreamPeer<S> {
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        let mut bytes = Vec::with_capacity(ENVELOPE_BYTES + message.len());
        bytes.extend_from_slice(&envelope(message));
        bytes.extend_from_slice(message);
        self.stream
            .write_all(&bytes)
            .and_then(|()| self.stream.flush())
            .map_err(|error| link_error("a message could not be sent", error))
    }

    fn receive(&mut self, timeout: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        let failed = |error| link_error("a message could not be received", error);
        self.stream.set_read_limit(timeout).map_err(failed)?;
        let mut head = [0; ENVELOPE_BYTES];
        let first = loop {
            match self.stream.read(&mut head) {
                Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => break count,
                Err(error) if is_timeout(&error) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        };
        // A TLS alert about what we said in the clear. As a length it would be far longer than any first message is.
        if !std::mem::replace(&mut self.heard, true) && first >= 5 && matches!(head, [0x15, 3, _, 0, 2, ..]) {
            return Err(LinkError::new(
                LinkErrorKind::Refused,
                "the other side speaks TLS; name this host's keys with --tls",
            ));
        }
        self.stream.set_read_limit(self.stall).map_err(failed)?;
        self.fill(head.get_mut(first..).unwrap_or_default())?;
        let malformed =
            |error: &dyn std::fmt::Display| LinkError::new(LinkErrorKind::Malformed, error.to_string());
        let (length, checksum) = open_envelope(head).map_err(|error| malformed(&error))?;
        let mut message = vec![0; length];
        self.fill(&mut message)?;
        if crc32c::crc32c(&message) != checksum {
            return Err(malformed(&"a message does not match its checksum"));
        }
        Ok(Some(message))
    }
}

/// The sending end of a lane over a stream.
pub struct StreamLane<S> {
    stream: S,
}

impl<S: Stream> StreamLane<S> {
    pub fn new(mut stream: S, stall: Duration) -> Result<Self, LinkError> {
        stream
            .set_write_limit(stall)
            .map_err(|error| link_error("a lane could not be set up", error))?;
        Ok(StreamLane { stream })
    }
}

impl<S: Stream> Lane for StreamLane<S> {
    fn send(&mut self, part: &[u8]) -> Result<(), LinkError> {
        self.stream
            .write_all(part)
            .map_err(|error| link_error("data could not be sent", error))
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        self.stream
            .flush()
            .map_err(|error| link_error("data could not be sent", error))
    }
}

impl<T: Stream + ?Sized> Stream for Box<T> {
    fn set_read_limit(&mut self, limit: Duration) -> io::Result<()> {
        (**self).set_read_limit(limit)
    }

    fn set_write_limit(&mut self, limit: Duration) -> io::Result<()> {
        (**self).set_write_limit(limit)
    }
}
