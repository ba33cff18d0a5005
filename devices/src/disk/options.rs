//! What a user says about a disk.

use std::num::NonZeroU64;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How the bytes of a disk lie in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

/// When a write counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskCache {
    /// In the host's page cache; a flush makes it durable.
    #[default]
    Writeback,
    /// On the disk, every write.
    Writethrough,
    /// Past the host's page cache (O_DIRECT); a flush makes it durable.
    Direct,
}

/// How requests reach the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EngineKind {
    /// io_uring where the kernel has it and the format allows it, threads otherwise. The environment variable
    /// FERRY_DISK_ENGINE (`io-uring` or `threads`) decides instead, where set.
    #[default]
    Auto,
    IoUring,
    Threads,
}

/// The user's limits on one disk; `None` is without limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskLimits {
    #[serde(default)]
    pub bandwidth_bytes_per_sec: Option<NonZeroU64>,
    #[serde(default)]
    pub operations_per_sec: Option<NonZeroU64>,
}

/// Who may use the image while it is open here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ownership {
    /// Lock it now: alone for writing, shared for reading.
    #[default]
    Now,
    /// The other side of a crossing has it; `Disk::take_lock` makes it ours.
    Later,
}

#[derive(Debug, Clone)]
pub struct DiskOptions {
    pub path: PathBuf,
    /// `None` looks at the first bytes. A guest can write those into a raw disk, so a format found that way is
    /// never allowed to name further files.
    pub format: Option<DiskFormat>,
    pub read_only: bool,
    pub cache: DiskCache,
    pub engine: EngineKind,
    pub limits: DiskLimits,
    pub ownership: Ownership,
}

impl DiskOptions {
    /// A raw, writable disk with the defaults of everything else.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: Some(DiskFormat::Raw),
            read_only: false,
            cache: DiskCache::default(),
            engine: EngineKind::default(),
            limits: DiskLimits::default(),
            ownership: Ownership::default(),
        }
    }
}
