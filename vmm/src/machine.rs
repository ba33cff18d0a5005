//! A machine: its memory, vCPUs and devices, and the few verbs that move it through its life. All verbs take `&self`
//! and may be called from any thread; they wait for each other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_devices::disk::{Disk, Ownership};
use ferry_devices::ram::Ram;
use ferry_devices::request::{MachineEvents, MachineRequest};
use ferry_devices::virtio::balloon::BalloonControl;
use ferry_devices::virtio::net::NetHandle;
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::boot;
use crate::config::MachineConfig;
use crate::console::Hub;
use crate::cpu::cpuid::{self, Leaf};
use crate::devices::Devices;
use crate::error::{Doing, MachineError, Result};
use crate::interrupts::Interrupts;
use crate::kvm::vm::Vm;
use crate::kvm::{self, Capabilities};
use crate::lifecycle::{Event, Lifecycle, State, StopReason};
use crate::memory;
use crate::place::Announcers;
use crate::resources::{self, Resources};
use crate::vcpu::{EndSink, Parker, Surroundings, Vcpu};

pub struct Machine {
    config: MachineConfig,
    host: Host,
    cpuid: Vec<Leaf>,
    ram: Ram,
    resources: Resources,
    announcers: Announcers,
    keeper: Arc<Keeper>,
    wiring: Wiring,
    body: Mutex<Option<Body>>,
}

/// KVM here.
pub(crate) struct Host {
    pub(crate) kvm: Kvm,
    pub(crate) caps: Capabilities,
}

/// All that a pulse throws away and makes anew: everything but the memory.
struct Body {
    // Dropped in this order: CPUs stop before their devices go.
    vcpus: Vec<Vcpu>,
    devices: Devices,
    vm: Arc<Vm>,
}

/// Knows the machine's state and how to stop its vCPUs. This is what vCPUs and devices report to.
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
        let machine = Machine::empty(config, wiring, Ownership::Now)?;
        let entry = boot::load(config, &machine.ram)?;
        if let Some(first) = machine.body().as_ref().and_then(|body| body.vcpus.first()) {
            boot::set_registers(&first.fd(), entry)?;
        }
        Ok(machine)
    }

    fn empty(config: &MachineConfig, wiring: &Wiring, ownership: Ownership) -> Result<Machine> {
        config.validate()?;
        let config = &resources::settled(config)?;
        let kvm = kvm::open()?;
        let caps = Capabilities::probe(&kvm)?;
        if config.cpus > caps.max_vcpus {
            return Err(MachineError::Host(format!(
                "{} CPUs were asked for, KVM allows {} here",
                config.cpus, caps.max_vcpus
            )));
        }
        let mut cpuid = cpuid::supported(&kvm)?;
        cpuid::filter(&mut cpuid, &caps, config.cpus);
        let host = Host { kvm, caps };
        let resources = Resources::open(config, ownership)?;
        let ram = memory::allocate(config)?;
        let keeper = Arc::new(Keeper {
            life: Lifecycle::default(),
            parkers: Mutex::default(),
        });
        let machine = Machine {
            config: config.clone(),
            host,
            cpuid,
            ram,
            resources,
            announcers: Announcers::default(),
            keeper,
            wiring: wiring.clone(),
            body: Mutex::new(None),
        };
        *machine.body() = Some(machine.build()?);
        Ok(machine)
    }

    fn body(&self) -> MutexGuard<'_, Option<Body>> {
        self.body.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new VM around the memory that is there.
    fn build(&self) -> Result<Body> {
        let vm = Vm::create(&self.host.kvm, &self.host.caps, &self.ram)?;
        let interrupts = Interrupts::new(vm.clone())?;
        let events: Arc<dyn MachineEvents> = self.keeper.clone();
        let devices = Devices::create(
            &self.config,
            &self.resources,
            &vm,
            &interrupts,
            &events,
            &self.wiring,
        )?;
        let around = Surroundings {
            ports: devices.ports.clone(),
            memory: devices.memory.clone(),
            end: self.keeper.clone(),
        };
        let mut vcpus = Vec::new();
        for index in 0..self.config.cpus {
            let fd = vm
                .fd
                .create_vcpu(u64::from(index))
                .doing(format!("create CPU {index}"))?;
            let cpuid = cpuid::for_vcpu(&self.cpuid, index)?;
            fd.set_cpuid2(&cpuid)
                .doing(format!("set the CPUID of CPU {index}"))?;
            vcpus.push(Vcpu::spawn(index, fd, vm.clone(), around.clone())?);
        }
        let parkers = vcpus.iter().map(Vcpu::parker).collect();
        *self.keeper.parkers.lock().unwrap_or_else(PoisonError::into_inner) = parkers;
        Ok(Body { vcpus, devices, vm })
    }

    fn gone() -> MachineError {
        MachineError::Host("the machine has been taken apart".into())
    }

    pub fn start(&self) -> Result<()> {
        self.go(Event::Start)
    }

    pub fn resume(&self) -> Result<()> {
        self.go(Event::Resume)
    }

    fn go(&self, event: Event) -> Result<()> {
        let body = self.body();
        let body = body.as_ref().ok_or_else(Self::gone)?;
        // A machine that cannot join its network does not start, and stays as it was.
        crate::lifecycle::next(&self.keeper.life.state(), event.clone())?;
        self.resources.join_network()?;
        self.keeper.life.apply(event)?;
        body.devices.pci.resume();
        body.vcpus.iter().for_each(Vcpu::run);
        Ok(())
    }

    /// Returns after every vCPU has stopped, with the time that this took.
    pub fn pause(&self) -> Result<Duration> {
        let body = self.body();
        let body = body.as_ref().ok_or_else(Self::gone)?;
        let begun = Instant::now();
        // Says no when the machine does not run.
        crate::lifecycle::next(&self.keeper.life.state(), Event::Pause)?;
        body.vcpus.iter().for_each(Vcpu::ask_park);
        body.vcpus.iter().try_for_each(Vcpu::wait_parked)?;
        body.devices.pci.pause()?;
        let taken = begun.elapsed();
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
            body.vcpus.iter().for_each(Vcpu::ask_park);
            body.vcpus.iter().try_for_each(Vcpu::wait_parked)?;
            body.devices.pci.pause()?;
        }
        Ok(())
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

    /// Presses the ACPI power button; whether the guest follows is its own decision.
    pub fn power_button(&self) -> Result<()> {
        let body = self.body();
        body.as_ref()
            .ok_or_else(Self::gone)?
            .devices
            .power
            .press_power_button();
        Ok(())
    }

    /// Saves, rebuilds and restores in place, running or paused; returns how long the guest stood still.
    pub fn pulse(&self) -> Result<Duration> {
        Err(MachineError::Host("machines do not pulse yet".into()))
    }

    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.resources.disks
    }

    /// The network devices, for their counters and links; none once the machine has been taken apart.
    pub fn nets(&self) -> Vec<NetHandle> {
        self.body()
            .as_ref()
            .map(|body| body.devices.pci.nets.clone())
            .unwrap_or_default()
    }

    pub fn balloon(&self) -> Option<Arc<BalloonControl>> {
        self.body()
            .as_ref()
            .and_then(|body| body.devices.pci.balloon.clone())
    }

    pub(crate) fn resources(&self) -> &Resources {
        &self.resources
    }

    pub(crate) fn announcers(&self) -> &Announcers {
        &self.announcers
    }

    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    pub fn info(&self) -> Info {
        Info {
            state: self.state(),
            config: self.config.clone(),
        }
    }
}
