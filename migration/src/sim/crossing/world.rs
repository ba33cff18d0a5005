//! The simulated world: its time, the guest, the link, and what the service pays. Time passes where the engine waits
//! and where bytes are on the link.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::super::link::{Link, Sharing};
use super::super::pages::{POINT_SECS, Point, Scenario};
use super::block::Block;
use crate::clock::Clock;
use crate::cost::Cost;
use crate::options::Handle;
use crate::policy::ServiceUse;

/// What the service pays is added up in steps of this length, by the bytes that crossed in them.
const BILL_SECS: f64 = 0.1;

/// Who yields to a service that wants more than the whole link still gets a packet through now and then.
const LEAST_SHARE: f64 = 0.01;

/// Bytes and time since something was written down last.
#[derive(Clone, Copy, Default)]
struct Since {
    bytes: f64,
    secs: f64,
    slowed_secs: f64,
}

pub(super) struct World {
    pub(super) now: f64,
    pub(super) running: bool,
    pub(super) blocks: Vec<Block>,
    pub(super) link: Link,
    bill: Cost,
    pub(super) cost: f64,
    pub(super) down: f64,
    since_bill: Since,
    throttle: f64,
    pub(super) throttled_secs: f64,
    pub(super) held_back_secs: f64,
    yields: bool,
    /// Beyond this nothing is simulated: the crossing is cancelled.
    at_most: f64,
    handle: Arc<Handle>,
    since_point: Since,
    pub(super) timeline: Vec<Point>,
    /// What was left when the guest stopped.
    pub(super) left_bytes: u64,
}

impl World {
    pub(super) fn new(scenario: &Scenario, handle: Arc<Handle>) -> Self {
        let disks = (1..).zip(&scenario.disks);
        let disks = disks.map(|(number, disk)| Block::disk(disk, number, scenario.seed));
        World {
            now: 0.0,
            running: true,
            blocks: std::iter::once(Block::memory(scenario)).chain(disks).collect(),
            link: scenario.link.clone(),
            bill: scenario.limits.cost.clone(),
            cost: 0.0,
            down: 0.0,
            since_bill: Since::default(),
            throttle: 0.0,
            throttled_secs: 0.0,
            held_back_secs: 0.0,
            yields: scenario.limits.policy.name() == "calm-live"
                && matches!(scenario.link.sharing, Sharing::ServiceFirst { .. }),
            at_most: scenario.at_most.as_secs_f64(),
            handle,
            since_point: Since::default(),
            timeline: Vec::new(),
            left_bytes: 0,
        }
    }

    /// Time passes; `bytes` of the crossing were on the link in it.
    pub(super) fn pass(&mut self, secs: f64, bytes: f64) {
        self.since_point.bytes += bytes;
        if secs <= 0.0 {
            self.since_bill.bytes += bytes;
            return;
        }
        self.now += secs;
        self.since_point.secs += secs;
        if self.running {
            for block in &mut self.blocks {
                block.advance(self.now);
                self.held_back_secs += secs * block.held_back();
            }
            self.since_bill.bytes += bytes;
            self.since_bill.secs += secs;
            self.since_bill.slowed_secs += secs * self.throttle;
            self.throttled_secs += secs * self.throttle;
        } else {
            self.cost += secs * self.bill.down();
            self.down += secs;
        }
        if self.since_bill.secs >= BILL_SECS {
            self.close_bill();
        }
        if self.running && self.since_point.secs >= POINT_SECS {
            self.point();
        }
        if self.running && self.now >= self.at_most {
            self.handle.cancel();
        }
    }

    pub(super) fn close_bill(&mut self) {
        let Since {
            bytes,
            secs,
            slowed_secs,
        } = std::mem::take(&mut self.since_bill);
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
        self.cost += (late * secs).max(slowed_secs * self.bill.down());
    }

    /// Writes a moment down for the plots.
    pub(super) fn point(&mut self) {
        let Since { bytes, secs, .. } = std::mem::take(&mut self.since_point);
        self.timeline.push(Point {
            secs: self.now,
            bandwidth_bytes_per_sec: if secs > 0.0 { bytes / secs } else { 0.0 },
            dirty_bytes: self.blocks.iter().map(Block::bytes_that_differ).sum(),
            cost: self.cost,
        });
    }

    pub(super) fn stop_guest(&mut self) {
        self.close_bill();
        self.point();
        self.running = false;
        self.left_bytes = self.blocks.iter().map(Block::bytes_that_differ).sum();
    }

    pub(super) fn set_throttle(&mut self, part: f64) {
        self.close_bill();
        self.throttle = part;
        for block in &mut self.blocks {
            block.vcpus_run(1.0 - part);
        }
    }

    /// How fast bytes leave at most, now.
    pub(super) fn rate(&self) -> f64 {
        let capacity = self.link.capacity_at(self.now);
        if !self.running || !self.yields {
            return capacity;
        }
        let load = self.link.load_at(self.now);
        let service = self.bill.offered_bytes_per_sec().unwrap_or(0.0) * load;
        let requests = self.bill.requests_per_sec().unwrap_or(0.0) * load;
        capacity * self.link.idle_share(capacity, service, requests).max(LEAST_SHARE)
    }

    /// What the service uses of the link, as its machine counts it.
    pub(super) fn service(&self) -> Option<ServiceUse> {
        let load = self.link.load_at(self.now);
        Some(ServiceUse {
            bytes_per_sec: self.bill.offered_bytes_per_sec()? * load,
            requests_per_sec: self.bill.requests_per_sec().map(|r| r * load),
            goes_first: match self.link.sharing {
                Sharing::Reserved => None,
                Sharing::ServiceFirst { reaction_secs } => Some(Duration::from_secs_f64(reaction_secs)),
            },
        })
    }
}

/// The world under its lock; also the engine's clock.
pub(super) struct Shared(pub(super) Mutex<World>);

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, World> {
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
