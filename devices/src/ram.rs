//! Guest memory: its type, and the one way to ask it what the monitor itself has written.
//!
//! Every write into guest memory by a device goes through vm-memory, which marks the page in the memory's
//! bitmap; a write that goes round it (io_uring, preadv) calls [`mark_dirty`] when it completes. KVM's dirty
//! log does not see these writes: a crossing that forgets this bitmap loses them.

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::DeviceError;

/// Guest memory with a bit for every page that the monitor has written.
pub type Ram = GuestMemoryMmap<AtomicBitmap>;

/// Page size of the bitmap and of everything that counts pages.
pub const PAGE_SIZE: u64 = 4096;

/// Marks a range as written, for writes that did not go through vm-memory. A range outside memory is an error,
/// and then nothing is marked.
pub fn mark_dirty(ram: &Ram, address: GuestAddress, len: usize) -> Result<(), DeviceError> {
    if len == 0 {
        return Ok(());
    }
    let outside = || DeviceError::OutsideRam {
        address: address.0,
        len: len as u64,
    };
    let slices = ram.get_slices(address, len);
    let slices: Vec<_> = slices.collect::<Result<_, _>>().map_err(|_| outside())?;
    for slice in slices {
        slice.bitmap().mark_dirty(0, slice.len());
    }
    Ok(())
}

/// Takes and clears the bitmap of every region: (first guest address of the region, one bit per page).
/// What is taken is the caller's to deliver or to put back with [`mark_dirty`].
pub fn take_dirty(ram: &Ram) -> Vec<(GuestAddress, Vec<u64>)> {
    ram.iter()
        .map(|region| (region.start_addr(), (**region).bitmap().get_and_reset()))
        .collect()
}
