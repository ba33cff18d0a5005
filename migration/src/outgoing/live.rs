//! Copy live: slices and rounds, as the policy says, and names first where the other side may know the content.

use std::sync::Arc;
use std::time::Duration;

use crate::block::{BlockId, BlockKind, Name, Span};
use crate::copying::{Copying, Means, Tick};
use crate::custody::Custody;
use crate::estimate::{self, SoFar};
use crate::failure::{Cause, Failure, Phase, Reason, Side};
use crate::handover::Giver;
use crate::policy::{self, Action, Decision, UNLIMITED};
use crate::report::{Event, Moment, Round};
use crate::talk::Broke;
use crate::units::UnitSet;
use crate::wire::{Message, VERSION_WITH_NAMES};

use super::{
    Crossing, FORESEE_PART, LOOK_EVERY, NAMES_AT_ONCE, REPORT_ROUND, SHOW_EVERY, SLOW_BOOK, cancelled,
    carry_broke, is_late, lock,
};

/// What a look at how it goes leads to.
enum Next {
    Copy(Decision, String),
    /// With the reason, if it is one that was decided.
    Switch(Option<String>),
}

impl Crossing<'_> {
    pub(super) fn copy_live(&mut self) -> Result<(), Failure> {
        self.enter(Phase::CopyLive);
        let sources: Vec<_> = self.cargo.iter().map(|cargo| Arc::clone(&cargo.source)).collect();
        self.custody = Some(Custody::new(
            &sources,
            usize::from(self.lanes),
            Arc::clone(&self.memory),
        ));
        let copying = Copying::begin(&self.cargo, self.world.clock, self.start, &self.options.limits);
        let copying = self.or_fail(copying.map_err(Reason::from))?;
        self.timeline.note(Moment {
            at: self.now(),
            remaining_bytes: copying.history.remaining_bytes,
            ..Moment::default()
        });
        self.copying = Some(copying);
        self.copy_known()?;
        let mut last = None;
        loop {
            let carried = match self.decide()? {
                Next::Copy(decision, reason) => {
                    let carried = self.slice(&decision, &reason);
                    last = Some((decision, reason));
                    carried
                }
                Next::Switch(reason) => match self.end_round(last.take()) {
                    Ok(()) => {
                        if !self.arm()? {
                            continue;
                        }
                        if let (Some(last), Some(reason)) = (self.report.rounds.last_mut(), reason) {
                            last.decision = "switch".into();
                            last.reason = reason;
                        }
                        return Ok(());
                    }
                    broke => broke,
                },
            };
            if let Err(broke) = carried {
                self.mend(broke)?;
            }
        }
    }

    /// Before the machine is paused, its leaving is written down, which takes a busy disk its time. `false`: so long that
    /// the machine will have written much meanwhile, and whether to switch is to be asked again.
    fn arm(&mut self) -> Result<bool, Failure> {
        let Some(departure) = self.departure.as_mut().filter(|d| d.state() != Giver::Armed) else {
            return Ok(true);
        };
        let begun = self.world.clock.now();
        let armed = departure.arm(self.world.ledger);
        self.or_fail(armed)?;
        if self.world.clock.now().saturating_sub(begun) < SLOW_BOOK {
            return Ok(true);
        }
        if let Some(copying) = self.copying.as_mut() {
            let looked = copying.look_again(&self.cargo, self.world.clock);
            self.or_fail(looked.map_err(Reason::from))?;
        }
        Ok(false)
    }

    /// A switch in the middle of a round waits until the other side holds what the round has sent so far. What the switch
    /// sends takes any lane: a page that was written again would overtake its older self on another one, and what was not
    /// written again would be sent a second time.
    fn end_round(&mut self, last: Option<(Decision, String)>) -> Result<(), Broke> {
        let in_round = self.copying.as_ref().is_some_and(Copying::in_round);
        match last.filter(|_| in_round) {
            Some((decision, reason)) => self.close_round(&decision, &reason),
            None => Ok(()),
        }
    }

    fn decide(&mut self) -> Result<Next, Failure> {
        let fit = self.world.machine.check();
        self.or_fail(fit)?;
        if let Some(reason) = self.interrupted() {
            return Err(self.fail(Side::Outgoing, reason));
        }
        let fixed = self.options.switch_fixed;
        let (clock, service) = (self.world.clock, self.world.machine.service());
        let Some(copying) = self.copying.as_mut() else {
            return Ok(Next::Switch(None));
        };
        copying.history.switch_fixed = fixed;
        copying.history.throttle_percent = self.throttled.percent;
        // Nobody asks who writes where nobody may be slowed.
        if self.options.limits.most_throttle_percent > 0 {
            let machine = &mut self.world.machine;
            let (pages, found) = (|| machine.vcpu_writes(), copying.memory_dirtied);
            copying.history.vcpus = self.writers.look(clock.now(), &self.throttled, found, pages);
        }
        copying.history.service = service;
        let history = copying.look(&self.cargo, clock);
        let (decision, reason) = policy::decide(history, &self.options.limits);
        let now = clock.now().saturating_sub(self.start);
        if decision.action == Action::GoOn
            && self.foreseen_at.is_none_or(|last| {
                now.saturating_sub(last) >= self.options.foresee_every.max(now / FORESEE_PART)
            })
        {
            let earlier: u64 = self.report.rounds.iter().map(|round| round.wire_bytes).sum();
            let going_on = if history.between_rounds {
                0
            } else {
                history.round.wire_bytes
            };
            let sent = earlier + going_on;
            let limits = &self.options.limits;
            if limits.link(history).is_some() {
                self.foreseen_at = Some(now);
            }
            let so_far = SoFar {
                at: now,
                prepared: self.report.prepare,
                wire_bytes: sent,
                verify: self.options.verify_takes,
            };
            self.promise = estimate::from_here(history, limits, so_far);
            self.report.promise = self.report.promise.or(self.promise);
        }
        let reason = reason.to_string();
        if self.world.handle.wants_switch() {
            return Ok(Next::Switch(Some("the switch was asked for".into())));
        }
        match decision.action {
            // Nothing is left to decide about.
            Action::GoOn if copying.history.between_rounds && copying.history.remaining_bytes == 0 => {
                return Ok(Next::Switch(None));
            }
            Action::Switch => return Ok(Next::Switch(Some(reason))),
            Action::GiveUp => {
                let late = self
                    .options
                    .limits
                    .deadline
                    .is_some_and(|limit| self.now() >= limit);
                let cause = if late {
                    Cause::Deadline
                } else {
                    Cause::NotConverging
                };
                return Err(self.fail(Side::Outgoing, Reason::new(cause, reason)));
            }
            Action::GoOn => {}
        }
        let eased = self
            .throttle(&decision.throttle)
            .and(self.slow_writes(decision.slow_writes_bytes_per_sec));
        self.or_fail(eased)?;
        self.set_pace(&decision);
        Ok(Next::Copy(decision, reason))
    }

    fn set_pace(&self, decision: &Decision) {
        let mut rate = decision
            .bandwidth_bytes_per_sec
            .min(self.world.handle.capped().unwrap_or(UNLIMITED));
        if decision.yield_to_service
            && rate != UNLIMITED
            && let Some(service) = self.copying.as_ref().and_then(|copying| copying.history.service)
        {
            let least = self.options.limits.least_bandwidth_bytes_per_sec;
            rate = rate.saturating_sub(service.bytes_per_sec as u64).max(least);
        }
        lock(&self.pace).set(Some(rate).filter(|rate| *rate != UNLIMITED));
    }

    fn slice(&mut self, decision: &Decision, reason: &str) -> Result<(), Broke> {
        let (at, late) = (self.now(), self.late_at());
        let Some(copying) = self.copying.as_mut() else {
            return Ok(());
        };
        let round = copying.round;
        if !copying.in_round() {
            let plan = copying.plan(&self.cargo, decision, self.world.clock);
            self.world.observer.event(&Event::Round {
                round,
                at,
                pages: plan.units(&self.cargo, BlockKind::Memory),
                clusters: plan.units(&self.cargo, BlockKind::Disk),
                bytes: plan.bytes(&self.cargo),
                bandwidth_bytes_per_sec: Some(decision.bandwidth_bytes_per_sec)
                    .filter(|rate| *rate != UNLIMITED),
                reason: reason.to_owned(),
            });
        }
        let Some(custody) = self.custody.as_ref() else {
            return Ok(());
        };
        let mut stopped = None;
        let mut shown = Duration::ZERO;
        let mut checked = self.world.clock.now();
        let (clock, handle, observer) = (self.world.clock, self.world.handle, self.world.observer);
        let machine = &mut *self.world.machine;
        let start = self.start;
        let remaining_bytes = copying.history.remaining_bytes;
        let disk_remaining_bytes = copying.history.disk_remaining_bytes;
        let dirty_bytes_per_sec = copying.history.dirty_bytes_per_sec() as u64;
        let promise = self.promise;
        let sent_before = copying.history.round.wire_bytes
            + self
                .report
                .rounds
                .iter()
                .map(|round| round.wire_bytes)
                .sum::<u64>();
        let mut tick = |sent_bytes: u64| {
            if let Some(reason) = cancelled(handle).or_else(|| is_late(clock, late)) {
                stopped = Some(reason);
                return Tick::Stop;
            }
            let now = clock.now();
            if now.saturating_sub(checked) >= LOOK_EVERY {
                checked = now;
                if let Err(reason) = machine.check() {
                    stopped = Some(reason);
                    return Tick::Stop;
                }
            }
            if now.saturating_sub(shown) >= SHOW_EVERY {
                shown = now;
                let at = now.saturating_sub(start);
                let sent_bytes = sent_before + sent_bytes;
                observer.event(&Event::Progress {
                    round,
                    at,
                    sent_bytes,
                    remaining_bytes,
                    disk_remaining_bytes,
                    dirty_bytes_per_sec,
                    promise,
                });
            }
            if handle.wants_switch() {
                Tick::Enough
            } else {
                Tick::GoOn
            }
        };
        let mut means = Means {
            cargo: &self.cargo,
            custody,
            memory: &self.memory,
            carrier: &mut self.carrier,
            pace: &self.pace,
            clock,
        };
        let outcome = copying.slice(&mut means, decision, &mut tick);
        if let Some(reason) = stopped {
            return Err(Broke::here(reason));
        }
        let done = outcome.map_err(carry_broke)?;
        self.note_moment();
        if done {
            self.close_round(decision, reason)?;
        }
        Ok(())
    }

    /// Within a round, for the timeline.
    fn note_moment(&mut self) {
        let at = self.now();
        let Some(copying) = self.copying.as_ref() else {
            return;
        };
        let history = &copying.history;
        let earlier: u64 = self.report.rounds.iter().map(|round| round.wire_bytes).sum();
        self.timeline.note(Moment {
            at,
            wire_bytes: earlier + history.round.wire_bytes,
            remaining_bytes: history.remaining_bytes,
            dirty_bytes_per_sec: history.dirty_bytes_per_sec() as u64,
        });
    }

    /// The other side says that it holds everything that was sent.
    fn close_round(&mut self, decision: &Decision, reason: &str) -> Result<(), Broke> {
        let Some(round) = self.copying.as_ref().map(|copying| copying.round) else {
            return Ok(());
        };
        let frames = self.carrier.frames();
        self.talk.say(&Message::RoundEnd { round, frames })?;
        self.hear_round_held(round)?;
        let (Some(copying), Some(custody)) = (self.copying.as_mut(), self.custody.as_ref()) else {
            return Ok(());
        };
        self.report.checks.frames_checked += copying.frames();
        let mut done = copying.report(&self.cargo, self.start, decision, reason);
        copying
            .round_held(&self.cargo, custody, self.world.clock)
            .map_err(|error| Broke::here(Reason::from(error)))?;
        done.took = copying
            .history
            .rounds
            .last()
            .map_or(done.took, |round| round.time);
        done.rate_bytes_per_sec = crate::copying::rate(done.wire_bytes, done.took);
        done.remaining_bytes = copying.history.remaining_bytes;
        done.promise = self.promise;
        self.world
            .observer
            .event(&Event::RoundDone(Box::new(done.clone())));
        self.keep_round(done, decision.fresh);
        Ok(())
    }

    /// A policy that plans anew several times a second makes many small rounds: for the report they are one for
    /// each second.
    fn keep_round(&mut self, done: Round, fresh: bool) {
        let was_fresh = std::mem::replace(&mut self.fresh, fresh);
        match self.report.rounds.last_mut() {
            Some(last) if fresh && was_fresh && last.took + done.took < REPORT_ROUND => last.absorb(&done),
            _ => self.report.rounds.push(done),
        }
    }

    pub(super) fn hear_round_held(&mut self, round: u32) -> Result<(), Broke> {
        match self.hear("RoundEnd", self.options.stall)? {
            Message::RoundHeld { round: held } if held == round => Ok(()),
            other => Err(Broke::unexpected(&other, "RoundEnd")),
        }
    }

    /// Where the other side may hold content from before, names go first, and what it has need not travel.
    fn copy_known(&mut self) -> Result<(), Failure> {
        if self.version < VERSION_WITH_NAMES {
            return Ok(());
        }
        for block in std::mem::take(&mut self.libraries) {
            if let Err(broke) = self.announce(block) {
                self.mend(broke)?;
            }
        }
        Ok(())
    }

    fn announce(&mut self, block: BlockId) -> Result<(), Broke> {
        let Some(at) = self.cargo.iter().position(|cargo| cargo.info.id == block) else {
            return Ok(());
        };
        let (mut asked, mut known) = (0u64, 0u64);
        let batch = NAMES_AT_ONCE;
        let mut unit = 0;
        loop {
            let (Some(cargo), Some(custody), Some(copying)) =
                (self.cargo.get(at), self.custody.as_ref(), self.copying.as_ref())
            else {
                return Ok(());
            };
            let Some((first, count)) = copying
                .remaining()
                .as_slice()
                .get(at)
                .and_then(|s| s.next_run(unit))
            else {
                return Ok(());
            };
            let count = count.min(batch);
            unit = first + count;
            let span = Span {
                block,
                first,
                count: count as u32,
            };
            let data = |error| Broke::here(Reason::from(error));
            custody.take(block, &[span]).map_err(data)?;
            let mut names = Vec::with_capacity(count as usize);
            let mut content = vec![0; cargo.info.unit_bytes() as usize];
            for number in first..first + count {
                let one = Span {
                    block,
                    first: number,
                    count: 1,
                };
                let room = content.get_mut(..cargo.info.span_bytes(one)).unwrap_or_default();
                cargo.source.read(one, room).map_err(data)?;
                names.push(Name::of(room));
            }
            self.talk.say(&Message::Announce { block, first, names })?;
            let wanted = match self.hear("Announce", self.options.stall)? {
                Message::Wanted { units } => units,
                other => return Err(Broke::unexpected(&other, "Announce")),
            };
            let (Some(custody), Some(copying)) = (self.custody.as_ref(), self.copying.as_mut()) else {
                return Ok(());
            };
            let lacks = |at: u64| {
                wanted
                    .get((at / 64) as usize)
                    .is_none_or(|word| word >> (at % 64) & 1 == 1)
            };
            let mut there = UnitSet::empty(self.cargo.get(at).map_or(0, |cargo| cargo.info.units()));
            (0..count)
                .filter(|at| !lacks(*at))
                .for_each(|at| there.insert(first + at));
            custody.delivered(block, &there);
            custody.put_back_owed_of(block);
            asked += count;
            known += there.count();
            copying.known(&self.cargo, at, &there);
            // Hardly anything is there: names only cost time.
            if asked >= 4 * batch && known * 20 < asked {
                return Ok(());
            }
        }
    }
}
