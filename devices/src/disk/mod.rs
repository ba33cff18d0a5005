//! Disks: the image behind a block device, and all that a crossing needs to carry it.
//!
//! A [`Disk`] is shared: the block device's queues, the control interface and a crossing use it at the same time.
//! Reads and writes at different places never wait for each other; what two do at the same place at once is as
//! undefined as on a real disk.

mod aligned;
mod areas;
pub(crate) mod engine;
mod error;
pub(crate) mod limit;
mod lock;
mod options;
mod probe;
mod qcow2;
mod qcow2_header;
mod qcow2_refcounts;
mod raw;
mod stats;
#[cfg(test)]
pub(crate) mod tests;
mod tracker;
mod writeback;

use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use areas::{Area, AreaKind, Areas};
pub use error::DiskError;
pub use limit::HeldBy;
pub use options::{DiskCache, DiskFormat, DiskLimits, DiskOptions, EngineKind, Ownership};
pub use stats::DiskStats;
pub use tracker::{CLUSTER_SIZE, WriteTracker};

use limit::Throttle;
use lock::{LockMode, Released};
use probe::{Alignment, SECTOR, direct_alignment, file_len, format_of, head, lock_file, open_file};
use qcow2::Qcow2Image;
use raw::RawImage;
use stats::Counters;

/// One open disk image.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    size: u64,
    read_only: bool,
    cache: DiskCache,
    engine: EngineKind,
    pub(crate) image: Image,
    /// Whether the image's lock is ours. Nothing touches the image while it is not.
    owned: AtomicBool,
    tracker: WriteTracker,
    throttle: Mutex<Throttle>,
    limited: AtomicBool,
    pub(crate) counters: Counters,
    opened_at: Instant,
    /// The last to be dropped: closing a qcow2 image still writes.
    _lock: Released,
}

#[derive(Debug)]
pub(crate) enum Image {
    Raw(RawImage),
    Qcow2(Qcow2Image),
}

impl Disk {
    pub fn open(options: &DiskOptions) -> Result<Self, DiskError> {
        let DiskOptions {
            path,
            format,
            read_only,
            cache,
            engine,
            limits,
            ownership,
        } = options;
        let write = !read_only;
        let direct = *cache == DiskCache::Direct;
        let file = open_file(path, write, direct)?;
        let file_len = file_len(&file, path)?;
        if file_len == 0 {
            return Err(DiskError::Empty(path.clone()));
        }
        let found = format_of(&head(path, SECTOR)?);
        let image = match (format, found) {
            (Some(DiskFormat::Raw), found) | (None, found @ DiskFormat::Raw) => {
                if found != DiskFormat::Raw {
                    tracing::warn!(
                        "the disk image {} begins like a qcow2 image but is used as raw, as asked",
                        path.display()
                    );
                }
                let alignment = if direct {
                    direct_alignment(&file)
                } else {
                    Alignment::NONE
                };
                Image::Raw(RawImage::new(file, file_len, alignment))
            }
            (Some(DiskFormat::Qcow2), DiskFormat::Raw) => {
                return Err(DiskError::unsupported(
                    path,
                    "is not a qcow2 image; use it with format=raw",
                ));
            }
            (given, DiskFormat::Qcow2) => {
                let image = Qcow2Image::new(path, file, write, direct)?;
                if given.is_none() && image.has_backing() {
                    return Err(DiskError::unsupported(
                        path,
                        "looks like qcow2 and names a base image, which a guest may have written there to read \
                        files of the host; say format=qcow2 if you trust it, or format=raw",
                    ));
                }
                Image::Qcow2(image)
            }
        };
        let disk = Self {
            path: path.clone(),
            size: image.size(),
            read_only: *read_only,
            cache: *cache,
            engine: *engine,
            owned: AtomicBool::new(false),
            tracker: WriteTracker::new(image.size()),
            throttle: Mutex::default(),
            limited: AtomicBool::new(false),
            counters: Counters::default(),
            opened_at: Instant::now(),
            _lock: Released::at_the_end_of(image.file())
                .map_err(DiskError::io(path, "it cannot be opened"))?,
            image,
        };
        let unit = u64::from(disk.block_size());
        if disk.size == 0 {
            return Err(DiskError::Empty(path.clone()));
        }
        if !disk.size.is_multiple_of(unit) {
            let (path, len) = (path.clone(), disk.size);
            return Err(DiskError::OddSize { path, len, unit });
        }
        disk.set_limits(*limits);
        if *ownership == Ownership::Now {
            disk.lock_and_look()?;
        }
        Ok(disk)
    }

    /// The format of an image whose user leaves it to us. Only a header that says so is believed: a raw disk's first
    /// bytes belong to its guest, so that "raw" found by looking is what a guest wants us to find, or not to find, the
    /// next time.
    pub fn find_format(path: &Path) -> Result<DiskFormat, DiskError> {
        let looked_at = Self::open(&DiskOptions {
            format: None,
            read_only: true,
            ownership: Ownership::Later,
            ..DiskOptions::new(path)
        })?;
        match looked_at.format() {
            DiskFormat::Raw => Err(DiskError::unsupported(
                path,
                "does not say what format it has, and raw is never guessed because a guest could write the header of \
                another format into it; say format=raw",
            )),
            found @ DiskFormat::Qcow2 => Ok(found),
        }
    }

    /// Makes a new, empty image that takes no space yet. Refuses to replace a file.
    pub fn create(path: &Path, format: DiskFormat, size: u64) -> Result<(), DiskError> {
        if size == 0 {
            return Err(DiskError::Empty(path.to_owned()));
        }
        if !size.is_multiple_of(SECTOR) {
            let (path, len, unit) = (path.to_owned(), size, SECTOR);
            return Err(DiskError::OddSize { path, len, unit });
        }
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => DiskError::Exists(path.to_owned()),
            _ => DiskError::io(path, "it cannot be made")(error),
        })?;
        let made = match format {
            DiskFormat::Raw => file
                .set_len(size)
                .map_err(DiskError::io(path, "it cannot be given its size")),
            DiskFormat::Qcow2 => qcow2::create(path, file, size),
        };
        made.inspect_err(|_| {
            // Half an image helps nobody, and would be in the way of the next try.
            let _ = std::fs::remove_file(path);
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub fn cache(&self) -> DiskCache {
        self.cache
    }

    pub fn format(&self) -> DiskFormat {
        match self.image {
            Image::Raw(_) => DiskFormat::Raw,
            Image::Qcow2(_) => DiskFormat::Qcow2,
        }
    }

    pub(crate) fn engine(&self) -> EngineKind {
        self.engine
    }

    /// The smallest piece that can be read or written without reading around it.
    pub fn block_size(&self) -> u32 {
        self.alignment().offset.max(SECTOR as u32)
    }

    pub(crate) fn alignment(&self) -> Alignment {
        match &self.image {
            Image::Raw(raw) => raw.alignment,
            Image::Qcow2(_) => Alignment::NONE,
        }
    }

    /// The space that is given back as a whole.
    pub(crate) fn discard_granularity(&self) -> u64 {
        match &self.image {
            Image::Raw(_) => 4096,
            Image::Qcow2(image) => image.cluster_size(),
        }
    }

    /// Makes the image ours: locks it and reads what another may have changed. Harmless when it is ours already.
    ///
    /// With [`release_lock`](Self::release_lock) this is how two hosts that see one image pass it between them. The
    /// device of this disk must be stopped.
    pub fn take_lock(&self) -> Result<(), DiskError> {
        if self.owned.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.lock_and_look()?;
        if let Image::Raw(image) = &self.image {
            // Pages of before the other side wrote must not be believed. An image that is ours from the moment it is
            // opened has none, and keeps what the host has cached of it.
            if let Err(error) = rustix::fs::fadvise(&image.file, 0, None, rustix::fs::Advice::DontNeed) {
                tracing::debug!(
                    "the page cache of {} was not dropped: {error}",
                    self.path.display()
                );
            }
        }
        Ok(())
    }

    fn lock_and_look(&self) -> Result<(), DiskError> {
        let mode = if self.read_only {
            LockMode::Read
        } else {
            LockMode::Write
        };
        let file = self.image.file();
        lock_file(file, &self.path, mode)?;
        let ready = match &self.image {
            Image::Raw(image) => match file_len(file, &self.path) {
                Ok(len) if len != image.size => Err(DiskError::unsupported(
                    &self.path,
                    format!(
                        "is {len} bytes long now, and was {} bytes when it was looked at first",
                        image.size
                    ),
                )),
                other => other.map(drop),
            },
            Image::Qcow2(image) => image.open(),
        };
        if let Err(error) = ready {
            self.unlock()?;
            return Err(error);
        }
        self.owned.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Makes everything durable, forgets what is cached and lets another have the image. Every access fails until
    /// [`take_lock`](Self::take_lock). The device of this disk must be stopped. If this fails, the image is still ours.
    pub fn release_lock(&self) -> Result<(), DiskError> {
        if !self.owned.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.flush()
            .map_err(DiskError::io(&self.path, "it cannot be made durable"))?;
        self.owned.store(false, Ordering::SeqCst);
        if let Image::Qcow2(image) = &self.image {
            image.close().map_err(|error| {
                self.owned.store(true, Ordering::SeqCst);
                DiskError::io(&self.path, "it cannot be closed")(error)
            })?;
        }
        self.unlock()
    }

    /// Whether the image is ours to use.
    pub fn is_owned(&self) -> bool {
        self.owned.load(Ordering::SeqCst)
    }

    fn unlock(&self) -> Result<(), DiskError> {
        lock::release(self.image.file()).map_err(DiskError::io(&self.path, "its lock cannot be given up"))
    }

    /// Reads for a crossing or a tool, beside the guest. Any place and length inside the disk.
    pub fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.check(offset, data.len() as u64, false)?;
        self.image.read_at(data, offset)
    }

    /// Writes to a disk whose guest does not run. Any place and length inside the disk. Durable after `flush`.
    pub fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let len = data.len() as u64;
        self.check(offset, len, true)?;
        self.tracked(offset, len, || self.image.write_at(data, offset))
    }

    /// Makes a range read as zeroes and take no space where the image can do that.
    pub fn write_zeroes_at(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len, true)?;
        self.tracked(offset, len, || self.image.write_zeroes(offset, len, false))
    }

    /// Gives the space of a range back; it then reads as zeroes, or is unchanged where that cannot be done.
    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len, true)?;
        self.tracked(offset, len, || self.image.punch(offset, len).map(drop))
    }

    /// Returns when everything written before is durable.
    pub fn flush(&self) -> io::Result<()> {
        self.check(0, 0, false)?;
        if self.read_only {
            return Ok(());
        }
        self.image.flush()
    }

    /// Has what was written so far go to the medium, without waiting for it, so that a later flush finds little to do.
    pub fn write_back(&self) {
        if !self.read_only && self.owned.load(Ordering::SeqCst) {
            writeback::begin(self.image.file());
        }
    }

    /// The areas of a range in order; see [`Areas`].
    pub fn areas(&self, range: Range<u64>) -> Areas<'_> {
        Areas::new(self, range)
    }

    fn area(&self, at: u64, end: u64) -> io::Result<Area> {
        self.check(at, end.saturating_sub(at), false)?;
        match &self.image {
            Image::Raw(raw) => raw.area(at, end),
            Image::Qcow2(qcow2) => qcow2.area(at, end),
        }
    }

    /// Which clusters the guest has written to.
    pub fn tracker(&self) -> &WriteTracker {
        &self.tracker
    }

    fn tracked<T>(&self, offset: u64, len: u64, write: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        self.tracker.mark(offset, len);
        let result = write();
        self.tracker.mark(offset, len);
        result
    }

    /// Refuses what is outside the disk, writing to what may only be read, and everything while not owned.
    pub(crate) fn check(&self, offset: u64, len: u64, write: bool) -> io::Result<()> {
        let why = if !self.owned.load(Ordering::Relaxed) {
            "the image was handed over"
        } else if write && self.read_only {
            "the disk may only be read"
        } else if offset.checked_add(len).is_none_or(|end| end > self.size) {
            "the place is past the end of the disk"
        } else {
            return Ok(());
        };
        Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
    }

    /// Changes the user's limits; requests that wait notice it at once.
    pub fn set_limits(&self, limits: DiskLimits) {
        self.change_throttle(|throttle, now| throttle.set_user(limits, now));
    }

    /// Slows the guest's writes for a crossing, beside the user's limits; `None` lets them go. What it costs the
    /// guest is in `stats().held_by_crossing`. A write that waits holds back what follows it in its queue.
    pub fn slow_writes(&self, bytes_per_sec: Option<NonZeroU64>) {
        self.change_throttle(|throttle, now| throttle.set_crossing(bytes_per_sec, now));
    }

    fn change_throttle(&self, change: impl FnOnce(&mut Throttle, Duration)) {
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut throttle, self.clock());
        self.limited.store(!throttle.is_unlimited(), Ordering::Release);
    }

    /// Lets a request of the guest pass, or says how long it must wait and because of whom.
    pub(crate) fn admit(&self, bytes: u64, is_write: bool) -> Result<(), (Duration, HeldBy)> {
        if !self.limited.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut throttle = self.throttle.lock().unwrap_or_else(PoisonError::into_inner);
        throttle.admit(self.clock(), bytes, is_write)
    }

    /// A queue begins to wait, or its wait ends.
    pub(crate) fn hold(&self, by: HeldBy, begins: bool) {
        let waiting = match by {
            HeldBy::User => &self.counters.by_limits,
            HeldBy::Crossing => &self.counters.by_crossing,
        };
        if begins {
            waiting.begin(self.clock())
        } else {
            waiting.end(self.clock())
        }
    }

    pub fn stats(&self) -> DiskStats {
        self.counters.snapshot(self.clock())
    }

    fn clock(&self) -> Duration {
        self.opened_at.elapsed()
    }
}

impl Image {
    fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size,
            Self::Qcow2(qcow2) => qcow2.size(),
        }
    }

    fn file(&self) -> &File {
        match self {
            Self::Raw(raw) => &raw.file,
            Self::Qcow2(qcow2) => &qcow2.file,
        }
    }

    pub(crate) fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.read_at(data, offset),
            Self::Qcow2(qcow2) => qcow2.read_at(data, offset),
        }
    }

    pub(crate) fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.write_at(data, offset),
            Self::Qcow2(qcow2) => qcow2.write_at(data, offset),
        }
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.flush(),
            Self::Qcow2(qcow2) => qcow2.flush(),
        }
    }

    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        match self {
            Self::Raw(raw) => raw.punch(offset, len),
            Self::Qcow2(qcow2) => qcow2.punch(offset, len),
        }
    }

    pub(crate) fn write_zeroes(&self, offset: u64, len: u64, keep_allocated: bool) -> io::Result<()> {
        match self {
            Self::Raw(raw) => raw.write_zeroes(offset, len, keep_allocated),
            Self::Qcow2(qcow2) => qcow2.write_zeroes(offset, len, keep_allocated),
        }
    }
}
