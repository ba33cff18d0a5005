//! The machine as the engine sees it at the side that it leaves.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use ferry_devices::disk::Disk;
use ferry_devices::virtio::net::NetStats;
use ferry_migration::block::{BlockId, Source};
use ferry_migration::failure::{Cause, Reason};
use ferry_migration::handover::{MachineId, RunPermit, SessionId};
use ferry_migration::machine::{GuestImpact, MachineCard, OutgoingMachine, VcpuImpact};
use ferry_migration::policy::{ServiceUse, Throttle};

use super::card::Description;
use super::settle::{Doubt, InDoubt, Place};
use super::{DiskSource, FreeMemory, MemorySource, Region, Unused};
use crate::config::MachineConfig;
use crate::error::MachineError;
use crate::lifecycle::{State, StopReason};
use crate::machine::{Machine, VcpuCost};
use crate::name::Name;

/// Fewer write faults cost a guest less than measuring what one costs here, some 40 ms that the user waits for.
const FAULTS_THAT_MATTER: u64 = 10_000;

/// A machine that is about to leave.
pub struct Leaving {
    machine: Arc<Machine>,
    id: MachineId,
    name: Name,
    shared_storage: bool,
    session: SessionId,
    /// Whether the guest ran when the crossing began.
    ran: bool,
    /// The disks, by the numbers of their blocks.
    disks: Vec<(BlockId, Arc<Disk>)>,
    /// What had been done to the vCPUs when the crossing began.
    before: Vec<VcpuCost>,
    /// The switch has begun: the crossing holds the machine.
    held: bool,
    /// The interfaces are being taken down.
    leaving: Option<JoinHandle<crate::error::Result<()>>>,
    released: bool,
    /// Where the machine goes, to ask there later.
    place: Place,
    /// Set when nobody knows who has the machine.
    doubt: Arc<Doubt>,
}

/// The disks and the network place of a machine that stays, after they were given up for the other side.
pub(super) fn take_back(machine: &Machine) -> Result<(), Reason> {
    for disk in machine.disks() {
        disk.take_lock()
            .map_err(|error| Reason::new(Cause::Data, error.to_string()))?;
    }
    machine.join_network().map_err(failed)
}

/// How often a vCPU wrote to a page that was protected: exactly, with dirty rings; the page faults that KVM mended for it
/// otherwise, which are hardly anything else while writes are tracked, on hosts that track by protecting.
fn faults(cost: &VcpuCost) -> Option<u64> {
    let ring = cost.tracked.ring.map(|ring| ring.pages);
    ring.or(cost.tracked.faults)
}

fn felt((before, now): (&VcpuCost, &VcpuCost)) -> VcpuImpact {
    let since = |(now, before): (u64, u64)| now.saturating_sub(before);
    VcpuImpact {
        throttled: now.napped.saturating_sub(before.napped),
        write_fault_count: faults(now).zip(faults(before)).map(since),
    }
}

fn failed(error: MachineError) -> Reason {
    Reason::new(Cause::Machine, error.to_string())
}

impl Leaving {
    pub fn new(
        machine: Arc<Machine>,
        id: MachineId,
        name: Name,
        session: SessionId,
        shared_storage: bool,
        place: Place,
        doubt: Arc<Doubt>,
    ) -> Leaving {
        let ran = machine.state() == State::Running;
        let before = machine.costs();
        Leaving {
            machine,
            id,
            name,
            shared_storage,
            session,
            place,
            doubt,
            ran,
            disks: Vec::new(),
            before,
            held: false,
            leaving: None,
            released: false,
        }
    }
}

impl Leaving {
    /// Begins to take the interfaces down: the kernel takes some ten milliseconds over it, and the rest of the pages
    /// can be copied meanwhile. The machine stands still, so it sends nothing.
    fn leave_network(&mut self) {
        let machine = Arc::clone(&self.machine);
        let leave = move || machine.leave_network();
        match std::thread::Builder::new()
            .name("leave-network".into())
            .spawn(leave)
        {
            Ok(thread) => self.leaving = Some(thread),
            Err(error) => tracing::warn!("no thread to leave the network early: {error}"),
        }
    }

    /// Waits until the interfaces are down.
    fn left_network(&mut self) -> Result<(), Reason> {
        let left = match self.leaving.take().map(JoinHandle::join) {
            Some(Ok(left)) => left,
            Some(Err(_)) | None => self.machine.leave_network(),
        };
        left.map_err(failed)
    }
}

impl OutgoingMachine for Leaving {
    fn card(&mut self) -> Result<MachineCard, Reason> {
        if !matches!(self.machine.state(), State::Running | State::Paused) {
            let sentence = format!("the machine cannot cross: it is {}", self.machine.state());
            return Err(Reason::new(Cause::Machine, sentence));
        }
        // Each side tracks writes in its own way, and an older one does not know of rings.
        let config = MachineConfig {
            dirty_ring: None,
            ..self.machine.config().clone()
        };
        let description = Description {
            config,
            guest: self.machine.description().clone(),
            shared_storage: self.shared_storage,
            virtio_ring_reset: self.machine.resets_queues(),
        };
        Ok(MachineCard {
            machine: self.id,
            name: self.name.to_string(),
            running: self.ran,
            description: description.encode()?,
        })
    }

    fn sources(&mut self) -> Result<Vec<Arc<dyn Source>>, Reason> {
        let mut sources: Vec<Arc<dyn Source>> = Vec::new();
        let logs = self.machine.dirty_logs().map_err(failed)?;
        let balloon = self.machine.balloon();
        let free = balloon.map(|balloon| Arc::new(FreeMemory::new(balloon)) as Arc<dyn Unused>);
        for (region, log) in Region::all(self.machine.ram()).into_iter().zip(logs) {
            let id = BlockId(sources.len() as u16);
            sources.push(Arc::new(MemorySource::new(id, region, log, free.clone())));
        }
        self.disks.clear();
        if !self.shared_storage {
            for (index, disk) in self.machine.disks().iter().cloned().enumerate() {
                let id = BlockId(sources.len() as u16);
                sources.push(Arc::new(DiskSource::new(
                    id,
                    format!("disk {index}"),
                    disk.clone(),
                )));
                self.disks.push((id, disk));
            }
        }
        Ok(sources)
    }

    fn check(&mut self) -> Result<(), Reason> {
        let state = self.machine.state();
        let fits = match state {
            State::Running => self.ran,
            State::Paused => !self.ran || self.held,
            _ => false,
        };
        if fits {
            return Ok(());
        }
        let (cause, sentence) = match state {
            State::Paused => (
                Cause::Machine,
                "the machine was paused while it crossed".to_owned(),
            ),
            State::Running => (
                Cause::Machine,
                "the machine was resumed while it crossed".to_owned(),
            ),
            other => (
                Cause::Ended,
                format!("the machine ended while it crossed: it is {other}"),
            ),
        };
        Err(Reason::new(cause, sentence))
    }

    fn has_ended(&self) -> bool {
        self.machine.state().is_final()
    }

    fn throttle(&mut self, throttle: &Throttle) -> Result<(), Reason> {
        let percents: Vec<u8> = (0..self.machine.config().cpus)
            .map(|vcpu| throttle.of(vcpu))
            .collect();
        self.machine.set_throttle(&percents);
        Ok(())
    }

    fn slow_writes(&mut self, disk: BlockId, bytes_per_sec: Option<u64>) -> Result<(), Reason> {
        if let Some((_, disk)) = self.disks.iter().find(|(id, _)| *id == disk) {
            disk.slow_writes(bytes_per_sec.and_then(NonZeroU64::new));
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Reason> {
        // The user may have paused, resumed or ended it a moment ago.
        self.check()?;
        self.machine.hold(!self.ran).map_err(failed)?;
        self.held = true;
        self.leave_network();
        // Disks that cross are flushed at the other side before the machine may run there.
        let shared = self.machine.disks().iter().filter(|_| self.shared_storage);
        for disk in shared {
            disk.flush().map_err(|error| {
                Reason::new(
                    Cause::Data,
                    format!(
                        "the disk image {} could not be flushed: {error}",
                        disk.path().display()
                    ),
                )
            })?;
        }
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, Reason> {
        let records = self.machine.save().map_err(failed)?;
        ferry_devices::records::encode(&records)
            .map_err(|error| Reason::new(Cause::Machine, error.to_string()))
    }

    fn release(&mut self) -> Result<(), Reason> {
        self.released = true;
        self.left_network()?;
        for disk in self.machine.disks() {
            disk.release_lock()
                .map_err(|error| Reason::new(Cause::Data, error.to_string()))?;
        }
        Ok(())
    }

    fn resume(&mut self, _permit: &RunPermit) -> Result<(), Reason> {
        self.machine.set_throttle(&[]);
        self.machine
            .disks()
            .iter()
            .for_each(|disk| disk.slow_writes(None));
        let leaving = self.leaving.is_some();
        if leaving {
            // Whether it got out or not: it comes back.
            let _ = self.left_network();
        }
        let back = match std::mem::take(&mut self.released) || leaving {
            true => take_back(&self.machine),
            false => Ok(()),
        };
        // A machine whose disks do not come back stays paused, and its user may resume it when they do.
        let going = match std::mem::take(&mut self.held) {
            true => self.machine.let_go(self.ran && back.is_ok()).map_err(failed),
            false => Ok(()),
        };
        back.and(going)
    }

    fn departed(&mut self) {
        if let Err(error) = self.machine.stop(StopReason::HandedOver) {
            tracing::warn!("what is left of the machine here could not be taken down: {error}");
        }
    }

    fn stranded(&mut self) {
        self.doubt.set(Some(InDoubt {
            session: self.session,
            ran: self.ran,
            place: self.place.clone(),
        }));
    }

    fn service(&mut self) -> Option<ServiceUse> {
        let nets = self.machine.nets();
        let used = |stats: NetStats| stats.received_bytes_per_sec + stats.sent_bytes_per_sec;
        (!nets.is_empty()).then(|| ServiceUse {
            bytes_per_sec: nets.iter().map(|net| used(net.stats())).sum(),
            requests_per_sec: None,
            goes_first: None,
        })
    }

    fn vcpu_writes(&mut self) -> Option<Vec<u64>> {
        self.machine.costs().iter().map(faults).collect()
    }

    fn impact(&mut self) -> GuestImpact {
        let now = self.machine.costs();
        let vcpus: Vec<VcpuImpact> = self.before.iter().zip(&now).map(felt).collect();
        let counts = vcpus.iter().map(|vcpu| vcpu.write_fault_count);
        let count = counts.sum::<Option<u64>>().filter(|_| !vcpus.is_empty());
        let cost = count
            .filter(|count| *count >= FAULTS_THAT_MATTER)
            .map(|_| self.machine.write_fault_cost());
        let waited = |costs: &[VcpuCost]| -> Duration {
            let rings = costs.iter().filter_map(|cost| cost.tracked.ring);
            rings.map(|ring| ring.waited).sum()
        };
        let waited = waited(&now).saturating_sub(waited(&self.before));
        let lost = |(count, cost): (u64, Duration)| waited + cost.mul_f64(count as f64);
        GuestImpact {
            throttled: vcpus.iter().map(|vcpu| vcpu.throttled).sum(),
            write_faults: count.zip(cost.flatten()).map(lost),
            write_fault_count: count,
            slowed_writes: self
                .machine
                .disks()
                .iter()
                .map(|disk| disk.stats().held_by_crossing)
                .sum(),
            vcpus,
        }
    }
}
