//! A guest for tests: memory, a PCI bus, and a memory of its own of what it wrote, so that everything the devices
//! wrote can be told apart.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::Messages;
use crate::bus::{Bus, BusDevice};
use crate::irq::NoBinder;
use crate::pci::access::Ecam;
use crate::pci::root::PciRoot;
use crate::pci::virtio::VirtioPci;
use crate::ram::{PAGE_SIZE, Ram, take_dirty};
use crate::virtio::device::VirtioDevice;

pub(crate) const LOW: usize = 6 << 20;
pub(crate) const HIGH_START: u64 = 1 << 32;
pub(crate) const HIGH: usize = 1 << 20;
const ECAM: u64 = 0xe000_0000;

/// What outlives the machine: its memory, as the guest sees it.
pub(crate) struct Memory {
    /// The devices' view, with the bitmap.
    pub(crate) ram: Ram,
    /// The guest's view of the same bytes: its writes are not the monitor's.
    view: GuestMemoryMmap<()>,
    /// What memory would hold if only the guest had written.
    shadow: Mutex<Shadow>,
}

struct Shadow {
    regions: Vec<(u64, Vec<u8>)>,
    dirty: BTreeSet<u64>,
}

impl Memory {
    pub(crate) fn new() -> Arc<Self> {
        let places = [(0, LOW), (HIGH_START, HIGH)];
        let files = places.map(|(_, len)| {
            let name = rustix::fs::memfd_create("test-ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let file = File::from(name);
            file.set_len(len as u64).unwrap();
            file
        });
        let ranges = || {
            places.iter().zip(&files).map(|((start, len), file)| {
                let file = FileOffset::new(file.try_clone().unwrap(), 0);
                (GuestAddress(*start), *len, Some(file))
            })
        };
        let regions = places
            .iter()
            .map(|(start, len)| (*start, vec![0; *len]))
            .collect();
        Arc::new(Self {
            ram: Ram::from_ranges_with_files(ranges()).unwrap(),
            view: GuestMemoryMmap::from_ranges_with_files(ranges()).unwrap(),
            shadow: Mutex::new(Shadow {
                regions,
                dirty: BTreeSet::new(),
            }),
        })
    }

    pub(crate) fn view(&self) -> &GuestMemoryMmap<()> {
        &self.view
    }

    /// The guest writes.
    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        let mut shadow = self.shadow.lock().unwrap();
        self.view.write_slice(bytes, GuestAddress(address)).unwrap();
        let (start, copy) = shadow
            .regions
            .iter_mut()
            .rev()
            .find(|(start, _)| *start <= address)
            .unwrap();
        let at = (address - *start) as usize;
        copy[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// The guest reads.
    pub(crate) fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.view.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    pub(crate) fn read_u16(&self, address: u64) -> u16 {
        self.view
            .load(GuestAddress(address), std::sync::atomic::Ordering::Acquire)
            .unwrap()
    }

    pub(crate) fn read_u32(&self, address: u64) -> u32 {
        self.view
            .load(GuestAddress(address), std::sync::atomic::Ordering::Acquire)
            .unwrap()
    }

    /// Everything, to compare.
    pub(crate) fn contents(&self) -> Vec<Vec<u8>> {
        self.view
            .iter()
            .map(|region| self.read(region.start_addr().0, region.len() as usize))
            .collect()
    }

    /// Compares memory with what the guest itself wrote: every page with another byte was written by a device and
    /// must be in the bitmap. No device may be at work. Returns how many pages devices have written.
    pub(crate) fn assert_all_writes_tracked(&self) -> usize {
        let mut shadow = self.shadow.lock().unwrap();
        let Shadow { regions, dirty } = &mut *shadow;
        for (start, words) in take_dirty(&self.ram) {
            for (index, word) in (0u64..).zip(words) {
                let bits = (0..64).filter(|bit| word >> bit & 1 == 1);
                dirty.extend(bits.map(|bit| start.0 / PAGE_SIZE + index * 64 + bit));
            }
        }
        let mut changed = 0;
        for (start, copy) in regions {
            let now = self.read(*start, copy.len());
            let pages = now
                .chunks(PAGE_SIZE as usize)
                .zip(copy.chunks_mut(PAGE_SIZE as usize));
            for (page, (now, copy)) in (*start / PAGE_SIZE..).zip(pages) {
                if now != copy {
                    changed += 1;
                    assert!(
                        dirty.contains(&page),
                        "a device wrote page {page:#x} and it is not in the bitmap"
                    );
                    copy.copy_from_slice(now);
                }
            }
        }
        dirty.clear();
        changed
    }
}

/// A machine around the memory, with one virtio device in slot 1.
pub(crate) struct Guest {
    pub(crate) memory: Arc<Memory>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) root: Arc<PciRoot>,
    pub(crate) messages: Arc<Messages>,
    pub(crate) function: Arc<VirtioPci>,
}

pub(crate) const SLOT: u8 = 1;

impl Guest {
    pub(crate) fn new(memory: Arc<Memory>, device: Box<dyn VirtioDevice>) -> Self {
        let bus = Arc::new(Bus::new("memory"));
        let ram = vec![0..LOW as u64, HIGH_START..HIGH_START + HIGH as u64];
        let root = Arc::new(PciRoot::new(&bus, ram, 0xc000_0000..ECAM));
        bus.insert(
            ECAM..ECAM + crate::pci::access::ECAM_LEN,
            Arc::new(Ecam::new(root.clone())),
        )
        .unwrap();
        let messages = Arc::new(Messages::default());
        let function = VirtioPci::new(
            SLOT,
            device,
            memory.ram.clone(),
            messages.clone(),
            Arc::new(NoBinder),
        )
        .unwrap();
        let function = Arc::new(function);
        root.add(SLOT, function.clone()).unwrap();
        Self {
            memory,
            bus,
            root,
            messages,
            function,
        }
    }

    pub(crate) fn config_read(&self, register: u64, len: usize) -> u32 {
        self.read(ECAM + (u64::from(SLOT) << 15) + register, len) as u32
    }

    pub(crate) fn config_write(&self, register: u64, value: u32, len: usize) {
        self.write(ECAM + (u64::from(SLOT) << 15) + register, u64::from(value), len);
    }

    /// A vCPU reads a device.
    pub(crate) fn read(&self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.read(address, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    /// A vCPU writes a device.
    pub(crate) fn write(&self, address: u64, value: u64, len: usize) {
        self.bus.write(address, &value.to_le_bytes()[..len]);
    }

    /// Straight to the function's BAR, wherever it is.
    pub(crate) fn poke(&self, offset: u64, data: &[u8]) {
        self.function.write(offset, data);
    }
}
