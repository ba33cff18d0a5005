//! The PCI bus of a machine: which virtio device is in which slot, and how its notifications and interrupts reach KVM.

use std::num::NonZeroU64;
use std::sync::Arc;

use ferry_devices::bus::Bus;
use ferry_devices::error::{BusError, DeviceError};
use ferry_devices::irq::NotifyBinder;
use ferry_devices::pci::access::{self, ConfigPorts, Ecam};
use ferry_devices::pci::root::PciRoot;
use ferry_devices::pci::virtio::VirtioPci;
use ferry_devices::ram::Ram;
use ferry_devices::virtio::balloon::{Balloon, BalloonControl};
use ferry_devices::virtio::block::BlockDevice;
use ferry_devices::virtio::console::Console;
use ferry_devices::virtio::device::VirtioDevice;
use ferry_devices::virtio::net::{Net, NetDeviceConfig, NetHandle, NetLimits, TapBackend};
use ferry_devices::virtio::rng::Rng;
use ferry_network::Tap;
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::config::{MachineConfig, NetConfig};
use crate::console::Hub;
use crate::devices::Around;
use crate::error::{MachineError, Result};
use crate::interrupts::Interrupts;
use crate::kvm::vm::Vm;
use crate::layout;
use crate::memory;
use crate::reclaim::HostMemory;
use crate::resources::Resources;

pub(crate) struct Pci {
    pub(crate) root: Arc<PciRoot>,
    pub(crate) ports: Arc<ConfigPorts>,
    pub(crate) nets: Vec<NetHandle>,
    pub(crate) balloon: Option<Arc<BalloonControl>>,
    /// All of them.
    pub(crate) functions: Vec<Arc<VirtioPci>>,
}

/// Guests' notifications become events in the kernel.
struct Notifications {
    vm: Arc<Vm>,
}

impl NotifyBinder for Notifications {
    fn bind(&self, address: u64, kick: &EventFd) -> Result<(), DeviceError> {
        self.vm
            .fd
            .register_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(|errno| DeviceError::Host {
                what: format!("no event for notifications at {address:#x}"),
                source: errno.into(),
            })
    }

    fn unbind(&self, address: u64, kick: &EventFd) {
        if let Err(errno) = self
            .vm
            .fd
            .unregister_ioevent(kick, &IoEventAddress::Mmio(address), NoDatamatch)
        {
            tracing::debug!("the event for notifications at {address:#x} was not taken back: {errno}");
        }
    }
}

fn failed(error: DeviceError) -> MachineError {
    MachineError::Host(error.to_string())
}

fn placed(outcome: Result<(), BusError>) -> Result<()> {
    outcome.map_err(|error| MachineError::Host(error.to_string()))
}

impl Pci {
    pub(crate) fn create(
        around: &Around,
        interrupts: &Arc<Interrupts>,
        (ports, memory_bus): (&Arc<Bus>, &Arc<Bus>),
    ) -> Result<Pci> {
        let Around {
            vm,
            config,
            resources,
            wiring,
            events,
        } = around;
        let ram = memory::ranges(config.memory.0)
            .iter()
            .map(|(start, bytes)| *start..*start + *bytes)
            .collect();
        let root = Arc::new(PciRoot::new(memory_bus, ram, layout::PCI_WINDOW));
        let config_ports = Arc::new(ConfigPorts::new(root.clone(), events.clone()));
        placed(ports.insert(access::PORTS, config_ports.clone()))?;
        placed(memory_bus.insert(layout::ECAM, Arc::new(Ecam::new(root.clone()))))?;
        let Made {
            devices,
            nets,
            balloon,
        } = make(config, resources, &vm.ram, &wiring.console)?;
        let mut pci = Pci {
            root,
            ports: config_ports,
            nets,
            balloon,
            functions: Vec::new(),
        };
        let binder: Arc<dyn NotifyBinder> = Arc::new(Notifications { vm: (*vm).clone() });
        for (slot, device) in (1..).zip(devices) {
            let msi = interrupts.messages(VirtioPci::vectors(device.queue_sizes().len()))?;
            let function =
                VirtioPci::new(slot, device, vm.ram.clone(), msi, binder.clone()).map_err(failed)?;
            let function = Arc::new(function);
            pci.root.add(slot, function.clone()).map_err(failed)?;
            pci.functions.push(function);
        }
        Ok(pci)
    }
}

struct Made {
    devices: Vec<Box<dyn VirtioDevice>>,
    nets: Vec<NetHandle>,
    balloon: Option<Arc<BalloonControl>>,
}

/// Every device the configuration asks for, in the order of its slots. The order is part of the saved state.
fn make(config: &MachineConfig, resources: &Resources, ram: &Ram, console: &Hub) -> Result<Made> {
    let mut made = Made {
        devices: Vec::new(),
        nets: Vec::new(),
        balloon: None,
    };
    for (index, (disk, opened)) in config.disks.iter().zip(&resources.disks).enumerate() {
        let queues = disk.queues.unwrap_or(1);
        let device = BlockDevice::new(
            &format!("disk{index}"),
            opened.clone(),
            disk.serial.as_deref(),
            queues,
        );
        made.devices.push(Box::new(device.map_err(failed)?));
    }
    for (index, (net, tap)) in config.nets.iter().zip(&resources.taps).enumerate() {
        let device = net_device(index, net, tap)?;
        made.nets.push(device.handle());
        made.devices.push(Box::new(device));
    }
    if config.rng {
        made.devices.push(Box::new(Rng::new("rng").map_err(failed)?));
    }
    if config.balloon {
        let reclaim = Arc::new(HostMemory { ram: ram.clone() });
        let balloon = Balloon::new("balloon", ram.clone(), reclaim).map_err(failed)?;
        made.balloon = Some(balloon.control());
        made.devices.push(Box::new(balloon));
    }
    if config.console.is_some() {
        let device = Console::new("console", Box::new(console.clone())).map_err(failed)?;
        console.attach(device.input());
        made.devices.push(Box::new(device));
    }
    Ok(made)
}

fn net_device(index: usize, net: &NetConfig, tap: &Tap) -> Result<Net> {
    let files = tap
        .queue_files()
        .map_err(|error| MachineError::Host(error.to_string()))?;
    let backend = TapBackend::new(files).map_err(|error| {
        MachineError::Host(format!("the TAP device {} cannot be set up: {error}", tap.name()))
    })?;
    let device = NetDeviceConfig {
        name: format!("net{index}"),
        mac: net.mac.map(|mac| mac.0).unwrap_or_default(),
        mtu: tap.mtu().ok().filter(|mtu| *mtu != 1500),
        limits: NetLimits {
            bandwidth_bytes_per_sec: net
                .bandwidth_bytes_per_sec
                .and_then(|size| NonZeroU64::new(size.0)),
            packets_per_sec: net.operations_per_sec.and_then(NonZeroU64::new),
        },
    };
    Net::new(device, Box::new(backend)).map_err(failed)
}
