//! One pipe in each direction carries the control connection and a lane: what `ferry receive --stdio` speaks over ssh.
//!
//! Each piece on the pipe has a head of five bytes: the connection's number and the piece's length. A piece of length
//! zero ends its connection. A pipe has no limits on time; the ends of it that are sockets or processes do.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use crate::handover::SessionId;
use crate::link::{Lane, Link, LinkError, LinkErrorKind, Peer};
use crate::wire::Greeting;

use super::listener::Arrival;
use super::stream::{Stream, StreamLane, StreamPeer, link_error};

const PIECE_BYTES: usize = 64 << 10;
/// Pieces that may wait to be read, for each connection.
const WAITING: usize = 64;
const CONTROL: u8 = 0;
const LANE: u8 = 1;

type Writer = Arc<Mutex<Box<dyn Write + Send>>>;

/// One connection on the pipe.
struct PipeStream {
    number: u8,
    writer: Writer,
    incoming: Receiver<Bytes>,
    rest: Bytes,
    read_limit: Duration,
}

impl PipeStream {
    fn new(number: u8, writer: &Writer, incoming: Receiver<Bytes>) -> PipeStream {
        let (writer, rest) = (Arc::clone(writer), Bytes::new());
        PipeStream {
            number,
            writer,
            incoming,
            rest,
            read_limit: Duration::from_secs(3600),
        }
    }

    fn write_piece(&self, piece: &[u8]) -> io::Result<()> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut head = [self.number, 0, 0, 0, 0];
        head[1..].copy_from_slice(&(piece.len() as u32).to_le_bytes());
        writer.write_all(&head)?;
        writer.write_all(piece)
    }
}

impl Read for PipeStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            self.rest = match self.incoming.recv_timeout(self.read_limit) {
                Ok(piece) => piece,
                Err(RecvTimeoutError::Timeout) => return Err(io::ErrorKind::TimedOut.into()),
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
            };
        }
        let count = buffer.len().min(self.rest.len());
        self.rest
            .copy_to_slice(buffer.get_mut(..count).unwrap_or_default());
        Ok(count)
    }
}

impl Write for PipeStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let piece = buffer.get(..buffer.len().min(PIECE_BYTES)).unwrap_or_default();
        if !piece.is_empty() {
            self.write_piece(piece)?;
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

impl Stream for PipeStream {
    fn set_read_limit(&mut self, limit: Duration) -> io::Result<()> {
        self.read_limit = limit;
        Ok(())
    }

    fn set_write_limit(&mut self, _limit: Duration) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for PipeStream {
    fn drop(&mut self) {
        let _ = self.write_piece(&[]).and_then(|()| self.flush());
    }
}

/// Reads pieces until the pipe ends and hands them to their connections. `open` is asked for connections that are not
/// known yet; when it says `None`, their pieces go nowhere.
fn sort(
    mut reader: impl Read,
    known: Vec<(u8, Sender<Bytes>)>,
    mut open: impl FnMut(u8) -> Option<Sender<Bytes>>,
) -> io::Result<()> {
    let mut connections: HashMap<u8, Option<Sender<Bytes>>> = known
        .into_iter()
        .map(|(number, sender)| (number, Some(sender)))
        .collect();
    loop {
        let mut head = [0; 5];
        reader.read_exact(&mut head)?;
        let [number, length @ ..] = head;
        let length = u32::from_le_bytes(length) as usize;
        if number > LANE || length > PIECE_BYTES {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the pipe carries something else than a crossing",
            ));
        }
        if length == 0 {
            connections.insert(number, None);
            continue;
        }
        let mut piece = vec![0; length];
        reader.read_exact(&mut piece)?;
        let sender = connections.entry(number).or_insert_with(|| open(number));
        if let Some(to) = sender
            && to.send(piece.into()).is_err()
        {
            *sender = None;
        }
    }
}

/// The outgoing side's link over a pipe. There is no reconnecting: when the pipe breaks, the crossing fails.
pub struct PipeLink {
    session: SessionId,
    writer: Writer,
    waiting: HashMap<u8, Receiver<Bytes>>,
    stall: Duration,
}

impl PipeLink {
    pub fn new(
        session: SessionId,
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        stall: Duration,
    ) -> Result<PipeLink, LinkError> {
        let mut known = Vec::new();
        let mut waiting = HashMap::new();
        for number in [CONTROL, LANE] {
            let (sender, receiver) = bounded(WAITING);
            known.push((number, sender));
            waiting.insert(number, receiver);
        }
        spawn("ferry-pipe", move || {
            if let Err(error) = sort(reader, known, |_| None) {
                tracing::debug!("the pipe ended: {error}");
            }
        })?;
        Ok(PipeLink {
            session,
            writer: Arc::new(Mutex::new(Box::new(writer))),
            waiting,
            stall,
        })
    }

    fn open(&mut self, number: u8, greeting: Greeting) -> Result<Box<dyn Stream>, LinkError> {
        let incoming = self.waiting.remove(&number).ok_or_else(|| {
            LinkError::new(LinkErrorKind::Closed, "a pipe cannot be connected a second time")
        })?;
        let mut stream = PipeStream::new(number, &self.writer, incoming);
        stream
            .write_all(&greeting.encode())
            .and_then(|()| stream.flush())
            .map_err(|error| link_error("the other end of the pipe could not be greeted", error))?;
        Ok(Box::new(stream))
    }
}

impl Link for PipeLink {
    fn control(&mut self) -> Result<Box<dyn Peer>, LinkError> {
        let greeting = Greeting::Control {
            session: self.session,
            attempt: 0,
        };
        let stream = self.open(CONTROL, greeting)?;
        Ok(Box::new(StreamPeer::new(stream, self.stall)?))
    }

    fn lane(&mut self, session: SessionId, attempt: u32, index: u16) -> Result<Box<dyn Lane>, LinkError> {
        let stream = self.open(
            LANE,
            Greeting::Lane {
                session,
                attempt,
                index,
            },
        )?;
        Ok(Box::new(StreamLane::new(stream, self.stall)?))
    }

    fn most_lanes(&self) -> u16 {
        1
    }

    fn reconnects(&self) -> bool {
        false
    }
}

/// The incoming side's end of a pipe.
pub struct PipeListener {
    arrivals: Receiver<PipeStream>,
    stall: Duration,
}

impl PipeListener {
    pub fn new(
        reader: impl Read + Send + 'static,
        writer: impl Write + Send + 'static,
        stall: Duration,
    ) -> Result<PipeListener, LinkError> {
        let writer: Writer = Arc::new(Mutex::new(Box::new(writer)));
        let (sender, arrivals) = unbounded();
        spawn("ferry-pipe", move || {
            let ended = sort(reader, Vec::new(), |number| {
                let (to, incoming) = bounded(WAITING);
                sender.send(PipeStream::new(number, &writer, incoming)).ok()?;
                Some(to)
            });
            if let Err(error) = ended {
                tracing::debug!("the pipe ended: {error}");
            }
        })?;
        Ok(PipeListener { arrivals, stall })
    }

    /// The next connection, or an error when the pipe has ended.
    pub fn accept(&self) -> Result<Arrival, LinkError> {
        let mut stream = self
            .arrivals
            .recv()
            .map_err(|_| LinkError::new(LinkErrorKind::Closed, "the other end of the pipe is gone"))?;
        let failed = |error| link_error("a connection did not greet", error);
        stream.set_read_limit(self.stall).map_err(failed)?;
        let mut bytes = [0; Greeting::BYTES];
        stream.read_exact(&mut bytes).map_err(failed)?;
        let greeting = Greeting::decode(&bytes).map_err(|error| {
            LinkError::new(
                LinkErrorKind::Malformed,
                format!("a connection greeted as no peer of ours does: {error}"),
            )
        })?;
        Ok(Arrival {
            greeting,
            stream: Box::new(stream),
        })
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), LinkError> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .map_err(|error| link_error("the pipe's thread could not be started", error))
}
