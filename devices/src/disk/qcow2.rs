//! A qcow2 image and the base images below it, through the crate `imago`.
//!
//! imago is asked for nothing on its own: we open every file of the chain ourselves, so that each is a file, is
//! locked, appears once, and is one the user knows of. Should imago panic on a damaged image, the image fails from
//! then on and the machine lives.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::file::File as Storage;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping};

use super::areas::{Area, AreaKind};
use super::error::DiskError;
use super::lock::LockMode;
use super::options::DiskFormat;
use super::probe::{format_of, head, lock_file, open_file};
use super::qcow2_header::{Backing, HEAD_LEN, Qcow2Header, parse};
use super::qcow2_refcounts;

const MAX_CHAIN: usize = 64;

#[derive(Debug)]
pub(crate) struct Qcow2Image {
    path: PathBuf,
    write: bool,
    direct: bool,
    /// The top image; its lock belongs to this open file. imago works on duplicates of it.
    pub(crate) file: File,
    header: Qcow2Header,
    /// `None` while the other side of a crossing owns the image: nothing of it may be cached then.
    open: RwLock<Option<Layer>>,
    /// imago panicked; what it holds in memory is not to be trusted.
    broken: AtomicBool,
}

type Layer = FormatAccess<Storage>;

impl Qcow2Image {
    /// Reads the header, and nothing else of the image before `open`.
    pub(crate) fn new(path: &Path, file: File, write: bool, direct: bool) -> Result<Self, DiskError> {
        let header = parse(path, &head(path, HEAD_LEN)?, write)?;
        Ok(Self {
            path: path.to_owned(),
            write,
            direct,
            file,
            header,
            open: RwLock::new(None),
            broken: AtomicBool::new(false),
        })
    }

    pub(crate) fn size(&self) -> u64 {
        self.header.size
    }

    pub(crate) fn cluster_size(&self) -> u64 {
        self.header.cluster_size
    }

    pub(crate) fn has_backing(&self) -> bool {
        self.header.backing.is_some()
    }

    /// Opens the chain; the image must be locked. The header is read again: the one who had it may have changed it.
    pub(crate) fn open(&self) -> Result<(), DiskError> {
        let header = parse(&self.path, &head(&self.path, HEAD_LEN)?, self.write)?;
        if header.size != self.header.size {
            return Err(DiskError::unsupported(
                &self.path,
                "has changed its size since it was looked at first",
            ));
        }
        let file = self
            .file
            .try_clone()
            .map_err(DiskError::io(&self.path, "it cannot be opened twice"))?;
        if self.write {
            // Past this file's own flags: direct I/O wants alignment that a table need not have.
            qcow2_refcounts::check(&self.path, &open_file(&self.path, false, false)?, &header)?;
        }
        let mut seen = vec![identity(&file, &self.path)?];
        let layer = self.layer(&self.path, file, header.backing, self.write, &mut seen)?;
        *self.layer_mut() = Some(layer);
        Ok(())
    }

    /// Writes back everything and forgets it, so that another may open the image. On an error it stays open.
    pub(crate) fn close(&self) -> io::Result<()> {
        self.flush()?;
        drop(self.layer_mut().take());
        Ok(())
    }

    fn layer(
        &self,
        path: &Path,
        file: File,
        backing: Option<Backing>,
        write: bool,
        seen: &mut Vec<(u64, u64)>,
    ) -> Result<Layer, DiskError> {
        let below = match backing {
            None => None,
            Some(backing) => Some(self.base(path, backing, seen)?),
        };
        let opened = catch(|| {
            let storage = Storage::try_from(file)?;
            let builder = Qcow2::<Storage>::builder(storage)
                .write(write)
                .backing(below)
                .data_file(None);
            Ok(FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?))
        });
        opened.map_err(DiskError::io(path, "it cannot be opened as qcow2"))
    }

    fn base(&self, above: &Path, backing: Backing, seen: &mut Vec<(u64, u64)>) -> Result<Layer, DiskError> {
        let path = above.parent().unwrap_or(Path::new("")).join(&backing.name);
        let file = open_file(&path, false, self.direct)?;
        let id = identity(&file, &path)?;
        if seen.contains(&id) || seen.len() >= MAX_CHAIN {
            let what = "is its own base image, or has too many of them below it";
            return Err(DiskError::unsupported(&path, what));
        }
        seen.push(id);
        lock_file(&file, &path, LockMode::Read)?;
        let first = head(&path, HEAD_LEN)?;
        let format = match backing.format.as_deref() {
            Some("qcow2") => DiskFormat::Qcow2,
            Some("raw" | "file") => DiskFormat::Raw,
            Some(other) => {
                let what = format!("has the format {other}, and a base image can be raw or qcow2");
                return Err(DiskError::unsupported(&path, what));
            }
            // A base is only read, so nobody writes a header into it to be believed here later.
            None => format_of(&first),
        };
        match format {
            DiskFormat::Qcow2 => {
                let header = parse(&path, &first, false)?;
                self.layer(&path, file, header.backing, false, seen)
            }
            DiskFormat::Raw => {
                let opened = catch(|| {
                    Ok(FormatAccess::new(Raw::open_image(
                        Storage::try_from(file)?,
                        false,
                    )?))
                });
                opened.map_err(DiskError::io(&path, "it cannot be opened"))
            }
        }
    }

    pub(crate) fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|layer| layer.read(data, offset))
    }

    pub(crate) fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.with(|layer| layer.write(data, offset))
    }

    pub(crate) fn flush(&self) -> io::Result<()> {
        if !self.write {
            return Ok(());
        }
        // First imago's tables into the file, then the file onto the disk.
        self.with(|layer| layer.flush().and_then(|()| layer.sync()))
    }

    /// Gives the space back; the range then reads as zeroes, also where a base image has data.
    /// `false` if the image is of a version that cannot say so.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        if self.header.version < 3 {
            return Ok(false);
        }
        // Discarding frees clusters that readers may be reading from.
        self.alone(|layer| layer.discard_to_zero(offset, len))
            .map(|()| true)
    }

    pub(crate) fn write_zeroes(&self, offset: u64, len: u64, keep_allocated: bool) -> io::Result<()> {
        if self.header.version >= 3 {
            if !keep_allocated {
                return self.punch(offset, len).map(drop);
            }
            // imago looks whether the rest of a cluster is zero, and if so zeroes the whole of it: a write to the
            // same cluster in between would be lost.
            return self.alone(|layer| layer.write_zeroes(offset, len));
        }
        let zeroes = vec![0; self.header.cluster_size as usize];
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let piece = (end - at).min(self.header.cluster_size);
            self.write_at(zeroes.get(..piece as usize).unwrap_or(&zeroes), at)?;
            at += piece;
        }
        Ok(())
    }

    pub(crate) fn area(&self, at: u64, end: u64) -> io::Result<Area> {
        self.with(|layer| {
            let mut area: Option<Area> = None;
            let mut next = at;
            while next < end {
                let (mapping, len) = layer.get_mapping(next, end - next)?;
                let kind = match mapping {
                    Mapping::Raw { .. } | Mapping::Special { .. } => AreaKind::Data,
                    Mapping::Zero { explicit: true, .. } => AreaKind::Zero,
                    _ => AreaKind::Hole,
                };
                let len = if len == 0 { end - next } else { len };
                match &mut area {
                    Some(area) if area.kind != kind => break,
                    Some(area) => area.len += len,
                    None => {
                        area = Some(Area {
                            offset: at,
                            len,
                            kind,
                        })
                    }
                }
                next += len;
            }
            area.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Layer) -> io::Result<T>) -> io::Result<T> {
        let guard: RwLockReadGuard<'_, _> = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let layer = guard.as_ref().ok_or_else(handed_over)?;
        self.guarded(|| work(layer))
    }

    /// Works on the image while nobody else does.
    fn alone<T>(&self, work: impl FnOnce(&mut Layer) -> io::Result<T>) -> io::Result<T> {
        let mut guard = self.layer_mut();
        let layer = guard.as_mut().ok_or_else(handed_over)?;
        self.guarded(|| work(layer))
    }

    fn guarded<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::Error::other("the image is damaged and was taken out of use"));
        }
        catch(work).inspect_err(|error| {
            if error.kind() == PANICKED {
                self.broken.store(true, Ordering::Relaxed);
            }
        })
    }

    fn layer_mut(&self) -> RwLockWriteGuard<'_, Option<Layer>> {
        self.open.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        if self.layer_mut().is_none() {
            return;
        }
        if let Err(error) = self.close() {
            tracing::error!(
                "the disk image {} could not be closed: {error}",
                self.path.display()
            );
            // Dropping would write again what just could not be written, or what imago left half changed.
            std::mem::forget(self.layer_mut().take());
        }
    }
}

/// Makes an empty image in an empty file.
pub(crate) fn create(path: &Path, file: File, size: u64) -> Result<(), DiskError> {
    catch(|| {
        Qcow2::<Storage>::create_builder(Storage::try_from(file)?)
            .size(size)
            .create()
    })
    .map_err(DiskError::io(path, "it cannot be made"))
}

const PANICKED: io::ErrorKind = io::ErrorKind::InvalidData;

fn catch<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // Nothing that was half changed is used again: see `broken`.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(io::Error::new(
            PANICKED,
            "the image is damaged in a way its reader did not expect",
        ))
    })
}

fn handed_over() -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, "the image was handed over")
}

fn identity(file: &File, path: &Path) -> Result<(u64, u64), DiskError> {
    let metadata = file
        .metadata()
        .map_err(DiskError::io(path, "it cannot be examined"))?;
    Ok((metadata.dev(), metadata.ino()))
}
