//! Locks on image files: one writer or many readers, on this host and wherever the file system carries locks.
#![allow(unsafe_code)] // fcntl with open-file-description locks has no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What a user of an image keeps others from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockMode {
    /// Others may read, nobody may write.
    Read,
    /// Nobody else may do anything.
    Write,
}

// QEMU locks single bytes: what it does at 100 + permission, what it forbids others at 200 + permission, all as
// read locks, and looks for conflicts by asking whether a write lock would be granted. A writer here locks the
// whole file for itself, which no QEMU gets past. A reader takes the two bytes a QEMU reader takes, and looks
// whether a QEMU somewhere writes. So an image that QEMU (or qemu-img) has open is refused here, and the reverse.
const QEMU_READS: i64 = 100;
const QEMU_WRITES: i64 = 101;
const QEMU_RESIZES: i64 = 103;
const QEMU_FORBIDS_WRITES: i64 = 201;

/// Takes the lock, or says `false` if another has it. The lock belongs to the open file and its duplicates.
pub(crate) fn take(file: &File, mode: LockMode) -> io::Result<bool> {
    match mode {
        LockMode::Write => set(file, libc::F_WRLCK, 0, 0),
        LockMode::Read => {
            let taken = set(file, libc::F_RDLCK, QEMU_READS, 1)?
                && set(file, libc::F_RDLCK, QEMU_FORBIDS_WRITES, 1)?
                && !is_locked(file, QEMU_WRITES)?
                && !is_locked(file, QEMU_RESIZES)?;
            if !taken {
                release(file)?;
            }
            Ok(taken)
        }
    }
}

pub(crate) fn release(file: &File) -> io::Result<()> {
    set(file, libc::F_UNLCK, 0, 0).map(drop)
}

/// Gives the lock up when it is dropped. Closing the file would not do: a process that another thread is just starting has a
/// duplicate of it until it becomes its program, and on a busy host that is long enough for "in use" to be said.
#[derive(Debug)]
pub(crate) struct Released(File);

impl Released {
    pub(crate) fn at_the_end_of(file: &File) -> io::Result<Released> {
        file.try_clone().map(Released)
    }
}

impl Drop for Released {
    fn drop(&mut self) {
        if let Err(error) = release(&self.0) {
            tracing::warn!("the lock of a disk image was not given up: {error}");
        }
    }
}

fn set(file: &File, kind: i32, start: i64, len: i64) -> io::Result<bool> {
    let range = range(kind, start, len);
    // SAFETY: the file descriptor is open for the length of the call, and `range` is a valid flock structure.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &range) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

/// Whether somebody else holds any lock on this byte.
fn is_locked(file: &File, byte: i64) -> io::Result<bool> {
    let mut range = range(libc::F_WRLCK, byte, 1);
    // SAFETY: as above; the kernel writes the conflicting lock into `range`, which lives through the call.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut range) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(range.l_type) != libc::F_UNLCK)
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    }
}
