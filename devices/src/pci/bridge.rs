//! The host bridge: it is there because an operating system looks for it.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::config::{ConfigSpace, Identity};
use super::root::PciFunction;
use crate::bus::BusDevice;
use crate::state::{Record, RecordKey, StateError, Stateful};

pub(super) struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl HostBridge {
    pub(super) fn new() -> Self {
        // The generic PCI Express host bridge, which no operating system has a quirk for.
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            class: [6, 0, 0],
            revision: 0,
            subsystem: 0x1100,
        };
        Self {
            config: Mutex::new(ConfigSpace::new(&identity, 0)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        self.lock().write(offset, data);
    }

    fn bar_size(&self) -> u32 {
        0
    }

    fn place_bar(&self, _address: u32) {}

    fn bar(&self) -> Option<Range<u64>> {
        None
    }

    fn bar_mapped(&self, _at: Option<u64>) {}

    fn pause(&self) {}

    fn resume(&self) {}
}

impl BusDevice for HostBridge {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

impl Stateful for HostBridge {
    fn key(&self) -> RecordKey {
        RecordKey::new("pci-host-bridge", 0)
    }

    fn save(&self) -> Result<Record, StateError> {
        Record::required(self.key(), 1, &self.lock().save())
    }

    fn restore(&self, record: &Record) -> Result<(), StateError> {
        let header = record.read(&self.key(), 1)?;
        self.lock().restore(&header);
        Ok(())
    }
}
