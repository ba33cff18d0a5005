//! Guest buffers as the kernel wants them for readv and writev: the frame goes straight between TAP and guest memory.
#![allow(unsafe_code)] // readv(2) and writev(2) take raw pointers into guest memory.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::ring::Broken;
use crate::ram::Ram;

/// The kernel's IOV_MAX is 1024; one is kept for the spill.
pub(super) const MAX_PIECES: usize = 1023;

/// Pieces of guest memory in a row. The pointers stay good because `ram` keeps every region mapped for as long as
/// this lives; the guest may change the bytes at any time, so they are only touched by the kernel or vm-memory.
pub(super) struct Pieces {
    ram: Ram,
    pointers: Vec<libc::iovec>,
    addresses: Vec<GuestAddress>,
}

// SAFETY: the pointers are into mappings that `ram` shares ownership of, and these are valid in every thread.
unsafe impl Send for Pieces {}

impl Pieces {
    pub(super) fn new(ram: Ram) -> Self {
        Self {
            ram,
            pointers: Vec::with_capacity(MAX_PIECES + 1),
            addresses: Vec::with_capacity(MAX_PIECES + 1),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.pointers.len()
    }

    pub(super) fn clear(&mut self) {
        self.pointers.clear();
        self.addresses.clear();
    }

    /// Appends a range, in several pieces where it crosses from one region of memory to the next.
    fn push(&mut self, address: GuestAddress, len: usize) -> Result<(), Broken> {
        let mut at = address.0;
        for slice in self.ram.get_slices(address, len) {
            let slice = slice.map_err(|_| Broken::Descriptor)?;
            if self.pointers.len() >= MAX_PIECES {
                return Err(Broken::Descriptor);
            }
            self.pointers.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
            self.addresses.push(GuestAddress(at));
            at = at.saturating_add(slice.len() as u64);
        }
        Ok(())
    }

    /// Appends the readable or writable part of a chain and returns its bytes. On an error nothing is appended.
    pub(super) fn push_chain(
        &mut self,
        chain: DescriptorChain<&Ram>,
        writable: bool,
    ) -> Result<usize, Broken> {
        let before = self.pointers.len();
        let mut bytes = 0usize;
        for descriptor in chain {
            if descriptor.is_write_only() != writable {
                continue;
            }
            let len = descriptor.len() as usize;
            if let Err(broken) = self.push(descriptor.addr(), len) {
                self.pointers.truncate(before);
                self.addresses.truncate(before);
                return Err(broken);
            }
            bytes = bytes.saturating_add(len);
        }
        Ok(bytes)
    }

    fn remove_front(&mut self, count: usize) {
        self.pointers.drain(..count.min(self.pointers.len()));
        self.addresses.drain(..count.min(self.addresses.len()));
    }

    /// Writes one frame.
    pub(super) fn write_to(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: every iovec was made by `push` and points into memory that `ram` keeps mapped; writev only reads.
        let written = unsafe {
            libc::writev(
                file.as_raw_fd(),
                self.pointers.as_ptr(),
                self.pointers.len() as libc::c_int,
            )
        };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Reads one frame into the first `pieces`, and what does not fit there into `spill`.
    fn read_from(&mut self, file: BorrowedFd<'_>, pieces: usize, spill: &mut [u8]) -> io::Result<usize> {
        let pieces = pieces.min(self.pointers.len());
        // The spill takes the place after the last piece for this call, so that readv sees one array.
        let spilled = libc::iovec {
            iov_base: spill.as_mut_ptr().cast(),
            iov_len: spill.len(),
        };
        let displaced = match self.pointers.get_mut(pieces) {
            Some(place) => Some(std::mem::replace(place, spilled)),
            None => {
                self.pointers.push(spilled);
                None
            }
        };
        // SAFETY: `pieces` iovecs made by `push` point into guest memory that `ram` keeps mapped, which the guest
        // shares and nothing here holds a reference to; the last one is `spill`, borrowed for the call.
        let got = unsafe {
            libc::readv(
                file.as_raw_fd(),
                self.pointers.as_ptr(),
                (pieces + 1) as libc::c_int,
            )
        };
        let error = io::Error::last_os_error();
        match (displaced, self.pointers.get_mut(pieces)) {
            (Some(displaced), Some(place)) => *place = displaced,
            _ => self.pointers.truncate(pieces),
        }
        usize::try_from(got).map_err(|_| error)
    }

    /// The ranges that hold `len` bytes from `skip` on: guest address and length.
    fn ranges(&self, skip: usize, len: usize) -> impl Iterator<Item = (GuestAddress, usize)> {
        let mut skip = skip;
        let mut left = len;
        self.pointers
            .iter()
            .zip(&self.addresses)
            .filter_map(move |(pointer, address)| {
                let skipped = skip.min(pointer.iov_len);
                skip -= skipped;
                let take = left.min(pointer.iov_len - skipped);
                left -= take;
                (take > 0).then(|| (GuestAddress(address.0.saturating_add(skipped as u64)), take))
            })
    }

    /// The kernel wrote the first `len` bytes behind vm-memory's back. Marked after the write: a mark before it could
    /// be harvested before the bytes are there.
    fn mark_dirty(&self, len: usize) {
        for (address, len) in self.ranges(0, len) {
            for slice in self.ram.get_slices(address, len).flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }

    /// Copies bytes out; returns how many there were.
    pub(super) fn copy_out(&self, skip: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        for (address, len) in self.ranges(skip, to.len()) {
            let Some(target) = to.get_mut(done..done + len) else {
                break;
            };
            if self.ram.read_slice(target, address).is_err() {
                break;
            }
            done += len;
        }
        done
    }

    fn copy_in(&self, skip: usize, from: &[u8]) -> Result<(), Broken> {
        let mut done = 0;
        for (address, len) in self.ranges(skip, from.len()) {
            let source = from.get(done..done + len).ok_or(Broken::Descriptor)?;
            self.ram
                .write_slice(source, address)
                .map_err(|_| Broken::Descriptor)?;
            done += len;
        }
        if done == from.len() {
            Ok(())
        } else {
            Err(Broken::Descriptor)
        }
    }
}

struct Chain {
    head: u16,
    pieces: usize,
    bytes: usize,
}

/// Receive buffers taken from the guest and not yet used, in order.
pub(super) struct ReceiveBuffers {
    pieces: Pieces,
    chains: VecDeque<Chain>,
    bytes: usize,
}

impl ReceiveBuffers {
    pub(super) fn new(ram: Ram) -> Self {
        Self {
            pieces: Pieces::new(ram),
            chains: VecDeque::new(),
            bytes: 0,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.chains.len()).unwrap_or(u16::MAX)
    }

    /// No further chain should be pushed: one more could pass the kernel's limit.
    pub(super) fn is_full(&self) -> bool {
        self.pieces.count() >= MAX_PIECES / 2
    }

    pub(super) fn push(&mut self, chain: DescriptorChain<&Ram>) -> Result<(), Broken> {
        let head = chain.head_index();
        let before = self.pieces.count();
        let bytes = self.pieces.push_chain(chain, true)?;
        if bytes == 0 {
            return Err(Broken::Descriptor);
        }
        self.chains.push_back(Chain {
            head,
            pieces: self.pieces.count() - before,
            bytes,
        });
        self.bytes = self.bytes.saturating_add(bytes);
        Ok(())
    }

    /// Bytes of the first chain, or of all.
    pub(super) fn room(&self, mergeable: bool) -> usize {
        if mergeable {
            self.bytes
        } else {
            self.chains.front().map_or(0, |chain| chain.bytes)
        }
    }

    /// Reads one frame, into all chains or only into the first, the rest of it into `spill`.
    pub(super) fn read_from(
        &mut self,
        file: BorrowedFd<'_>,
        mergeable: bool,
        spill: &mut [u8],
    ) -> io::Result<usize> {
        let room = self.room(mergeable);
        let pieces = if mergeable {
            self.pieces.count()
        } else {
            self.chains.front().map_or(0, |chain| chain.pieces)
        };
        let got = self.pieces.read_from(file, pieces, spill)?;
        self.pieces.mark_dirty(got.min(room));
        Ok(got)
    }

    pub(super) fn copy_out(&self, to: &mut [u8]) -> usize {
        self.pieces.copy_out(0, to)
    }

    pub(super) fn copy_in(&self, from: &[u8]) -> Result<(), Broken> {
        self.pieces.copy_in(0, from)
    }

    /// Gives up the chains that the first `len` bytes fill, with how much of each was used, after writing their
    /// number into the header.
    pub(super) fn use_up(&mut self, len: usize, used: &mut Vec<(u16, u32)>) -> Result<(), Broken> {
        used.clear();
        let mut left = len;
        let mut pieces = 0;
        for chain in &self.chains {
            if left == 0 {
                break;
            }
            let part = left.min(chain.bytes);
            left -= part;
            pieces += chain.pieces;
            used.push((chain.head, part as u32));
        }
        let count = used.len() as u16;
        self.pieces.copy_in(super::NUM_BUFFERS_AT, &count.to_le_bytes())?;
        for chain in self.chains.drain(..used.len()) {
            self.bytes = self.bytes.saturating_sub(chain.bytes);
        }
        self.pieces.remove_front(pieces);
        Ok(())
    }

    /// Forgets all of them; the caller puts them back into the queue.
    pub(super) fn clear(&mut self) {
        self.pieces.clear();
        self.chains.clear();
        self.bytes = 0;
    }
}
