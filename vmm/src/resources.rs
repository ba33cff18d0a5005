//! What a machine holds of its host, beside memory: disk images. Opened once; a rebuilt machine gets the same ones.

use std::num::NonZeroU64;
use std::sync::Arc;

use ferry_devices::disk::{self, Disk, DiskCache, DiskLimits, DiskOptions, Ownership};

use crate::config::{CacheMode, DiskConfig, DiskFormat, MachineConfig};
use crate::error::{MachineError, Result};

pub(crate) struct Resources {
    pub(crate) disks: Vec<Arc<Disk>>,
}

impl Resources {
    pub(crate) fn open(config: &MachineConfig, ownership: Ownership) -> Result<Resources> {
        let disks = config.disks.iter().map(|disk| {
            let disk = Disk::open(&options(disk, ownership))
                .map_err(|error| MachineError::Host(error.to_string()))?;
            Ok(Arc::new(disk))
        });
        Ok(Resources {
            disks: disks.collect::<Result<_>>()?,
        })
    }
}

fn options(config: &DiskConfig, ownership: Ownership) -> DiskOptions {
    let DiskConfig {
        path,
        format,
        readonly,
        cache,
        bandwidth_bytes_per_sec,
        operations_per_sec,
        serial: _,
        queues: _,
    } = config;
    let mut options = DiskOptions::new(path);
    options.format = Some((*format).into());
    options.read_only = *readonly;
    options.cache = match cache {
        CacheMode::Writeback => DiskCache::Writeback,
        CacheMode::Writethrough => DiskCache::Writethrough,
        CacheMode::Direct => DiskCache::Direct,
    };
    options.limits = DiskLimits {
        bandwidth_bytes_per_sec: bandwidth_bytes_per_sec.and_then(|size| NonZeroU64::new(size.0)),
        operations_per_sec: operations_per_sec.and_then(NonZeroU64::new),
    };
    options.ownership = ownership;
    options
}

impl From<DiskFormat> for disk::DiskFormat {
    fn from(format: DiskFormat) -> Self {
        match format {
            DiskFormat::Raw => disk::DiskFormat::Raw,
            DiskFormat::Qcow2 => disk::DiskFormat::Qcow2,
        }
    }
}
