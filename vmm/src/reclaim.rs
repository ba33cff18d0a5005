//! Gives memory that the guest does not need back to the host.
#![allow(unsafe_code)] // madvise that discards content

use std::io;
use std::ops::Range;

use ferry_devices::ram::{Ram, mark_dirty};
use ferry_devices::virtio::balloon::Reclaim;
use rustix::mm::Advice;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

pub(crate) struct HostMemory {
    pub(crate) ram: Ram,
}

impl Reclaim for HostMemory {
    fn release(&self, range: Range<u64>) -> io::Result<()> {
        let bytes = range.end.saturating_sub(range.start) as usize;
        let outside = |error| io::Error::new(io::ErrorKind::InvalidInput, format!("{error}"));
        for slice in self.ram.get_slices(GuestAddress(range.start), bytes) {
            let slice = slice.map_err(outside)?;
            let shared = self
                .ram
                .find_region(GuestAddress(range.start))
                .is_some_and(|region| region.file_offset().is_some());
            // Private memory forgets its pages; shared memory must have them taken out of its file.
            let advice = if shared {
                Advice::LinuxRemove
            } else {
                Advice::LinuxDontNeed
            };
            let guard = slice.ptr_guard_mut();
            // SAFETY: `get_slices` gave a part of the guest's own mapping, alive as long as `self.ram`. Nothing in this
            // process holds references into guest memory; the guest said that it does not need the content, and
            // reading zeroes instead is what the balloon's contract promises it.
            unsafe { rustix::mm::madvise(guard.as_ptr().cast(), slice.len(), advice) }?;
        }
        // The content has changed, and no vCPU did it.
        mark_dirty(&self.ram, GuestAddress(range.start), bytes)
            .map_err(|error| io::Error::other(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MachineConfig, MemoryBacking};
    use crate::memory;
    use crate::size::ByteSize;
    use vm_memory::Bytes;

    #[test]
    fn memory_that_is_given_back_is_zero_and_counts_as_changed() {
        for backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
            let config = MachineConfig {
                memory_backing: backing,
                memory: ByteSize(16 << 20),
                ..MachineConfig::default()
            };
            let ram = memory::allocate(&config).unwrap();
            let host = HostMemory { ram: ram.clone() };
            ram.write_slice(&[7; 3 * 4096], GuestAddress(0x10_0000)).unwrap();
            ferry_devices::ram::take_dirty(&ram);
            host.release(0x10_1000..0x10_2000).unwrap();
            let read = |at| ram.read_obj::<u8>(GuestAddress(at)).unwrap();
            assert_eq!(
                [0x10_0fff, 0x10_1000, 0x10_1fff, 0x10_2000].map(read),
                [7, 0, 0, 7]
            );
            let dirty = ferry_devices::ram::take_dirty(&ram).remove(0).1;
            assert_eq!(dirty.iter().map(|word| word.count_ones()).sum::<u32>(), 1);
            assert!(host.release(0xff_f000..0x100_1000).is_err());
        }
    }
}
