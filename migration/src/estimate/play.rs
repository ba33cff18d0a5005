//! Plays a crossing through before it happens: the policy itself decides, over memory that is written as the machine
//! was seen to write. Nothing is random and no page is simulated: each class of memory is an amount.

use std::time::Duration;

use crate::policy::{
    self, Action, Decision, Group, History, Limits, Order, Round, Sample, ServiceUse, UNLIMITED,
};

/// Bytes that are written equally often and shrink equally on the wire.
#[derive(Clone, Copy, Debug)]
pub(super) struct Amount {
    pub(super) bytes: f64,
    pub(super) writes_per_sec: f64,
    /// Wire bytes per byte.
    pub(super) ratio: f64,
    /// What must cross and is not in the round's plan, and what is.
    pub(super) dirty: f64,
    pub(super) planned: f64,
}

/// What the crossing is played over.
#[derive(Clone, Debug)]
pub(super) struct Ground<'a> {
    pub(super) limits: &'a Limits,
    pub(super) link_bytes_per_sec: f64,
    /// How fast this host turns memory into frames, in bytes of memory.
    pub(super) copy_bytes_per_sec: f64,
    pub(super) round_trip_secs: f64,
    /// So many slices are played as they would be; after that they get longer, so that a play ends soon.
    pub(super) fine_steps: u32,
}

/// How it ends.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ending {
    /// Since the copying began.
    pub(super) secs: f64,
    pub(super) downtime_secs: f64,
    /// From the moment the play began.
    pub(super) wire_bytes: f64,
    pub(super) rounds: f64,
    pub(super) cost: f64,
    /// The policy switches; otherwise it gives up, or the play was ended.
    pub(super) crosses: bool,
    pub(super) reason: String,
}

/// Less than a page is nothing.
const NOTHING_BYTES: f64 = 4096.0;
/// A play ends after so many times its fine steps.
const MOST_STRETCHES: u32 = 10;
const SAMPLES: usize = 100;
/// Groups are known after about this long.
const WATCHED_SECS: f64 = 1.0;

pub(super) struct Player<'a> {
    pub(super) ground: Ground<'a>,
    /// Coldest first.
    pub(super) amounts: Vec<Amount>,
    pub(super) history: History,
    wire_bytes: f64,
    cost: f64,
    steps: u32,
}

impl<'a> Player<'a> {
    pub(super) fn new(ground: Ground<'a>, mut amounts: Vec<Amount>, history: History) -> Self {
        amounts.sort_by(|a, b| a.writes_per_sec.total_cmp(&b.writes_per_sec));
        Player {
            ground,
            amounts,
            history,
            wire_bytes: 0.0,
            cost: 0.0,
            steps: 0,
        }
    }

    pub(super) fn play(mut self) -> Ending {
        let limits = self.ground.limits;
        loop {
            self.look();
            let (decision, reason) = policy::decide(&self.history, limits);
            let nothing_left = self.history.between_rounds && self.history.remaining_bytes == 0;
            match decision.action {
                Action::GiveUp => return self.end(false, reason.to_string()),
                Action::Switch => return self.end(true, reason.to_string()),
                Action::GoOn if nothing_left => return self.end(true, "nothing is left to copy".to_owned()),
                Action::GoOn if self.steps >= MOST_STRETCHES * self.ground.fine_steps => {
                    let time = policy::reason::time(self.history.elapsed.as_secs_f64());
                    return self.end(false, format!("no end is seen within {time}: {reason}"));
                }
                Action::GoOn => self.slice(&decision),
            }
            self.steps += 1;
        }
    }

    fn remaining(&self) -> f64 {
        let left: f64 = self.amounts.iter().map(|a| a.dirty + a.planned).sum();
        if left < NOTHING_BYTES { 0.0 } else { left }
    }

    fn look(&mut self) {
        self.history.remaining_bytes = self.remaining() as u64;
        if self.history.elapsed.as_secs_f64() >= WATCHED_SECS {
            self.history.groups = self
                .amounts
                .iter()
                .map(|amount| Group {
                    bytes: amount.bytes as u64,
                    dirty_bytes: (amount.dirty + amount.planned) as u64,
                    writes_per_sec: amount.writes_per_sec,
                })
                .collect();
        }
    }

    /// Moves what the round will carry from `dirty` to `planned`, as the engine plans.
    fn plan(&mut self, decision: &Decision, secs: f64) {
        for amount in &mut self.amounts {
            amount.dirty += std::mem::take(&mut amount.planned);
        }
        let by_heat = decision.order == Order::ColdestFirst
            && decision.fresh
            && decision.bandwidth_bytes_per_sec != UNLIMITED;
        let mut room = if by_heat {
            decision.bandwidth_bytes_per_sec as f64 * secs
        } else {
            f64::INFINITY
        };
        for amount in &mut self.amounts {
            let plain = (room / amount.ratio.max(1e-6)).min(amount.dirty);
            amount.planned = plain;
            amount.dirty -= plain;
            room -= plain * amount.ratio;
        }
        self.history.round = Round {
            planned_bytes: self.amounts.iter().map(|a| a.planned).sum::<f64>() as u64,
            bandwidth_bytes_per_sec: decision.bandwidth_bytes_per_sec,
            ..Round::default()
        };
        self.history.between_rounds = false;
    }

    fn rate(&self, decision: &Decision) -> f64 {
        let rate = (decision.bandwidth_bytes_per_sec as f64).min(self.ground.link_bytes_per_sec);
        match self.history.service {
            Some(service) if decision.yield_to_service => rate - service.bytes_per_sec,
            _ => rate,
        }
        .max(1.0)
    }

    fn slice(&mut self, decision: &Decision) {
        let coarse = self.steps.saturating_sub(self.ground.fine_steps) / self.ground.fine_steps.max(1);
        let most_secs = decision.ask_again.as_secs_f64().max(1e-3) * f64::from(1u32 << coarse.min(20));
        if self.history.between_rounds {
            self.plan(decision, most_secs);
        }
        let rate = self.rate(decision);
        let wire: f64 = self.amounts.iter().map(|a| a.planned * a.ratio).sum();
        let plain: f64 = self.amounts.iter().map(|a| a.planned).sum();
        let whole_secs = (wire / rate).max(plain / self.ground.copy_bytes_per_sec.max(1.0));
        let secs = whole_secs.min(most_secs).max(1e-6);
        let part = if whole_secs > 0.0 {
            (secs / whole_secs).min(1.0)
        } else {
            1.0
        };
        let dirtied = self.advance(secs, part, decision);
        let (copied, sent) = (plain * part, wire * part);
        self.note(decision, secs, copied, sent, dirtied);
        let cost = &self.ground.limits.cost;
        let slowed = f64::from(decision.throttle.percent) / 100.0 * cost.down();
        self.cost += secs * cost.at(self.ground.link_bytes_per_sec - sent / secs).max(slowed);
        if decision.waiting {
            self.history.waited += Duration::from_secs_f64(secs);
        }
        if part >= 1.0 || decision.fresh {
            self.end_round(decision);
        }
    }

    /// Lets the machine write for a while, during which a part of the plan becomes clean. What was clean, or became
    /// so, and is written is dirty again: dc/dt = sent - rate * c.
    fn advance(&mut self, secs: f64, part: f64, decision: &Decision) -> f64 {
        let speed = 1.0 - f64::from(decision.throttle.percent.min(99)) / 100.0;
        let mut dirtied = 0.0;
        for amount in &mut self.amounts {
            let sent = amount.planned * part;
            let clean = (amount.bytes - amount.dirty - amount.planned).max(0.0);
            amount.planned -= sent;
            let exposure = amount.writes_per_sec * speed * secs;
            let stays = (-exposure).exp();
            // The mean of exp over the slice, for what becomes clean evenly in it.
            let stays_new = if exposure > 1e-9 {
                (1.0 - stays) / exposure
            } else {
                1.0
            };
            let written = clean * (1.0 - stays) + sent * (1.0 - stays_new);
            amount.dirty += written;
            dirtied += written;
        }
        self.history.elapsed += Duration::from_secs_f64(secs);
        dirtied
    }

    fn note(&mut self, decision: &Decision, secs: f64, copied: f64, sent: f64, dirtied: f64) {
        self.wire_bytes += sent;
        let paced = (decision.bandwidth_bytes_per_sec as f64) < self.ground.link_bytes_per_sec;
        let history = &mut self.history;
        if !paced && sent > 0.0 {
            history.saw_link(self.ground.link_bytes_per_sec);
        } else {
            history.saw_under_limit(sent / secs.max(1e-9), decision);
        }
        history.throttle_percent = decision.throttle.percent;
        let time = Duration::from_secs_f64(secs);
        let round = &mut history.round;
        round.time += time;
        round.copied_bytes += copied as u64;
        round.wire_bytes += sent as u64;
        round.dirty_bytes = self.amounts.iter().map(|a| a.dirty).sum::<f64>() as u64;
        let remaining: f64 = self.amounts.iter().map(|a| a.dirty + a.planned).sum();
        if history.samples.len() >= SAMPLES {
            history.samples.remove(0);
        }
        history.samples.push(Sample {
            at: history.elapsed,
            time,
            copied_bytes: copied as u64,
            wire_bytes: sent as u64,
            dirtied_bytes: dirtied as u64,
            remaining_bytes: remaining as u64,
            bandwidth_bytes_per_sec: decision.bandwidth_bytes_per_sec,
            paced,
            throttle_percent: decision.throttle.percent,
            service_bytes_per_sec: history.service.map_or(0.0, |s: ServiceUse| s.bytes_per_sec),
        });
    }

    /// The other side says that it holds the round, which takes a round trip.
    fn end_round(&mut self, decision: &Decision) {
        if self.ground.round_trip_secs > 0.0 {
            self.advance(self.ground.round_trip_secs, 0.0, decision);
        }
        for amount in &mut self.amounts {
            amount.dirty += std::mem::take(&mut amount.planned);
        }
        self.history.round.dirty_bytes = self.remaining() as u64;
        self.history.rounds.push(self.history.round);
        self.history.between_rounds = true;
    }

    fn end(self, crosses: bool, reason: String) -> Ending {
        let (mut downtime_secs, mut rest) = (0.0, 0.0);
        if crosses {
            rest = self.amounts.iter().map(|a| (a.dirty + a.planned) * a.ratio).sum();
            let plain: f64 = self.amounts.iter().map(|a| a.dirty + a.planned).sum();
            let copying = (rest / self.ground.link_bytes_per_sec.max(1.0))
                .max(plain / self.ground.copy_bytes_per_sec.max(1.0));
            downtime_secs = self.history.switch_fixed.as_secs_f64() + copying;
        }
        Ending {
            secs: self.history.elapsed.as_secs_f64() + downtime_secs,
            downtime_secs,
            wire_bytes: self.wire_bytes + rest,
            rounds: self.history.rounds.len() as f64 + if crosses { 1.0 } else { 0.0 },
            cost: self.cost + downtime_secs * self.ground.limits.cost.down(),
            crosses,
            reason,
        }
    }
}
