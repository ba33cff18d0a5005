//! The engine's real code in the simulator: both sides, every message and frame, over a link that takes time.
//!
//! One lock holds the simulated world: its time, the guest, what the dirty log has noted, and the service's bill.
//! Time passes where the engine waits (its clock sleeps) and where bytes are on the link; the guest writes
//! meanwhile. Nothing runs in parallel, so that a seed repeats to the byte.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Rng;
use super::guest::Guest;
use super::link::{Link, Sharing};
use super::pages::{Outcome, Scenario};
use crate::block::{BlockId, BlockInfo, BlockKind, DataError, PAGE_BYTES, Sink, Source, Span};
use crate::clock::Clock;
use crate::cost::Cost;
use crate::failure::{Reason, Side, Whereabouts};
use crate::handover::{Ledger, LedgerId, MachineId, Record, RunPermit, SessionId};
use crate::incoming::Terms;
use crate::link::{Lane, Link as EngineLink, LinkError, LinkErrorKind, Peer};
use crate::machine::{IncomingMachine, MachineCard, Offer, OutgoingMachine, Unobserved};
use crate::options::{Handle, Options};
use crate::outgoing::{World as EngineWorld, cross};
use crate::pages::encode::Compression;
use crate::policy::ServiceUse;
use crate::report::Report;
use crate::transport::loopback::{Host, Loopback};
use crate::units::UnitSet;

const PAGE: usize = PAGE_BYTES as usize;
const BLOCK: BlockId = BlockId(0);
const MACHINE: MachineId = MachineId([0x51; 16]);
/// What the service pays is added up in steps of this length, by the bytes that crossed in them.
const BILL_SECS: f64 = 0.1;

/// A crossing by the engine: its own report, the outcome in the simulator's terms, and whether both sides hold
/// the same pages at the end.
#[derive(Clone, Debug)]
pub struct Crossed {
    pub report: Report,
    pub outcome: Outcome,
    pub pages_differ: u64,
}

impl Scenario {
    /// Runs the scenario with the engine itself instead of the page-level model.
    pub fn cross(&self) -> Crossed {
        let world = Arc::new(Shared(Mutex::new(World::new(self))));
        let mut options = Options::new(SessionId([7; 16]));
        options.lanes = 1;
        options.compression = Compression::Off;
        options.limits = self.limits.clone();
        options.switch_fixed = self.switch_fixed;
        // Nobody watches a simulation, and it passes a thousand seconds in one.
        options.foresee_every = Duration::MAX;
        let arrived: Arc<Mutex<Vec<u32>>> = Arc::default();
        let there = There {
            arrived: Arc::clone(&arrived),
            seed: self.seed,
        };
        let clock: Arc<dyn Clock> = Arc::clone(&world) as Arc<dyn Clock>;
        let host = Host::new(Box::new(there), Box::new(Memo::new(2)), clock, Terms::default());
        let mut link = SimLink {
            world: Arc::clone(&world),
            inner: Loopback::new(Arc::new(Mutex::new(host)), 1),
        };
        let report = cross(
            EngineWorld {
                machine: &mut Here {
                    world: Arc::clone(&world),
                    seed: self.seed,
                },
                link: &mut link,
                ledger: &mut Memo::new(1),
                clock: &*world,
                observer: &Unobserved,
                handle: &Handle::new(),
            },
            &options,
        );
        let mut world = world.lock();
        world.close_bill();
        let arrived = arrived.lock().unwrap_or_else(PoisonError::into_inner);
        let pages_differ = (0..world.guest.pages() as usize)
            .filter(|page| world.versions.get(*page) != arrived.get(*page))
            .count() as u64;
        let crossed = report.outcome.whereabouts == Whereabouts::There;
        let last = report.rounds.last();
        let outcome = Outcome {
            policy: self.limits.policy.to_string(),
            cost: world.cost,
            cost_with_time: world.cost + self.limits.time_price * world.now,
            total_s: world.now,
            downtime_s: world.down,
            bytes: report.wire_bytes,
            rounds: report.rounds.len(),
            stop_reason: match &report.outcome.failure {
                Some(failure) => failure.to_string(),
                None => last.map_or_else(String::new, |round| round.reason.clone()),
            },
            crossed,
            left_bytes: 0,
            timeline: Vec::new(),
            decisions: Vec::new(),
        };
        drop(world);
        Crossed {
            report,
            outcome,
            pages_differ,
        }
    }
}

/// The simulated world.
struct World {
    now: f64,
    guest: Guest,
    running: bool,
    tracking: bool,
    noted: UnitSet,
    /// How often each page was written: its content follows from it.
    versions: Vec<u32>,
    link: Link,
    bill: Cost,
    cost: f64,
    down: f64,
    /// Bytes, seconds and slowed seconds since the last entry of the bill.
    open: (f64, f64, f64),
    throttle: f64,
    yields: bool,
}

impl World {
    fn new(scenario: &Scenario) -> Self {
        let pages = scenario.memory_bytes.div_ceil(u64::from(PAGE_BYTES)) + scenario.trace.device_pages;
        World {
            now: 0.0,
            guest: Guest::new(&scenario.trace, pages, scenario.seed),
            running: true,
            tracking: false,
            noted: UnitSet::empty(pages),
            versions: vec![0; pages as usize],
            link: scenario.link.clone(),
            bill: scenario.limits.cost.clone(),
            cost: 0.0,
            down: 0.0,
            open: (0.0, 0.0, 0.0),
            throttle: 0.0,
            yields: scenario.limits.policy.name() == "calm-live"
                && matches!(scenario.link.sharing, Sharing::ServiceFirst { .. }),
        }
    }

    /// Time passes; `bytes` of the crossing were on the link in it.
    fn pass(&mut self, secs: f64, bytes: f64) {
        if secs <= 0.0 {
            self.open.0 += bytes;
            return;
        }
        let to = self.now + secs;
        if self.running {
            let (noted, versions, tracking) = (&mut self.noted, &mut self.versions, self.tracking);
            self.guest.advance(to, |page| {
                if tracking {
                    noted.insert(page);
                }
                if let Some(version) = versions.get_mut(page as usize) {
                    *version += 1;
                }
            });
            self.open.0 += bytes;
            self.open.1 += secs;
            self.open.2 += secs * self.throttle;
        } else {
            self.cost += secs * self.bill.down();
            self.down += secs;
        }
        self.now = to;
        if self.open.1 >= BILL_SECS {
            self.close_bill();
        }
    }

    fn close_bill(&mut self) {
        let (bytes, secs, slowed) = std::mem::take(&mut self.open);
        if secs <= 0.0 {
            return;
        }
        let capacity = self.link.capacity_at(self.now);
        let load = self.link.load_at(self.now);
        let late = match self.link.sharing {
            Sharing::ServiceFirst { reaction_secs } if self.yields => {
                self.bill.at_first_place(capacity, load, reaction_secs)
            }
            _ => self.bill.at_load(capacity - bytes / secs, load),
        };
        self.cost += (late * secs).max(slowed * self.bill.down());
    }

    /// How fast bytes leave at most, now.
    fn rate(&self) -> f64 {
        let capacity = self.link.capacity_at(self.now);
        if !self.running || !self.yields {
            return capacity;
        }
        let load = self.link.load_at(self.now);
        let service = self.bill.offered_bytes_per_sec().unwrap_or(0.0) * load;
        let requests = self.bill.requests_per_sec().unwrap_or(0.0) * load;
        capacity * self.link.idle_share(capacity, service, requests)
    }
}

/// The world under its lock; also the engine's clock.
struct Shared(Mutex<World>);

impl Shared {
    fn lock(&self) -> MutexGuard<'_, World> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock for Shared {
    fn now(&self) -> Duration {
        Duration::from_secs_f64(self.lock().now)
    }

    fn sleep(&self, time: Duration) {
        self.lock().pass(time.as_secs_f64(), 0.0);
    }
}

/// A page's content: its number, how often it was written, and noise that no compression shortens.
fn fill(page: u64, version: u32, seed: u64, out: &mut [u8]) {
    let mut rng = Rng::new(seed ^ page.rotate_left(32) ^ u64::from(version));
    for chunk in out.chunks_mut(8) {
        let bytes = rng.bits().to_le_bytes();
        if let Some(bytes) = bytes.get(..chunk.len()) {
            chunk.copy_from_slice(bytes);
        }
    }
    if let Some(head) = out.get_mut(..4) {
        head.copy_from_slice(&version.to_le_bytes());
    }
}

fn info(units: u64) -> BlockInfo {
    BlockInfo {
        id: BLOCK,
        kind: BlockKind::Memory,
        name: "memory".into(),
        bytes: units * u64::from(PAGE_BYTES),
    }
}

/// The memory of the simulated guest.
struct Memory {
    world: Arc<Shared>,
    seed: u64,
}

impl Source for Memory {
    fn info(&self) -> BlockInfo {
        info(self.world.lock().guest.pages())
    }

    fn start_tracking(&self) -> Result<(), DataError> {
        self.world.lock().tracking = true;
        Ok(())
    }

    fn stop_tracking(&self) {
        self.world.lock().tracking = false;
    }

    fn first_pass(&self) -> Result<UnitSet, DataError> {
        Ok(UnitSet::full(self.world.lock().guest.pages()))
    }

    fn survey(&self, changed: &mut UnitSet) -> Result<(), DataError> {
        changed.union(&self.world.lock().noted);
        Ok(())
    }

    fn take(&self, spans: &[Span]) -> Result<(), DataError> {
        let mut world = self.world.lock();
        for span in spans {
            world.noted.remove_run(span.first, u64::from(span.count));
        }
        Ok(())
    }

    fn put_back(&self, spans: &[Span]) {
        let mut world = self.world.lock();
        for span in spans {
            world.noted.insert_run(span.first, u64::from(span.count));
        }
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        let world = self.world.lock();
        for (page, out) in (span.first..).zip(out.chunks_mut(PAGE)) {
            let version = world.versions.get(page as usize).copied().unwrap_or(0);
            fill(page, version, self.seed, out);
        }
        Ok(())
    }
}

/// The other side's memory: which version of each page it holds, after looking at every byte.
struct Arrived {
    units: u64,
    seed: u64,
    versions: Arc<Mutex<Vec<u32>>>,
}

impl Arrived {
    fn versions(&self) -> MutexGuard<'_, Vec<u32>> {
        self.versions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A page that never came.
const NEVER: u32 = u32::MAX;

impl Sink for Arrived {
    fn info(&self) -> BlockInfo {
        info(self.units)
    }

    fn place(&self, span: Span, data: &[u8]) -> Result<(), DataError> {
        let mut expected = vec![0; PAGE];
        for (page, data) in (span.first..).zip(data.chunks(PAGE)) {
            let version = data.first_chunk().map_or(NEVER, |head| u32::from_le_bytes(*head));
            fill(page, version, self.seed, &mut expected);
            if data != expected.as_slice() {
                return Err(DataError::new(format!("page {page} did not arrive as it was")));
            }
            if let Some(slot) = self.versions().get_mut(page as usize) {
                *slot = version;
            }
        }
        Ok(())
    }

    fn place_zeroes(&self, span: Span) -> Result<(), DataError> {
        Err(DataError::new(format!("page {} was never zero", span.first)))
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        for (page, out) in (span.first..).zip(out.chunks_mut(PAGE)) {
            match self.versions().get(page as usize) {
                Some(version) if *version != NEVER => fill(page, *version, self.seed, out),
                _ => out.fill(0),
            }
        }
        Ok(())
    }
}

/// The machine at the side it leaves.
struct Here {
    world: Arc<Shared>,
    seed: u64,
}

impl OutgoingMachine for Here {
    fn card(&mut self) -> Result<MachineCard, Reason> {
        Ok(MachineCard {
            machine: MACHINE,
            name: "simulated".into(),
            running: true,
            description: Vec::new(),
        })
    }

    fn sources(&mut self) -> Result<Vec<Arc<dyn Source>>, Reason> {
        Ok(vec![Arc::new(Memory {
            world: Arc::clone(&self.world),
            seed: self.seed,
        })])
    }

    fn check(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn service(&mut self) -> Option<ServiceUse> {
        let world = self.world.lock();
        let load = world.link.load_at(world.now);
        Some(ServiceUse {
            bytes_per_sec: world.bill.offered_bytes_per_sec()? * load,
            requests_per_sec: world.bill.requests_per_sec().map(|r| r * load),
            goes_first: match world.link.sharing {
                Sharing::Reserved => None,
                Sharing::ServiceFirst { reaction_secs } => Some(Duration::from_secs_f64(reaction_secs)),
            },
        })
    }

    fn throttle(&mut self, percent: u8) -> Result<(), Reason> {
        let mut world = self.world.lock();
        world.throttle = f64::from(percent) / 100.0;
        let speed = 1.0 - world.throttle;
        world.guest.set_speed(speed);
        Ok(())
    }

    fn slow_writes(&mut self, _: BlockId, _: Option<u64>) -> Result<(), Reason> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Reason> {
        let mut world = self.world.lock();
        world.close_bill();
        world.running = false;
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, Reason> {
        Ok(vec![0x5a; 64 << 10])
    }

    fn release(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn resume(&mut self, _: &RunPermit) -> Result<(), Reason> {
        self.world.lock().running = true;
        Ok(())
    }

    fn departed(&mut self) {}

    fn stranded(&mut self) {}
}

/// The machine at the side it comes to.
struct There {
    arrived: Arc<Mutex<Vec<u32>>>,
    seed: u64,
}

impl IncomingMachine for There {
    fn admit(&mut self, _: &Offer) -> Result<(), Reason> {
        Ok(())
    }

    fn prepare(&mut self, offer: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason> {
        let units = offer.blocks.first().map_or(0, BlockInfo::units);
        *self.arrived.lock().unwrap_or_else(PoisonError::into_inner) = vec![NEVER; units as usize];
        Ok(vec![Arc::new(Arrived {
            units,
            seed: self.seed,
            versions: Arc::clone(&self.arrived),
        })])
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), Reason> {
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn resume(&mut self, _: RunPermit) -> Result<(), Reason> {
        Ok(())
    }

    fn abort(&mut self) {}
}

/// A ledger for as long as the simulation lasts.
struct Memo {
    id: LedgerId,
    records: Vec<Record>,
}

impl Memo {
    fn new(id: u8) -> Self {
        Memo {
            id: LedgerId([id; 16]),
            records: Vec::new(),
        }
    }
}

impl Ledger for Memo {
    fn id(&self) -> LedgerId {
        self.id
    }

    fn write(&mut self, record: &Record) -> Result<(), Reason> {
        let same = |r: &Record| r.session == record.session && r.side == record.side;
        self.records.retain(|r| !same(r));
        self.records.push(record.clone());
        Ok(())
    }

    fn read(&self, session: SessionId, side: Side) -> Result<Option<Record>, Reason> {
        let found = self
            .records
            .iter()
            .find(|r| r.session == session && r.side == side);
        Ok(found.cloned())
    }

    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason> {
        Ok(self
            .records
            .iter()
            .filter(|r| r.machine == machine)
            .cloned()
            .collect())
    }
}

/// The loopback to the other side, over which bytes take their time.
struct SimLink {
    world: Arc<Shared>,
    inner: Loopback,
}

impl SimLink {
    fn up(&self) -> Result<(), LinkError> {
        up(&self.world.lock())
    }
}

fn up(world: &World) -> Result<(), LinkError> {
    if world.rate() > 0.0 {
        Ok(())
    } else {
        Err(LinkError::new(
            LinkErrorKind::Closed,
            "the simulated link is down",
        ))
    }
}

impl EngineLink for SimLink {
    fn control(&mut self) -> Result<Box<dyn Peer>, LinkError> {
        self.up()?;
        Ok(Box::new(SimPeer {
            world: Arc::clone(&self.world),
            inner: self.inner.control()?,
        }))
    }

    fn lane(&mut self, session: SessionId, attempt: u32, index: u16) -> Result<Box<dyn Lane>, LinkError> {
        self.up()?;
        Ok(Box::new(SimLane {
            world: Arc::clone(&self.world),
            inner: self.inner.lane(session, attempt, index)?,
        }))
    }

    fn most_lanes(&self) -> u16 {
        1
    }

    fn parallel(&self) -> bool {
        false
    }
}

struct SimPeer {
    world: Arc<Shared>,
    inner: Box<dyn Peer>,
}

impl Peer for SimPeer {
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        let mut world = self.world.lock();
        up(&world)?;
        let secs = message.len() as f64 / world.rate() + world.link.delay_secs;
        world.pass(secs, message.len() as f64);
        drop(world);
        self.inner.send(message)
    }

    fn receive(&mut self, timeout: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        let reply = self.inner.receive(timeout)?;
        if reply.is_some() {
            let mut world = self.world.lock();
            let delay = world.link.delay_secs;
            world.pass(delay, 0.0);
        }
        Ok(reply)
    }
}

struct SimLane {
    world: Arc<Shared>,
    inner: Box<dyn Lane>,
}

impl Lane for SimLane {
    fn send(&mut self, part: &[u8]) -> Result<(), LinkError> {
        // What a page is when it was read is what arrives: it is on the link while the guest writes on.
        for piece in part.chunks(PAGE) {
            let mut world = self.world.lock();
            up(&world)?;
            let secs = piece.len() as f64 / world.rate();
            world.pass(secs, piece.len() as f64);
        }
        self.inner.send(part)
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::super::paper;
    use super::super::trace::Trace;
    use super::*;
    use crate::cost::Queue;
    use crate::policy::{ALL, Policy};

    /// The reference trace at an eighth of its size: the same seconds and costs.
    fn scenario(policy: Policy, sharing: Sharing) -> Scenario {
        let mut trace = Trace::reference();
        trace.device_pages /= 8;
        let mut scenario = paper::scenario(trace, 64, 32.0, policy, 1);
        scenario.limits.cost = Cost::queue(Queue {
            response_bytes: paper::MBIT,
            ..paper::service()
        });
        scenario.link.sharing = sharing;
        scenario
    }

    #[test]
    fn the_engine_carries_the_simulated_guest_with_every_policy_and_loses_nothing() {
        for about in ALL.iter().skip(1) {
            let crossed = scenario(about.policy, Sharing::Reserved).cross();
            assert_eq!(crossed.report.outcome.failure, None, "{}", about.name);
            assert!(crossed.outcome.crossed, "{}", about.name);
            assert_eq!(crossed.pages_differ, 0, "{}", about.name);
        }
    }

    /// Costs are close; the engine has frames, rounds that are acknowledged, and a survey once a second.
    #[test]
    fn the_engine_does_what_the_page_level_model_foretells() {
        for (policy, sharing) in [
            (Policy::CalmAdaptive, Sharing::Reserved),
            (Policy::CalmLive, Sharing::Reserved),
            (Policy::CalmLive, Sharing::ServiceFirst { reaction_secs: 0.001 }),
        ] {
            let mut scenario = scenario(policy, sharing);
            scenario.limits.page_write_rate_per_sec = Some(paper::PAGE_WRITE_RATE);
            let (model, engine) = (scenario.run(), scenario.cross().outcome);
            let close = (engine.cost_with_time / model.cost_with_time - 1.0).abs() < 0.15;
            assert!(
                close,
                "{}: engine {:.3} in {:.1} s, model {:.3} in {:.1} s",
                policy.name(),
                engine.cost,
                engine.total_s,
                model.cost,
                model.total_s
            );
        }
    }

    #[test]
    fn the_engine_in_the_simulator_repeats_to_the_byte() {
        let run = || {
            let crossed = scenario(Policy::CalmLive, Sharing::Reserved).cross();
            let rounds = serde_json::to_string(&crossed.report.rounds).unwrap();
            (rounds, serde_json::to_string(&crossed.outcome).unwrap())
        };
        assert_eq!(run(), run());
    }

    #[test]
    fn a_lost_connection_is_mended_and_nothing_is_lost() {
        let mut scenario = scenario(Policy::CalmLive, Sharing::Reserved);
        scenario.link.capacity = vec![
            super::super::link::Change {
                at_secs: 6.0,
                factor: 0.0,
            },
            super::super::link::Change {
                at_secs: 9.0,
                factor: 1.0,
            },
        ];
        let crossed = scenario.cross();
        assert_eq!(crossed.report.outcome.failure, None);
        assert!(crossed.outcome.crossed && crossed.report.reconnects >= 1);
        assert_eq!(crossed.pages_differ, 0);
    }
}
