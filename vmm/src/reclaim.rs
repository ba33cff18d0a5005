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
