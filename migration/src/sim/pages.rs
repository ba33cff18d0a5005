//! A crossing page by page: every write of the guest and every page sent is an event, in order of time.
//!
//! It plays the part of the engine for one block of memory: it keeps the dirty pages, asks the policy before
//! every slice and at the end of every round, and adds up what the service pays.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::disk::Disk;
use super::guest::Guest;
use super::link::{Link, Sharing};
use super::trace::Trace;
use crate::policy::heat::Heat;
use crate::policy::{
    Action, Decision, History, Limits, Order, Policy, Reason, Round, Sample, ServiceUse, decide,
};
use crate::units::UnitSet;

const PAGE: u64 = 4096;
/// How many slices the history keeps.
const SAMPLES: usize = 600;
/// The shortest window for which writes are counted for the groups.
const WINDOW_SECS: f64 = 0.1;
/// Two points of a timeline are at least this far apart.
pub(super) const POINT_SECS: f64 = 0.25;

/// A guest, a link and limits; the policy is in the limits.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub trace: Trace,
    pub memory_bytes: u64,
    /// Only the engine carries them.
    pub disks: Vec<Disk>,
    pub link: Link,
    pub limits: Limits,
    pub seed: u64,
    /// What a page is on the wire, on average.
    pub wire_bytes_per_page: f64,
    /// What the switch takes besides copying.
    pub switch_fixed: Duration,
    /// Nothing is simulated beyond this.
    pub at_most: Duration,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    pub policy: String,
    /// Seconds of outage: late requests and downtime.
    pub cost: f64,
    /// The same and the price of time.
    pub cost_with_time: f64,
    pub total_s: f64,
    pub downtime_s: f64,
    pub bytes: u64,
    /// Of `bytes`, for disks.
    #[serde(default)]
    pub disk_bytes: u64,
    pub rounds: usize,
    pub stop_reason: String,
    /// Whether the machine has crossed (the policy may have given up).
    pub crossed: bool,
    /// Bytes that were left for the switch.
    pub left_bytes: u64,
    #[serde(skip)]
    pub timeline: Vec<Point>,
    #[serde(skip)]
    pub decisions: Vec<Noted>,
}

/// A moment of a crossing, for plots.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Point {
    pub secs: f64,
    pub bandwidth_bytes_per_sec: f64,
    pub dirty_bytes: u64,
    pub cost: f64,
}

/// A decision whose rule differs from the one before.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Noted {
    pub secs: f64,
    pub reason: Reason,
}

impl Scenario {
    /// A scenario as the reference papers have it: a link that is reserved, raw pages, an instant switch.
    pub fn new(trace: Trace, memory_bytes: u64, link_bytes_per_sec: f64, limits: Limits) -> Self {
        Scenario {
            trace,
            memory_bytes,
            disks: Vec::new(),
            link: Link::new(link_bytes_per_sec),
            limits: Limits {
                link_bytes_per_sec: Some(link_bytes_per_sec as u64),
                ..limits
            },
            seed: 1,
            wire_bytes_per_page: PAGE as f64,
            switch_fixed: Duration::ZERO,
            at_most: Duration::from_secs(3600),
        }
    }

    pub fn with_policy(&self, policy: Policy) -> Scenario {
        let mut scenario = self.clone();
        scenario.limits.policy = policy;
        scenario
    }

    /// All pages of the guest, those of its devices too.
    pub fn pages(&self) -> u64 {
        self.memory_bytes.div_ceil(PAGE) + self.trace.device_pages
    }

    pub fn run(&self) -> Outcome {
        Run::new(self).finish()
    }
}

/// When a system takes its dirty log: all at once at the start of a round (what is written before it is sent is
/// sent twice), or just before each page is sent.
fn takes_at_round_start(policy: Policy) -> bool {
    matches!(
        policy,
        Policy::XenBasic | Policy::XenCode | Policy::Qemu | Policy::CloudHypervisor | Policy::VirtualBox
    )
}

/// Pages that are dirty, counted.
struct Dirty {
    set: UnitSet,
    count: u64,
}

impl Dirty {
    fn full(pages: u64) -> Self {
        Dirty {
            set: UnitSet::full(pages),
            count: pages,
        }
    }

    fn insert(&mut self, page: u64) -> bool {
        let new = !self.set.contains(page);
        if new {
            self.set.insert(page);
            self.count += 1;
        }
        new
    }

    fn remove(&mut self, page: u64) {
        if self.set.contains(page) {
            self.set.remove(page);
            self.count -= 1;
        }
    }
}

/// What is sent next.
enum Next {
    /// What is dirty, around the memory.
    Sweep,
    /// These, in this order.
    List(Vec<u64>, usize),
}

struct Run<'a> {
    scenario: &'a Scenario,
    guest: Guest,
    pages: u64,
    now: f64,
    at_start: bool,
    dirty: Dirty,
    /// Written since the last window of the heat.
    window: UnitSet,
    window_began: f64,
    heat: Option<Heat>,
    history: History,
    next: Next,
    cursor: u64,
    /// How much of the next page is on the wire already.
    progress: f64,
    dirtied: u64,
    cost: f64,
    bytes: f64,
    timeline: Vec<Point>,
    decisions: Vec<Noted>,
}

impl<'a> Run<'a> {
    fn new(scenario: &'a Scenario) -> Self {
        let pages = scenario.pages();
        let policy = scenario.limits.policy;
        let counts_heat = policy == Policy::CalmLive || scenario.limits.page_write_rate_per_sec.is_none();
        Run {
            scenario,
            guest: Guest::new(&scenario.trace, pages, scenario.seed),
            pages,
            now: 0.0,
            at_start: takes_at_round_start(policy),
            dirty: Dirty::full(pages),
            window: UnitSet::empty(pages),
            window_began: 0.0,
            heat: counts_heat.then(|| Heat::new(pages, PAGE as u32)),
            history: History {
                total_bytes: pages * PAGE,
                remaining_bytes: pages * PAGE,
                between_rounds: true,
                switch_fixed: scenario.switch_fixed,
                ..History::default()
            },
            next: Next::List(Vec::new(), 0),
            cursor: 0,
            progress: 0.0,
            dirtied: 0,
            cost: 0.0,
            bytes: 0.0,
            timeline: Vec::new(),
            decisions: Vec::new(),
        }
    }

    fn finish(mut self) -> Outcome {
        loop {
            self.look();
            let (decision, reason) = decide(&self.history, &self.scenario.limits);
            self.note(&reason);
            match decision.action {
                Action::GoOn if self.now < self.scenario.at_most.as_secs_f64() => {}
                Action::GoOn => {
                    let secs = self.scenario.at_most.as_secs();
                    return self.end(false, format!("not done in {secs} s"));
                }
                Action::GiveUp => return self.end(false, reason.to_string()),
                Action::Switch => {
                    self.switch();
                    return self.end(true, reason.to_string());
                }
            }
            self.slice(&decision);
        }
    }

    /// Brings the history up to now.
    fn look(&mut self) {
        let link = &self.scenario.link;
        self.history.elapsed = Duration::from_secs_f64(self.now);
        self.history.remaining_bytes = self.dirty.count * PAGE;
        if let Some(heat) = &mut self.heat {
            let secs = self.now - self.window_began;
            if secs >= WINDOW_SECS * 0.999 {
                heat.observe(&self.window, secs);
                self.window.clear();
                self.window_began = self.now;
                self.history.groups = heat.groups(&self.dirty.set);
            }
        }
        let load = link.load_at(self.now);
        let cost = &self.scenario.limits.cost;
        self.history.service = cost.offered_bytes_per_sec().map(|bytes_per_sec| ServiceUse {
            bytes_per_sec: bytes_per_sec * load,
            requests_per_sec: cost.requests_per_sec().map(|r| r * load),
            goes_first: match link.sharing {
                Sharing::Reserved => None,
                Sharing::ServiceFirst { reaction_secs } => Some(Duration::from_secs_f64(reaction_secs)),
            },
        });
    }

    fn note(&mut self, reason: &Reason) {
        let same = self
            .decisions
            .last()
            .is_some_and(|d| std::mem::discriminant(&d.reason) == std::mem::discriminant(reason));
        if !same {
            self.decisions.push(Noted {
                secs: self.now,
                reason: reason.clone(),
            });
        }
    }

    fn begin_round(&mut self) {
        self.history.round = Round {
            planned_bytes: self.dirty.count * PAGE,
            ..Round::default()
        };
        let plan = self
            .dirty
            .set
            .runs()
            .flat_map(|(first, count)| first..first + count)
            .collect();
        self.next = Next::List(plan, 0);
        if self.at_start {
            self.dirty.set.clear();
            self.dirty.count = 0;
        }
    }

    fn end_round(&mut self) {
        let mut round = self.history.round;
        round.dirty_bytes = self.dirty.count * PAGE;
        self.history.rounds.push(round);
        self.history.between_rounds = true;
    }

    /// What is planned and not sent is dirty, also where the log was taken at the start of the round.
    fn put_back(&mut self) {
        if let Next::List(list, at) = &mut self.next {
            if self.at_start {
                for page in list.iter().skip(*at) {
                    self.dirty.insert(*page);
                }
            }
            *at = list.len();
        }
    }

    /// The next page to send, if there is one.
    fn take(&mut self) -> Option<u64> {
        let page = match &mut self.next {
            Next::List(list, at) => {
                let page = *list.get(*at)?;
                *at += 1;
                page
            }
            Next::Sweep => {
                let set = &self.dirty.set;
                let (page, _) = set.next_run(self.cursor).or_else(|| set.next_run(0))?;
                self.cursor = page + 1;
                page
            }
        };
        if !self.at_start {
            self.dirty.remove(page);
        }
        Some(page)
    }

    /// Whether the round's plan is sent.
    fn exhausted(&self) -> bool {
        match &self.next {
            Next::List(list, at) => *at >= list.len(),
            Next::Sweep => self.dirty.count == 0,
        }
    }

    fn write_until(&mut self, secs: f64) {
        let (dirty, window, dirtied) = (&mut self.dirty, &mut self.window, &mut self.dirtied);
        let counts = self.heat.is_some();
        self.guest.advance(secs, |page| {
            *dirtied += u64::from(dirty.insert(page));
            if counts {
                window.insert(page);
            }
        });
        self.now = secs;
    }

    fn slice(&mut self, decision: &Decision) {
        if self.history.between_rounds {
            self.begin_round();
        } else if decision.fresh && self.at_start {
            self.put_back();
            return self.end_round();
        }
        let link = &self.scenario.link;
        let capacity = link.capacity_at(self.now);
        let rate = self.rate(decision, capacity);
        let secs = decision.ask_again.as_secs_f64().max(1e-3);
        let (began, end) = (self.now, self.now + secs);
        self.guest
            .set_speed(1.0 - f64::from(decision.throttle.percent) / 100.0);
        self.history.throttle_percent = decision.throttle.percent;
        self.history.between_rounds = false;
        self.dirtied = 0;
        if decision.fresh {
            let most = (rate * secs / self.scenario.wire_bytes_per_page) as u64 + 2;
            self.next = match (&self.heat, decision.order) {
                (Some(heat), Order::ColdestFirst) => {
                    let chosen = heat.coldest(&self.dirty.set, decision.hold_back_from, most, self.cursor);
                    let list: Vec<u64> = chosen.runs().flat_map(|(f, c)| f..f + c).collect();
                    Next::List(list, 0)
                }
                _ => Next::Sweep,
            };
        }
        let page_secs = self.scenario.wire_bytes_per_page / rate.max(1e-9);
        let mut copied = 0u64;
        let mut busy = 0.0;
        loop {
            if self.exhausted() && (copied > 0 || !decision.fresh) {
                break;
            }
            let wait = (1.0 - self.progress) * page_secs;
            if self.now + wait > end {
                let left = end - self.now;
                self.progress += left / page_secs;
                busy += left;
                self.write_until(end);
                break;
            }
            let at = self.now + wait;
            self.write_until(at);
            busy += wait;
            self.progress = 0.0;
            if let Some(page) = self.take() {
                copied += 1;
                if matches!(decision.order, Order::ColdestFirst) {
                    self.cursor = page + 1;
                }
            }
        }
        let round_ends = !decision.fresh && self.exhausted();
        if !round_ends && self.now < end {
            self.write_until(end);
        }
        let took = self.now - began;
        self.pay(decision, capacity, rate, busy, took - busy);
        self.account(decision, rate, capacity, copied, took);
        if decision.waiting {
            self.history.waited += Duration::from_secs_f64(took);
        }
        let round = &self.history.round;
        if round_ends || (decision.fresh && round.copied_bytes >= round.planned_bytes) {
            self.end_round();
        }
    }

    fn rate(&self, decision: &Decision, capacity: f64) -> f64 {
        let commanded = (decision.bandwidth_bytes_per_sec as f64).min(capacity);
        if !decision.yield_to_service {
            return commanded;
        }
        let Some(service) = self.history.service else {
            return commanded;
        };
        let requests = service.requests_per_sec.unwrap_or(0.0);
        let idle = self
            .scenario
            .link
            .idle_share(capacity, service.bytes_per_sec, requests)
            * capacity;
        commanded.min(idle)
    }

    /// What the service paid in a slice: `busy` seconds with the crossing on the link, `idle` without.
    fn pay(&mut self, decision: &Decision, capacity: f64, rate: f64, busy: f64, idle: f64) {
        let limits = &self.scenario.limits;
        let load = self.scenario.link.load_at(self.now);
        let late = match self.history.service.and_then(|s| s.goes_first) {
            Some(delay) if decision.yield_to_service => {
                limits.cost.at_first_place(capacity, load, delay.as_secs_f64())
            }
            _ => limits.cost.at_load(capacity - rate, load),
        };
        let alone = limits.cost.at_load(capacity, load);
        // A vCPU that stands still answers nothing.
        let slowed = f64::from(decision.throttle.percent) / 100.0 * limits.cost.down();
        self.cost += busy * late.max(slowed) + idle * alone.max(slowed);
    }

    fn account(&mut self, decision: &Decision, rate: f64, capacity: f64, copied: u64, took: f64) {
        let wire = copied as f64 * self.scenario.wire_bytes_per_page;
        let time = Duration::from_secs_f64(took);
        self.bytes += wire;
        let round = &mut self.history.round;
        round.time += time;
        round.copied_bytes += copied * PAGE;
        round.wire_bytes += wire as u64;
        round.bandwidth_bytes_per_sec = decision.bandwidth_bytes_per_sec;
        let paced = decision.bandwidth_bytes_per_sec as f64 <= capacity;
        if !paced && !decision.yield_to_service {
            self.history.saw_link(rate);
        } else if paced {
            self.history.saw_under_limit(wire / took.max(1e-9), decision);
        }
        let samples = &mut self.history.samples;
        if samples.len() >= SAMPLES {
            samples.remove(0);
        }
        samples.push(Sample {
            at: Duration::from_secs_f64(self.now),
            time,
            copied_bytes: copied * PAGE,
            wire_bytes: wire as u64,
            dirtied_bytes: self.dirtied * PAGE,
            remaining_bytes: self.dirty.count * PAGE,
            bandwidth_bytes_per_sec: decision.bandwidth_bytes_per_sec,
            paced,
            throttle_percent: decision.throttle.percent,
            service_bytes_per_sec: self.history.service.map_or(0.0, |s| s.bytes_per_sec),
        });
        if self
            .timeline
            .last()
            .is_none_or(|p| self.now - p.secs >= POINT_SECS)
        {
            let dirty_bytes = (self.dirty.count + self.unsent()).min(self.pages) * PAGE;
            self.timeline.push(Point {
                secs: self.now,
                bandwidth_bytes_per_sec: rate,
                dirty_bytes,
                cost: self.cost,
            });
        }
    }

    /// Pages of the round's plan that are still to be sent, where they are not in the dirty set.
    fn unsent(&self) -> u64 {
        match &self.next {
            Next::List(list, at) if self.at_start => (list.len() - at) as u64,
            _ => 0,
        }
    }

    /// Stops the guest and copies the rest with all the link.
    fn switch(&mut self) {
        self.put_back();
        let began = self.now;
        let mut left = self.dirty.count as f64 * self.scenario.wire_bytes_per_page;
        self.bytes += left;
        self.now += self.scenario.switch_fixed.as_secs_f64() + self.scenario.link.delay_secs;
        while left > 0.0 {
            let capacity = self.scenario.link.capacity_at(self.now);
            // The capacity may change: at most 10 ms at a time where it does.
            let step = if self.scenario.link.capacity.is_empty() {
                left / capacity
            } else {
                0.01f64.min(left / capacity.max(1e-9))
            };
            if !step.is_finite() || self.now > self.scenario.at_most.as_secs_f64() * 2.0 {
                break;
            }
            self.now += step;
            left -= (capacity * step).max(left * 1e-12);
        }
        self.cost += (self.now - began) * self.scenario.limits.cost.down();
        self.timeline.push(Point {
            secs: began,
            bandwidth_bytes_per_sec: self.scenario.link.bytes_per_sec,
            dirty_bytes: self.dirty.count * PAGE,
            cost: self.cost - (self.now - began) * self.scenario.limits.cost.down(),
        });
        self.history.elapsed = Duration::from_secs_f64(began);
    }

    fn end(mut self, crossed: bool, stop_reason: String) -> Outcome {
        let copying = self.history.elapsed.as_secs_f64();
        let downtime_s = if crossed { self.now - copying } else { 0.0 };
        if let Some(last) = self.timeline.last().copied() {
            self.timeline.push(Point {
                secs: self.now,
                bandwidth_bytes_per_sec: last.bandwidth_bytes_per_sec,
                dirty_bytes: if crossed { 0 } else { last.dirty_bytes },
                cost: self.cost,
            });
        }
        Outcome {
            policy: self.scenario.limits.policy.to_string(),
            cost: self.cost,
            cost_with_time: self.cost + self.scenario.limits.time_price * self.now,
            total_s: self.now,
            downtime_s,
            bytes: self.bytes as u64,
            disk_bytes: 0,
            rounds: self.history.rounds.len(),
            stop_reason,
            crossed,
            left_bytes: self.dirty.count * PAGE,
            timeline: self.timeline,
            decisions: self.decisions,
        }
    }
}
