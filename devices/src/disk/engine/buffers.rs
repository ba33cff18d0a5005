//! The memory of a request: guest memory itself where direct access fits, a copy of it otherwise.
//!
//! # When guest memory counts as written
//!
//! A read from the disk changes guest memory at some moment between submit and completion, and the kernel tells no
//! dirty log about it. A crossing that copies the page before that moment has old bytes; so the page must be seen as
//! dirty after it. Hence it is marked when the read has **completed**, whatever its result, for a failed read may
//! have changed a part: [`Buffers::finish_read`]. What is copied in between is copied again.
#![allow(unsafe_code)] // Hands addresses of guest memory to the kernel.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::disk::aligned::AlignedBuf;
use crate::ram::{Ram, mark_dirty};

/// What the kernel takes in one call.
const MAX_PIECES: usize = 1024;

/// Memory to read into or write from, as the kernel wants it.
#[derive(Debug)]
pub(crate) struct Buffers {
    /// Each points into `ram` or into `copy`, which this value keeps alive.
    pieces: Vec<libc::iovec>,
    /// The pieces before this one are done with.
    at: usize,
    guest: Vec<(GuestAddress, usize)>,
    ram: Option<Ram>,
    copy: Option<AlignedBuf>,
}

// SAFETY: the pointers lead to memory that this value owns a share of and that may be used from any thread; guest
// memory is shared with the guest itself anyway and only the kernel follows them.
unsafe impl Send for Buffers {}

impl Buffers {
    pub(crate) fn none() -> Self {
        Self {
            pieces: Vec::new(),
            at: 0,
            guest: Vec::new(),
            ram: None,
            copy: None,
        }
    }

    /// The guest's memory itself. `None` if a part of it does not exist or there are too many pieces.
    pub(crate) fn in_guest(ram: &Ram, guest: Vec<(GuestAddress, usize)>) -> Option<Self> {
        let mut pieces = Vec::with_capacity(guest.len());
        for &(address, len) in &guest {
            for slice in ram.get_slices(address, len) {
                let slice = slice.ok()?;
                pieces.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        (pieces.len() <= MAX_PIECES).then(|| Self {
            pieces,
            at: 0,
            guest,
            ram: Some(ram.clone()),
            copy: None,
        })
    }

    /// Whether all addresses and lengths are multiples of `alignment`.
    pub(crate) fn is_aligned(&self, alignment: u32) -> bool {
        let alignment = alignment as usize;
        let fits = |piece: &libc::iovec| {
            piece.iov_base.addr().is_multiple_of(alignment) && piece.iov_len.is_multiple_of(alignment)
        };
        self.pieces.iter().all(fits)
    }

    /// Uses a copy in our own memory instead, aligned, and filled with the guest's bytes if it is for writing.
    pub(crate) fn copied(mut self, alignment: u32, for_writing: bool) -> io::Result<Self> {
        let len = self.guest.iter().map(|(_, len)| len).sum();
        let mut copy = AlignedBuf::new(len, alignment as usize);
        if let (true, Some(ram)) = (for_writing, &self.ram) {
            let mut rest = copy.bytes_mut();
            for &(address, len) in &self.guest {
                let (now, later) = rest
                    .split_at_mut_checked(len)
                    .ok_or(io::ErrorKind::InvalidInput)?;
                ram.read_slice(now, address).map_err(io::Error::other)?;
                rest = later;
            }
        }
        self.pieces = vec![libc::iovec {
            iov_base: copy.bytes_mut().as_mut_ptr().cast(),
            iov_len: len,
        }];
        self.at = 0;
        self.copy = Some(copy);
        Ok(self)
    }

    /// The copy, where there is one.
    pub(crate) fn copy(&self) -> Option<&[u8]> {
        self.copy.as_ref().map(AlignedBuf::bytes)
    }

    pub(crate) fn copy_mut(&mut self) -> Option<&mut [u8]> {
        self.copy.as_mut().map(AlignedBuf::bytes_mut)
    }

    /// A read has completed: the guest gets its bytes, and its memory is marked as written. See the head of this file.
    pub(crate) fn finish_read(&self, success: bool) -> io::Result<()> {
        let Some(ram) = &self.ram else { return Ok(()) };
        let Some(mut bytes) = self.copy() else {
            let mark = |&(address, len): &(GuestAddress, usize)| mark_dirty(ram, address, len);
            return self.guest.iter().try_for_each(mark).map_err(io::Error::other);
        };
        if success {
            for &(address, len) in &self.guest {
                let (now, later) = bytes.split_at_checked(len).ok_or(io::ErrorKind::InvalidInput)?;
                ram.write_slice(now, address).map_err(io::Error::other)?;
                bytes = later;
            }
        }
        Ok(())
    }

    /// What remains, for the kernel. Valid while this value lives and is not changed.
    pub(super) fn rest(&self) -> &[libc::iovec] {
        self.pieces.get(self.at..).unwrap_or_default()
    }

    /// The kernel has done this many bytes of the rest.
    pub(super) fn advance(&mut self, mut len: usize) {
        while let Some(piece) = self.pieces.get_mut(self.at) {
            if len < piece.iov_len {
                // Stays inside the piece, and so inside the memory it points into.
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(len).cast();
                piece.iov_len -= len;
                return;
            }
            len -= piece.iov_len;
            self.at += 1;
        }
    }

    /// Reads from a file into all of this memory.
    pub(super) fn read_from(&mut self, file: &File, offset: u64) -> io::Result<()> {
        self.transfer(offset, |pieces, offset| {
            // SAFETY: every piece points to memory that `self` keeps alive and that may be written to; the kernel
            // checks the addresses itself.
            unsafe { libc::preadv(file.as_raw_fd(), pieces.as_ptr(), pieces.len() as i32, offset) }
        })
    }

    /// Writes all of this memory to a file; with `durable` onto the disk.
    pub(super) fn write_to(&mut self, file: &File, offset: u64, durable: bool) -> io::Result<()> {
        let flags = if durable { libc::RWF_DSYNC } else { 0 };
        self.transfer(offset, |pieces, offset| {
            // SAFETY: as above, and the memory is only read.
            unsafe {
                libc::pwritev2(
                    file.as_raw_fd(),
                    pieces.as_ptr(),
                    pieces.len() as i32,
                    offset,
                    flags,
                )
            }
        })
    }

    fn transfer(&mut self, mut offset: u64, call: impl Fn(&[libc::iovec], i64) -> isize) -> io::Result<()> {
        while !self.rest().is_empty() {
            let place = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            match call(self.rest(), place) {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                done if done > 0 => {
                    self.advance(done as usize);
                    offset += done as u64;
                }
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }
}
