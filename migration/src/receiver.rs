//! Driving the incoming side over real connections: one thread listens for them, one handles control, one places
//! the data of each lane.

use std::cell::RefCell;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender};

use crate::arrivals::{Desk, Progress};
use crate::clock::Clock;
use crate::failure::{Cause, Phase, Reason};
use crate::handover::{Ledger, SessionId};
use crate::incoming::{Incoming, Over, Reply, Room, Terms};
use crate::link::{LinkError, Peer};
use crate::machine::IncomingMachine;
use crate::transport::{Arrival, Stream, StreamPeer};
use crate::wire::{Greeting, Message};

#[derive(Clone, Debug)]
pub struct ReceiveOptions {
    pub terms: Terms,
    /// A peer that is in the middle of something and makes no progress for so long has stalled.
    pub stall: Duration,
    /// How long a peer may say nothing at all before its connection counts as broken.
    pub silence: Duration,
    /// How long to wait for a broken link to come back, before the machine is declined. Should be longer than
    /// what the outgoing side waits.
    pub reconnect_for: Duration,
    /// How long to keep answering after the machine was taken, in case the other side never heard it.
    pub doubt_for: Duration,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        ReceiveOptions {
            terms: Terms::default(),
            stall: Duration::from_secs(10),
            silence: Duration::from_secs(60),
            reconnect_for: Duration::from_secs(60),
            doubt_for: Duration::from_secs(60),
        }
    }
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    pub session: Option<SessionId>,
    /// The machine is here.
    pub taken: bool,
    /// Why not, or why the crossing ended as it did.
    pub reason: Option<Reason>,
}

impl Over {
    fn received(&self) -> Received {
        Received {
            session: self.session,
            taken: self.taken,
            reason: self.reason.clone(),
        }
    }
}

/// Receives one machine. `arrivals` are connections that have greeted (see `transport::Listener`); a caller that
/// receives several machines sorts them by session. Returns when the crossing is over either way, or `stop` is
/// set before one began. The machine runs from `IncomingMachine::resume` on, which may be long before this
/// returns: the other side may still ask whether it was taken.
pub fn receive(
    machine: &mut dyn IncomingMachine,
    ledger: &mut dyn Ledger,
    clock: &dyn Clock,
    arrivals: &Receiver<Arrival>,
    stop: &AtomicBool,
    options: &ReceiveOptions,
) -> Received {
    let desk = Desk::new();
    let lanes = Lanes::default();
    let (give, controls) = crossbeam::channel::bounded(4);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (desk, lanes, over) = (&desk, &lanes, &over);
        let sort = move || sort_arrivals(arrivals, &give, desk, lanes, over);
        if let Err(error) = std::thread::Builder::new()
            .name("arrivals".into())
            .spawn_scoped(scope, sort)
        {
            let message = format!("no thread could be started to receive: {error}");
            return Received {
                session: None,
                taken: false,
                reason: Some(Reason::new(Cause::Machine, message)),
            };
        }
        let mut control = Control {
            machine,
            ledger,
            clock,
            desk,
            lanes,
            controls: &controls,
            stop,
            options,
            incoming: Incoming::default(),
        };
        let received = control.serve();
        desk.close();
        over.store(true, Ordering::Release);
        lanes.join();
        received
    })
}

/// How often a thread that waits looks up.
const GLANCE: Duration = Duration::from_millis(50);
/// How often a sign of life is given while an answer takes its time.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// The lanes' threads.
#[derive(Default)]
struct Lanes(Mutex<Vec<JoinHandle<()>>>);

impl Lanes {
    /// Waits until no thread of a lane places anything any more. The desk must be closed.
    fn join(&self) {
        let threads = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("the thread of a lane panicked");
            }
        }
    }
}

fn sort_arrivals(
    arrivals: &Receiver<Arrival>,
    controls: &Sender<(SessionId, Box<dyn Stream>)>,
    desk: &Arc<Desk>,
    lanes: &Lanes,
    over: &AtomicBool,
) {
    while !over.load(Ordering::Acquire) {
        let arrival = match arrivals.recv_timeout(GLANCE) {
            Ok(arrival) => arrival,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        match arrival.greeting {
            Greeting::Control { session, .. } => {
                // A full queue means too many strangers: this one is dropped, and hears it.
                let _ = controls.try_send((session, arrival.stream));
            }
            Greeting::Lane {
                session,
                attempt,
                index,
            } => {
                let lane = match desk.lane(session, attempt, index) {
                    Ok(lane) => lane,
                    Err(reason) => {
                        tracing::warn!("a lane was turned away: {reason}");
                        continue;
                    }
                };
                let mut stream = arrival.stream;
                if stream.set_read_limit(GLANCE).is_err() {
                    continue;
                }
                let desk = Arc::clone(desk);
                let run = move || run_lane(lane, stream, &desk, attempt);
                let mut threads = lanes.0.lock().unwrap_or_else(PoisonError::into_inner);
                match std::thread::Builder::new()
                    .name(format!("lane-{index}"))
                    .spawn(run)
                {
                    Ok(thread) => threads.push(thread),
                    Err(error) => tracing::error!("no thread could be started for a lane: {error}"),
                }
            }
        }
    }
}

fn run_lane(mut lane: crate::arrivals::LaneIn, stream: Box<dyn Stream>, desk: &Arc<Desk>, attempt: u32) {
    let reader = LaneReader {
        stream,
        desk,
        attempt,
    };
    // Heads and tables are small; what is longer is read past this buffer.
    let mut reader = io::BufReader::with_capacity(4096, reader);
    loop {
        match lane.frame(&mut reader) {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::debug!("a lane ended: {error}");
                return;
            }
        }
    }
}

/// A lane's stream that gives up when its attempt is over. A lane may be quiet for as long as it likes between
/// frames; the control connection notices a peer that is gone.
struct LaneReader<'a> {
    stream: Box<dyn Stream>,
    desk: &'a Desk,
    attempt: u32,
}

impl Read for LaneReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.stream.read(buffer) {
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if !self.desk.is_open(self.attempt) {
                        return Err(io::Error::new(
                            io::ErrorKind::ConnectionAborted,
                            "the attempt is over",
                        ));
                    }
                }
                other => return other,
            }
        }
    }
}

/// The control side.
struct Control<'a> {
    machine: &'a mut dyn IncomingMachine,
    ledger: &'a mut dyn Ledger,
    clock: &'a dyn Clock,
    desk: &'a Arc<Desk>,
    lanes: &'a Lanes,
    controls: &'a Receiver<(SessionId, Box<dyn Stream>)>,
    stop: &'a AtomicBool,
    options: &'a ReceiveOptions,
    incoming: Incoming,
}

type ControlPeer = StreamPeer<Box<dyn Stream>>;

impl Control<'_> {
    fn serve(&mut self) -> Received {
        let mut peer: Option<ControlPeer> = None;
        let mut since = self.clock.now();
        loop {
            if let Some(received) = self.ended(since, peer.is_some()) {
                return received;
            }
            let waiting = if peer.is_some() { Duration::ZERO } else { GLANCE };
            match self.controls.recv_timeout(waiting) {
                Ok((session, stream)) => {
                    if let Some(asked) = peer.as_mut()
                        && self.has_hung_up(asked, session)
                    {
                        peer = None;
                        self.link_lost();
                    }
                    if let Some(new) = self.welcome(session, stream) {
                        // A newer connection of the same crossing: the older one is dead, even if it does not know.
                        self.link_lost();
                        peer = Some(new);
                        since = self.clock.now();
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) if peer.is_none() => return self.alone(),
                Err(_) => {}
            }
            let Some(connection) = peer.as_mut() else {
                if self.stop.load(Ordering::Acquire) && matches!(self.incoming, Incoming::Listening) {
                    let reason = Reason::new(Cause::Cancelled, "the receiver was told to stop");
                    return Received {
                        session: None,
                        taken: false,
                        reason: Some(reason),
                    };
                }
                continue;
            };
            let open = match connection.receive(GLANCE) {
                Ok(Some(bytes)) => {
                    since = self.clock.now();
                    self.handle(connection, &bytes)
                }
                Ok(None) => self.quiet(connection, &mut since),
                Err(error) => {
                    tracing::debug!("the control connection ended: {error}");
                    false
                }
            };
            if !open {
                peer = None;
                since = self.clock.now();
                self.link_lost();
            }
        }
    }

    /// Nobody can come any more: what is not here by now never will be.
    fn alone(&mut self) -> Received {
        let reason = Reason::new(Cause::Link, "the other side closed the connection");
        self.with_room(
            |incoming, room| (incoming.give_up(reason, room), ()),
            &|desk, frames| desk.progress(frames),
        );
        match &self.incoming {
            Incoming::Over(over) => over.received(),
            running => Received {
                session: running.session(),
                taken: true,
                reason: None,
            },
        }
    }

    /// Whether there is nothing more to do. `since`: the last sign of the other side.
    fn ended(&mut self, since: Duration, connected: bool) -> Option<Received> {
        let silent = self.clock.now().saturating_sub(since);
        match &self.incoming {
            Incoming::Over(over) => {
                let unheard = over.taken && !over.finished;
                // Taken, and the other side may not know: it can still ask, as long as there is a machine.
                (!unheard || silent >= self.options.doubt_for || self.machine.is_over())
                    .then(|| over.received())
            }
            Incoming::Copying(_) | Incoming::Loaded(_)
                if !connected && silent >= self.options.reconnect_for =>
            {
                let reason = Reason::new(
                    Cause::Stalled,
                    format!(
                        "the other side did not come back within {:?}",
                        self.options.reconnect_for
                    ),
                );
                self.with_room(
                    |incoming, room| (incoming.give_up(reason, room), ()),
                    &|desk, frames| desk.progress(frames),
                );
                None
            }
            _ => None,
        }
    }

    /// Whether somebody who only asked, and built nothing, has gone. That may not have been noticed yet when another one comes,
    /// as a rule the crossing that was asked about: it must not hear that this side is busy.
    fn has_hung_up(&mut self, asked: &mut ControlPeer, newcomer: SessionId) -> bool {
        let since = self.clock.now();
        while matches!(self.incoming, Incoming::Greeted(_)) && self.incoming.session() != Some(newcomer) {
            match asked.receive(GLANCE) {
                Ok(Some(bytes)) if self.handle(asked, &bytes) => {}
                Ok(None) => return false,
                Ok(Some(_)) | Err(_) => return true,
            }
            if self.clock.now().saturating_sub(since) > SIGN_OF_LIFE {
                return false;
            }
        }
        false
    }

    /// A control connection came: ours, or a stranger's, who hears that we are busy.
    fn welcome(&self, session: SessionId, stream: Box<dyn Stream>) -> Option<ControlPeer> {
        let mut peer = StreamPeer::new(stream, self.options.stall).ok()?;
        let known = self.incoming.session();
        if known.is_none_or(|known| known == session) {
            return Some(peer);
        }
        let reason = Reason::new(Cause::Busy, "this side is busy with another crossing");
        let _ = peer.send(
            &Message::Refused {
                phase: Phase::Negotiate,
                reason,
            }
            .encode(),
        );
        None
    }

    fn link_lost(&mut self) {
        self.desk.close();
        self.lanes.join();
        self.with_room(
            |incoming, room| (incoming.link_lost(room), ()),
            &|desk, frames| desk.progress(frames),
        );
    }

    /// Nothing was said. False: the connection is of no more use.
    fn quiet(&mut self, peer: &mut ControlPeer, since: &mut Duration) -> bool {
        if let Some(reason) = self.desk.fatal()
            && matches!(self.incoming, Incoming::Copying(_))
        {
            // A lane failed for good: the other side hears why before it wonders.
            let phase = Phase::CopyLive;
            let _ = peer.send(
                &Message::Refused {
                    phase,
                    reason: reason.clone(),
                }
                .encode(),
            );
            self.desk.close();
            self.lanes.join();
            self.with_room(
                |incoming, room| (incoming.give_up(reason, room), ()),
                &|desk, frames| desk.progress(frames),
            );
            return false;
        }
        if self.desk.is_broken() && matches!(self.incoming, Incoming::Copying(_)) {
            // Hanging up brings the other side back with new lanes, sooner than it would find out itself.
            return false;
        }
        if self.desk.moved_since_last_look() {
            *since = self.clock.now();
        }
        self.clock.now().saturating_sub(*since) < self.options.silence
    }

    fn handle(&mut self, peer: &mut ControlPeer, bytes: &[u8]) -> bool {
        let message = match Message::decode(bytes) {
            Ok(message) => message,
            Err(error) => {
                let reason = Reason::new(Cause::Protocol, format!("a message is malformed: {error}"));
                let _ = peer.send(
                    &Message::Refused {
                        phase: Phase::Negotiate,
                        reason,
                    }
                    .encode(),
                );
                return false;
            }
        };
        let (clock, stall) = (self.clock, self.options.stall);
        let reply = match message {
            Message::Prepare | Message::Verify | Message::Load { .. } | Message::Go { .. } => {
                self.handle_long(message, peer)
            }
            message => {
                let talking = RefCell::new(&mut *peer);
                let wait = |desk: &Desk, frames: &[u64]| wait_for_lanes(desk, frames, &talking, clock, stall);
                self.with_room(|incoming, room| incoming.handle(message, room), &wait)
            }
        };
        let mut open = !reply.close;
        if let Some(message) = reply.message {
            open &= peer.send(&message.encode()).is_ok();
        }
        open
    }

    /// Does what may take long on a thread of its own, and gives signs of life meanwhile: the other side, whose machine
    /// may stand still, can tell this from a link that is gone.
    fn handle_long(&mut self, message: Message, peer: &mut ControlPeer) -> Reply {
        let desk = self.desk;
        let (done, is_done) = crossbeam::channel::bounded::<()>(0);
        let work = Mutex::new(Some((message, done)));
        let this = Mutex::new(&mut *self);
        let act = || {
            let (message, _done) = lock(&work).take()?;
            let reply = lock(&this).with_room(
                |incoming, room| incoming.handle(message, room),
                &|desk, frames| desk.progress(frames),
            );
            Some(reply)
        };
        let reply = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("handling".into());
            let Ok(thread) = thread.spawn_scoped(scope, act) else {
                return act();
            };
            while is_done.recv_timeout(SIGN_OF_LIFE) == Err(RecvTimeoutError::Timeout) {
                let frames = desk.total();
                // A link that is gone is noticed with the answer.
                let _ = peer.send(&Message::Working { frames }.encode());
            }
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        reply.unwrap_or(Reply {
            message: None,
            close: true,
        })
    }

    fn with_room<T>(
        &mut self,
        act: impl FnOnce(Incoming, &mut Room<'_>) -> (Incoming, T),
        wait: &dyn Fn(&Desk, &[u64]) -> Progress,
    ) -> T {
        let mut room = Room {
            machine: &mut *self.machine,
            ledger: &mut *self.ledger,
            clock: self.clock,
            desk: self.desk,
            terms: self.options.terms,
            wait,
        };
        let (now, made) = act(std::mem::take(&mut self.incoming), &mut room);
        self.incoming = now;
        made
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits as long as something moves, and says so to the other side.
fn wait_for_lanes(
    desk: &Desk,
    frames: &[u64],
    peer: &RefCell<&mut ControlPeer>,
    clock: &dyn Clock,
    stall: Duration,
) -> Progress {
    let (mut total, mut moved, mut told) = (desk.total(), clock.now(), clock.now());
    loop {
        match desk.wait(frames, GLANCE) {
            Progress::NotYet => {}
            settled => return settled,
        }
        let now = clock.now();
        let frames = desk.total();
        if frames != total {
            (total, moved) = (frames, now);
        }
        if now.saturating_sub(moved) >= stall {
            return Progress::NotYet;
        }
        if now.saturating_sub(told) >= SIGN_OF_LIFE {
            told = now;
            if let Err(LinkError { message, .. }) =
                peer.borrow_mut().send(&Message::Working { frames }.encode())
            {
                return Progress::Broken(Reason::new(Cause::Link, message));
            }
        }
    }
}
