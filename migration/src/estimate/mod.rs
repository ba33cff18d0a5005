//! What a crossing will take, before it begins and while it goes on: time, bytes and downtime.
//!
//! Before: the machine was watched for a while ([`WriteCurve`]) and the link was measured; from these the crossing is
//! played through with the policy that would steer it, at the least, the expected and the most favourable numbers.
//! While it goes on: what the policy sees is played on from there ([`from_here`]).

mod curve;
pub mod lmdt;
pub mod order;
mod play;
pub mod sample;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use curve::{Class, WriteCurve};
pub use sample::{Sampled, sample};

use crate::policy::{History, Limits, ServiceUse};
use crate::report::Promise;
use play::{Amount, Ending, Ground, Player};

/// What is known before the crossing.
#[derive(Clone, Debug, PartialEq)]
pub struct Known {
    /// What has to cross at least once, and what of it is zero or empty and costs next to nothing.
    pub total_bytes: u64,
    pub empty_bytes: u64,
    /// Wire bytes per byte of the rest: what compression is expected to do; 1 if nobody knows.
    pub wire_ratio: f64,
    pub writes: WriteCurve,
    /// The least, the expected and the most that the link carries.
    pub link_bytes_per_sec: [f64; 3],
    /// How fast this host turns memory into frames; infinite if nobody knows.
    pub copy_bytes_per_sec: f64,
    pub round_trip: Duration,
    /// Negotiating, and building the machine there.
    pub prepare: Duration,
    /// Pausing, device state, resuming: what policies count into the downtime.
    pub switch_fixed: Duration,
    /// Comparing both sides inside the switch, which no policy can choose.
    pub verify: Duration,
    pub service: Option<ServiceUse>,
}

/// A number with the range it is expected in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Range {
    pub low: f64,
    pub expected: f64,
    pub high: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub total_secs: Range,
    pub downtime_secs: Range,
    pub wire_bytes: Range,
    pub rounds: Range,
    /// Seconds of outage, if the service level is known.
    pub cost: Option<Range>,
    /// Whether the machine gets across within the downtime asked for, in the worst, the expected and the best case.
    pub converges: [bool; 3],
    /// Whether the policy would switch at all in the expected case; if not, the machine stays here.
    pub crosses: bool,
    /// Why it would switch, or not.
    pub reason: String,
}

impl Estimate {
    /// What is said before the move: the expected numbers. None if the machine would not cross.
    pub fn promise(&self) -> Option<Promise> {
        self.crosses.then(|| Promise {
            at: Duration::ZERO,
            total: duration(self.total_secs.expected),
            downtime: duration(self.downtime_secs.expected),
            wire_bytes: self.wire_bytes.expected as u64,
        })
    }
}

fn duration(secs: f64) -> Duration {
    Duration::try_from_secs_f64(secs).unwrap_or(Duration::MAX)
}

/// How much more and less than the watched writing is thought possible.
const WRITING_VARIES: f64 = 0.25;
/// A zero page is a few bytes on the wire; 1/256 is generous.
const EMPTY_RATIO: f64 = 1.0 / 256.0;
/// Slices that a play before the move takes as they are, and one while it goes on.
const FINE_STEPS: u32 = 400;
const LIVE_STEPS: u32 = 12;
/// So many windows tell all there is to tell.
const MOST_POINTS: usize = 8;

fn sound(value: f64, otherwise: f64) -> f64 {
    if value.is_nan() { otherwise } else { value }
}

/// Plays the crossing with the least, the expected and the most favourable numbers.
pub fn estimate(known: &Known, limits: &Limits) -> Estimate {
    let [slow, usual, fast] = known
        .link_bytes_per_sec
        .map(|rate| sound(rate, 1.0).clamp(1.0, 1e15));
    let play = |link, writing| {
        let mut ending = play(known, limits, link, writing);
        if ending.crosses {
            let verify = known.verify.as_secs_f64();
            ending.secs += verify;
            ending.downtime_secs += verify;
            ending.cost += verify * limits.cost.down();
        }
        ending
    };
    let bad = play(slow.min(usual), 1.0 + WRITING_VARIES);
    let expected = play(usual, 1.0);
    let good = play(fast.max(usual), 1.0 - WRITING_VARIES);
    let range = |pick: &dyn Fn(&Ending) -> f64| {
        let values = [pick(&bad), pick(&expected), pick(&good)];
        Range {
            low: values.iter().copied().fold(f64::INFINITY, f64::min),
            expected: values[1],
            high: values.iter().copied().fold(0.0, f64::max),
        }
    };
    let limit = (limits.downtime + known.verify).as_secs_f64();
    let prepare = known.prepare.as_secs_f64();
    Estimate {
        total_secs: range(&|ending| prepare + ending.secs),
        downtime_secs: range(&|ending| ending.downtime_secs),
        wire_bytes: range(&|ending| ending.wire_bytes),
        rounds: range(&|ending| ending.rounds),
        cost: limits.cost.is_known().then(|| range(&|ending| ending.cost)),
        converges: [&bad, &expected, &good].map(|ending| ending.crosses && ending.downtime_secs <= limit),
        crosses: expected.crosses,
        reason: expected.reason,
    }
}

fn play(known: &Known, limits: &Limits, link: f64, writing: f64) -> Ending {
    let ratio = sound(known.wire_ratio, 1.0).clamp(1e-3, 2.0);
    let total = known.total_bytes as f64;
    let empty = (known.empty_bytes as f64).min(total);
    let mut amounts = amounts(&known.writes, total - empty, ratio, writing);
    amounts.push(Amount {
        bytes: empty,
        writes_per_sec: 0.0,
        ratio: EMPTY_RATIO,
        dirty: 0.0,
        planned: 0.0,
    });
    for amount in &mut amounts {
        amount.dirty = amount.bytes;
    }
    let history = History {
        between_rounds: true,
        total_bytes: known.total_bytes,
        remaining_bytes: known.total_bytes,
        switch_fixed: known.switch_fixed,
        service: known.service,
        ..History::default()
    };
    let ground = Ground {
        limits,
        link_bytes_per_sec: link,
        copy_bytes_per_sec: sound(known.copy_bytes_per_sec, f64::INFINITY),
        round_trip_secs: known.round_trip.as_secs_f64(),
        fine_steps: FINE_STEPS,
    };
    Player::new(ground, amounts, history).play()
}

/// Memory that writes like the curve, and the rest that is never written.
fn amounts(writes: &WriteCurve, bytes: f64, ratio: f64, writing: f64) -> Vec<Amount> {
    let mut amounts: Vec<Amount> = writes
        .classes(bytes)
        .iter()
        .map(|class| Amount {
            bytes: class.bytes,
            writes_per_sec: class.writes_per_sec * writing,
            ratio,
            dirty: 0.0,
            planned: 0.0,
        })
        .collect();
    let written: f64 = amounts.iter().map(|amount| amount.bytes).sum();
    amounts.push(Amount {
        bytes: (bytes - written).max(0.0),
        writes_per_sec: 0.0,
        ratio,
        dirty: 0.0,
        planned: 0.0,
    });
    amounts
}

/// What the history does not tell of a crossing that goes on.
#[derive(Clone, Copy, Debug, Default)]
pub struct SoFar {
    /// Since the crossing began.
    pub at: Duration,
    /// The time before the copying began.
    pub prepared: Duration,
    pub wire_bytes: u64,
    /// What comparing both sides is expected to take.
    pub verify: Duration,
}

/// What is expected now, in the middle of it: `history` as the policy sees it. None while nothing is known of the link, or if no end is in sight.
pub fn from_here(history: &History, limits: &Limits, so_far: SoFar) -> Option<Promise> {
    let link = limits.link(history)?;
    let ratio = history.wire_ratio();
    let amounts = if history.groups.iter().any(|group| group.bytes > 0) {
        by_groups(history, ratio)
    } else {
        by_rounds(history, ratio)
    };
    let ground = Ground {
        limits,
        link_bytes_per_sec: link.max(1.0),
        copy_bytes_per_sec: f64::INFINITY,
        round_trip_secs: 0.0,
        fine_steps: LIVE_STEPS,
    };
    let ending = Player::new(ground, amounts, history.clone()).play();
    ending.crosses.then(|| Promise {
        at: so_far.at,
        total: so_far.prepared + duration(ending.secs) + so_far.verify,
        downtime: duration(ending.downtime_secs) + so_far.verify,
        wire_bytes: so_far.wire_bytes.saturating_add(ending.wire_bytes as u64),
    })
}

/// What of the dirty bytes the round going on still carries.
fn planned_part(history: &History) -> f64 {
    if history.between_rounds || history.remaining_bytes == 0 {
        return 0.0;
    }
    let left = history
        .round
        .planned_bytes
        .saturating_sub(history.round.copied_bytes);
    (left as f64 / history.remaining_bytes as f64).min(1.0)
}

fn by_groups(history: &History, ratio: f64) -> Vec<Amount> {
    let part = planned_part(history);
    let groups = history.groups.iter();
    groups
        .map(|group| Amount {
            bytes: group.bytes as f64,
            writes_per_sec: sound(group.writes_per_sec, 0.0).max(0.0),
            ratio,
            dirty: group.dirty_bytes as f64 * (1.0 - part),
            planned: group.dirty_bytes as f64 * part,
        })
        .collect()
}

/// Without groups the rounds are the watching: what was written in one of length T was, on average, watched for T/2,
/// because each page is watched from the moment it is sent.
fn by_rounds(history: &History, ratio: f64) -> Vec<Amount> {
    let total = history.total_bytes as f64;
    let mut points: Vec<(Duration, u64)> = history
        .rounds
        .iter()
        .rev()
        .take(MOST_POINTS)
        .map(|round| (round.time / 2, round.dirty_bytes))
        .collect();
    if history.rounds.is_empty() {
        points = first_pass(history);
    }
    let watched = points
        .iter()
        .map(|(length, _)| length.as_secs_f64())
        .fold(0.0, f64::max);
    let mut amounts = amounts(&WriteCurve::new(points), total, ratio, 1.0);
    let expected = |amount: &Amount| -amount.bytes * (-amount.writes_per_sec * watched).exp_m1();
    let hot: f64 = amounts.iter().map(expected).sum();
    let remaining = history.remaining_bytes as f64;
    let scale = if hot > 0.0 {
        (remaining / hot).min(1.0)
    } else {
        0.0
    };
    // What is dirty beyond that was not sent yet.
    let unsent = (remaining - hot * scale).max(0.0);
    let clean: f64 = amounts
        .iter()
        .map(|amount| amount.bytes - expected(amount) * scale)
        .sum();
    let share = if clean > 0.0 {
        (unsent / clean).min(1.0)
    } else {
        0.0
    };
    let part = planned_part(history);
    for amount in &mut amounts {
        let written = expected(amount) * scale;
        let dirty = written + (amount.bytes - written) * share;
        (amount.dirty, amount.planned) = (dirty * (1.0 - part), dirty * part);
    }
    amounts
}

/// In the first pass only what is sent already is watched, more and more of it.
fn first_pass(history: &History) -> Vec<(Duration, u64)> {
    let (mut time, mut copied, mut dirtied) = (Duration::ZERO, 0u64, 0u64);
    let mut points = Vec::new();
    for sample in &history.samples {
        time += sample.time;
        copied += sample.copied_bytes;
        dirtied += sample.dirtied_bytes;
        let part = copied as f64 / history.total_bytes.max(1) as f64;
        if part >= 0.01 {
            points.push((time / 2, (dirtied as f64 / part) as u64));
        }
    }
    let every = points.len().div_ceil(MOST_POINTS).max(1);
    // The last one is always among them.
    points.into_iter().rev().step_by(every).collect()
}

#[cfg(test)]
mod tests;
