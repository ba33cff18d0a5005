//! A region of guest memory, and which of its pages have ever been touched: the others are zero and need not travel.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use ferry_devices::ram::Ram;
use ferry_migration::block::{BlockId, BlockInfo, BlockKind, DataError};
use ferry_migration::units::UnitSet;
use rustix::fs::SeekFrom;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, bitmap::AtomicBitmap};

const PAGE: u64 = 4096;
/// "Present" and "swapped": either means that the page has content.
const HAS_CONTENT: u64 = 0b11 << 62;

/// One region of a machine's memory.
#[derive(Clone)]
pub struct Region {
    ram: Ram,
    start: GuestAddress,
    bytes: u64,
}

impl Region {
    /// The regions of a machine, in order of their addresses: both sides of a crossing count them the same way.
    pub fn all(ram: &Ram) -> Vec<Region> {
        ram.iter()
            .map(|region| Region {
                ram: ram.clone(),
                start: region.start_addr(),
                bytes: region.len(),
            })
            .collect()
    }

    pub fn start(&self) -> GuestAddress {
        self.start
    }

    pub(super) fn info(&self, id: BlockId) -> BlockInfo {
        let name = format!("memory at {:#x}", self.start.0);
        BlockInfo {
            id,
            kind: BlockKind::Memory,
            name,
            bytes: self.bytes,
        }
    }

    pub(super) fn get(&self) -> Result<&GuestRegionMmap<AtomicBitmap>, DataError> {
        self.ram
            .find_region(self.start)
            .ok_or_else(|| DataError::new(format!("there is no memory at {:#x}", self.start.0)))
    }

    /// What the monitor has written since the last call.
    pub(super) fn take_bitmap(&self) -> Vec<u64> {
        self.get()
            .map(|region| (**region).bitmap().get_and_reset())
            .unwrap_or_default()
    }

    /// Pages that may hold something other than zeroes. When the host does not tell, that is all of them.
    pub(super) fn populated(&self) -> UnitSet {
        let units = self.bytes / PAGE;
        let Ok(region) = self.get() else {
            return UnitSet::full(units);
        };
        let found = match region.file_offset() {
            Some(file) => file_data(file.file(), file.start(), self.bytes),
            None => anonymous(region.as_ptr() as u64, units),
        };
        found.unwrap_or_else(|_| UnitSet::full(units))
    }
}

/// A page of shared memory that was swapped out has no page table entry, so the file is asked, not the page table.
fn file_data(file: &File, start: u64, len: u64) -> std::io::Result<UnitSet> {
    let mut set = UnitSet::empty(len / PAGE);
    let mut at = start;
    while at < start + len {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data.min(start + len),
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))?.min(start + len);
        set.insert_run(
            (data - start) / PAGE,
            (hole - start).div_ceil(PAGE) - (data - start) / PAGE,
        );
        at = hole.max(data + 1);
    }
    Ok(set)
}

fn anonymous(address: u64, units: u64) -> std::io::Result<UnitSet> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut set = UnitSet::empty(units);
    let mut entries = vec![0u8; 512 << 10];
    let mut unit = 0;
    while unit < units {
        let count = (units - unit).min(entries.len() as u64 / 8);
        let bytes = entries.get_mut(..count as usize * 8).unwrap_or_default();
        pagemap.read_exact_at(bytes, (address / PAGE + unit) * 8)?;
        for (at, entry) in bytes.chunks_exact(8).enumerate() {
            let entry = entry.try_into().map_or(u64::MAX, u64::from_le_bytes);
            if entry & HAS_CONTENT != 0 {
                set.insert(unit + at as u64);
            }
        }
        unit += count;
    }
    Ok(set)
}
