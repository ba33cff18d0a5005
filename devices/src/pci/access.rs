//! The two doors to configuration space: ECAM in memory, and the ports 0xcf8 and 0xcfc. The reset control register
//! lives inside the latter.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::root::{PciRoot, Place};
use crate::bus::BusDevice;
use crate::request::{MachineEvents, MachineRequest};
use crate::state::{Record, RecordKey, StateError, Stateful};

/// One bus of 32 slots of 8 functions of 4 KiB.
pub const ECAM_LEN: u64 = 1 << 20;
pub const PORTS: Range<u64> = 0xcf8..0xd00;
/// For the FADT's reset register: write this value to this port.
pub const RESET_PORT: u16 = 0xcf9;
pub const RESET_VALUE: u8 = 0x06;

const RESET_CPU: u8 = 1 << 2;
const ADDRESS_ENABLE: u32 = 1 << 31;

/// Configuration space mapped into memory.
pub struct Ecam {
    root: Arc<PciRoot>,
}

impl Ecam {
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root }
    }
}

fn ecam_place(offset: u64) -> Place {
    Place {
        bus: (offset >> 20) as u8,
        slot: (offset >> 15 & 31) as u8,
        function: (offset >> 12 & 7) as u8,
        register: (offset & 0xfff) as u16,
    }
}

/// An access wider than four bytes, or across a register, reads as nothing.
fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len as u64)
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if aligned(offset, data.len()) {
            self.root.read_config(ecam_place(offset), data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if aligned(offset, data.len()) {
            self.root.write_config(ecam_place(offset), data);
        }
    }
}

/// Configuration space through an address and a data port.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: AtomicU32,
    events: Arc<dyn MachineEvents>,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    address: u32,
}

impl ConfigPorts {
    pub fn new(root: Arc<PciRoot>, events: Arc<dyn MachineEvents>) -> Self {
        Self {
            root,
            address: AtomicU32::new(0),
            events,
        }
    }

    fn place(&self, offset: u64) -> Option<Place> {
        let address = self.address.load(Ordering::SeqCst);
        (address & ADDRESS_ENABLE != 0).then(|| Place {
            bus: (address >> 16) as u8,
            slot: (address >> 11 & 31) as u8,
            function: (address >> 8 & 7) as u8,
            register: (address & 0xfc) as u16 + (offset & 3) as u16,
        })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match (offset, data) {
            (0, [a, b, c, d]) => [*a, *b, *c, *d] = self.address.load(Ordering::SeqCst).to_le_bytes(),
            (1, [reset]) => *reset = 0,
            (4..8, data) if aligned(offset, data.len()) => {
                if let Some(place) = self.place(offset) {
                    self.root.read_config(place, data);
                }
            }
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, [a, b, c, d]) => self
                .address
                .store(u32::from_le_bytes([*a, *b, *c, *d]), Ordering::SeqCst),
            (1, [value]) if value & RESET_CPU != 0 => self.events.request(MachineRequest::Reset),
            (4..8, data) if aligned(offset, data.len()) => {
                if let Some(place) = self.place(offset) {
                    self.root.write_config(place, data);
                }
            }
            _ => {}
        }
    }
}

impl Stateful for ConfigPorts {
    fn key(&self) -> RecordKey {
        RecordKey::new("pci-ports", 0)
    }

    fn save(&self) -> Result<Record, StateError> {
        Record::required(
            self.key(),
            1,
            &Saved {
                address: self.address.load(Ordering::SeqCst),
            },
        )
    }

    fn restore(&self, record: &Record) -> Result<(), StateError> {
        let Saved { address } = record.read(&self.key(), 1)?;
        self.address.store(address, Ordering::SeqCst);
        Ok(())
    }
}
