//! The devices of a machine and where they are on its buses.

use std::sync::Arc;

use ferry_devices::bus::{Bus, BusDevice};
use ferry_devices::clock::{Clock, HostClock};
use ferry_devices::legacy::acpi_pm::{self, AcpiPm};
use ferry_devices::legacy::debug_exit::{self, DebugExit};
use ferry_devices::legacy::i8042::{self, I8042};
use ferry_devices::legacy::rtc::{self, Rtc};
use ferry_devices::legacy::serial::{self, Serial};
use ferry_devices::records::RecordReader;
use ferry_devices::request::MachineEvents;
use ferry_devices::state::{Record, Stateful};

use crate::config::MachineConfig;
use crate::error::{MachineError, Result};
use crate::interrupts::Interrupts;
use crate::kvm::vm::Vm;
use crate::layout;
use crate::machine::Wiring;
use crate::pci::Pci;
use crate::resources::Resources;
use crate::state::saved;

pub(crate) struct Devices {
    pub(crate) ports: Arc<Bus>,
    pub(crate) memory: Arc<Bus>,
    pub(crate) power: Arc<AcpiPm>,
    pub(crate) pci: Pci,
    /// All that has state apart from the functions on the PCI bus, in the order of its records.
    stateful: Vec<Arc<dyn Stateful>>,
    interrupts: Arc<Interrupts>,
    wiring: Wiring,
}

/// What devices are made from.
pub(crate) struct Around<'a> {
    pub(crate) vm: &'a Arc<Vm>,
    pub(crate) config: &'a MachineConfig,
    pub(crate) resources: &'a Resources,
    pub(crate) wiring: &'a Wiring,
    pub(crate) events: Arc<dyn MachineEvents>,
}

impl Devices {
    pub(crate) fn create(around: &Around) -> Result<Devices> {
        let Around {
            vm, wiring, events, ..
        } = around;
        let interrupts = Interrupts::new((*vm).clone())?;
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
        let places: [(_, Arc<dyn BusDevice>); 5] = [
            (serial::COM1, com1.clone()),
            (rtc::PORTS, rtc.clone()),
            (acpi_pm::PORTS, power.clone()),
            (i8042::PORTS, Arc::new(I8042::new(events.clone()))),
            (
                debug_exit::PORT..debug_exit::PORT + debug_exit::LEN,
                Arc::new(DebugExit::new(events.clone())),
            ),
        ];
        for (range, device) in places {
            ports
                .insert(range, device)
                .map_err(|e| MachineError::Host(e.to_string()))?;
        }
        let pci = Pci::create(around, &interrupts, (&ports, &memory))?;
        wiring.serial.attach(com1.clone());
        let stateful: Vec<Arc<dyn Stateful>> = vec![com1, rtc, power.clone(), pci.ports.clone()];
        Ok(Devices {
            ports,
            memory,
            power,
            pci,
            stateful,
            interrupts,
            wiring: (*wiring).clone(),
        })
    }

    pub(crate) fn save(&self) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        for device in &self.stateful {
            records.push(device.save().map_err(saved)?);
        }
        records.extend(self.pci.root.save().map_err(saved)?);
        Ok(records)
    }

    pub(crate) fn restore(&self, records: &mut RecordReader) -> Result<()> {
        self.interrupts.hold();
        let restored = self
            .stateful
            .iter()
            .try_for_each(|device| records.restore(device.as_ref()))
            .and_then(|()| self.pci.root.restore(records))
            .map_err(saved);
        self.interrupts.release()?;
        restored
    }
}

impl Drop for Devices {
    fn drop(&mut self) {
        // A hub and its device hold each other.
        self.wiring.serial.detach();
        self.wiring.console.detach();
    }
}
