//! A raw image: a file or a block device whose bytes are the disk's bytes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, fdatasync, seek};
use rustix::io::Errno;

use super::aligned::AlignedBuf;
use super::areas::{Area, AreaKind};
use super::probe::Alignment;

/// Zeroes are written in pieces of this size where the file system cannot be asked for them.
const ZEROES: usize = 1 << 20;

#[derive(Debug)]
pub(crate) struct RawImage {
    pub(crate) file: File,
    pub(crate) size: u64,
    pub(crate) alignment: Alignment,
    /// The file system said that it cannot do this; asking again costs a system call each time.
    no_zero_range: AtomicBool,
    no_punch: AtomicBool,
}

impl RawImage {
    pub(crate) fn new(file: File, size: u64, alignment: Alignment) -> Self {
        Self {
            file,
            size,
            alignment,
            no_zero_range: AtomicBool::new(false),
            no_punch: AtomicBool::new(false),
        }
    }

    pub(crate) fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        if self.alignment.offset == 1 {
            return self.file.read_exact_at(data, offset);
        }
        let (start, mut around) = self.around(offset, data.len());
        self.file.read_exact_at(around.bytes_mut(), start)?;
        let skip = (offset - start) as usize;
        let source = around
            .bytes()
            .get(skip..skip + data.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        data.copy_from_slice(source);
        Ok(())
    }

    /// Not atomic against others who write to the same blocks where direct I/O makes it read and write whole blocks.
    pub(crate) fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        if self.alignment.offset == 1 {
            return self.file.write_all_at(data, offset);
        }
        let (start, mut around) = self.around(offset, data.len());
        if around.bytes().len() != data.len() {
            self.file.read_exact_at(around.bytes_mut(), start)?;
        }
        let skip = (offset - start) as usize;
        let target = around
            .bytes_mut()
            .get_mut(skip..skip + data.len())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        target.copy_from_slice(data);
        self.file.write_all_at(around.bytes(), start)
    }

    /// A buffer for the whole blocks around a range, and where it starts.
    fn around(&self, offset: u64, len: usize) -> (u64, AlignedBuf) {
        let unit = u64::from(self.alignment.offset);
        let start = offset / unit * unit;
        let end = (offset + len as u64).next_multiple_of(unit);
        let memory = self.alignment.memory.max(self.alignment.offset) as usize;
        (start, AlignedBuf::new((end - start) as usize, memory))
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    /// Gives the space back; the range then reads as zeroes. `false` if the file system cannot.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.fallocate(&self.no_punch, mode, offset, len)
    }

    /// Makes the range read as zeroes, and keeps its space where `keep_allocated` says so and the file system can.
    pub(crate) fn write_zeroes(&self, offset: u64, len: u64, keep_allocated: bool) -> io::Result<()> {
        let zero_range = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let done = if keep_allocated {
            self.fallocate(&self.no_zero_range, zero_range, offset, len)?
        } else {
            self.punch(offset, len)? || self.fallocate(&self.no_zero_range, zero_range, offset, len)?
        };
        if done {
            return Ok(());
        }
        let zeroes = vec![0; ZEROES.min(usize::try_from(len).unwrap_or(ZEROES))];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let piece = (end - at).min(zeroes.len() as u64);
            self.write_at(zeroes.get(..piece as usize).unwrap_or(&zeroes), at)?;
            at += piece;
        }
        Ok(())
    }

    fn fallocate(
        &self,
        cannot: &AtomicBool,
        mode: FallocateFlags,
        offset: u64,
        len: u64,
    ) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        if cannot.load(Ordering::Relaxed) {
            return Ok(false);
        }
        loop {
            match fallocate(&self.file, mode, offset, len) {
                Ok(()) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    cannot.store(true, Ordering::Relaxed);
                    return Ok(false);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The area that begins at `at`, not reaching past `end`.
    ///
    /// Data that only the page cache has counts as data. Seeking moves a file position nobody uses.
    pub(crate) fn area(&self, at: u64, end: u64) -> io::Result<Area> {
        let (until, kind) = match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) if data > at => (data, AreaKind::Hole),
            Ok(_) => (seek(&self.file, SeekFrom::Hole(at))?, AreaKind::Data),
            Err(Errno::NXIO) => (end, AreaKind::Hole),
            // Block devices and some file systems do not know: all of it may be data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => (end, AreaKind::Data),
            Err(error) => return Err(error.into()),
        };
        Ok(Area {
            offset: at,
            len: until.clamp(at + 1, end) - at,
            kind,
        })
    }
}
