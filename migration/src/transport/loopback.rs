//! The other side in the same process: every message is encoded, decoded and handled at once, every frame is
//! placed at once. Deterministic; the simulator and the sweeps of the tests use it, and a pulse can.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::arrivals::{Desk, LaneIn, Progress};
use crate::clock::Clock;
use crate::codec::Malformed;
use crate::failure::Reason;
use crate::handover::{Ledger, SessionId};
use crate::incoming::{Incoming, Room, Terms};
use crate::link::{Lane, Link, LinkError, LinkErrorKind, Peer};
use crate::machine::IncomingMachine;
use crate::pages::decode::FrameError;
use crate::wire::Message;

/// An incoming side without threads or sockets.
pub struct Host {
    incoming: Incoming,
    machine: Box<dyn IncomingMachine>,
    ledger: Box<dyn Ledger>,
    clock: Arc<dyn Clock>,
    desk: Arc<Desk>,
    terms: Terms,
    /// Counts control connections: only the newest one may speak.
    connections: u64,
}

impl Host {
    pub fn new(
        machine: Box<dyn IncomingMachine>,
        ledger: Box<dyn Ledger>,
        clock: Arc<dyn Clock>,
        terms: Terms,
    ) -> Self {
        let (incoming, desk) = (Incoming::default(), Desk::new());
        Host {
            incoming,
            machine,
            ledger,
            clock,
            desk,
            terms,
            connections: 0,
        }
    }

    pub fn incoming(&self) -> &Incoming {
        &self.incoming
    }

    fn with_room<T>(&mut self, act: impl FnOnce(Incoming, &mut Room<'_>) -> (Incoming, T)) -> T {
        let was = std::mem::take(&mut self.incoming);
        let mut room = Room {
            machine: &mut *self.machine,
            ledger: &mut *self.ledger,
            clock: &*self.clock,
            desk: &self.desk,
            terms: self.terms,
            wait: &|desk: &Desk, frames: &[u64]| -> Progress { desk.progress(frames) },
        };
        let (now, made) = act(was, &mut room);
        self.incoming = now;
        made
    }

    /// The connection broke.
    pub fn link_lost(&mut self) {
        self.with_room(|incoming, room| (incoming.link_lost(room), ()));
    }

    /// The other side was silent for too long.
    pub fn give_up(&mut self, reason: Reason) {
        self.with_room(|incoming, room| (incoming.give_up(reason, room), ()));
    }

    fn handle(&mut self, bytes: &[u8]) -> Result<(Option<Vec<u8>>, bool), Malformed> {
        let message = Message::decode(bytes)?;
        let reply = self.with_room(|incoming, room| incoming.handle(message, room));
        Ok((reply.message.map(|message| message.encode()), reply.close))
    }
}

fn lock(host: &Mutex<Host>) -> MutexGuard<'_, Host> {
    host.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The link to a [`Host`] in this process.
#[derive(Clone)]
pub struct Loopback {
    host: Arc<Mutex<Host>>,
    most_lanes: u16,
}

impl Loopback {
    pub fn new(host: Arc<Mutex<Host>>, most_lanes: u16) -> Self {
        Loopback { host, most_lanes }
    }
}

impl Link for Loopback {
    fn control(&mut self) -> Result<Box<dyn Peer>, LinkError> {
        let mut host = lock(&self.host);
        host.link_lost();
        host.connections += 1;
        let connection = host.connections;
        Ok(Box::new(ControlEnd {
            host: Arc::clone(&self.host),
            connection,
            replies: VecDeque::new(),
            closed: false,
        }))
    }

    fn lane(&mut self, session: SessionId, attempt: u32, index: u16) -> Result<Box<dyn Lane>, LinkError> {
        let lane = lock(&self.host)
            .desk
            .lane(session, attempt, index)
            .map_err(|reason| LinkError::new(LinkErrorKind::Refused, reason.message))?;
        Ok(Box::new(LaneEnd {
            lane,
            waiting: Vec::new(),
        }))
    }

    fn most_lanes(&self) -> u16 {
        self.most_lanes
    }

    fn parallel(&self) -> bool {
        false
    }
}

struct ControlEnd {
    host: Arc<Mutex<Host>>,
    connection: u64,
    replies: VecDeque<Vec<u8>>,
    closed: bool,
}

fn closed() -> LinkError {
    LinkError::new(LinkErrorKind::Closed, "the other side closed the connection")
}

impl Peer for ControlEnd {
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        let mut host = lock(&self.host);
        if self.closed || host.connections != self.connection {
            return Err(closed());
        }
        let (reply, close) = host
            .handle(message)
            .map_err(|error| LinkError::new(LinkErrorKind::Malformed, error.to_string()))?;
        self.replies.extend(reply);
        self.closed = close;
        if close {
            host.link_lost();
        }
        Ok(())
    }

    fn receive(&mut self, _: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        match self.replies.pop_front() {
            None if self.closed => Err(closed()),
            // The other side works only when it is spoken to: what is not there now will never come.
            None => Err(LinkError::new(
                LinkErrorKind::Stalled,
                "the other side has nothing to say",
            )),
            reply => Ok(reply),
        }
    }
}

impl Drop for ControlEnd {
    fn drop(&mut self) {
        let mut host = lock(&self.host);
        if host.connections == self.connection && !self.closed {
            host.link_lost();
        }
    }
}

struct LaneEnd {
    lane: LaneIn,
    /// A frame that has not come to its end yet.
    waiting: Vec<u8>,
}

impl LaneEnd {
    /// Places all whole frames that wait; what is left is the beginning of one.
    fn place(&mut self) -> Result<(), LinkError> {
        while let Some(length) = crate::wire::frame_bytes(&self.waiting)
            .map_err(|error| LinkError::new(LinkErrorKind::Malformed, error.to_string()))?
            .filter(|length| *length <= self.waiting.len())
        {
            let mut frame = self.waiting.get(..length).unwrap_or_default();
            self.lane.frame(&mut frame).map_err(|error| lane_error(&error))?;
            self.waiting.drain(..length);
        }
        Ok(())
    }
}

fn lane_error(error: &FrameError) -> LinkError {
    LinkError::new(LinkErrorKind::Closed, error.to_string())
}

impl Lane for LaneEnd {
    fn send(&mut self, part: &[u8]) -> Result<(), LinkError> {
        self.waiting.extend_from_slice(part);
        self.place()
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        Ok(())
    }
}

impl Drop for LaneEnd {
    /// A frame was cut in the middle: the other side reads what came, and finds the lane's end inside it.
    fn drop(&mut self) {
        if !self.waiting.is_empty() {
            let waiting = std::mem::take(&mut self.waiting);
            let _ = self.lane.frame(&mut waiting.as_slice());
        }
    }
}
