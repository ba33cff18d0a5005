//! While data arrives, the state is loaded, and the go-ahead comes - and when the link breaks in between.

use std::sync::Arc;

use crate::arrivals::Progress;
use crate::block::Name;
use crate::failure::{Cause, Phase, Reason};
use crate::handover::{SessionId, Standing};
use crate::machine::Loaded as LoadTimes;
use crate::report::Woken;
use crate::wire::{MAX_STATE_BYTES, Message, Purpose, Stage, VERSION_WITH_AWAKE, VERSION_WITH_NAMES};

use super::{Copying, Failed, Greeted, Incoming, Loaded, Over, Reply, Room, Running, standing};

impl Copying {
    pub(super) fn handle(
        mut self,
        message: Message,
        room: &mut Room<'_>,
    ) -> Result<(Incoming, Reply), Box<Failed>> {
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
    pub(super) fn again(
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
    pub(super) fn decline(mut self, reason: Reason, room: &mut Room<'_>) -> (Incoming, Reply) {
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
    pub(super) fn again(
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
    pub(super) fn go(
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
        let came = room.clock.now();
        room.desk.close();
        let permit = match copying.arrival.take(room.ledger) {
            Ok(permit) => permit,
            Err(reason) => return Ok(copying.decline(reason, room)),
        };
        let start = room.clock.now();
        match room.machine.resume(permit) {
            Ok(()) => {
                if let Err(reason) = copying.arrival.started(room.ledger) {
                    // It runs: that is what the other side must hear. Only a host that dies now would not know it any more.
                    tracing::warn!("that the machine runs here may not have reached the disk: {reason}");
                }
                let end = room.clock.now();
                let took = end.saturating_sub(start);
                let answer = if copying.version >= VERSION_WITH_AWAKE {
                    let ran_after = room.machine.ran_after().unwrap_or(took).min(took);
                    Message::Awake {
                        woken: Woken {
                            until_running: start.saturating_sub(came) + ran_after,
                            until_answer: end.saturating_sub(came),
                        },
                        clock_behind: room.machine.clock_behind(),
                    }
                } else {
                    Message::Running { took }
                };
                let reply = Reply::of(answer.clone());
                let running = Running {
                    session,
                    arrival: copying.arrival,
                    answer,
                };
                Ok((Incoming::Running(running), reply))
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
