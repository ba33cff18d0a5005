//! The machine as the engine sees it: a few hooks on each side, implemented by the monitor.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::block::{BlockId, BlockInfo, Sink, Source};
use crate::failure::Reason;
use crate::handover::{MachineId, RunPermit};
use crate::policy::Throttle;

/// What the incoming side must know to build the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineCard {
    /// Stays the same over all crossings of the machine.
    pub machine: MachineId,
    /// For people.
    pub name: String,
    /// Whether it ran when the crossing began; a paused machine arrives paused.
    pub running: bool,
    /// Configuration and required CPU and KVM features, in the monitors' own format. Opaque to the engine,
    /// at most `wire::MAX_DESCRIPTION_BYTES`.
    pub description: Vec<u8>,
}

/// What the guest felt of the crossing so far, as far as the monitor can measure it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestImpact {
    /// Time lost to throttling, of all vCPUs together.
    pub throttled: Duration,
    /// Time lost to the tracking of writes, of all vCPUs together, where it can be measured: the number of write faults
    /// times what one costs on this host, and the waits for full dirty rings; where there were enough to matter.
    pub write_faults: Option<Duration>,
    /// How often a vCPU wrote to a page that was protected, where that is counted.
    #[serde(default)]
    pub write_fault_count: Option<u64>,
    /// Time disk writes were held back.
    pub slowed_writes: Duration,
    /// Each vCPU's part, in order; empty if nobody counts.
    #[serde(default)]
    pub vcpus: Vec<VcpuImpact>,
}

/// What one vCPU felt.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuImpact {
    pub throttled: Duration,
    pub write_fault_count: Option<u64>,
}

/// The machine at the side it leaves. Called from one thread, in this order:
/// `card`, `sources`, (`check`, `throttle`, `slow_writes`)*, `pause`, `save`, `release`, and at the end exactly
/// one of `resume`, `departed`, `stranded` - `resume` also if `pause` was never called or failed.
pub trait OutgoingMachine: Send {
    fn card(&mut self) -> Result<MachineCard, Reason>;

    /// All blocks, with distinct ids.
    fn sources(&mut self) -> Result<Vec<Arc<dyn Source>>, Reason>;

    /// Whether the machine is still fit to cross. An error (the guest powered off, crashed, was paused by
    /// its user) ends the crossing with that reason. Called often; must be cheap.
    fn check(&mut self) -> Result<(), Reason>;

    /// Whether the guest has ended by itself: there is nothing left to run, here or elsewhere.
    fn has_ended(&self) -> bool {
        false
    }

    /// Slows vCPUs, each as it says from now on: slowed by so many per cent, it runs in the rest of the time.
    fn throttle(&mut self, throttle: &Throttle) -> Result<(), Reason>;

    /// Limits how fast the guest may write to a disk; `None` ends the limit.
    fn slow_writes(&mut self, disk: BlockId, bytes_per_sec: Option<u64>) -> Result<(), Reason>;

    /// Stops vCPUs and devices; requests in flight are finished, disks flushed.
    fn pause(&mut self) -> Result<(), Reason>;

    /// The state of vCPUs, clocks and devices. What this writes to guest memory or disks is seen by a survey
    /// after it.
    fn save(&mut self) -> Result<Vec<u8>, Reason>;

    /// Gives up what the other side needs before it can be ready (locks on shared storage, the network
    /// place). `resume` takes it back.
    fn release(&mut self) -> Result<(), Reason>;

    /// The crossing ended before the hand over, or the other side proved that it never took the machine: the
    /// machine runs here (or stays paused if it came paused), throttles, locks and network as before.
    fn resume(&mut self, permit: &RunPermit) -> Result<(), Reason>;

    /// The machine is at the other side, confirmed. It never runs here again.
    fn departed(&mut self);

    /// Nobody knows who has the machine: it stays stopped here, memory and disks kept as they are, until
    /// `resolve` settles it.
    fn stranded(&mut self);

    /// How much of the link the service in the machine uses itself, if that is known.
    fn service(&mut self) -> Option<crate::policy::ServiceUse> {
        None
    }

    /// How many pages each vCPU has written since writes are tracked, some of them perhaps more than once; none if that is
    /// not counted. Only grows. Asked once a second.
    fn vcpu_writes(&mut self) -> Option<Vec<u64>> {
        None
    }

    /// Asked at the very end; may take a while.
    fn impact(&mut self) -> GuestImpact {
        GuestImpact::default()
    }
}

/// What the outgoing side offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    pub card: MachineCard,
    pub blocks: Vec<BlockInfo>,
}

/// How long loading took, for the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loaded {
    pub restore: Duration,
    pub flush: Duration,
}

/// The machine at the side it comes to. Called from one thread, in this order:
/// `admit`, `prepare`, `restore`, `flush`, and at the end exactly one of `resume`, `abort`.
pub trait IncomingMachine: Send {
    /// Can and may this machine be here? Looks at features, room and limits; builds nothing, allocates
    /// nothing the offer's sizes decide.
    fn admit(&mut self, offer: &Offer) -> Result<(), Reason>;

    /// Builds the whole machine, before the switch: memory populated, devices made, disks created and locked.
    /// Returns one sink for each block of the offer.
    fn prepare(&mut self, offer: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason>;

    /// Loads what `OutgoingMachine::save` gave.
    fn restore(&mut self, state: &[u8]) -> Result<(), Reason>;

    /// Makes the disks durable.
    fn flush(&mut self) -> Result<(), Reason>;

    /// Runs the machine (or leaves it paused if it came paused). Only the hand over makes permits.
    fn resume(&mut self, permit: RunPermit) -> Result<(), Reason>;

    /// Whether a machine that ran here has ended since.
    fn is_over(&self) -> bool {
        false
    }

    /// The machine will not run here: everything made for it goes away again.
    fn abort(&mut self);

    /// How long after the call of `resume` the guest ran, if that is known. Asked after `resume`.
    fn ran_after(&self) -> Option<Duration> {
        None
    }

    /// How far the guest's clock was found behind the wall clock when the state was loaded, if that can be measured.
    fn clock_behind(&self) -> Option<Duration> {
        None
    }
}

/// Follows a crossing while it happens: progress on a terminal, events as JSON lines.
pub trait Observer: Send + Sync {
    fn event(&self, event: &crate::report::Event);
}

/// An observer that looks away.
pub struct Unobserved;

impl Observer for Unobserved {
    fn event(&self, _: &crate::report::Event) {}
}
