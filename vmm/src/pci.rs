//! The PCI bus of a machine: which virtio device is in which slot, and how its notifications and interrupts reach KVM.

use std::sync::Arc;

use ferry_devices::bus::Bus;
use ferry_devices::error::{BusError, DeviceError};
use ferry_devices::irq::NotifyBinder;
use ferry_devices::pci::access::{self, ConfigPorts, Ecam};
use ferry_devices::pci::root::PciRoot;
use ferry_devices::pci::virtio::VirtioPci;
use ferry_devices::request::MachineEvents;
use ferry_devices::state::Stateful;
use ferry_devices::virtio::block::BlockDevice;
use ferry_devices::virtio::device::VirtioDevice;
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use crate::config::MachineConfig;
use crate::error::{MachineError, Result};
use crate::interrupts::{Interrupts, Messages};
use crate::kvm::vm::Vm;
use crate::layout;
use crate::memory;
use crate::resources::Resources;

pub(crate) struct Pci {
    pub(crate) root: Arc<PciRoot>,
    pub(crate) ports: Arc<ConfigPorts>,
    messages: Vec<Arc<Messages>>,
    memory_bus: Arc<Bus>,
}

impl Drop for Pci {
    /// The bus holds the door to configuration space, which holds the root, which holds the bus: without this nothing
    /// of a machine would ever go, and its disks would stay locked.
    fn drop(&mut self) {
        self.memory_bus.remove(layout::ECAM.start);
    }
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
        config: &MachineConfig,
        resources: &Resources,
        vm: &Arc<Vm>,
        interrupts: &Arc<Interrupts>,
        events: &Arc<dyn MachineEvents>,
        (ports, memory_bus): (&Arc<Bus>, &Arc<Bus>),
    ) -> Result<Pci> {
        let ram = memory::ranges(config.memory.0)
            .iter()
            .map(|(start, bytes)| *start..*start + *bytes)
            .collect();
        let root = Arc::new(PciRoot::new(memory_bus.clone(), ram, layout::PCI_WINDOW));
        let config_ports = Arc::new(ConfigPorts::new(root.clone(), events.clone()));
        placed(ports.insert(access::PORTS, config_ports.clone()))?;
        placed(memory_bus.insert(layout::ECAM, Arc::new(Ecam::new(root.clone()))))?;
        let binder: Arc<dyn NotifyBinder> = Arc::new(Notifications { vm: vm.clone() });
        let mut messages = Vec::new();
        for (slot, device) in (1..).zip(devices(config, resources)?) {
            let msi = interrupts.messages(VirtioPci::vectors(device.queue_sizes().len()))?;
            messages.push(msi.clone());
            let function =
                VirtioPci::new(slot, device, vm.ram.clone(), msi, binder.clone()).map_err(failed)?;
            root.add(slot, Arc::new(function)).map_err(failed)?;
        }
        Ok(Pci {
            root,
            ports: config_ports,
            messages,
            memory_bus: memory_bus.clone(),
        })
    }

    /// Stops the devices' work, after the vCPUs have stopped. Interrupts that they sent are then in the guest's APICs.
    pub(crate) fn pause(&self) -> Result<()> {
        self.root.pause();
        self.messages.iter().try_for_each(|messages| messages.flush())
    }

    /// Continues the devices' work, before the vCPUs run again.
    pub(crate) fn resume(&self) {
        self.root.resume();
    }

    /// What has state besides the functions on the bus.
    pub(crate) fn stateful(&self) -> Arc<dyn Stateful> {
        self.ports.clone()
    }
}

/// Every device the configuration asks for, in the order of its slots. The order is part of the saved state.
fn devices(config: &MachineConfig, resources: &Resources) -> Result<Vec<Box<dyn VirtioDevice>>> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (index, (disk, opened)) in config.disks.iter().zip(&resources.disks).enumerate() {
        let queues = disk.queues.unwrap_or(1);
        let device = BlockDevice::new(
            &format!("disk{index}"),
            opened.clone(),
            disk.serial.as_deref(),
            queues,
        );
        devices.push(Box::new(device.map_err(failed)?));
    }
    Ok(devices)
}
