//! Opening image files: what is at a path, which format it has, and what direct I/O demands there.
#![allow(unsafe_code)] // statx with the direct I/O fields has no safe wrapper.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{SeekFrom, seek};

use super::error::DiskError;
use super::lock::{self, LockMode};
use super::options::DiskFormat;

pub(crate) const SECTOR: u64 = 512;
/// What direct I/O needs where nobody says: every disk of today takes this.
const SAFE_ALIGNMENT: u32 = 4096;
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";

/// What offsets, lengths and memory addresses of requests must be multiples of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alignment {
    pub(crate) offset: u32,
    pub(crate) memory: u32,
}

impl Alignment {
    pub(crate) const NONE: Self = Self { offset: 1, memory: 1 };
}

/// Opens a file or block device, and nothing else: opening a FIFO would hang, a terminal would do worse.
pub(crate) fn open_file(path: &Path, write: bool, direct: bool) -> Result<File, DiskError> {
    let kind = match std::fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(DiskError::Missing(path.to_owned()));
        }
        Err(error) => return Err(DiskError::io(path, "it cannot be examined")(error)),
    };
    let what = if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() || kind.is_socket() {
        "a pipe or socket"
    } else {
        ""
    };
    if !what.is_empty() {
        let path = path.to_owned();
        return Err(DiskError::NotAnImage { path, what });
    }
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let opened = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(flags)
        .open(path);
    opened.map_err(|error| match error.raw_os_error() {
        Some(libc::EACCES | libc::EROFS | libc::EPERM) if write => DiskError::ReadOnly(path.to_owned()),
        Some(libc::EINVAL) if direct => DiskError::unsupported(
            path,
            "is on a file system without direct I/O; use another cache mode",
        ),
        _ => DiskError::io(path, "it cannot be opened")(error),
    })
}

/// Length of a file or block device.
pub(crate) fn file_len(file: &File, path: &Path) -> Result<u64, DiskError> {
    seek(file, SeekFrom::End(0))
        .map_err(|error| DiskError::io(path, "its length cannot be read")(error.into()))
}

pub(crate) fn lock_file(file: &File, path: &Path, mode: LockMode) -> Result<(), DiskError> {
    match lock::take(file, mode) {
        Ok(true) => Ok(()),
        Ok(false) => Err(DiskError::InUse {
            path: path.to_owned(),
            wanted: match mode {
                LockMode::Read => "it is being written to",
                LockMode::Write => "this machine wants to write to it",
            },
        }),
        Err(error) => Err(DiskError::io(path, "it cannot be locked")(error)),
    }
}

/// The first bytes of an image, through the page cache.
pub(crate) fn head(path: &Path, len: u64) -> Result<Vec<u8>, DiskError> {
    let mut head = Vec::new();
    let file = open_file(path, false, false)?;
    let read = file.take(len).read_to_end(&mut head);
    read.map(|_| head)
        .map_err(DiskError::io(path, "it cannot be read"))
}

/// What the first bytes say. Raw has no mark of its own, so it is what remains.
pub(crate) fn format_of(head: &[u8]) -> DiskFormat {
    if head.starts_with(QCOW2_MAGIC) {
        DiskFormat::Qcow2
    } else {
        DiskFormat::Raw
    }
}

/// Asks the kernel what direct I/O on this file needs.
pub(crate) fn direct_alignment(file: &File) -> Alignment {
    // SAFETY: statx is plain data; zeroes are a valid value.
    let mut found: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the descriptor is open, the path is an empty C string, and `found` outlives the call.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &mut found,
        )
    };
    let known = result == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0;
    let usable = |n: u32| n.is_power_of_two() && n <= 1 << 16;
    if known && usable(found.stx_dio_offset_align) && usable(found.stx_dio_mem_align) {
        return Alignment {
            // Smaller than a sector helps nobody: requests are whole sectors.
            offset: found.stx_dio_offset_align.max(SECTOR as u32),
            memory: found.stx_dio_mem_align,
        };
    }
    Alignment {
        offset: SAFE_ALIGNMENT,
        memory: SAFE_ALIGNMENT,
    }
}
