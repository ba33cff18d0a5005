//! The devices of a machine and where they are on its buses.

use std::sync::Arc;

use ferry_devices::bus::Bus;
use ferry_devices::clock::{Clock, HostClock};
use ferry_devices::error::BusError;
use ferry_devices::legacy::acpi_pm::{self, AcpiPm};
use ferry_devices::legacy::debug_exit::{self, DebugExit};
use ferry_devices::legacy::i8042::{self, I8042};
use ferry_devices::legacy::rtc::{self, Rtc};
use ferry_devices::legacy::serial::{self, Serial};
use ferry_devices::records::RecordReader;
use ferry_devices::request::MachineEvents;
use ferry_devices::state::{Record, StateError, Stateful};

use crate::config::MachineConfig;
use crate::error::{MachineError, Result};
use crate::interrupts::Interrupts;
use crate::kvm::vm::Vm;
use crate::layout;
use crate::machine::Wiring;
use crate::pci::Pci;
use crate::resources::Resources;

pub(crate) struct Devices {
    pub(crate) ports: Arc<Bus>,
    pub(crate) memory: Arc<Bus>,
    pub(crate) power: Arc<AcpiPm>,
    pub(crate) pci: Pci,
    /// All that has state, in the order of its records.
    stateful: Vec<Arc<dyn Stateful>>,
    wiring: Wiring,
}

impl Drop for Devices {
    fn drop(&mut self) {
        self.wiring.serial.detach();
        self.wiring.console.detach();
    }
}

fn placed(outcome: std::result::Result<(), BusError>) -> Result<()> {
    outcome.map_err(|e| MachineError::Host(e.to_string()))
}

impl Devices {
    pub(crate) fn create(
        config: &MachineConfig,
        resources: &Resources,
        vm: &Arc<Vm>,
        interrupts: &Arc<Interrupts>,
        events: &Arc<dyn MachineEvents>,
        wiring: &Wiring,
    ) -> Result<Devices> {
        let clock: Arc<dyn Clock> = Arc::new(HostClock::new());
        let ports = Arc::new(Bus::new("port"));
        let memory = Arc::new(Bus::new("memory"));
        let com1 = Arc::new(Serial::new(
            0,
            interrupts.line(serial::COM1_IRQ),
            Box::new(wiring.serial.clone()),
        ));
        let rtc = Arc::new(Rtc::new(clock.clone()));
        let power = Arc::new(AcpiPm::new(
            clock,
            interrupts.line(layout::SCI_IRQ),
            events.clone(),
        ));
        placed(ports.insert(serial::COM1, com1.clone()))?;
        placed(ports.insert(rtc::PORTS, rtc.clone()))?;
        placed(ports.insert(acpi_pm::PORTS, power.clone()))?;
        placed(ports.insert(i8042::PORTS, Arc::new(I8042::new(events.clone()))))?;
        placed(ports.insert(
            debug_exit::PORT..debug_exit::PORT + debug_exit::LEN,
            Arc::new(DebugExit::new(events.clone())),
        ))?;
        wiring.serial.attach(com1.clone());
        let pci = Pci::create(
            config,
            resources,
            vm,
            interrupts,
            events,
            (&ports, &memory),
            &wiring.console,
        )?;
        let config_ports = pci.stateful();
        Ok(Devices {
            ports,
            memory,
            power: power.clone(),
            pci,
            stateful: vec![com1, rtc, power, config_ports],
            wiring: wiring.clone(),
        })
    }

    pub(crate) fn save(&self) -> Result<Vec<Record>> {
        let saved = |e: StateError| MachineError::Saved(e.to_string());
        let mut records: Vec<Record> = self
            .stateful
            .iter()
            .map(|device| device.save().map_err(saved))
            .collect::<Result<_>>()?;
        records.extend(self.pci.root.save().map_err(saved)?);
        Ok(records)
    }

    pub(crate) fn restore(&self, records: &mut RecordReader) -> Result<()> {
        let saved = |e: StateError| MachineError::Saved(e.to_string());
        self.stateful
            .iter()
            .try_for_each(|device| records.restore(device.as_ref()).map_err(saved))?;
        self.pci.root.restore(records).map_err(saved)
    }
}
