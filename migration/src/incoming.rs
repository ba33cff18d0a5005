//! The side that gets the machine: one struct for each state, and what each message does to it.
//!
//! ```text
//! Listening -Hello-> Greeted -Offer-> Offered -Prepare-> Copying -Load-> Loaded -Go-> Running -Finish-> Over
//! ```
//! While `Copying` and `Loaded` a broken link is survived: the machine stays, and `Hello { Resume }` goes on.
//! Whatever ends a crossing before the go-ahead is written down as declined and everything made for it goes away.
//!
//! `handle` reads no clock, no socket and no file of its own: the [`Room`] it is given has them.

use std::sync::Arc;
use std::time::Duration;

use crate::arrivals::{Desk, Progress};
use crate::block::Name;
use crate::clock::Clock;
use crate::failure::{Cause, Phase, Reason, Side};
use crate::handover::{Arrival, Ledger, LedgerId, SessionId, Standing, answer_from_ledger, check_epoch};
use crate::machine::{IncomingMachine, Loaded as LoadTimes, Offer};
use crate::pages::decode::Placement;
use crate::wire::{
    MAX_BLOCKS, MAX_LANES, MAX_STATE_BYTES, Message, OLDEST_VERSION, Purpose, Stage, VERSION,
    VERSION_WITH_NAMES, common_version,
};

/// What the states may use of the world.
pub struct Room<'a> {
    pub machine: &'a mut dyn IncomingMachine,
    pub ledger: &'a mut dyn Ledger,
    pub clock: &'a dyn Clock,
    pub desk: &'a Arc<Desk>,
    pub terms: Terms,
    /// Waits for the lanes to hold these frames, as long as something moves. In a simulation: looks.
    pub wait: &'a dyn Fn(&Desk, &[u64]) -> Progress,
}

/// What this side agrees to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    pub most_lanes: u16,
    pub oldest_version: u16,
    pub newest_version: u16,
}

impl Default for Terms {
    fn default() -> Self {
        Terms {
            most_lanes: MAX_LANES,
            oldest_version: OLDEST_VERSION,
            newest_version: VERSION,
        }
    }
}

/// What goes back.
#[derive(Debug)]
pub struct Reply {
    pub message: Option<Message>,
    /// The connection is of no more use.
    pub close: bool,
}

impl Reply {
    fn of(message: Message) -> Self {
        Reply {
            message: Some(message),
            close: false,
        }
    }

    fn last(message: Message) -> Self {
        Reply {
            message: Some(message),
            close: true,
        }
    }

    fn nothing() -> Self {
        Reply {
            message: None,
            close: false,
        }
    }
}

#[derive(Default)]
pub enum Incoming {
    #[default]
    Listening,
    Greeted(Greeted),
    Offered(Offered),
    Copying(Box<Copying>),
    Loaded(Box<Loaded>),
    Running(Running),
    Over(Over),
}

/// A peer has said who it is.
pub struct Greeted {
    session: SessionId,
    attempt: u32,
    version: u16,
    peer: LedgerId,
}

/// The machine may come, nothing is built yet.
pub struct Offered {
    greeted: Greeted,
    epoch: u64,
    lanes: u16,
    offer: Offer,
}

/// The machine is built, data arrives.
pub struct Copying {
    session: SessionId,
    attempt: u32,
    version: u16,
    lanes: u16,
    arrival: Arrival,
    placement: Arc<Placement>,
    /// How many frames of each lane were held at the end of earlier attempts that may still be asked for.
    earlier: Vec<(u32, Vec<u64>)>,
    state: Vec<u8>,
}

/// The state is loaded: the go-ahead is all that is missing.
pub struct Loaded {
    copying: Copying,
    times: LoadTimes,
}

/// The machine is here.
pub struct Running {
    session: SessionId,
    took: Duration,
}

/// Nothing more happens. `taken` says whether the machine is here.
pub struct Over {
    pub session: Option<SessionId>,
    pub taken: bool,
    /// Why it ended, if not well.
    pub reason: Option<Reason>,
    /// The other side is known to know.
    pub finished: bool,
}

impl Incoming {
    pub fn state(&self) -> &'static str {
        match self {
            Incoming::Listening => "Listening",
            Incoming::Greeted(_) => "Greeted",
            Incoming::Offered(_) => "Offered",
            Incoming::Copying(_) => "Copying",
            Incoming::Loaded(_) => "Loaded",
            Incoming::Running(_) => "Running",
            Incoming::Over(_) => "Over",
        }
    }

    /// Which crossing this is about, once known.
    pub fn session(&self) -> Option<SessionId> {
        match self {
            Incoming::Listening => None,
            Incoming::Greeted(greeted) => Some(greeted.session),
            Incoming::Offered(offered) => Some(offered.greeted.session),
            Incoming::Copying(copying) => Some(copying.session),
            Incoming::Loaded(loaded) => Some(loaded.copying.session),
            Incoming::Running(running) => Some(running.session),
            Incoming::Over(over) => over.session,
        }
    }

    /// What a message does. An error from a step is answered, in words, and ends the crossing.
    pub fn handle(self, message: Message, room: &mut Room<'_>) -> (Self, Reply) {
        let phase = self.phase();
        let (name, state, session) = (message.name(), self.state(), self.session());
        let outcome = match (self, message) {
            (
                state @ (Incoming::Listening | Incoming::Greeted(_) | Incoming::Offered(_)),
                Message::Hello {
                    oldest,
                    newest,
                    session,
                    attempt,
                    ledger,
                    purpose,
                },
            ) => {
                drop(state);
                Self::hello((oldest, newest), session, attempt, ledger, purpose, room)
            }
            (
                Incoming::Copying(copying),
                Message::Hello {
                    session,
                    attempt,
                    purpose,
                    ..
                },
            ) if copying.session == session => copying.again(attempt, purpose, Stage::Copying, room),
            (
                Incoming::Loaded(loaded),
                Message::Hello {
                    session,
                    attempt,
                    purpose,
                    ..
                },
            ) if loaded.copying.session == session => loaded.again(attempt, purpose, room),
            (Incoming::Running(running), Message::Hello { session, .. }) if running.session == session => {
                let reply = standing(room, Standing::Taken, None);
                Ok((Incoming::Running(running), Reply::of(reply)))
            }
            (was, Message::Hello { session: other, .. })
                if was.session().is_some_and(|session| session != other)
                    && !matches!(was, Incoming::Over(_)) =>
            {
                // Somebody else's crossing: this one goes on.
                let reason = Reason::new(Cause::Busy, "this side is busy with another crossing");
                Ok((
                    was,
                    Reply::last(Message::Refused {
                        phase: Phase::Negotiate,
                        reason,
                    }),
                ))
            }
            (
                Incoming::Over(over),
                Message::Hello {
                    purpose: Purpose::Begin,
                    ..
                },
            ) => {
                let reason = Reason::new(Cause::Busy, "the crossing this side waited for has ended");
                let refused = Message::Refused {
                    phase: Phase::Negotiate,
                    reason,
                };
                Ok((Incoming::Over(over), Reply::last(refused)))
            }
            (Incoming::Over(over), Message::Hello { session, .. }) => {
                answer_from_ledger(room.ledger, session)
                    .map(|known| {
                        let word = standing(room, known, over.reason.as_ref());
                        (Incoming::Over(over), Reply::last(word))
                    })
                    .map_err(Failed::closed)
            }
            (Incoming::Greeted(greeted), Message::Offer { epoch, lanes, offer }) => {
                greeted.offer(epoch, lanes, offer, room)
            }
            (Incoming::Offered(offered), Message::Prepare) => offered.prepare(room),
            (Incoming::Copying(copying), message) => copying.handle(message, room),
            (Incoming::Loaded(loaded), Message::Go { session, epoch }) => loaded.go(session, epoch, room),
            (Incoming::Running(running), Message::Go { session, .. }) if running.session == session => {
                let took = running.took;
                Ok((Incoming::Running(running), Reply::of(Message::Running { took })))
            }
            (Incoming::Running(running), Message::Finish) => {
                let over = Over {
                    session: Some(running.session),
                    taken: true,
                    reason: None,
                    finished: true,
                };
                Ok((
                    Incoming::Over(over),
                    Reply {
                        message: None,
                        close: true,
                    },
                ))
            }
            (Incoming::Loaded(loaded), Message::Cancel { cause, message, .. }) => {
                Ok(loaded.copying.decline(Reason::new(cause, message), room))
            }
            (
                Incoming::Listening | Incoming::Greeted(_) | Incoming::Offered(_),
                Message::Cancel { cause, message, .. },
            ) => {
                let over = Over {
                    session,
                    taken: false,
                    reason: Some(Reason::new(cause, message)),
                    finished: false,
                };
                let reply = Reply::last(standing(room, Standing::Declined, None));
                Ok((Incoming::Over(over), reply))
            }
            (was, _) => Err(Failed::within(
                was,
                Reason::new(
                    Cause::Protocol,
                    format!("the incoming side is {state} and does not expect the message {name}"),
                ),
            )),
        };
        outcome.unwrap_or_else(|failed| (*failed).end(phase, session, room))
    }

    fn hello(
        theirs: (u16, u16),
        session: SessionId,
        attempt: u32,
        peer: LedgerId,
        purpose: Purpose,
        room: &mut Room<'_>,
    ) -> Result<(Self, Reply), Box<Failed>> {
        if purpose != Purpose::Begin {
            // Nothing of this session is here (any more): what the ledger says is final.
            let known = answer_from_ledger(room.ledger, session).map_err(Failed::closed)?;
            let word = standing(room, known, None);
            return Ok((Incoming::Listening, Reply::last(word)));
        }
        let ours = (room.terms.oldest_version, room.terms.newest_version);
        let Some(version) = common_version(ours, theirs) else {
            return Err(Failed::closed(Reason::new(
                Cause::Version,
                format!(
                    "this side speaks the protocol versions {} to {} and the other side {} to {}",
                    ours.0, ours.1, theirs.0, theirs.1
                ),
            )));
        };
        // (One that was declined may begin again: its outgoing side has the machine, or it would not ask.)
        let known = room
            .ledger
            .read(session, Side::Incoming)
            .map_err(Failed::closed)?;
        if known.is_some_and(|record| record.standing == Standing::Taken) {
            let message = format!("the machine of crossing {session} was already taken here");
            return Err(Failed::closed(Reason::new(Cause::Busy, message)));
        }
        let ledger = room.ledger.id();
        let greeted = Greeted {
            session,
            attempt,
            version,
            peer,
        };
        Ok((
            Incoming::Greeted(greeted),
            Reply::of(Message::Welcome { version, ledger }),
        ))
    }

    fn phase(&self) -> Phase {
        match self {
            Incoming::Listening | Incoming::Greeted(_) => Phase::Negotiate,
            Incoming::Offered(_) => Phase::Prepare,
            Incoming::Copying(_) => Phase::CopyLive,
            Incoming::Loaded(_) => Phase::HandOver,
            Incoming::Running(_) | Incoming::Over(_) => Phase::Finish,
        }
    }

    /// The control connection broke. What can go on later stays; what has not begun ends.
    pub fn link_lost(self, room: &mut Room<'_>) -> Self {
        room.desk.close();
        match self {
            Incoming::Greeted(_) | Incoming::Offered(_) => Incoming::Listening,
            Incoming::Running(running) => Incoming::Over(Over {
                session: Some(running.session),
                taken: true,
                reason: None,
                finished: false,
            }),
            other => other,
        }
    }

    /// The other side was silent for too long, or this side is told to stop.
    pub fn give_up(self, reason: Reason, room: &mut Room<'_>) -> Self {
        room.desk.close();
        match self {
            Incoming::Copying(copying) => copying.decline(reason, room).0,
            Incoming::Loaded(loaded) => loaded.copying.decline(reason, room).0,
            Incoming::Running(_) | Incoming::Over(_) => self,
            _ => Incoming::Over(Over {
                session: self.session(),
                taken: false,
                reason: Some(reason),
                finished: false,
            }),
        }
    }
}

fn standing(room: &Room<'_>, standing: Standing, why: Option<&Reason>) -> Message {
    Message::Standing {
        ledger: room.ledger.id(),
        standing,
        why: why.cloned(),
    }
}

/// A step failed; the state it failed in, if there is something to take down.
struct Failed {
    state: Option<Incoming>,
    reason: Reason,
}

impl Failed {
    fn closed(reason: Reason) -> Box<Self> {
        Box::new(Failed { state: None, reason })
    }

    fn within(state: Incoming, reason: Reason) -> Box<Self> {
        Box::new(Failed {
            state: Some(state),
            reason,
        })
    }

    /// Says so to the other side and takes down what was built.
    fn end(self, phase: Phase, session: Option<SessionId>, room: &mut Room<'_>) -> (Incoming, Reply) {
        let refused = |reason: &Reason| {
            Reply::last(Message::Refused {
                phase,
                reason: reason.clone(),
            })
        };
        let reply = refused(&self.reason);
        let copying = match self.state {
            Some(Incoming::Copying(copying)) => *copying,
            Some(Incoming::Loaded(loaded)) => loaded.copying,
            // The machine runs here: an illegal message does not change that.
            Some(state @ (Incoming::Running(_) | Incoming::Over(_))) => return (state, reply),
            _ => {
                let over = Over {
                    session,
                    taken: false,
                    reason: Some(self.reason),
                    finished: false,
                };
                return (Incoming::Over(over), reply);
            }
        };
        (copying.decline(self.reason, room).0, reply)
    }
}

impl Greeted {
    fn offer(
        self,
        epoch: u64,
        lanes: u16,
        offer: Offer,
        room: &mut Room<'_>,
    ) -> Result<(Incoming, Reply), Box<Failed>> {
        check_offer(&offer)
            .and_then(|()| check_epoch(&room.ledger.records(offer.card.machine)?, epoch))
            .and_then(|()| room.machine.admit(&offer))
            .map_err(Failed::closed)?;
        let lanes = lanes.clamp(1, room.terms.most_lanes.clamp(1, MAX_LANES));
        let offered = Offered {
            greeted: self,
            epoch,
            lanes,
            offer,
        };
        Ok((Incoming::Offered(offered), Reply::of(Message::Accepted { lanes })))
    }
}

/// What must be true of any offer, before the monitor looks at it.
fn check_offer(offer: &Offer) -> Result<(), Reason> {
    let bad = |text: String| Err(Reason::new(Cause::Protocol, text));
    if offer.blocks.is_empty() || offer.blocks.len() > MAX_BLOCKS {
        return bad(format!(
            "the machine is offered with {} blocks",
            offer.blocks.len()
        ));
    }
    for (at, info) in offer.blocks.iter().enumerate() {
        if offer.blocks.iter().take(at).any(|other| other.id == info.id) {
            return bad(format!("{} is offered twice", info.id));
        }
        let granule = match info.kind {
            crate::block::BlockKind::Memory => u64::from(info.unit_bytes()),
            crate::block::BlockKind::Disk => 512,
        };
        if info.bytes == 0 || !info.bytes.is_multiple_of(granule) {
            return bad(format!("{} is offered with {} bytes", info.id, info.bytes));
        }
    }
    Ok(())
}

impl Offered {
    fn prepare(self, room: &mut Room<'_>) -> Result<(Incoming, Reply), Box<Failed>> {
        let Offered {
            greeted:
                Greeted {
                    session,
                    attempt,
                    version,
                    peer,
                },
            epoch,
            lanes,
            offer,
        } = self;
        let sinks = room.machine.prepare(&offer).and_then(|sinks| {
            let built: Vec<_> = sinks.iter().map(|sink| sink.info()).collect();
            let fits = built.len() == offer.blocks.len()
                && offer.blocks.iter().all(|o| {
                    built
                        .iter()
                        .any(|b| (b.id, b.kind, b.bytes) == (o.id, o.kind, o.bytes))
                });
            if fits {
                Ok(sinks)
            } else {
                Err(Reason::new(
                    Cause::Machine,
                    "what was built is not what was offered",
                ))
            }
        });
        let sinks = match sinks {
            Ok(sinks) => sinks,
            Err(reason) => {
                room.machine.abort();
                return Err(Failed::closed(reason));
            }
        };
        let arrival = match Arrival::begin(room.ledger, session, offer.card.machine, epoch, peer) {
            Ok(arrival) => arrival,
            Err(reason) => {
                room.machine.abort();
                return Err(Failed::closed(reason));
            }
        };
        let placement = Arc::new(Placement::new(&sinks));
        let libraries = if version >= VERSION_WITH_NAMES {
            placement.libraries()
        } else {
            Vec::new()
        };
        room.desk.open(session, attempt, lanes, Arc::clone(&placement));
        let copying = Copying {
            session,
            attempt,
            version,
            lanes,
            arrival,
            placement,
            earlier: Vec::new(),
            state: Vec::new(),
        };
        Ok((
            Incoming::Copying(Box::new(copying)),
            Reply::of(Message::Prepared { libraries }),
        ))
    }
}

impl Copying {
    fn handle(mut self, message: Message, room: &mut Room<'_>) -> Result<(Incoming, Reply), Box<Failed>> {
        let outcome = match message {
            Message::Announce { block, first, names } => self.wanted(block, first, &names),
            Message::RoundEnd { round, frames } => match (room.wait)(room.desk, &frames) {
                Progress::Reached => Ok(Reply::of(Message::RoundHeld { round })),
                Progress::Broken(reason) if matches!(reason.cause, Cause::Link | Cause::Damaged) => {
                    // A new connection mends it: hang up, and keep everything.
                    return Ok((
                        Incoming::Copying(Box::new(self)),
                        Reply {
                            message: None,
                            close: true,
                        },
                    ));
                }
                Progress::Broken(reason) => Err(reason),
                Progress::NotYet => {
                    return Ok((
                        Incoming::Copying(Box::new(self)),
                        Reply {
                            message: None,
                            close: true,
                        },
                    ));
                }
            },
            Message::StatePart { offset, bytes } => self.state_part(offset, &bytes),
            Message::Verify => {
                let start = room.clock.now();
                self.placement.names().map_err(Reason::from).map(|names| {
                    let took = room.clock.now().saturating_sub(start);
                    Reply::of(Message::Hashes { names, took })
                })
            }
            Message::Load { total, name } => match self.load(total, name, room) {
                Ok(times) => {
                    let loaded = Loaded { copying: self, times };
                    let reply = Reply::of(Message::Loaded { loaded: times });
                    return Ok((Incoming::Loaded(Box::new(loaded)), reply));
                }
                Err(reason) => Err(reason),
            },
            Message::Cancel { cause, message, .. } => {
                return Ok(self.decline(Reason::new(cause, message), room));
            }
            other => Err(Reason::new(
                Cause::Protocol,
                format!(
                    "the incoming side is Copying and does not expect the message {}",
                    other.name()
                ),
            )),
        };
        match outcome {
            Ok(reply) => Ok((Incoming::Copying(Box::new(self)), reply)),
            Err(reason) => Err(Failed::within(Incoming::Copying(Box::new(self)), reason)),
        }
    }

    fn wanted(&self, block: crate::block::BlockId, first: u64, names: &[Name]) -> Result<Reply, Reason> {
        if self.version < VERSION_WITH_NAMES {
            return Err(Reason::new(
                Cause::Protocol,
                "names came in a version that has none",
            ));
        }
        let mut units = vec![0u64; names.len().div_ceil(64)];
        for (at, name) in names.iter().enumerate() {
            let unit = first.checked_add(at as u64).ok_or_else(|| {
                Reason::new(
                    Cause::Protocol,
                    "names were announced for units that do not exist",
                )
            })?;
            if !self.placement.place_known(block, unit, name)?
                && let Some(word) = units.get_mut(at / 64)
            {
                *word |= 1 << (at % 64);
            }
        }
        Ok(Reply::of(Message::Wanted { units }))
    }

    fn state_part(&mut self, offset: u64, bytes: &[u8]) -> Result<Reply, Reason> {
        if offset == 0 {
            self.state.clear();
        }
        let end = offset.saturating_add(bytes.len() as u64);
        if offset != self.state.len() as u64 || end > MAX_STATE_BYTES {
            return Err(Reason::new(
                Cause::Protocol,
                format!(
                    "a part of the state came for offset {offset} after {} bytes",
                    self.state.len()
                ),
            ));
        }
        self.state.extend_from_slice(bytes);
        Ok(Reply::nothing())
    }

    fn load(&mut self, total: u64, name: Name, room: &mut Room<'_>) -> Result<LoadTimes, Reason> {
        let state = std::mem::take(&mut self.state);
        if state.len() as u64 != total || Name::of(&state) != name {
            return Err(Reason::new(Cause::Damaged, "the machine's state arrived damaged"));
        }
        let start = room.clock.now();
        room.machine.restore(&state)?;
        let restored = room.clock.now();
        room.machine.flush()?;
        Ok(LoadTimes {
            restore: restored.saturating_sub(start),
            flush: room.clock.now().saturating_sub(restored),
        })
    }

    /// A new control connection of the same crossing.
    fn again(
        mut self,
        attempt: u32,
        purpose: Purpose,
        stage: Stage,
        room: &mut Room<'_>,
    ) -> Result<(Incoming, Reply), Box<Failed>> {
        match self.rejoin(attempt, purpose, stage, room) {
            Ok(Some(reply)) => Ok((Incoming::Copying(Box::new(self)), reply)),
            // Begun anew, from the start: the outgoing side never heard that we were prepared.
            Ok(None) => Ok(self.restart(attempt, room)),
            Err(Stay::Decline(reason)) => Ok(self.decline(reason, room)),
            Err(Stay::Fail(reason)) => Err(Failed::within(Incoming::Copying(Box::new(self)), reason)),
        }
    }

    /// `None`: the crossing begins from the start.
    fn rejoin(
        &mut self,
        attempt: u32,
        purpose: Purpose,
        stage: Stage,
        room: &mut Room<'_>,
    ) -> Result<Option<Reply>, Stay> {
        match purpose {
            Purpose::Ask => Err(Stay::Decline(Reason::new(
                Cause::Declined,
                "the other side asked for a final word before the go-ahead came",
            ))),
            _ if attempt <= self.attempt => Err(Stay::Fail(Reason::new(
                Cause::Protocol,
                format!("attempt {attempt} came after attempt {}", self.attempt),
            ))),
            Purpose::Begin => Ok(None),
            Purpose::Resume { since } => {
                if let Some(reason) = room.desk.fatal() {
                    return Err(Stay::Fail(reason));
                }
                self.earlier.retain(|(earlier, _)| *earlier >= since);
                self.earlier.push((self.attempt, room.desk.frames()));
                let frames = self
                    .earlier
                    .iter()
                    .find(|(earlier, _)| *earlier == since)
                    .map_or_else(|| vec![0; usize::from(self.lanes)], |(_, frames)| frames.clone());
                self.attempt = attempt;
                room.desk
                    .open(self.session, attempt, self.lanes, Arc::clone(&self.placement));
                Ok(Some(Reply::of(Message::Holding {
                    version: self.version,
                    stage,
                    frames,
                })))
            }
        }
    }

    /// Drops what was built and greets anew under the same session.
    fn restart(self, attempt: u32, room: &mut Room<'_>) -> (Incoming, Reply) {
        room.desk.close();
        room.machine.abort();
        let Copying {
            session,
            version,
            arrival,
            ..
        } = self;
        let ledger = room.ledger.id();
        let peer = arrival.peer();
        let greeted = Greeted {
            session,
            attempt,
            version,
            peer,
        };
        (
            Incoming::Greeted(greeted),
            Reply::of(Message::Welcome { version, ledger }),
        )
    }

    /// Writes that this side will never run the machine, and takes down what was built. The answer is proof
    /// only if it was written.
    fn decline(mut self, reason: Reason, room: &mut Room<'_>) -> (Incoming, Reply) {
        room.desk.close();
        room.machine.abort();
        let reply = match self.arrival.give_up(room.ledger) {
            Ok(()) => Reply::last(standing(room, Standing::Declined, Some(&reason))),
            Err(unwritten) => Reply::last(Message::Refused {
                phase: Phase::HandOver,
                reason: unwritten,
            }),
        };
        let over = Over {
            session: Some(self.session),
            taken: false,
            reason: Some(reason),
            finished: false,
        };
        (Incoming::Over(over), reply)
    }
}

enum Stay {
    Decline(Reason),
    Fail(Reason),
}

impl Loaded {
    fn again(
        mut self: Box<Self>,
        attempt: u32,
        purpose: Purpose,
        room: &mut Room<'_>,
    ) -> Result<(Incoming, Reply), Box<Failed>> {
        match self.copying.rejoin(attempt, purpose, Stage::Loaded, room) {
            Ok(Some(reply)) => Ok((Incoming::Loaded(self), reply)),
            Ok(None) => Ok(self.copying.restart(attempt, room)),
            Err(Stay::Decline(reason)) => Ok(self.copying.decline(reason, room)),
            Err(Stay::Fail(reason)) => Err(Failed::within(Incoming::Loaded(self), reason)),
        }
    }

    /// The go-ahead. From `take` on, until the machine runs or provably did not start, nothing may go wrong
    /// silently: see `handover`.
    fn go(
        self,
        session: SessionId,
        epoch: u64,
        room: &mut Room<'_>,
    ) -> Result<(Incoming, Reply), Box<Failed>> {
        let Loaded { mut copying, times } = self;
        if session != copying.session || epoch != copying.arrival.epoch() {
            let reason = Reason::new(Cause::Protocol, "the go-ahead is for another hand over");
            let loaded = Loaded { copying, times };
            return Err(Failed::within(Incoming::Loaded(Box::new(loaded)), reason));
        }
        room.desk.close();
        let permit = match copying.arrival.take(room.ledger) {
            Ok(permit) => permit,
            Err(reason) => return Ok(copying.decline(reason, room)),
        };
        let start = room.clock.now();
        match room.machine.resume(permit) {
            Ok(()) => {
                copying.arrival.started();
                let took = room.clock.now().saturating_sub(start);
                Ok((
                    Incoming::Running(Running { session, took }),
                    Reply::of(Message::Running { took }),
                ))
            }
            Err(reason) => {
                room.machine.abort();
                let over = Over {
                    session: Some(session),
                    taken: false,
                    reason: Some(reason),
                    finished: false,
                };
                let reply = match copying.arrival.start_failed(room.ledger) {
                    Ok(()) => standing(room, Standing::Declined, over.reason.as_ref()),
                    Err(reason) => Message::Refused {
                        phase: Phase::HandOver,
                        reason,
                    },
                };
                Ok((Incoming::Over(over), Reply::last(reply)))
            }
        }
    }

    pub fn times(&self) -> LoadTimes {
        self.times
    }
}
