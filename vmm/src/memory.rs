//! Guest memory: maps it, asks for huge pages, and populates it on request.
#![allow(unsafe_code)] // madvise on our own mapping

use std::fs::File;
use std::num::NonZeroUsize;

use ferry_devices::ram::{PAGE_SIZE, Ram};
use rustix::mm::Advice;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, NewBitmap};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::config::{MachineConfig, MemoryBacking};
use crate::error::{MachineError, Result};
use crate::layout::{HIGH_RAM, LOW_RAM_END};
use crate::size::ByteSize;

/// What KVM and the crossing need to know of one region. `slot` is its KVM memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    pub slot: u32,
    pub guest: u64,
    pub size: u64,
}

impl Region {
    pub fn pages(&self) -> u64 {
        self.size / PAGE_SIZE
    }
}

/// How `size` bytes lie in the address space: (start, length), below 3 GiB and above 4 GiB.
pub fn ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= LOW_RAM_END {
        vec![(0, size)]
    } else {
        vec![(0, LOW_RAM_END), (HIGH_RAM, size - LOW_RAM_END)]
    }
}

pub fn regions(ram: &Ram) -> Vec<Region> {
    ram.iter()
        .zip(0..)
        .map(|(region, slot)| Region {
            slot,
            guest: region.start_addr().0,
            size: region.len(),
        })
        .collect()
}

/// Maps the memory of a machine. Nothing is touched yet unless `prepopulate` says so.
pub fn allocate(config: &MachineConfig) -> Result<Ram> {
    let size = config.memory.0;
    let available = host_memory();
    if available.is_some_and(|has| size > has) {
        return Err(MachineError::Host(format!(
            "the machine wants {} of memory, this host has {}; give it less with --memory",
            config.memory,
            ByteSize(available.unwrap_or(0) & !((1 << 20) - 1))
        )));
    }
    let mut mapped = Vec::new();
    for (start, len) in ranges(size) {
        let map = map(config, len)?;
        let region = GuestRegionMmap::new(map, GuestAddress(start)).ok_or_else(|| {
            MachineError::Host(format!("memory at {start:#x} does not fit the address space"))
        })?;
        mapped.push(region);
    }
    let ram = Ram::from_regions(mapped)
        .map_err(|e| MachineError::Host(format!("guest memory could not be laid out: {e}")))?;
    if !config.hugepages {
        for region in ram.iter() {
            // Without huge pages the machine runs all the same, only slower.
            if let Err(errno) = advise(region, Advice::LinuxHugepage) {
                tracing::debug!("transparent huge pages were refused: {errno}");
            }
        }
    }
    if config.prepopulate {
        populate(&ram)?;
    }
    Ok(ram)
}

fn map(config: &MachineConfig, len: u64) -> Result<MmapRegion<AtomicBitmap>> {
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        let hint = if config.hugepages {
            "; reserve 2 MiB pages with `sysctl vm.nr_hugepages=N` or leave --hugepages out"
        } else {
            ""
        };
        MachineError::Host(format!(
            "{what} {} of guest memory failed: {e}{hint}",
            ByteSize(len)
        ))
    };
    let bytes = usize::try_from(len).map_err(|e| failed("mapping", &e))?;
    let huge = if config.hugepages {
        libc::MAP_HUGETLB | libc::MAP_HUGE_2MB
    } else {
        libc::MAP_NORESERVE
    };
    let builder = MmapRegionBuilder::new_with_bitmap(bytes, AtomicBitmap::with_len(bytes))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_hugetlbfs(config.hugepages);
    let builder = match config.memory_backing {
        MemoryBacking::Anonymous => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | huge),
        MemoryBacking::Memfd => {
            let mut flags = rustix::fs::MemfdFlags::CLOEXEC;
            if config.hugepages {
                flags |= rustix::fs::MemfdFlags::HUGETLB | rustix::fs::MemfdFlags::HUGE_2MB;
            }
            let fd = rustix::fs::memfd_create("ferry-ram", flags).map_err(|e| failed("creating", &e))?;
            let file = File::from(fd);
            file.set_len(len).map_err(|e| failed("sizing", &e))?;
            builder
                .with_mmap_flags(libc::MAP_SHARED | (huge & libc::MAP_NORESERVE))
                .with_file_offset(FileOffset::new(file, 0))
        }
    };
    builder.build().map_err(|e| failed("mapping", &e))
}

fn advise(region: &GuestRegionMmap<AtomicBitmap>, advice: Advice) -> rustix::io::Result<()> {
    // SAFETY: the range is exactly the region's own live mapping, and neither advice that we pass (huge pages,
    // populate) changes what the memory contains.
    unsafe { rustix::mm::madvise(region.as_ptr().cast(), region.size(), advice) }
}

/// Touches all of guest memory without changing it, on as many threads as there are CPUs: page faults, one after the
/// other, are slower than the link of a crossing.
pub fn populate(ram: &Ram) -> Result<()> {
    const CHUNK: usize = 64 << 20;
    let threads = std::thread::available_parallelism()
        .map_or(1, NonZeroUsize::get)
        .min(8);
    let mut chunks = Vec::new();
    for region in ram.iter() {
        let start = region.as_ptr() as usize;
        let end = start + region.size();
        chunks.extend((start..end).step_by(CHUNK).map(|at| (at, CHUNK.min(end - at))));
    }
    let queue = std::sync::Mutex::new(chunks.into_iter());
    let take = || {
        queue
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .next()
    };
    let work = || -> rustix::io::Result<()> {
        while let Some((start, len)) = take() {
            // SAFETY: a piece of a mapping that `ram` keeps alive; populating does not change its contents.
            unsafe { rustix::mm::madvise(start as *mut _, len, Advice::LinuxPopulateWrite) }?;
        }
        Ok(())
    };
    let outcome = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|w| w.join().unwrap_or(Err(rustix::io::Errno::FAULT)))
    });
    match outcome {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::INVAL) => populate_by_touch(ram), // before Linux 5.14
        Err(errno) => Err(MachineError::Host(format!(
            "guest memory could not be populated: {errno}; is there enough free memory?"
        ))),
    }
}

/// Reads and writes back one byte of each page. Only for memory that nobody else writes yet.
fn populate_by_touch(ram: &Ram) -> Result<()> {
    let failed = |e| MachineError::Host(format!("guest memory could not be populated: {e}"));
    for region in regions(ram) {
        for page in 0..region.pages() {
            let at = GuestAddress(region.guest + page * PAGE_SIZE);
            let byte: u8 = ram.read_obj(at).map_err(failed)?;
            ram.write_obj(byte, at).map_err(failed)?;
        }
    }
    Ok(())
}

/// Bytes of memory in this host.
pub(crate) fn host_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(memory: u64) -> MachineConfig {
        MachineConfig {
            memory: ByteSize(memory),
            ..MachineConfig::default()
        }
    }

    #[test]
    fn memory_leaves_the_gap_below_4_gib_free() {
        assert_eq!(ranges(1 << 30), vec![(0, 1 << 30)]);
        assert_eq!(ranges(3 << 30), vec![(0, 3 << 30)]);
        assert_eq!(ranges(5 << 30), vec![(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn every_backing_gives_zeroed_memory_that_can_be_populated() {
        for backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
            let ram = allocate(&MachineConfig {
                memory_backing: backing,
                prepopulate: true,
                ..config(32 << 20)
            })
            .unwrap();
            assert_eq!(
                regions(&ram),
                vec![Region {
                    slot: 0,
                    guest: 0,
                    size: 32 << 20
                }]
            );
            let last: u64 = ram.read_obj(GuestAddress((32 << 20) - 8)).unwrap();
            assert_eq!(last, 0);
            populate_by_touch(&ram).unwrap();
        }
    }

    #[test]
    fn more_memory_than_the_host_has_is_refused_before_it_is_mapped() {
        let error = allocate(&config(1 << 45)).unwrap_err().to_string();
        assert!(
            error.contains("32T") && error.contains("this host has"),
            "{error}"
        );
    }
}
