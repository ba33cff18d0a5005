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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Mutex;

    /// Answers with its number, and notes the offsets of writes.
    struct Numbered(u8, Mutex<Vec<u64>>);

    impl BusDevice for Numbered {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&self, offset: u64, _: &[u8]) {
            self.1.lock().unwrap().push(offset);
        }
    }

    fn numbered(number: u8) -> Arc<Numbered> {
        Arc::new(Numbered(number, Mutex::default()))
    }

    #[test]
    fn an_access_across_the_end_of_a_device_reaches_nobody() {
        let bus = Bus::new("memory");
        let device = numbered(1);
        bus.insert(0x10..0x20, device.clone()).unwrap();
        let mut data = [0; 4];
        assert!(!bus.read(0x1e, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(!bus.write(0x1e, &data));
        assert!(!bus.write(u64::MAX - 1, &data));
        assert!(bus.write(0x1c, &data));
        assert_eq!(*device.1.lock().unwrap(), [0xc]);
    }

    #[test]
    fn refusals_name_the_ranges() {
        let bus = Bus::new("port");
        bus.insert(0x10..0x20, numbered(1)).unwrap();
        let refusal = bus.insert(0x1f..0x30, numbered(2)).unwrap_err().to_string();
        assert!(refusal.contains("0x1f..0x30") && refusal.contains("0x10..0x20") && refusal.contains("port"));
        assert!(bus.insert(0x40..0x40, numbered(2)).is_err());
    }

    /// A device whose write moves it, as a BAR does.
    struct Mover(Arc<Bus>);

    impl BusDevice for Mover {
        fn read(&self, _: u64, data: &mut [u8]) {
            data.fill(0);
        }
        fn write(&self, _: u64, _: &[u8]) {
            self.0.remove(0);
            self.0.insert(8..16, numbered(9)).unwrap();
        }
    }

    #[test]
    fn a_device_may_move_itself_while_it_is_being_written() {
        let bus = Arc::new(Bus::new("memory"));
        bus.insert(0..8, Arc::new(Mover(bus.clone()))).unwrap();
        assert!(bus.write(0, &[1]));
        let mut data = [0];
        assert!(!bus.read(0, &mut data));
        assert!(bus.read(8, &mut data));
        assert_eq!(data, [9]);
    }

    proptest! {
        /// Against a plain array of who owns each address.
        #[test]
        fn the_bus_agrees_with_a_plain_map(
            steps in prop::collection::vec((any::<bool>(), 0..64u64, 0..24u64, 1..200u8), 0..40),
            reads in prop::collection::vec((0..70u64, 1..9usize), 20),
        ) {
            let bus = Bus::new("memory");
            let mut owner = [0u8; 100];
            let mut starts: BTreeMap<u64, Range<usize>> = BTreeMap::new();
            for (insert, start, len, number) in steps {
                let range = start as usize..(start + len) as usize;
                if insert {
                    let free = !range.is_empty() && owner[range.clone()].iter().all(|owner| *owner == 0);
                    prop_assert_eq!(bus.insert(start..start + len, numbered(number)).is_ok(), free);
                    if free {
                        owner[range.clone()].fill(number);
                        starts.insert(start, range);
                    }
                } else {
                    let had = starts.remove(&start);
                    prop_assert_eq!(bus.remove(start), had.is_some());
                    if let Some(range) = had {
                        owner[range].fill(0);
                    }
                }
            }
            for (address, len) in reads {
                let mut data = vec![0; len];
                let at = address as usize;
                let whole = starts.values().any(|range| range.start <= at && at + len <= range.end);
                prop_assert_eq!(bus.read(address, &mut data), whole);
                prop_assert_eq!(data, vec![if whole { owner[at] } else { 0xff }; len]);
            }
        }
    }
}
