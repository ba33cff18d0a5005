//! The PCI bus: which function is in which slot, and where its memory answers.
//!
//! A guest may put a BAR anywhere, also onto memory or another device. Such a BAR answers nowhere until it is moved
//! away: memory and whoever was there first win.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::bridge::HostBridge;
use crate::bus::{Bus, BusDevice};
use crate::error::DeviceError;
use crate::log_once::LogOnce;
use crate::records::RecordReader;
use crate::state::{Record, StateError, Stateful};

pub const SLOTS: u8 = 32;

/// One function (always function 0 of its slot). As a `BusDevice` it answers inside its BAR.
pub trait PciFunction: BusDevice + Stateful {
    fn read_config(&self, offset: u16, data: &mut [u8]);
    fn write_config(&self, offset: u16, data: &[u8]);
    /// Zero for none.
    fn bar_size(&self) -> u32;
    /// Sets the BAR's address as firmware would.
    fn place_bar(&self, address: u32);
    /// Where the guest wants the BAR to answer now.
    fn bar(&self) -> Option<Range<u64>>;
    /// Where the BAR answers from now on.
    fn bar_mapped(&self, at: Option<u64>);
    /// Stops all work on guest memory; requests in flight are finished. Twice is once.
    fn pause(&self);
    /// Continues after `pause` or `restore`.
    fn resume(&self);
}

/// The bus and its functions.
pub struct PciRoot {
    /// Weak: the bus holds the ways to reach this root, and a circle would keep every device alive for ever, with its
    /// threads, TAPs and locks.
    memory: Weak<Bus>,
    /// Where no BAR may answer.
    ram: Vec<Range<u64>>,
    /// Where BARs are placed before the guest moves them.
    window: Range<u64>,
    inner: Mutex<Inner>,
    blocked: LogOnce,
}

struct Inner {
    slots: BTreeMap<u8, Slot>,
    next_bar: u64,
}

struct Slot {
    function: Arc<dyn PciFunction>,
    /// Where the BAR answers.
    mapped: Option<Range<u64>>,
}

impl PciRoot {
    /// `window` is the part of the address space below 4 GiB that the firmware tables call PCI's.
    pub fn new(memory: &Arc<Bus>, ram: Vec<Range<u64>>, window: Range<u64>) -> Self {
        let bridge = Slot {
            function: Arc::new(HostBridge::new()),
            mapped: None,
        };
        let inner = Inner {
            slots: BTreeMap::from([(0, bridge)]),
            next_bar: window.start,
        };
        Self {
            memory: Arc::downgrade(memory),
            ram,
            window,
            inner: Mutex::new(inner),
            blocked: LogOnce::new(),
        }
    }

    /// Puts a function into a slot from 1 to 31 and places its BAR.
    pub fn add(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<(), DeviceError> {
        let mut inner = self.lock();
        if slot >= SLOTS || inner.slots.contains_key(&slot) {
            return Err(DeviceError::Invalid(format!(
                "PCI slot {slot} is taken or does not exist; use another of 1 to {}",
                SLOTS - 1
            )));
        }
        let size = u64::from(function.bar_size());
        if size > 0 {
            let start = inner.next_bar.next_multiple_of(size);
            let end = start.saturating_add(size);
            let address = u32::try_from(start)
                .ok()
                .filter(|_| end <= self.window.end)
                .ok_or_else(|| {
                    DeviceError::Invalid("there is no PCI address space left; use fewer devices".to_owned())
                })?;
            function.place_bar(address);
            inner.next_bar = end;
        }
        inner.slots.insert(
            slot,
            Slot {
                function,
                mapped: None,
            },
        );
        Ok(())
    }

    /// Reads configuration space; what is not there reads as all ones.
    pub fn read_config(&self, place: Place, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(function) = self.function(place) {
            function.read_config(place.register, data);
        }
    }

    pub fn write_config(&self, place: Place, data: &[u8]) {
        if let Some(function) = self.function(place) {
            function.write_config(place.register, data);
            self.refresh();
        }
    }

    fn function(&self, place: Place) -> Option<Arc<dyn PciFunction>> {
        let Place {
            bus,
            slot,
            function,
            register: _,
        } = place;
        let inner = self.lock();
        let slot = inner.slots.get(&slot).filter(|_| bus == 0 && function == 0)?;
        Some(slot.function.clone())
    }

    /// Lets every BAR answer where its function says. First all that have moved go away, then all that can come
    /// come, so that two may change places, and one that was blocked comes when its place is free.
    fn refresh(&self) {
        let mut inner = self.lock();
        for Slot { function, mapped } in inner.slots.values_mut() {
            if mapped.is_some() && *mapped != function.bar() {
                self.unmap(function, mapped);
            }
        }
        for Slot { function, mapped } in inner.slots.values_mut() {
            if let (None, Some(wanted)) = (&mapped, function.bar()) {
                self.map(function, mapped, wanted);
            }
        }
    }

    fn map(&self, function: &Arc<dyn PciFunction>, mapped: &mut Option<Range<u64>>, wanted: Range<u64>) {
        let on_ram = self
            .ram
            .iter()
            .any(|ram| wanted.start < ram.end && ram.start < wanted.end);
        if on_ram {
            self.blocked
                .warn(|| format!("the guest put a device onto memory at {:#x}", wanted.start));
            return;
        }
        let Some(memory) = self.memory.upgrade() else {
            return;
        };
        match memory.insert(wanted.clone(), function.clone()) {
            Ok(()) => {
                function.bar_mapped(Some(wanted.start));
                *mapped = Some(wanted);
            }
            Err(error) => self
                .blocked
                .warn(|| format!("the guest put one device onto another: {error}")),
        }
    }

    fn unmap(&self, function: &Arc<dyn PciFunction>, mapped: &mut Option<Range<u64>>) {
        if let Some(range) = mapped.take() {
            function.bar_mapped(None);
            if let Some(memory) = self.memory.upgrade() {
                memory.remove(range.start);
            }
        }
    }

    fn functions(&self) -> Vec<Arc<dyn PciFunction>> {
        self.lock()
            .slots
            .values()
            .map(|slot| slot.function.clone())
            .collect()
    }

    /// Stops every device's work; called with no vCPU running. State can be saved afterwards.
    pub fn pause(&self) {
        self.functions().iter().for_each(|function| function.pause());
    }

    /// Continues every device's work, before the vCPUs run again.
    pub fn resume(&self) {
        self.functions().iter().for_each(|function| function.resume());
    }

    /// One record for each function, all paused.
    pub fn save(&self) -> Result<Vec<Record>, StateError> {
        self.functions().iter().map(|function| function.save()).collect()
    }

    /// Restores every function from its record; none may be running.
    pub fn restore(&self, reader: &mut RecordReader) -> Result<(), StateError> {
        for function in self.functions() {
            reader.restore(&*function)?;
        }
        self.refresh();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which register of which function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub bus: u8,
    pub slot: u8,
    pub function: u8,
    pub register: u16,
}
