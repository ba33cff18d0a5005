//! The side that gets the machine: one struct for each state, and what each message does to it.
//!
//! ```text
//! Listening -Hello-> Greeted -Offer-> Offered -Prepare-> Copying -Load-> Loaded -Go-> Running -Finish-> Over
//! ```
//! While `Copying` and `Loaded` a broken link is survived: the machine stays, and `Hello { Resume }` goes on.
//! Whatever ends a crossing before the go-ahead is written down as declined and everything made for it goes away.
//!
//! `handle` reads no clock, no socket and no file of its own: the [`Room`] it is given has them.

mod building;
mod moving;

use std::sync::Arc;

use crate::arrivals::{Desk, Progress};
use crate::clock::Clock;
use crate::failure::{Cause, Phase, Reason, Side};
use crate::handover::{Arrival, Ledger, LedgerId, SessionId, Standing, answer_from_ledger};
use crate::machine::{IncomingMachine, Loaded as LoadTimes, Offer};
use crate::pages::decode::Placement;
use crate::wire::{
    MAX_LANES, Message, OLDEST_VERSION, Purpose, Stage, VERSION, VERSION_WITH_QUESTIONS, common_version,
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
    arrival: Arrival,
    /// What is answered, however often the go-ahead comes.
    answer: Message,
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
            (Incoming::Greeted(greeted), Message::Consider { epoch, offer })
                if greeted.version >= VERSION_WITH_QUESTIONS =>
            {
                Ok(greeted.consider(epoch, &offer, room))
            }
            (Incoming::Greeted(greeted), Message::Ballast { answer, bytes: _ })
                if greeted.version >= VERSION_WITH_QUESTIONS =>
            {
                let reply = if answer {
                    Reply::of(Message::Swallowed)
                } else {
                    Reply::nothing()
                };
                Ok((Incoming::Greeted(greeted), reply))
            }
            (Incoming::Offered(offered), Message::Prepare) => offered.prepare(room),
            (Incoming::Copying(copying), message) => copying.handle(message, room),
            (Incoming::Loaded(loaded), Message::Go { session, epoch }) => loaded.go(session, epoch, room),
            (Incoming::Running(running), Message::Go { session, .. }) if running.session == session => {
                let answer = running.answer.clone();
                Ok((Incoming::Running(running), Reply::of(answer)))
            }
            (Incoming::Running(mut running), Message::Finish) => {
                if let Err(reason) = running.arrival.heard(room.ledger) {
                    // The record stays longer than it needs to.
                    tracing::warn!("{reason}");
                }
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
        if peer == ledger {
            // One ledger cannot hold both sides of a hand over: each would overwrite what the other wrote.
            return Err(Failed::closed(Reason::new(
                Cause::NotAllowed,
                "the receiver is on the same host, with the same runtime directory, as the machine",
            )));
        }
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
