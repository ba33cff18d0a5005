//! A machine: its memory, vCPUs and devices, and the few verbs that move it through its life. All verbs take `&self`
//! and may be called from any thread; they wait for each other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_devices::disk::{Disk, Ownership};
use ferry_devices::ram::Ram;
use ferry_devices::request::{MachineEvents, MachineRequest};
use ferry_devices::state::Record;
use ferry_devices::virtio::balloon::BalloonControl;
use ferry_devices::virtio::net::NetHandle;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::body::Body;
use crate::boot;
use crate::config::MachineConfig;
use crate::console::Hub;
use crate::cpu::cpuid;
use crate::cpu::description::{Description, HostFeatures, compatible};
use crate::cpu::template;
use crate::crossing::DirtyLog;
use crate::devices::Around;
use crate::error::{Doing, MachineError, Result};
use crate::kvm::dirty::{RegionLog, RegionRing};
use crate::kvm::fault_cost;
use crate::kvm::ring;
use crate::kvm::vm::{Tracked, Vm};
use crate::kvm::{self, Capabilities};
use crate::lifecycle::{Event, Lifecycle, State, StopReason, next};
use crate::memory::{self, regions};
use crate::place::Announcers;
use crate::resources::{self, Resources};
use crate::state::msrs;
use crate::throttle::Throttle;
use crate::vcpu::{EndSink, Parker, Vcpu};

pub struct Machine {
    config: MachineConfig,
    description: Description,
    kvm: Kvm,
    caps: Capabilities,
    ram: Ram,
    resources: Resources,
    announcers: Announcers,
    wiring: Wiring,
    keeper: Arc<Keeper>,
    throttle: Throttle,
    body: Mutex<Option<Body>>,
    /// A crossing stopped it and alone sets it going again. Read and changed under the lock on `body`.
    held: AtomicBool,
}

/// Knows the machine's state and how to stop its vCPUs. This is what vCPUs and devices report to.
#[derive(Default)]
struct Keeper {
    life: Lifecycle,
    parkers: Mutex<Vec<Parker>>,
}

impl EndSink for Keeper {
    fn end(&self, event: Event) {
        if let Err(refused) = self.life.apply(event) {
            tracing::debug!("{refused}");
        }
        self.parkers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .for_each(Parker::ask_park);
    }
}

impl MachineEvents for Keeper {
    fn request(&self, request: MachineRequest) {
        self.end(Event::Stop(match request {
            MachineRequest::Reset => StopReason::Reset,
            MachineRequest::PowerOff => StopReason::PowerOff,
            MachineRequest::DebugExit { code } => StopReason::DebugExit { code },
        }));
    }
}

/// What `ferry info` shows of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    pub state: State,
    pub config: MachineConfig,
    /// How often each vCPU left the guest.
    pub exits: Vec<u64>,
    /// What this host's KVM cannot do, one sentence each.
    pub without: Vec<String>,
}

/// What was done to one vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VcpuCost {
    /// Kept from running by a throttle.
    pub napped: Duration,
    pub tracked: Tracked,
}

/// What a machine's consoles are connected to. A device writes to a clone of its hub and attaches itself for input,
/// again after every rebuild.
#[derive(Clone, Default)]
pub struct Wiring {
    pub serial: Hub,
    pub console: Hub,
}

impl Machine {
    /// A machine with its kernel loaded, ready to start.
    pub fn create(config: &MachineConfig, wiring: &Wiring) -> Result<Machine> {
        let machine = Machine::assemble(config, wiring, None)?;
        let entry = boot::load(config, &machine.ram)?;
        if let Some(first) = machine.body().as_ref().and_then(|body| body.vcpus.first()) {
            boot::set_registers(&first.fd(), entry)?;
        }
        Ok(machine)
    }

    /// A machine for a guest that comes from elsewhere: memory and devices as described, nothing loaded, disks not ours
    /// yet, networks not joined. `restore` fills it.
    pub fn prepare(config: &MachineConfig, description: &Description, wiring: &Wiring) -> Result<Machine> {
        Machine::assemble(config, wiring, Some(description))
    }

    fn assemble(config: &MachineConfig, wiring: &Wiring, wanted: Option<&Description>) -> Result<Machine> {
        config.validate()?;
        let config = &resources::settled(config)?;
        let kvm = kvm::open()?;
        let caps = Capabilities::probe(&kvm)?;
        if config.cpus > caps.max_vcpus {
            return Err(MachineError::Host(format!(
                "{} CPUs were asked for, KVM allows {} here; change --cpus",
                config.cpus, caps.max_vcpus
            )));
        }
        if let Some(entries) = config.dirty_ring {
            ring::check(&caps, entries)?;
        }
        let description = match wanted {
            Some(wanted) => check(wanted, config, &kvm)?,
            None => describe(config, &kvm, &caps)?,
        };
        let ownership = if wanted.is_some() {
            Ownership::Later
        } else {
            Ownership::Now
        };
        let resources = Resources::open(config, ownership)?;
        let ram = memory::allocate(config)?;
        let machine = Machine {
            config: config.clone(),
            description,
            kvm,
            caps,
            ram,
            resources,
            announcers: Announcers::default(),
            wiring: wiring.clone(),
            keeper: Arc::default(),
            throttle: Throttle::default(),
            body: Mutex::new(None),
            held: AtomicBool::new(false),
        };
        *machine.body() = Some(machine.build()?);
        Ok(machine)
    }

    fn body(&self) -> MutexGuard<'_, Option<Body>> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new VM around the memory that is there.
    fn build(&self) -> Result<Body> {
        let vm = Vm::create(&self.kvm, &self.caps, &self.ram, self.config.dirty_ring)?;
        let around = Around {
            vm: &vm,
            config: &self.config,
            resources: &self.resources,
            wiring: &self.wiring,
            events: self.keeper.clone(),
        };
        let end: Arc<dyn EndSink> = self.keeper.clone();
        let body = Body::build(&around, &self.description.cpuid, &end)?;
        let parkers = body.vcpus.iter().map(Vcpu::parker).collect();
        *self.keeper.parkers.lock().unwrap_or_else(PoisonError::into_inner) = parkers;
        self.throttle.watch(&body.vcpus);
        Ok(body)
    }

    pub fn start(&self) -> Result<()> {
        self.go(Event::Start)
    }

    pub fn resume(&self) -> Result<()> {
        self.go(Event::Resume)
    }

    fn go(&self, event: Event) -> Result<()> {
        let body = self.body();
        self.may_go()?;
        self.go_body(body.as_ref().ok_or_else(gone)?, event)
    }

    fn may_go(&self) -> Result<()> {
        if self.is_held() {
            return Err(MachineError::Host(
                "the machine stands still for its crossing and runs on by itself, here or at the other side"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Stops the guest for the switch of a crossing; one that was `paused` already stays so. Until `let_go` nobody can set
    /// it going here: it may run elsewhere by then.
    pub fn hold(&self, paused: bool) -> Result<()> {
        let body = self.body();
        let body = body.as_ref().ok_or_else(gone)?;
        if !paused {
            self.pause_body(body)?;
        } else if self.state() != State::Paused {
            return Err(MachineError::Host(
                "the machine was resumed while it crossed".into(),
            ));
        }
        self.held.store(true, Ordering::Release);
        Ok(())
    }

    /// The machine stays here after all, and runs again unless it was paused before.
    pub fn let_go(&self, resume: bool) -> Result<()> {
        let body = self.body();
        let held = self.held.swap(false, Ordering::AcqRel);
        if held && resume && self.state() == State::Paused {
            self.go_body(body.as_ref().ok_or_else(gone)?, Event::Resume)?;
        }
        Ok(())
    }

    /// Whether a crossing's switch has begun.
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    fn go_body(&self, body: &Body, event: Event) -> Result<()> {
        // A machine that cannot have its disks or join its network does not run, and stays as it was.
        let was_paused = self.state() == State::Paused;
        next(&self.state(), event.clone())?;
        self.resources.take_disks()?;
        self.resources.join_network()?;
        self.keeper.life.apply(event)?;
        body.run(&self.caps, was_paused);
        Ok(())
    }

    /// Returns after every vCPU and every device has stopped, with the time that the vCPUs took.
    pub fn pause(&self) -> Result<Duration> {
        let body = self.body();
        self.pause_body(body.as_ref().ok_or_else(gone)?)
    }

    fn pause_body(&self, body: &Body) -> Result<Duration> {
        // Says no when the machine does not run.
        next(&self.state(), Event::Pause)?;
        let taken = body.pause()?;
        // The guest may have ended itself meanwhile.
        self.keeper.life.apply(Event::Pause)?;
        Ok(taken)
    }

    /// Ends the machine from any state; nothing happens when it has ended already.
    pub fn stop(&self, reason: StopReason) -> Result<()> {
        let body = self.body();
        if let Err(refused) = self.keeper.life.apply(Event::Stop(reason))
            && !refused.state.is_final()
        {
            return Err(refused.into());
        }
        if let Some(body) = body.as_ref() {
            body.pause()?;
        }
        Ok(())
    }

    /// Presses the ACPI power button; whether the guest follows is its own decision.
    pub fn power_button(&self) -> Result<()> {
        let body = self.body();
        body.as_ref().ok_or_else(gone)?.devices.power.press_power_button();
        Ok(())
    }

    /// The state of vCPUs and devices of a paused machine, without memory and disks.
    pub fn save(&self) -> Result<Vec<Record>> {
        let body = self.body();
        self.save_body(body.as_ref().ok_or_else(gone)?)
    }

    fn save_body(&self, body: &Body) -> Result<Vec<Record>> {
        match self.state() {
            State::Paused => body.save(&self.caps, &self.description.msrs),
            other => Err(MachineError::Host(format!(
                "only a paused machine can be saved, this one is {other}"
            ))),
        }
    }

    /// Puts saved state into a machine that was only created or prepared; it is paused afterwards. If this fails the
    /// machine is of no use any more; where the state came from nothing has changed. Tells how far the guest's clock is behind, where that can be measured.
    pub fn restore(&self, records: Vec<Record>) -> Result<Option<Duration>> {
        let body = self.body();
        let body = body.as_ref().ok_or_else(gone)?;
        next(&self.state(), Event::Restore)?;
        let restored = body.restore(&self.caps, records);
        match &restored {
            Ok(_) => self.keeper.life.apply(Event::Restore)?,
            Err(error) => self.keeper.life.apply(Event::Fail(error.to_string()))?,
        };
        restored
    }

    /// Saves, rebuilds and restores in place, running or paused; returns how long the guest stood still. A migration
    /// without a network: only memory, disks and consoles are the same afterwards.
    pub fn pulse(&self) -> Result<Duration> {
        let mut slot = self.body();
        let begun = Instant::now();
        let body = slot.as_ref().ok_or_else(gone)?;
        self.may_go()?;
        if body.vm.is_logging() {
            return Err(MachineError::Host(
                "the machine is on a crossing; pulse it afterwards".into(),
            ));
        }
        let was_running = self.state() == State::Running;
        if was_running {
            self.pause_body(body)?;
        }
        let records = match self.save_body(body) {
            Ok(records) => records,
            Err(error) => {
                if was_running {
                    self.keeper.life.apply(Event::Resume)?;
                    body.run(&self.caps, true);
                }
                return Err(error);
            }
        };
        // The old must be gone before the new comes: they share disks, TAPs and consoles.
        *slot = None;
        let rebuilt = self
            .build()
            .and_then(|body| body.restore(&self.caps, records).map(|_| body));
        match rebuilt {
            Ok(body) => {
                if was_running {
                    self.keeper.life.apply(Event::Resume)?;
                    body.run(&self.caps, true);
                }
                *slot = Some(body);
                Ok(begun.elapsed())
            }
            Err(error) => {
                let message = format!("the machine could not be rebuilt in a pulse: {error}");
                self.keeper.life.apply(Event::Fail(message))?;
                Err(error)
            }
        }
    }

    /// Keeps each vCPU from running for so many per cent of the time (0 to 99), so that memory changes more slowly. Those
    /// beyond the list run freely.
    pub fn set_throttle(&self, percents: &[u8]) {
        self.throttle.set(percents);
    }

    /// What KVM notes of writes to each region of memory, in the order of their addresses.
    pub fn dirty_logs(&self) -> Result<Vec<Box<dyn DirtyLog>>> {
        let body = self.body();
        let vm = &body.as_ref().ok_or_else(gone)?.vm;
        let manual = self.caps.manual_dirty_protect != 0;
        let log = |region| -> Box<dyn DirtyLog> {
            let vm = vm.clone();
            match vm.rings {
                Some(_) => Box::new(RegionRing { vm, region }),
                None => Box::new(RegionLog { vm, region, manual }),
            }
        };
        Ok(regions(&self.ram).into_iter().map(log).collect())
    }

    /// What a write to a protected page costs a guest on this host; none where that cannot be measured. Takes some ten
    /// milliseconds.
    pub fn write_fault_cost(&self) -> Option<Duration> {
        let measured = fault_cost::measure(&self.kvm, &self.caps, self.config.dirty_ring.is_some());
        let measured = measured.inspect_err(|error| tracing::warn!("{error}"));
        measured.ok().flatten()
    }

    /// What a crossing has cost each vCPU, as far as it is counted, since the machine was built here.
    pub fn costs(&self) -> Vec<VcpuCost> {
        let body = self.body();
        let Some(body) = body.as_ref() else {
            return Vec::new();
        };
        let napped = body.vcpus.iter().map(Vcpu::napped);
        let cost = |(napped, tracked)| VcpuCost { napped, tracked };
        napped.zip(body.vm.tracked()).map(cost).collect()
    }

    pub fn state(&self) -> State {
        self.keeper.life.state()
    }

    /// A receiver that always holds the newest state: how a server learns that the guest powered off or failed.
    pub fn watch(&self) -> watch::Receiver<State> {
        self.keeper.life.watch()
    }

    /// Waits until `wanted` holds; None when the time is up first.
    pub fn wait(&self, wanted: impl Fn(&State) -> bool, limit: Duration) -> Option<State> {
        self.keeper.life.wait(wanted, limit)
    }

    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    pub(crate) fn resources(&self) -> &Resources {
        &self.resources
    }

    pub(crate) fn announcers(&self) -> &Announcers {
        &self.announcers
    }

    /// With everything chosen that the user left open.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// What the guest relies on: `compatible` compares it with another host.
    pub fn description(&self) -> &Description {
        &self.description
    }

    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.resources.disks
    }

    pub fn balloon(&self) -> Option<Arc<BalloonControl>> {
        self.body()
            .as_ref()
            .and_then(|body| body.devices.pci.balloon.clone())
    }

    /// The network devices; new ones after a pulse.
    pub fn nets(&self) -> Vec<NetHandle> {
        self.body()
            .as_ref()
            .map(|body| body.devices.pci.nets.clone())
            .unwrap_or_default()
    }

    /// Whether a driver of the guest's may reset virtio queues one by one.
    pub fn resets_queues(&self) -> bool {
        let body = self.body();
        let mut functions = body.iter().flat_map(|body| &body.devices.pci.functions);
        functions.any(|function| function.resets_queues())
    }

    pub fn info(&self) -> Info {
        let exits = self
            .body()
            .as_ref()
            .map(|body| body.vcpus.iter().map(Vcpu::exits).collect());
        Info {
            state: self.state(),
            config: self.config.clone(),
            exits: exits.unwrap_or_default(),
            without: self.caps.without().into_iter().map(str::to_owned).collect(),
        }
    }
}

fn gone() -> MachineError {
    MachineError::Host("the machine has been taken apart".into())
}

/// What a guest of this configuration will see on this host.
fn describe(config: &MachineConfig, kvm: &Kvm, caps: &Capabilities) -> Result<Description> {
    let mut leaves = cpuid::supported(kvm)?;
    cpuid::filter(&mut leaves, caps, config.cpus);
    template::apply(&config.cpu_template, &mut leaves)?;
    // A CPU with this CPUID says which registers it has.
    let vm = kvm.create_vm().doing("create a virtual machine to look at")?;
    let vcpu = vm.create_vcpu(0).doing("create a CPU to look at")?;
    vcpu.set_cpuid2(&cpuid::for_vcpu(&leaves, 0)?)
        .doing("set the CPUID of a CPU to look at")?;
    Ok(Description {
        cpus: config.cpus,
        memory_bytes: config.memory.0,
        cpuid: leaves,
        msrs: msrs::readable(&vcpu, &msrs::candidates(kvm)?)?,
        tsc_khz: vcpu.get_tsc_khz().doing("read the TSC's frequency")?,
        pit: caps.pit2,
    })
}

/// A description from elsewhere, after looking whether this host and this configuration can be it.
fn check(wanted: &Description, config: &MachineConfig, kvm: &Kvm) -> Result<Description> {
    if !wanted.fits(config) {
        return Err(MachineError::Saved(format!(
            "the configuration ({} CPUs, {}) and the description ({} CPUs, {} bytes) are of different machines",
            config.cpus, config.memory, wanted.cpus, wanted.memory_bytes
        )));
    }
    compatible(wanted, &HostFeatures::probe(kvm)?).map_err(|missing| {
        let reasons: Vec<String> = missing.iter().map(ToString::to_string).collect();
        MachineError::Host(format!("this host cannot run the guest: {}", reasons.join("; ")))
    })?;
    Ok(wanted.clone())
}
