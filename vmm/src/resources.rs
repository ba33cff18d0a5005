//! What a machine holds of its host, beside memory: disk images and TAP devices. Opened once; a rebuilt machine gets the
//! same ones.

use std::num::NonZeroU64;
use std::sync::Arc;

use ferry_devices::disk::{self, Disk, DiskCache, DiskLimits, DiskOptions, Ownership};

use ferry_network::{Tap, TapConfig};

use crate::config::{CacheMode, DiskConfig, DiskFormat, MacAddress, MachineConfig};
use crate::error::{MachineError, Result};

pub(crate) struct Resources {
    pub(crate) disks: Vec<Arc<Disk>>,
    pub(crate) taps: Vec<Tap>,
}

impl Resources {
    /// The configuration must be [`settled`]. TAPs that are made here stay down until the machine runs.
    pub(crate) fn open(config: &MachineConfig, ownership: Ownership) -> Result<Resources> {
        let disks = config.disks.iter().map(|disk| {
            let disk = Disk::open(&options(disk, ownership))
                .map_err(|error| MachineError::Host(error.to_string()))?;
            Ok(Arc::new(disk))
        });
        let taps = config.nets.iter().map(|net| {
            let tap = TapConfig {
                name: net.tap.clone(),
                bridge: net.bridge.clone(),
                queue_pairs: net.queues.unwrap_or(1),
                guest_mac: net.mac.map(|mac| mac.0).unwrap_or_default(),
            };
            Tap::open(&tap).map_err(|error| MachineError::Host(error.to_string()))
        });
        Ok(Resources {
            disks: disks.collect::<Result<_>>()?,
            taps: taps.collect::<Result<_>>()?,
        })
    }

    /// The machine's images are this machine's, again if a crossing had given them up.
    pub(crate) fn take_disks(&self) -> Result<()> {
        self.disks.iter().try_for_each(|disk| {
            disk.take_lock()
                .map_err(|error| MachineError::Host(error.to_string()))
        })
    }

    /// The machine's network interfaces come up: it runs here.
    pub(crate) fn join_network(&self) -> Result<()> {
        self.taps
            .iter()
            .try_for_each(|tap| tap.join().map_err(|error| MachineError::Host(error.to_string())))
    }

    /// They go down: it may run elsewhere now.
    pub(crate) fn leave_network(&self) -> Result<()> {
        self.taps
            .iter()
            .try_for_each(|tap| tap.leave().map_err(|error| MachineError::Host(error.to_string())))
    }
}

/// The configuration with everything decided that the user left open and that must stay the same over a crossing.
pub(crate) fn settled(config: &MachineConfig) -> Result<MachineConfig> {
    let mut config = config.clone();
    for net in &mut config.nets {
        if net.mac.is_none() {
            let mac = ferry_network::random_mac().map_err(|error| {
                MachineError::Host(format!("no random network address could be made: {error}"))
            })?;
            net.mac = Some(MacAddress(mac));
        }
    }
    for disk in &mut config.disks {
        if disk.format == DiskFormat::Auto {
            let found =
                Disk::find_format(&disk.path).map_err(|error| MachineError::Host(error.to_string()))?;
            disk.format = found.into();
        }
    }
    Ok(config)
}

fn options(config: &DiskConfig, ownership: Ownership) -> DiskOptions {
    let DiskConfig {
        path,
        format,
        readonly,
        cache,
        engine,
        bandwidth_bytes_per_sec,
        operations_per_sec,
        serial: _,
        queues: _,
    } = config;
    let mut options = DiskOptions::new(path);
    options.format = (*format).into();
    options.read_only = *readonly;
    options.cache = match cache {
        CacheMode::Writeback => DiskCache::Writeback,
        CacheMode::Writethrough => DiskCache::Writethrough,
        CacheMode::Direct => DiskCache::Direct,
    };
    options.engine = *engine;
    options.limits = DiskLimits {
        bandwidth_bytes_per_sec: bandwidth_bytes_per_sec.and_then(|size| NonZeroU64::new(size.0)),
        operations_per_sec: operations_per_sec.and_then(NonZeroU64::new),
    };
    options.ownership = ownership;
    options
}

/// None: whatever the image says it is.
impl From<DiskFormat> for Option<disk::DiskFormat> {
    fn from(format: DiskFormat) -> Self {
        match format {
            DiskFormat::Raw => Some(disk::DiskFormat::Raw),
            DiskFormat::Qcow2 => Some(disk::DiskFormat::Qcow2),
            DiskFormat::Auto => None,
        }
    }
}

impl From<disk::DiskFormat> for DiskFormat {
    fn from(format: disk::DiskFormat) -> Self {
        match format {
            disk::DiskFormat::Raw => DiskFormat::Raw,
            disk::DiskFormat::Qcow2 => DiskFormat::Qcow2,
        }
    }
}
