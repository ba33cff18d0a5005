//! The link between both sides as the engine sees it: one control connection and some lanes.
//!
//! Messages and frames are whole byte strings here; `wire` gives them meaning, `transport` carries them over
//! sockets, `transport::loopback` hands them to the other side in the same process.

use std::time::Duration;

use crate::handover::SessionId;

/// Why the link did not do it. A link that returned an error is finished: drop it and connect anew.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct LinkError {
    pub kind: LinkErrorKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkErrorKind {
    /// Nobody answers at the address, or the connection broke.
    Closed,
    /// Nothing moved for as long as was allowed.
    Stalled,
    /// The other side is somebody else, or does not let us in (TLS).
    Refused,
    /// The other side sent what no peer of ours sends.
    Malformed,
}

impl LinkError {
    pub fn new(kind: LinkErrorKind, message: impl Into<String>) -> Self {
        LinkError {
            kind,
            message: message.into(),
        }
    }
}

/// One end of the control connection.
pub trait Peer: Send {
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError>;

    /// The next message, or `None` if none came within `timeout`. A message that has begun to arrive is read
    /// to its end, within the link's stall limit.
    fn receive(&mut self, timeout: Duration) -> Result<Option<Vec<u8>>, LinkError>;
}

/// The sending end of a lane.
pub trait Lane: Send {
    /// Sends a part of a frame. Blocks while the link is full, no longer than its stall limit without progress.
    fn send(&mut self, part: &[u8]) -> Result<(), LinkError>;

    /// Everything sent so far is on its way.
    fn flush(&mut self) -> Result<(), LinkError>;
}

/// How the outgoing side reaches the incoming side; used again after a connection broke.
pub trait Link: Send {
    /// Opens a control connection.
    fn control(&mut self) -> Result<Box<dyn Peer>, LinkError>;

    /// Opens lane `index` of the crossing's connection number `attempt` (both sides count reconnects).
    fn lane(&mut self, session: SessionId, attempt: u32, index: u16) -> Result<Box<dyn Lane>, LinkError>;

    /// How many lanes this kind of link can carry (a pipe: one).
    fn most_lanes(&self) -> u16;

    /// Whether a link that broke can be opened again (a pipe cannot).
    fn reconnects(&self) -> bool {
        true
    }

    /// Whether lanes may be driven from several threads at once. A simulated link is driven inline, so that
    /// a seed repeats to the byte.
    fn parallel(&self) -> bool {
        true
    }
}
