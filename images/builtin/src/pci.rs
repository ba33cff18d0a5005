//! The PCI bus: finds devices, gives addresses to those that have none, and reads capabilities.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::{in32, out32};

/// Where unassigned BARs are put: the 32-bit window of devices.
static NEXT_ADDRESS: AtomicU64 = AtomicU64::new(0xc000_0000);
const WINDOW_END: u64 = 0xe000_0000;
/// Configuration space in memory, 0 where there are only ports.
static ECAM: AtomicU64 = AtomicU64::new(0);

/// Takes configuration space where the tables say it is; without a word from them, behind the ports, or
/// where a machine without ports has it.
pub fn begin(ecam: u64) {
    const USUAL: u64 = 0xe000_0000;
    const ENABLE: u32 = 1 << 31;
    ECAM.store(ecam, Ordering::Relaxed);
    if ecam == 0 {
        out32(0xcf8, ENABLE);
        if in32(0xcf8) != ENABLE {
            ECAM.store(USUAL, Ordering::Relaxed);
        }
    }
}

/// A function of bus 0.
#[derive(Clone, Copy)]
pub struct Function(u32);

#[derive(Clone, Copy)]
pub struct Capability {
    pub id: u8,
    pub at: u32,
}

impl Function {
    /// All devices of bus 0 of this vendor.
    pub fn find(vendor: u16) -> impl Iterator<Item = Function> {
        (0..32)
            .map(|slot| Function(slot << 3))
            .filter(move |f| f.read(0) & 0xffff == vendor as u32)
    }

    pub fn device_id(self) -> u16 {
        (self.read(0) >> 16) as u16
    }

    pub fn read(self, offset: u32) -> u32 {
        match ECAM.load(Ordering::Relaxed) {
            0 => {
                out32(0xcf8, 1 << 31 | self.0 << 8 | offset & 0xfc);
                in32(0xcfc)
            }
            // SAFETY: configuration space is mapped; the access is aligned.
            base => unsafe {
                ((base + ((self.0 as u64) << 12) + (offset & 0xffc) as u64) as *const u32).read_volatile()
            },
        }
    }

    pub fn write(self, offset: u32, value: u32) {
        match ECAM.load(Ordering::Relaxed) {
            0 => {
                out32(0xcf8, 1 << 31 | self.0 << 8 | offset & 0xfc);
                out32(0xcfc, value);
            }
            // SAFETY: as above.
            base => unsafe {
                ((base + ((self.0 as u64) << 12) + (offset & 0xffc) as u64) as *mut u32).write_volatile(value)
            },
        }
    }

    pub fn capabilities(self) -> impl Iterator<Item = Capability> {
        let first = if self.read(4) & 1 << 20 == 0 {
            0
        } else {
            self.read(0x34) & 0xfc
        };
        let at = move |at: u32| (at != 0).then(|| (self.read(at), at));
        core::iter::successors(at(first), move |(head, _)| at(head >> 8 & 0xfc))
            .take(48)
            .map(|(head, at)| Capability { id: head as u8, at })
    }

    /// Sees that every memory BAR has an address, and lets the device decode it and read memory.
    pub fn enable(self) {
        let mut bar = 0;
        while bar < 6 {
            let wide = self.place_bar(bar);
            bar += if wide { 2 } else { 1 };
        }
        self.write(4, self.read(4) & 0xffff | 0x6);
    }

    /// The address of a memory BAR.
    pub fn bar(self, index: u8) -> u64 {
        let low = self.read(0x10 + 4 * index as u32);
        let high = if low & 6 == 4 {
            self.read(0x14 + 4 * index as u32)
        } else {
            0
        };
        (high as u64) << 32 | (low & !0xf) as u64
    }

    /// Returns whether the BAR is 64 bits wide.
    fn place_bar(self, index: u8) -> bool {
        let at = 0x10 + 4 * index as u32;
        let old = self.read(at);
        let wide = old & 7 == 4;
        if old & 1 != 0 || self.bar(index) != 0 {
            return wide;
        }
        self.write(at, u32::MAX);
        let size = !(self.read(at) & !0xf) as u64 + 1;
        self.write(at, old);
        if (16..=1 << 28).contains(&size) {
            let address = NEXT_ADDRESS.load(Ordering::Relaxed).next_multiple_of(size);
            if address + size <= WINDOW_END {
                NEXT_ADDRESS.store(address + size, Ordering::Relaxed);
                self.write(at, address as u32);
            }
        }
        wide
    }
}
