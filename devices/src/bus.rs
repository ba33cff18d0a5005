//! A bus: which device answers at which address. One for ports, one for memory-mapped devices.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use crate::error::BusError;

/// Something a vCPU can read and write. Offsets count from the start of the device's range.
///
/// An access may have any width and any alignment: what a device does not understand reads as all ones and
/// ignores writes. Called from vCPU threads, several at a time.
pub trait BusDevice: Send + Sync {
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);
}

struct Entry {
    end: u64,
    device: Arc<dyn BusDevice>,
}

/// Ranges of addresses that do not overlap, each with its device. May change while vCPUs run (a guest moves BARs).
pub struct Bus {
    name: &'static str,
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// `name` is for messages: "port" or "memory".
    pub fn new(name: &'static str) -> Self {
        Self {
            name,
            entries: RwLock::new(BTreeMap::new()),
        }
    }

    pub fn insert(&self, range: Range<u64>, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        if range.is_empty() {
            return Err(BusError::Empty {
                bus: self.name,
                range,
            });
        }
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        // The only candidates are the last range that starts before our end, and those before it end earlier.
        if let Some((start, entry)) = entries.range(..range.end).next_back()
            && entry.end > range.start
        {
            return Err(BusError::Overlap {
                bus: self.name,
                range,
                taken: *start..entry.end,
            });
        }
        entries.insert(
            range.start,
            Entry {
                end: range.end,
                device,
            },
        );
        Ok(())
    }

    /// Removes the range that starts at `start`; false if there is none.
    pub fn remove(&self, start: u64) -> bool {
        self.entries
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&start)
            .is_some()
    }

    /// Reads; false (and `data` all ones) where no device is, or where the access crosses the end of one.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes; false where no device is, or where the access crosses the end of one.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The device is called without the lock: its write may move a range of this very bus.
    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let end = address.checked_add(len as u64)?;
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let (start, entry) = entries.range(..=address).next_back()?;
        (end <= entry.end && address < entry.end).then(|| (address - start, entry.device.clone()))
    }
}
