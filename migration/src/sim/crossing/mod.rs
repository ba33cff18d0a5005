//! The engine's real code in the simulator: both sides, every message and frame, over a link that takes time.
//!
//! One lock holds the simulated world: its time, the guest, what the dirty logs have noted, and the service's bill.
//! Time passes where the engine waits (its clock sleeps) and where bytes are on the link; the guest writes
//! meanwhile. Nothing runs in parallel, so that a seed repeats to the byte.

mod block;
mod link;
mod sides;
#[cfg(test)]
mod tests;
mod world;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::pages::{Outcome, Scenario};
use crate::block::{BlockKind, PAGE_BYTES};
use crate::clock::Clock;
use crate::failure::Whereabouts;
use crate::handover::SessionId;
use crate::incoming::Terms;
use crate::machine::Unobserved;
use crate::options::{Handle, Options};
use crate::outgoing::{World as EngineWorld, cross};
use crate::pages::encode::Compression;
use crate::report::Report;
use crate::transport::loopback::{Host, Loopback};

use link::SimLink;
use sides::{Here, Memo, There};
use world::{Shared, World};

/// A crossing by the engine: its own report, the outcome in the simulator's terms, and whether both sides hold
/// the same at the end.
#[derive(Clone, Debug)]
pub struct Crossed {
    pub report: Report,
    pub outcome: Outcome,
    pub pages_differ: u64,
    pub clusters_differ: u64,
}

impl Scenario {
    /// Runs the scenario with the engine itself instead of the page-level model.
    pub fn cross(&self) -> Crossed {
        let handle = Arc::new(Handle::new());
        let world = Arc::new(Shared(Mutex::new(World::new(self, Arc::clone(&handle)))));
        let mut options = Options::new(SessionId([7; 16]));
        options.lanes = 1;
        options.compression = if self.wire_bytes_per_page < f64::from(PAGE_BYTES) {
            Compression::Always
        } else {
            Compression::Off
        };
        options.limits = self.limits.clone();
        options.switch_fixed = self.switch_fixed;
        // Nobody watches a simulation, and it passes a thousand seconds in one.
        options.foresee_every = Duration::MAX;
        let there = There {
            world: Arc::clone(&world),
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
                    switch_fixed: self.switch_fixed,
                },
                link: &mut link,
                ledger: &mut Memo::new(1),
                clock: &*world,
                observer: &Unobserved,
                handle: &handle,
            },
            &options,
        );
        let mut world = world.lock();
        world.close_bill();
        world.point();
        let differ = |kind: BlockKind| {
            let blocks = world.blocks.iter().filter(|block| block.info.kind == kind);
            blocks.map(|block| block.units_that_differ()).sum()
        };
        let (pages_differ, clusters_differ) = (differ(BlockKind::Memory), differ(BlockKind::Disk));
        let crossed = report.outcome.whereabouts == Whereabouts::There;
        let outcome = Outcome {
            policy: self.limits.policy.to_string(),
            cost: world.cost,
            cost_with_time: world.cost + self.limits.time_price * world.now,
            total_s: world.now,
            downtime_s: world.down,
            bytes: report.wire_bytes,
            disk_bytes: report.disk.wire_bytes,
            // The last one is the switch.
            rounds: report.rounds.len() - usize::from(crossed && !report.rounds.is_empty()),
            stop_reason: match &report.outcome.failure {
                Some(_) if handle.is_cancelled() => format!("not done in {} s", self.at_most.as_secs()),
                Some(failure) => failure.message.clone(),
                None => {
                    let switched = report.rounds.iter().find(|round| round.decision == "switch");
                    switched.map_or_else(String::new, |round| round.reason.clone())
                }
            },
            crossed,
            left_bytes: world.left_bytes,
            timeline: std::mem::take(&mut world.timeline),
            decisions: Vec::new(),
        };
        drop(world);
        Crossed {
            report,
            outcome,
            pages_differ,
            clusters_differ,
        }
    }
}
