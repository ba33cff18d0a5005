//! The memory that is left beside the image: handed out in one direction, all given back at once.

use core::slice;

pub const PAGE: u64 = 4096;
const MAX_RANGES: usize = crate::info::MAX_RANGES;
/// Page tables reach this far.
const MAPPED: u64 = 64 << 30;
const MIB: u64 = 1 << 20;

/// Some pages, in at most a few ranges of addresses.
#[derive(Clone, Copy)]
pub struct Pages {
    ranges: [(u64, u64); MAX_RANGES],
    used: usize,
    count: u64,
}

impl Pages {
    pub const NONE: Pages = Pages {
        ranges: [(0, 0); MAX_RANGES],
        used: 0,
        count: 0,
    };

    pub fn count(&self) -> u64 {
        self.count
    }

    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges[..self.used]
    }

    /// The address of a page.
    pub fn address(&self, page: u64) -> u64 {
        let mut offset = page * PAGE;
        for &(from, to) in self.ranges() {
            if offset < to - from {
                return from + offset;
            }
            offset -= to - from;
        }
        panic!("a page beyond the last")
    }
}

pub struct Memory {
    all: Pages,
    free: Pages,
}

unsafe extern "C" {
    static mut high_directories: [[u64; 512]; 60];
}

impl Memory {
    /// All RAM above 1 MiB that the image does not use.
    pub fn new(ram: &[(u64, u64)]) -> Memory {
        let mut all = Pages::NONE;
        for &(from, to) in ram {
            let from = if from < MIB {
                from
            } else {
                from.max(crate::info::free_start())
            };
            let (from, to) = (from.next_multiple_of(PAGE), to.min(MAPPED) & !(PAGE - 1));
            if from >= MIB && from < to {
                all.ranges[all.used] = (from, to);
                all.used += 1;
                all.count += (to - from) / PAGE;
                map(to);
            }
        }
        Memory { all, free: all }
    }

    pub fn free_bytes(&self) -> u64 {
        self.free.count * PAGE
    }

    /// What is taken now is taken for good.
    pub fn keep_taken(&mut self) {
        self.all = self.free;
    }

    pub fn give_back_all(&mut self) {
        self.free = self.all;
    }

    /// Up to `count` pages, wherever they are.
    pub fn take_pages(&mut self, count: u64) -> Pages {
        let mut taken = Pages::NONE;
        while taken.count < count && self.free.used > 0 {
            let (from, to) = self.free.ranges[0];
            let size = ((count - taken.count) * PAGE).min(to - from);
            taken.ranges[taken.used] = (from, from + size);
            taken.used += 1;
            taken.count += size / PAGE;
            self.free.count -= size / PAGE;
            self.free.ranges[0].0 += size;
            if from + size == to {
                self.free.ranges.copy_within(1.., 0);
                self.free.used -= 1;
            }
        }
        taken
    }

    /// A zeroed slice in one piece, or None.
    ///
    /// # Safety
    /// No slice taken before the last `give_back_all` may be in use, and all zeroes must be a `T`.
    pub unsafe fn take_zeroed<T>(&mut self, count: usize) -> Option<&'static mut [T]> {
        // SAFETY: handed on; zeroed before anybody sees it.
        unsafe {
            let at = self.take(count * size_of::<T>())? as *mut T;
            core::ptr::write_bytes(at, 0, count);
            Some(slice::from_raw_parts_mut(at, count))
        }
    }

    /// Words in one piece, with whatever is in them: large ones are not touched before they are needed.
    ///
    /// # Safety
    /// As above.
    pub unsafe fn take_words<const N: usize>(&mut self, count: usize) -> Option<&'static mut [[u64; N]]> {
        // SAFETY: handed on; any bits are a number.
        unsafe {
            Some(slice::from_raw_parts_mut(
                self.take(count * 8 * N)? as *mut [u64; N],
                count,
            ))
        }
    }

    /// The address of so many bytes, mapped, aligned to a page, and nobody else's.
    fn take(&mut self, bytes: usize) -> Option<u64> {
        let size = (bytes as u64).next_multiple_of(PAGE);
        let place = (0..self.free.used).find(|&i| self.free.ranges[i].1 - self.free.ranges[i].0 > size)?;
        let at = self.free.ranges[place].0;
        self.free.ranges[place].0 += size;
        self.free.count -= size / PAGE;
        Some(at)
    }
}

/// Fills the page directories above 4 GiB up to this address.
fn map(to: u64) {
    for entry in (4 << 9)..(to.div_ceil(2 * MIB)) {
        // SAFETY: only the first vCPU runs; the entries were empty or get the value they have.
        unsafe {
            (&raw mut high_directories as *mut u64)
                .add((entry - (4 << 9)) as usize)
                .write_volatile(entry * 2 * MIB + 0xe7);
        }
    }
}
