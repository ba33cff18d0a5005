//! A disk as the engine's sink: written where data arrives, left a hole where it does not.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ferry_devices::disk::{CLUSTER_SIZE, Disk, DiskOptions};
use ferry_migration::block::{BlockId, BlockInfo, BlockKind, DataError, Name, Sink, Span};

use super::notes::Notes;

pub struct DiskSink {
    info: BlockInfo,
    disk: Arc<Disk>,
    /// Clusters that were written to. The others read as zeroes, as the image was made, and stay holes.
    placed: Notes,
    /// Bytes in the page cache since the kernel was last told to write them out.
    unwritten: AtomicU64,
    library: Option<Arc<Library>>,
}

/// So much may wait in the page cache: the flush while the machine stands still should find little to do.
const WRITE_BACK_BYTES: u64 = 16 << 20;

impl DiskSink {
    /// `disk` must be freshly made: it reads as zeroes everywhere.
    pub fn new(id: BlockId, name: String, disk: Arc<Disk>, library: Option<Arc<Library>>) -> DiskSink {
        let info = BlockInfo {
            id,
            kind: BlockKind::Disk,
            name,
            bytes: disk.size(),
        };
        DiskSink {
            placed: Notes::new(info.units()),
            unwritten: AtomicU64::new(0),
            info,
            disk,
            library,
        }
    }

    fn failed(&self, verb: &str, error: io::Error) -> DataError {
        let path = self.disk.path().display();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                DataError::no_space(format!("there is no room left for the disk image {path}"))
            }
            _ => DataError::new(format!("the disk image {path} could not be {verb}: {error}")),
        }
    }
}

impl Sink for DiskSink {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn place(&self, span: Span, data: &[u8]) -> Result<(), DataError> {
        self.placed.add_spans(&[span]);
        self.disk
            .write_at(data, self.info.offset(span.first))
            .map_err(|error| self.failed("written", error))?;
        let bytes = data.len() as u64;
        if self.unwritten.fetch_add(bytes, Ordering::Relaxed) + bytes >= WRITE_BACK_BYTES {
            self.unwritten.store(0, Ordering::Relaxed);
            self.disk.write_back();
        }
        Ok(())
    }

    fn place_zeroes(&self, span: Span) -> Result<(), DataError> {
        for unit in (span.first..span.end()).filter(|unit| self.placed.contains(*unit)) {
            let offset = self.info.offset(unit);
            let bytes = CLUSTER_SIZE.min(self.info.bytes - offset);
            self.disk
                .write_zeroes_at(offset, bytes)
                .map_err(|error| self.failed("written", error))?;
        }
        Ok(())
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        self.disk
            .read_at(out, self.info.offset(span.first))
            .map_err(|error| self.failed("read", error))
    }

    fn has_library(&self) -> bool {
        self.library.is_some()
    }

    fn place_known(&self, unit: u64, name: &Name) -> Result<bool, DataError> {
        let bytes = self.info.span_bytes(Span {
            block: self.info.id,
            first: unit,
            count: 1,
        });
        let Some(content) = self
            .library
            .as_ref()
            .and_then(|library| library.find(name, bytes))
        else {
            return Ok(false);
        };
        self.place(
            Span {
                block: self.info.id,
                first: unit,
                count: 1,
            },
            &content,
        )?;
        Ok(true)
    }
}

/// The clusters of a base image that both hosts have, by the hash of their content.
pub struct Library {
    disk: Disk,
    places: HashMap<[u8; 32], u64>,
}

impl Library {
    /// Reads the whole image once.
    pub fn of(path: &Path) -> Result<Library, String> {
        let mut options = DiskOptions::new(path);
        options.read_only = true;
        options.format = None;
        let disk = Disk::open(&options).map_err(|error| error.to_string())?;
        let mut places = HashMap::new();
        let mut cluster = vec![0; CLUSTER_SIZE as usize];
        for area in disk.areas(0..disk.size()) {
            let area =
                area.map_err(|error| format!("the base image {} cannot be mapped: {error}", path.display()))?;
            if area.kind != ferry_devices::disk::AreaKind::Data {
                continue;
            }
            let first = area.offset / CLUSTER_SIZE;
            for unit in first..(area.offset + area.len).div_ceil(CLUSTER_SIZE) {
                let offset = unit * CLUSTER_SIZE;
                let bytes = CLUSTER_SIZE.min(disk.size() - offset) as usize;
                let content = cluster.get_mut(..bytes).unwrap_or_default();
                disk.read_at(content, offset)
                    .map_err(|error| format!("the base image {} cannot be read: {error}", path.display()))?;
                places.insert(Name::of(content).0, offset);
            }
        }
        Ok(Library { disk, places })
    }

    /// The content is hashed again: the file may have changed since it was read.
    fn find(&self, name: &Name, bytes: usize) -> Option<Vec<u8>> {
        let offset = *self.places.get(&name.0)?;
        let mut content = vec![0; bytes];
        self.disk.read_at(&mut content, offset).ok()?;
        (Name::of(&content) == *name).then_some(content)
    }
}
