//! The switch, while the machine runs nowhere: pause, copy the rest, compare, send the state.

use crate::block::{BlockKind, Name, name_of_block};
use crate::carrier::{Cargo, CarryError};
use crate::copying::Means;
use crate::failure::{Cause, Failure, Phase, Reason, Side};
use crate::talk::Broke;
use crate::wire::{Message, STATE_PART_BYTES, Stage};

use super::{Crossing, cancelled, carry_broke};

impl Crossing<'_> {
    pub(super) fn pause(&mut self) -> Result<(), Failure> {
        self.enter(Phase::Pause);
        if let Some(reason) = cancelled(self.world.handle) {
            return Err(self.fail(Side::Outgoing, reason));
        }
        self.marked = self.world.clock.now();
        let paused = self.world.machine.pause();
        self.or_fail(paused)?;
        let took = self.mark();
        self.report.downtime.pause = took;
        let state = self.world.machine.save();
        self.state = self.or_fail(state)?;
        let took = self.mark();
        self.report.downtime.save_state = took;
        Ok(())
    }

    pub(super) fn copy_rest(&mut self) -> Result<(), Failure> {
        self.enter(Phase::CopyRest);
        self.in_switch(Self::copy_rest_once)
    }

    fn copy_rest_once(&mut self) -> Result<(), Broke> {
        let clock = self.world.clock;
        let data = |error| Broke::here(Reason::from(error));
        if let Some(copying) = self.copying.as_mut() {
            copying.last_survey(&self.cargo, clock).map_err(data)?;
        }
        let took = self.mark();
        self.report.downtime.last_survey += took;
        let mut round = crate::report::Round {
            start: self.now(),
            decision: "switch".into(),
            reason: "the machine is stopped: everything that is left".into(),
            ..Default::default()
        };
        for kind in [BlockKind::Disk, BlockKind::Memory] {
            let handle = self.world.handle;
            let (Some(copying), Some(custody)) = (self.copying.as_mut(), self.custody.as_ref()) else {
                return Ok(());
            };
            let mut means = Means {
                cargo: &self.cargo,
                custody,
                memory: &self.memory,
                carrier: &mut self.carrier,
                pace: &self.pace,
                clock,
            };
            round.round = copying.round;
            let carried = copying
                .rest(&mut means, kind, &mut || handle.is_cancelled())
                .map_err(|error| match (error, cancelled(handle)) {
                    (CarryError::Stopped, Some(reason)) => Broke::here(reason),
                    (error, _) => carry_broke(error),
                })?;
            round.memory.add(&carried.memory);
            round.disk.add(&carried.disk);
            self.report.checks.frames_checked += carried.frames;
            let took = self.mark();
            match kind {
                BlockKind::Disk => self.report.downtime.last_clusters += took,
                BlockKind::Memory => self.report.downtime.last_pages += took,
            }
        }
        round.wire_bytes = round.memory.wire_bytes + round.disk.wire_bytes;
        round.took = self.now().saturating_sub(round.start);
        round.rate_bytes_per_sec = crate::copying::rate(round.wire_bytes, round.took);
        // The answer is heard after the state was sent: no round trip is waited for here.
        let frames = self.carrier.frames();
        self.talk.say(&Message::RoundEnd {
            round: round.round,
            frames,
        })?;
        self.rest_unheard = true;
        self.report.rounds.push(round);
        Ok(())
    }

    pub(super) fn verify(&mut self) -> Result<(), Failure> {
        if !self.options.verify {
            return Ok(());
        }
        self.enter(Phase::Verify);
        self.in_switch(|crossing| {
            crossing.talk.say(&Message::Verify)?;
            let ours = crossing
                .names()
                .map_err(|error| Broke::here(Reason::from(error)))?;
            crossing.hear_rest_held()?;
            let theirs = match crossing.hear("Verify", crossing.options.stall)? {
                Message::Hashes { names, .. } => names,
                other => return Err(Broke::unexpected(&other, "Verify")),
            };
            crossing.report.checks.compared = Some(ours == theirs);
            let took = crossing.mark();
            crossing.report.downtime.verify += took;
            if ours != theirs {
                return Err(Broke::For(
                    Side::Incoming,
                    Reason::new(
                        Cause::Damaged,
                        "the memory or disks of both sides differ after copying",
                    ),
                ));
            }
            Ok(())
        })
    }

    /// The hash of every block, in the order of their ids, as the other side makes it.
    pub(super) fn names(&self) -> Result<Vec<Name>, crate::block::DataError> {
        let mut cargo: Vec<&Cargo> = self.cargo.iter().collect();
        cargo.sort_by_key(|cargo| cargo.info.id);
        cargo
            .iter()
            .map(|cargo| name_of_block(&cargo.info, |span, out| cargo.source.read(span, out)))
            .collect()
    }

    pub(super) fn send_state(&mut self) -> Result<(), Failure> {
        self.enter(Phase::SendState);
        let released = self.world.machine.release();
        self.or_fail(released)?;
        self.in_switch(|crossing| {
            let mut offset = 0;
            for part in crossing.state.chunks(STATE_PART_BYTES) {
                crossing.talk.say(&Message::StatePart {
                    offset,
                    bytes: part.to_vec(),
                })?;
                offset += part.len() as u64;
            }
            crossing.talk.say(&Message::Load {
                total: offset,
                name: Name::of(&crossing.state),
            })?;
            let took = crossing.mark();
            crossing.report.downtime.send_state += took;
            crossing.hear_rest_held()?;
            match crossing.hear("Load", crossing.options.stall)? {
                Message::Loaded { loaded } => crossing.report.downtime.load_there = loaded,
                other => return Err(Broke::unexpected(&other, "Load")),
            }
            crossing.stage = Stage::Loaded;
            Ok(())
        })?;
        let took = self.mark();
        self.report.downtime.load += took;
        Ok(())
    }

    /// The answer to the last `RoundEnd`, if it was not heard yet.
    fn hear_rest_held(&mut self) -> Result<(), Broke> {
        let Some(round) = self.copying.as_ref().map(|copying| copying.round) else {
            return Ok(());
        };
        if !std::mem::take(&mut self.rest_unheard) {
            return Ok(());
        }
        self.hear_round_held(round)?;
        let (Some(copying), Some(custody)) = (self.copying.as_mut(), self.custody.as_ref()) else {
            return Ok(());
        };
        copying.rest_held(custody);
        Ok(())
    }

    /// A step of the switch. If the link breaks and comes back, what is missing is copied before it is tried
    /// again - unless the other side has already loaded everything.
    fn in_switch(&mut self, mut step: impl FnMut(&mut Self) -> Result<(), Broke>) -> Result<(), Failure> {
        loop {
            let mut broke = match step(self) {
                Ok(()) => return Ok(()),
                Err(broke) => broke,
            };
            loop {
                self.mend(broke)?;
                if self.stage == Stage::Loaded {
                    return Ok(());
                }
                if self.phase == Phase::CopyRest {
                    break;
                }
                match self.copy_rest_once() {
                    Ok(()) => break,
                    Err(again) => broke = again,
                }
            }
        }
    }
}
