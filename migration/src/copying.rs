//! Copying while the machine runs: slices of a round, what was measured in each, and what the policy says next.

use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::block::{BlockKind, DataError};
use crate::carrier::{Cargo, Carried, Carrier, CarryError, Meters, Work};
use crate::clock::Clock;
use crate::custody::Custody;
use crate::pacing::Pace;
use crate::pages::encode::Memory;
use crate::policy::{self, Decision, Heat, History, Limits, Order, Policy, Sample, UNLIMITED};
use crate::report;
use crate::sets::Sets;
use crate::units::UnitSet;

/// How many slices the policy may look back: a minute, so that it sees more than one phase of a guest that has phases.
const SAMPLES_KEPT: usize = 600;
/// How often notes are taken over just to see which pages are written again. Each costs the guest a write fault.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// The state of the copying: what must still cross, and what is known of how it goes.
pub(crate) struct Copying {
    /// Everything that must cross and is not known to have.
    todo: Sets,
    /// Noted at the sources when last looked.
    noted: Sets,
    /// What this round still has to take.
    plan: Option<Sets>,
    heat: Option<Vec<Heat>>,
    watched_at: Duration,
    pub(crate) history: History,
    pub(crate) round: u32,
    /// What the round in progress has carried, over all its slices.
    carried: Carried,
    /// Where the next slice of a policy that plans anew in each goes on, in each block.
    cursors: Vec<u64>,
    /// What had to cross at least once, in each block.
    first_units: Vec<u64>,
    /// Units that the present plan leaves for the switch.
    held_back: u64,
    /// What crossed by name before the first round.
    by_name: Carried,
    round_started: Duration,
    survey_time: Duration,
    /// Clean bytes of memory that were found written, since the copying began.
    pub(crate) memory_dirtied: u64,
    began: Duration,
}

/// What a slice of copying may use.
pub(crate) struct Means<'a> {
    pub(crate) cargo: &'a [Cargo],
    pub(crate) custody: &'a Custody,
    pub(crate) memory: &'a Memory,
    pub(crate) carrier: &'a mut Carrier,
    pub(crate) pace: &'a Mutex<Pace>,
    pub(crate) clock: &'a dyn Clock,
}

/// What `tick` may do to the carrying that goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tick {
    GoOn,
    /// Begin no more batches.
    Enough,
    /// Drop everything.
    Stop,
}

impl Copying {
    /// Begins to note writes, and plans the first pass.
    /// `began`: when the crossing did, of which the deadline counts.
    pub(crate) fn begin(
        cargo: &[Cargo],
        clock: &dyn Clock,
        began: Duration,
        limits: &Limits,
    ) -> Result<Self, DataError> {
        for cargo in cargo {
            cargo.source.start_tracking()?;
        }
        let todo = cargo
            .iter()
            .map(|cargo| cargo.source.first_pass())
            .collect::<Result<Vec<_>, _>>()?;
        let todo = Sets::from(todo);
        let first_units = todo.as_slice().iter().map(UnitSet::count).collect();
        let now = clock.now();
        // Only this policy looks at groups, and watching costs the guest something.
        let heat = matches!(limits.policy, Policy::CalmLive).then(|| {
            cargo
                .iter()
                .map(|cargo| Heat::new(cargo.info.units(), cargo.info.unit_bytes()))
                .collect()
        });
        let total = todo.bytes(cargo);
        let history = History {
            between_rounds: true,
            total_bytes: total,
            remaining_bytes: total,
            disk_remaining_bytes: todo.disk_bytes(cargo),
            ..History::default()
        };
        Ok(Copying {
            noted: Sets::empty(cargo),
            todo,
            plan: None,
            heat,
            watched_at: now,
            history,
            round: 0,
            carried: Carried::default(),
            cursors: vec![0; cargo.len()],
            first_units,
            held_back: 0,
            by_name: Carried::default(),
            round_started: now,
            survey_time: Duration::ZERO,
            memory_dirtied: 0,
            began,
        })
    }

    /// What the policy sees now.
    pub(crate) fn look(&mut self, cargo: &[Cargo], clock: &dyn Clock) -> &History {
        self.history.elapsed = clock.now().saturating_sub(self.began);
        self.history.round.time = clock.now().saturating_sub(self.round_started);
        if let Some(heat) = &self.heat {
            let mut dirty = self.todo.clone();
            dirty.union(&self.noted);
            let groups: Vec<_> = heat
                .iter()
                .zip(dirty.as_slice())
                .map(|(heat, dirty)| heat.groups(dirty))
                .collect();
            self.history.groups = policy::heat::sum(&groups);
        }
        debug_assert!(cargo.len() == self.todo.as_slice().len());
        &self.history
    }

    /// Whether a plan is being carried out.
    pub(crate) fn in_round(&self) -> bool {
        self.plan.is_some()
    }

    /// Whether anything must still cross, as far as is known.
    pub(crate) fn remaining(&self) -> Sets {
        let mut left = self.todo.clone();
        left.union(&self.noted);
        left
    }

    /// Plans a round over what is dirty, as the decision says.
    pub(crate) fn plan(&mut self, cargo: &[Cargo], decision: &Decision, clock: &dyn Clock) -> &Sets {
        let mut plan = self.todo.clone();
        self.held_back = match &self.heat {
            Some(heat) if decision.hold_back_from != usize::MAX => {
                let held = |(set, heat): (&UnitSet, &Heat)| {
                    let units = set.runs().flat_map(|(first, count)| first..first + count);
                    units
                        .filter(|unit| heat.group_of(*unit) >= decision.hold_back_from)
                        .count() as u64
                };
                self.todo.as_slice().iter().zip(heat).map(held).sum()
            }
            _ => 0,
        };
        // A slice's worth; everything if the pace is not known.
        let slice_bytes = match decision.bandwidth_bytes_per_sec {
            UNLIMITED => u64::MAX,
            rate => (rate as f64 * decision.ask_again.as_secs_f64() / self.history.wire_ratio()) as u64,
        };
        let total = plan.bytes(cargo).max(1);
        // Every block gets its share of the slice.
        let most = |dirty: &UnitSet, cargo: &Cargo| {
            let unit = u64::from(cargo.info.unit_bytes());
            let share = (slice_bytes as f64 * (dirty.count() * unit) as f64 / total as f64) as u64;
            if decision.fresh {
                share.div_ceil(unit).max(1)
            } else {
                u64::MAX
            }
        };
        let blocks = plan.as_slice().iter().zip(cargo);
        if let Some(heat) = &self.heat
            && (decision.hold_back_from != usize::MAX || decision.order == Order::ColdestFirst)
        {
            let chosen = blocks
                .zip(heat)
                .map(|((dirty, cargo), heat)| {
                    heat.coldest(dirty, decision.hold_back_from, most(dirty, cargo), 0)
                })
                .collect();
            plan = Sets::from(chosen);
        } else if decision.fresh && decision.bandwidth_bytes_per_sec != UNLIMITED {
            // On around the block: who begins at its start each time sends what is written there over and over, and
            // hardly gets any further.
            let chosen = blocks
                .zip(&mut self.cursors)
                .map(|((dirty, cargo), cursor)| sweep(dirty, most(dirty, cargo), cursor))
                .collect();
            plan = Sets::from(chosen);
        }
        self.history.round = policy::Round {
            planned_bytes: plan.bytes(cargo),
            bandwidth_bytes_per_sec: decision.bandwidth_bytes_per_sec,
            ..policy::Round::default()
        };
        self.history.between_rounds = false;
        self.carried = std::mem::take(&mut self.by_name);
        self.round_started = clock.now();
        self.survey_time = Duration::ZERO;
        self.plan.insert(plan)
    }

    /// Carries a part of the plan; true when the plan is done.
    pub(crate) fn slice(
        &mut self,
        means: &mut Means<'_>,
        decision: &Decision,
        tick: &mut dyn FnMut(u64) -> Tick,
    ) -> Result<bool, CarryError> {
        let Some(plan) = self.plan.take() else {
            return Ok(true);
        };
        let start = means.clock.now();
        let meters = Meters::default();
        let work = Work {
            cargo: means.cargo,
            custody: means.custody,
            memory: means.memory,
            pace: means.pace,
            clock: means.clock,
            meters: &meters,
            round: self.round,
        };
        let outcome = means.carrier.carry(&work, plan.as_slice(), &mut || {
            let passed = means.clock.now().saturating_sub(start);
            match tick(meters.sent_bytes.load(Ordering::Relaxed)) {
                Tick::GoOn if passed >= decision.ask_again => meters.enough.store(true, Ordering::Release),
                Tick::GoOn => {}
                Tick::Enough => meters.enough.store(true, Ordering::Release),
                Tick::Stop => meters.stop.store(true, Ordering::Release),
            }
        });
        let carried = outcome?;
        let time = means.clock.now().saturating_sub(start);
        let taken = Sets::from(means.custody.owed());
        let left = plan.without(&taken);
        self.carried.add(&carried);
        let dirtied = self
            .survey(means.cargo, means.clock, &taken)
            .map_err(CarryError::Data)?;
        let copied = carried.memory.plain_bytes + carried.disk.plain_bytes;
        let paced = Duration::from_nanos(meters.held_back.into_inner()) > time / 20;
        let mut would_copy = self.todo.without(&taken);
        would_copy.union(&self.noted);
        self.history.remaining_bytes = would_copy.bytes(means.cargo);
        self.history.disk_remaining_bytes = would_copy.disk_bytes(means.cargo);
        self.history.round.copied_bytes += copied;
        self.history.round.wire_bytes += carried.wire_bytes();
        self.history.round.dirty_bytes = self.noted.bytes(means.cargo);
        if !paced && carried.wire_bytes() > 0 && !time.is_zero() {
            let busy = Duration::from_nanos(meters.sending.into_inner()) / means.carrier.busy_at_once();
            // Where the service goes first, what it used is the link's, too.
            let service = match self.history.service {
                Some(service) if decision.yield_to_service => service.bytes_per_sec,
                _ => 0.0,
            };
            let rate = carried.wire_bytes() as f64 / time.as_secs_f64() + service;
            self.history.saw_link(match self.history.link_bytes_per_sec {
                // The link was what took the time: this is what it carries.
                Some(known) if busy > time / 2 => known + (rate - known) / 4.0,
                // Something else did: it carries at least this.
                Some(known) => known.max(rate),
                None => rate,
            });
        }
        if paced {
            let rate = carried.wire_bytes() as f64 / time.as_secs_f64().max(1e-9);
            self.history.saw_under_limit(rate, decision);
        }
        if decision.waiting {
            self.history.waited += time;
        }
        self.history.samples.push(Sample {
            at: means.clock.now().saturating_sub(self.began),
            time,
            copied_bytes: copied,
            wire_bytes: carried.wire_bytes(),
            dirtied_bytes: dirtied,
            remaining_bytes: self.history.remaining_bytes,
            bandwidth_bytes_per_sec: decision.bandwidth_bytes_per_sec,
            paced,
            throttle_percent: self.history.throttle_percent,
            service_bytes_per_sec: self.history.service.map_or(0.0, |s| s.bytes_per_sec),
        });
        if self.history.samples.len() > SAMPLES_KEPT {
            self.history.samples.remove(0);
        }
        let done = left.is_empty() || decision.fresh;
        self.plan = Some(left);
        Ok(done)
    }

    /// Looks which units are noted now; returns how many clean bytes became dirty since the last look. `taken` was
    /// taken in between.
    pub(crate) fn survey(
        &mut self,
        cargo: &[Cargo],
        clock: &dyn Clock,
        taken: &Sets,
    ) -> Result<u64, DataError> {
        let start = clock.now();
        let known = self.noted.without(taken);
        let mut noted = Sets::empty(cargo);
        for (cargo, set) in cargo.iter().zip(noted.iter_mut()) {
            cargo.source.survey(set)?;
        }
        let new = noted.without(&known);
        self.noted = noted;
        // A unit that was still to be sent was dirty already, whenever it was written.
        let fresh = new.without(&self.todo.without(taken));
        let dirtied = fresh.bytes(cargo);
        self.memory_dirtied += dirtied.saturating_sub(fresh.disk_bytes(cargo));
        if let Some(last) = self.history.samples.last()
            && !last.time.is_zero()
        {
            self.history.disk_dirty_bytes_per_sec = new.disk_bytes(cargo) as f64 / last.time.as_secs_f64();
        }
        self.survey_time += clock.now().saturating_sub(start);
        Ok(dirtied)
    }

    /// The other side holds the round: what was taken is delivered, and what is noted is for the next one.
    /// From time to time the notes are taken over just to see which pages are written again.
    pub(crate) fn round_held(
        &mut self,
        cargo: &[Cargo],
        custody: &Custody,
        clock: &dyn Clock,
    ) -> Result<(), DataError> {
        let taken = Sets::from(custody.delivered_all());
        self.todo.subtract(&taken);
        self.survey(cargo, clock, &taken)?;
        self.todo.union(&self.noted);
        let now = clock.now();
        let window = now.saturating_sub(self.watched_at);
        if let Some(heat) = self.heat.as_mut().filter(|_| window >= WATCH_EVERY) {
            for ((cargo, heat), noted) in cargo.iter().zip(heat).zip(self.noted.as_slice()) {
                heat.observe(noted, window.as_secs_f64());
                let spans: Vec<_> = noted.spans(cargo.info.id, u32::MAX).collect();
                if !spans.is_empty() {
                    custody.watch(cargo.info.id, &spans)?;
                }
            }
            self.watched_at = now;
        }
        self.history.round.time = now.saturating_sub(self.round_started);
        self.history.round.dirty_bytes = self.noted.bytes(cargo);
        self.history.remaining_bytes = self.todo.bytes(cargo);
        self.history.disk_remaining_bytes = self.todo.disk_bytes(cargo);
        self.history.between_rounds = true;
        self.history.rounds.push(self.history.round);
        self.plan = None;
        self.round += 1;
        Ok(())
    }

    /// Between two rounds, time passed in which nothing was carried: what was written meanwhile?
    pub(crate) fn look_again(&mut self, cargo: &[Cargo], clock: &dyn Clock) -> Result<(), DataError> {
        self.survey(cargo, clock, &Sets::empty(cargo))?;
        self.todo.union(&self.noted);
        let left = self.remaining();
        self.history.remaining_bytes = left.bytes(cargo);
        self.history.disk_remaining_bytes = left.disk_bytes(cargo);
        let noted = self.noted.bytes(cargo);
        if let Some(last) = self.history.rounds.last_mut() {
            last.dirty_bytes = noted;
        }
        Ok(())
    }

    /// The link broke and was mended: what was delivered is done, the rest is noted again.
    pub(crate) fn settled(
        &mut self,
        cargo: &[Cargo],
        custody: &Custody,
        frames: &[u64],
        clock: &dyn Clock,
    ) -> Result<u64, DataError> {
        let before = self.todo.clone();
        let owed = Sets::from(custody.owed());
        self.todo.subtract_listed(cargo, &custody.settle(frames));
        let resent = owed.without(&before.without(&self.todo));
        let again = resent.as_slice().iter().map(UnitSet::count).sum();
        self.survey(cargo, clock, &owed)?;
        self.todo.union(&self.noted);
        self.plan = None;
        self.history.between_rounds = true;
        self.history.remaining_bytes = self.todo.bytes(cargo);
        // A number never names two rounds, whatever became of the first.
        self.round += 1;
        Ok(again)
    }

    /// The round for the report.
    pub(crate) fn report(
        &self,
        cargo: &[Cargo],
        start: Duration,
        decision: &Decision,
        reason: &str,
    ) -> report::Round {
        let took = self.history.round.time;
        let wire_bytes = self.carried.wire_bytes();
        report::Round {
            round: self.round,
            start: self.round_started.saturating_sub(start),
            took,
            survey: self.survey_time,
            memory: self.carried.memory,
            disk: self.carried.disk,
            wire_bytes,
            bandwidth_bytes_per_sec: Some(decision.bandwidth_bytes_per_sec).filter(|b| *b != UNLIMITED),
            rate_bytes_per_sec: rate(wire_bytes, took),
            dirty_pages: self.noted.units(cargo, BlockKind::Memory),
            dirty_clusters: self.noted.units(cargo, BlockKind::Disk),
            remaining_bytes: self.history.remaining_bytes,
            held_back_units: self.held_back,
            decision: "go on".into(),
            reason: reason.to_owned(),
            promise: None,
            throttle_percent: decision.throttle.percent,
            throttled_vcpus: decision.throttle.vcpus.clone(),
        }
    }

    /// How the machine wrote, for the report.
    pub(crate) fn conduct(&self, cargo: &[Cargo], limits: &Limits, capped: Option<u64>) -> report::Conduct {
        let most = limits
            .most_bandwidth_bytes_per_sec
            .into_iter()
            .chain(capped)
            .min();
        let link = limits.link(&self.history).map(|rate| rate as u64);
        report::Conduct {
            policy: limits.policy.to_string(),
            link_bytes_per_sec: link.into_iter().chain(most).min(),
            service_bytes_per_sec: self.history.service.map(|service| service.bytes_per_sec as u64),
            memory: self.wrote(cargo, BlockKind::Memory),
            disk: self.wrote(cargo, BlockKind::Disk),
        }
    }

    fn wrote(&self, cargo: &[Cargo], kind: BlockKind) -> report::Wrote {
        let of_kind = || {
            cargo
                .iter()
                .enumerate()
                .filter(|(_, cargo)| cargo.info.kind == kind)
        };
        let first = of_kind().map(|(at, cargo)| {
            let units = self.first_units.get(at).copied().unwrap_or(0);
            (units * u64::from(cargo.info.unit_bytes())).min(cargo.info.bytes)
        });
        let groups: Vec<_> = of_kind()
            .filter_map(|(at, _)| Some((self.heat.as_ref()?.get(at)?, self.todo.as_slice().get(at)?)))
            .map(|(heat, dirty)| heat.groups(dirty))
            .collect();
        report::Wrote {
            bytes: of_kind().map(|(_, cargo)| cargo.info.bytes).sum(),
            first_bytes: first.sum(),
            groups: policy::heat::sum(&groups)
                .into_iter()
                .filter(|group| group.bytes > 0)
                .map(|group| report::Group {
                    bytes: group.bytes,
                    writes_per_sec: group.writes_per_sec,
                })
                .collect(),
        }
    }

    pub(crate) fn frames(&self) -> u64 {
        self.carried.frames
    }

    /// Carries everything that is left, with all there is: the machine is stopped. `kind` alone, so that both
    /// kinds are measured.
    pub(crate) fn rest(
        &mut self,
        means: &mut Means<'_>,
        kind: BlockKind,
        tick: &mut dyn FnMut() -> bool,
    ) -> Result<Carried, CarryError> {
        let plan = self.todo.only(means.cargo, kind);
        let meters = Meters::default();
        means
            .pace
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .set(None);
        let work = Work {
            cargo: means.cargo,
            custody: means.custody,
            memory: means.memory,
            pace: means.pace,
            clock: means.clock,
            meters: &meters,
            round: self.round,
        };
        means.carrier.carry(&work, plan.as_slice(), &mut || {
            if tick() {
                meters.stop.store(true, Ordering::Release);
            }
        })
    }

    /// Units whose names the other side knew.
    pub(crate) fn known(&mut self, cargo: &[Cargo], at: usize, units: &UnitSet) {
        let mut sets = Sets::empty(cargo);
        if let (Some(set), Some(cargo)) = (sets.iter_mut().nth(at), cargo.get(at)) {
            set.union(units);
            let counts = match cargo.info.kind {
                BlockKind::Memory => &mut self.by_name.memory,
                BlockKind::Disk => &mut self.by_name.disk,
            };
            counts.known += units.count();
            counts.plain_bytes += units.count() * u64::from(cargo.info.unit_bytes());
        }
        self.todo.subtract(&sets);
        self.history.remaining_bytes = self.todo.bytes(cargo);
    }

    /// The other side holds the last round: nothing is left.
    pub(crate) fn rest_held(&mut self, custody: &Custody) {
        let taken = Sets::from(custody.delivered_all());
        self.todo.subtract(&taken);
    }

    /// The machine is stopped: what is noted now is all that will ever be.
    pub(crate) fn last_survey(&mut self, cargo: &[Cargo], clock: &dyn Clock) -> Result<(), DataError> {
        self.survey(cargo, clock, &Sets::empty(cargo))?;
        self.todo.union(&self.noted);
        Ok(())
    }
}

/// At most `most` units of the set from the cursor on and around, and moves it behind them.
fn sweep(set: &UnitSet, most: u64, cursor: &mut u64) -> UnitSet {
    let mut chosen = UnitSet::empty(set.units());
    let mut left = most;
    let start = *cursor;
    for (from, to) in [(start, set.units()), (0, start)] {
        let mut at = from;
        while left > 0
            && let Some((first, count)) = set.next_run(at).filter(|(first, _)| *first < to)
        {
            let count = count.min(left).min(to - first);
            chosen.insert_run(first, count);
            at = first + count;
            left -= count;
            *cursor = at;
        }
    }
    chosen
}

pub(crate) fn rate(bytes: u64, time: Duration) -> u64 {
    if time.is_zero() {
        0
    } else {
        (bytes as f64 / time.as_secs_f64()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Sweeps follow one another around the block; whatever the size of a slice, each unit's turn comes once.
        #[test]
        fn every_unit_has_its_turn_before_any_has_a_second(
            units in proptest::collection::btree_set(0u64..200, 1..60),
            slice in 1u64..20,
            start in 0u64..200,
        ) {
            let mut set = UnitSet::empty(200);
            units.iter().for_each(|unit| set.insert(*unit));
            let (mut cursor, mut turns) = (start, Vec::new());
            while turns.len() < units.len() {
                let left = (units.len() - turns.len()) as u64;
                let chosen = sweep(&set, slice.min(left), &mut cursor);
                prop_assert_eq!(chosen.count(), slice.min(left));
                turns.extend(chosen.runs().flat_map(|(first, count)| first..first + count));
            }
            turns.sort_unstable();
            prop_assert_eq!(turns, units.into_iter().collect::<Vec<_>>());
        }
    }
}
