//! What a machine is made of, as the user writes it: one plain struct that the command line, `--config FILE.json`
//! and a crossing all use. `validate` says in one sentence what is wrong before anything is created.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ferry_devices::disk::EngineKind;
use serde::{Deserialize, Serialize};

use crate::kvm::ring::{LEAST_ENTRIES, MOST_ENTRIES};
use crate::size::ByteSize;

/// Local APIC ids are 8 bits wide in our MADT and 255 means "all".
pub const MAX_CPUS: u32 = 254;
/// Below this no kernel that we know gets to its first line.
pub const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// One ECAM bus: 32 slots, slot 0 is the host bridge.
pub const MAX_PCI_DEVICES: usize = 31;
/// The Linux boot protocol's own limit, which our PVH guests share.
pub const MAX_CMDLINE_BYTES: usize = 2047;

/// A configuration that cannot work, said in one sentence. Always the user's to mend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(pub String);

fn refuse<T>(message: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError(message.into()))
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MachineConfig {
    pub cpus: u32,
    pub memory: ByteSize,
    pub memory_backing: MemoryBacking,
    /// Guest memory on 2 MiB hugetlbfs pages, which must have been reserved. Transparent huge pages are asked
    /// for in any case.
    pub hugepages: bool,
    /// Touch all of the memory before the guest starts.
    pub prepopulate: bool,
    /// Track writes by dirty rings of so many entries, one for each vCPU, instead of the dirty log. Of this host alone:
    /// it does not travel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dirty_ring: Option<u32>,
    /// ELF with a PVH note, or bzImage. None: the built-in guest.
    pub kernel: Option<PathBuf>,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
    pub cpu_template: CpuTemplate,
    pub serial: SerialTarget,
    pub disks: Vec<DiskConfig>,
    pub nets: Vec<NetConfig>,
    pub rng: bool,
    pub balloon: bool,
    /// virtio-console, beside the serial port.
    pub console: Option<SerialTarget>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            cpus: 1,
            memory: ByteSize(256 << 20),
            memory_backing: MemoryBacking::default(),
            hugepages: false,
            prepopulate: false,
            dirty_ring: None,
            kernel: None,
            initrd: None,
            cmdline: String::new(),
            cpu_template: CpuTemplate::Host,
            serial: SerialTarget::Null,
            disks: Vec::new(),
            nets: Vec::new(),
            rng: false,
            balloon: false,
            console: None,
        }
    }
}

/// Where guest memory comes from. Anonymous memory gets transparent huge pages on more hosts (shmem needs its own
/// switch in /sys/kernel/mm/transparent_hugepage/shmem_enabled); a memfd can be shared with another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemoryBacking {
    #[default]
    Anonymous,
    Memfd,
}

/// Which CPU features the guest may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuTemplate {
    Host,
    X86_64V2,
    X86_64V3,
    File(PathBuf),
}

/// Where a serial port or console is connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SerialTarget {
    Stdio,
    File(PathBuf),
    Socket(PathBuf),
    Null,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    #[default]
    Raw,
    Qcow2,
    /// What the image's header says. Raw images have none and must be called raw.
    Auto,
}

/// `writeback` acknowledges from the page cache, `writethrough` after the disk has it, `direct` goes around the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    #[default]
    Writeback,
    Writethrough,
    Direct,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    pub path: PathBuf,
    #[serde(default)]
    pub format: DiskFormat,
    #[serde(default)]
    pub readonly: bool,
    #[serde(default)]
    pub cache: CacheMode,
    #[serde(default)]
    pub engine: EngineKind,
    #[serde(default)]
    pub bandwidth_bytes_per_sec: Option<ByteSize>,
    #[serde(default)]
    pub operations_per_sec: Option<u64>,
    /// What VIRTIO_BLK_T_GET_ID answers; at most 20 bytes.
    #[serde(default)]
    pub serial: Option<String>,
    #[serde(default)]
    pub queues: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// An existing TAP device, or the name for the one we make when `bridge` is given.
    #[serde(default)]
    pub tap: Option<String>,
    /// Make a TAP, attach it to this bridge, and remove it at the end.
    #[serde(default)]
    pub bridge: Option<String>,
    #[serde(default)]
    pub mac: Option<MacAddress>,
    /// Queue pairs.
    #[serde(default)]
    pub queues: Option<u16>,
    #[serde(default)]
    pub bandwidth_bytes_per_sec: Option<ByteSize>,
    #[serde(default)]
    pub operations_per_sec: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl MachineConfig {
    /// Reads a configuration file. Unknown fields are refused by name.
    pub fn from_json_file(path: &Path) -> Result<MachineConfig, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            ConfigError(format!(
                "the configuration file {} cannot be read: {e}",
                path.display()
            ))
        })?;
        serde_json::from_str(&text).map_err(|e| {
            ConfigError(format!(
                "the configuration file {} is not a machine configuration: {e}",
                path.display()
            ))
        })
    }

    /// Everything that can be known without touching the host.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.cpus == 0 || self.cpus > MAX_CPUS {
            return refuse(format!(
                "a machine has between 1 and {MAX_CPUS} CPUs, {} were asked for; change --cpus",
                self.cpus
            ));
        }
        let memory = self.memory.0;
        if memory < MIN_MEMORY_BYTES {
            return refuse(format!(
                "{} of memory is too little to boot anything; give at least {}, for example --memory 256M",
                self.memory,
                ByteSize(MIN_MEMORY_BYTES)
            ));
        }
        let granule: u64 = if self.hugepages { 2 << 20 } else { 4096 };
        if !memory.is_multiple_of(granule) {
            return refuse(format!(
                "{} of memory is not a multiple of {}",
                self.memory,
                ByteSize(granule)
            ));
        }
        self.dirty_ring.map_or(Ok(()), check_dirty_ring)?;
        if memory > 1 << 46 {
            return refuse(format!(
                "{} of memory is more than a machine can address",
                self.memory
            ));
        }
        if self.cmdline.len() > MAX_CMDLINE_BYTES || self.cmdline.contains('\0') {
            return refuse(format!(
                "the kernel command line has {} bytes; it may have at most {MAX_CMDLINE_BYTES} and no NUL",
                self.cmdline.len()
            ));
        }
        if self.initrd.is_some() && self.kernel.is_none() {
            return refuse("an initrd needs a kernel: the built-in guest takes none; add --kernel FILE");
        }
        let devices = self.disks.len()
            + self.nets.len()
            + usize::from(self.rng)
            + usize::from(self.balloon)
            + usize::from(self.console.is_some());
        if devices > MAX_PCI_DEVICES {
            return refuse(format!(
                "{devices} PCI devices were asked for, the bus has room for {MAX_PCI_DEVICES}"
            ));
        }
        if self.serial == SerialTarget::Stdio && self.console == Some(SerialTarget::Stdio) {
            return refuse(
                "the serial port and the console cannot both use stdio; give one of them file= or null",
            );
        }
        self.disks.iter().try_for_each(DiskConfig::validate)?;
        self.nets.iter().try_for_each(NetConfig::validate)
    }
}

/// The sizes that a dirty ring can have on any host.
pub fn check_dirty_ring(entries: u32) -> Result<(), ConfigError> {
    if entries.is_power_of_two() && (LEAST_ENTRIES..=MOST_ENTRIES).contains(&entries) {
        return Ok(());
    }
    refuse(format!(
        "a dirty ring has a power of two of entries, from {LEAST_ENTRIES} to {MOST_ENTRIES}; {entries} were asked for with --dirty-ring"
    ))
}

impl DiskConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let path = self.path.display();
        if self.path.as_os_str().is_empty() {
            return refuse("a disk needs a path, for example --disk path=disk.img");
        }
        if self
            .serial
            .as_ref()
            .is_some_and(|s| s.len() > 20 || !s.is_ascii())
        {
            return refuse(format!(
                "the serial number of disk {path} may have at most 20 ASCII characters"
            ));
        }
        if self.queues.is_some_and(|n| n == 0 || n > 64) {
            return refuse(format!("disk {path} can have between 1 and 64 queues"));
        }
        Ok(())
    }
}

impl NetConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        if self.tap.is_none() && self.bridge.is_none() {
            return refuse("a network device needs tap=NAME or bridge=NAME");
        }
        for name in [&self.tap, &self.bridge].into_iter().flatten() {
            let fits = !name.is_empty() && name.len() <= 15;
            if !fits
                || name
                    .bytes()
                    .any(|b| b == b'/' || b.is_ascii_whitespace() || b == 0)
            {
                return refuse(format!(
                    "{name:?} is not a network interface name (1 to 15 characters, no slash)"
                ));
            }
        }
        if self.queues.is_some_and(|n| n == 0 || n > 16) {
            return refuse("a network device can have between 1 and 16 queue pairs");
        }
        if self.mac.is_some_and(|m| m.0[0] & 1 != 0) {
            return refuse("the MAC address of a network device must not be a multicast address");
        }
        Ok(())
    }
}

/// `key=value,flag` lists of --disk and --net.
fn options(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    text.split(',')
        .filter(|word| !word.is_empty())
        .map(|word| match word.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (word, None),
        })
}

fn number<T: FromStr>(what: &str, key: &str, text: &str) -> Result<T, ConfigError> {
    text.parse()
        .map_err(|_| ConfigError(format!("{what}: {key}={text} is not a number that fits")))
}

impl FromStr for DiskConfig {
    type Err = ConfigError;

    /// `PATH` or `path=PATH[,format=raw|qcow2|auto][,readonly][,cache=…][,engine=…][,bandwidth=SIZE][,iops=N][,serial=…][,queues=N]`
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut disk = DiskConfig {
            path: PathBuf::new(),
            format: DiskFormat::default(),
            readonly: false,
            cache: CacheMode::default(),
            engine: EngineKind::default(),
            bandwidth_bytes_per_sec: None,
            operations_per_sec: None,
            serial: None,
            queues: None,
        };
        for (position, option) in options(text).enumerate() {
            match option {
                ("path", Some(path)) => disk.path = path.into(),
                ("format", Some("raw")) => disk.format = DiskFormat::Raw,
                ("format", Some("qcow2")) => disk.format = DiskFormat::Qcow2,
                ("format", Some("auto")) => disk.format = DiskFormat::Auto,
                ("readonly" | "ro", None) => disk.readonly = true,
                ("cache", Some("writeback")) => disk.cache = CacheMode::Writeback,
                ("cache", Some("writethrough")) => disk.cache = CacheMode::Writethrough,
                ("cache", Some("direct")) => disk.cache = CacheMode::Direct,
                ("engine", Some("auto")) => disk.engine = EngineKind::Auto,
                ("engine", Some("io-uring")) => disk.engine = EngineKind::IoUring,
                ("engine", Some("threads")) => disk.engine = EngineKind::Threads,
                ("bandwidth", Some(size)) => disk.bandwidth_bytes_per_sec = Some(size.parse()?),
                ("iops", Some(n)) => disk.operations_per_sec = Some(number("--disk", "iops", n)?),
                ("serial", Some(serial)) => disk.serial = Some(serial.to_owned()),
                ("queues", Some(n)) => disk.queues = Some(number("--disk", "queues", n)?),
                (path, None) if position == 0 => disk.path = path.into(),
                (key, _) => {
                    return refuse(format!(
                        "--disk does not know {key:?} in {text:?}; it takes path=FILE, format=raw|qcow2|auto, \
                         readonly, cache=writeback|writethrough|direct, engine=auto|io-uring|threads, bandwidth=SIZE, iops=N, serial=TEXT, queues=N"
                    ));
                }
            }
        }
        disk.validate()?;
        Ok(disk)
    }
}

impl FromStr for NetConfig {
    type Err = ConfigError;

    /// `tap=NAME` or `bridge=NAME[,tap=NAME]`, and `[,mac=…][,queues=N][,bandwidth=SIZE][,pps=N]`
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let mut net = NetConfig {
            tap: None,
            bridge: None,
            mac: None,
            queues: None,
            bandwidth_bytes_per_sec: None,
            operations_per_sec: None,
        };
        for option in options(text) {
            match option {
                ("tap", Some(name)) => net.tap = Some(name.to_owned()),
                ("bridge", Some(name)) => net.bridge = Some(name.to_owned()),
                ("mac", Some(mac)) => net.mac = Some(mac.parse()?),
                ("queues", Some(n)) => net.queues = Some(number("--net", "queues", n)?),
                ("bandwidth", Some(size)) => net.bandwidth_bytes_per_sec = Some(size.parse()?),
                ("pps", Some(n)) => net.operations_per_sec = Some(number("--net", "pps", n)?),
                (key, _) => {
                    return refuse(format!(
                        "--net does not know {key:?} in {text:?}; it takes tap=NAME, bridge=NAME, mac=ADDRESS, \
                         queues=N, bandwidth=SIZE, pps=N"
                    ));
                }
            }
        }
        net.validate()?;
        Ok(net)
    }
}

impl FromStr for CpuTemplate {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "host" => Ok(CpuTemplate::Host),
            "x86-64-v2" => Ok(CpuTemplate::X86_64V2),
            "x86-64-v3" => Ok(CpuTemplate::X86_64V3),
            path if path.ends_with(".json") || path.contains('/') => Ok(CpuTemplate::File(path.into())),
            other => refuse(format!(
                "there is no CPU template {other:?}; use host, x86-64-v2, x86-64-v3 or a JSON file"
            )),
        }
    }
}

impl fmt::Display for CpuTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CpuTemplate::Host => f.write_str("host"),
            CpuTemplate::X86_64V2 => f.write_str("x86-64-v2"),
            CpuTemplate::X86_64V3 => f.write_str("x86-64-v3"),
            CpuTemplate::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl FromStr for SerialTarget {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(SerialTarget::Stdio),
            None if text == "null" => Ok(SerialTarget::Null),
            Some(("file", path)) if !path.is_empty() => Ok(SerialTarget::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(SerialTarget::Socket(path.into())),
            _ => refuse(format!(
                "{text:?} is no place for a serial port; use stdio, null, file=PATH or socket=PATH"
            )),
        }
    }
}

impl fmt::Display for SerialTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SerialTarget::Stdio => f.write_str("stdio"),
            SerialTarget::File(path) => write!(f, "file={}", path.display()),
            SerialTarget::Socket(path) => write!(f, "socket={}", path.display()),
            SerialTarget::Null => f.write_str("null"),
        }
    }
}

impl FromStr for MacAddress {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError(format!("{text:?} is not a MAC address such as 52:54:00:12:34:56"));
        let mut mac = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            Err(wrong())
        } else {
            Ok(MacAddress(mac))
        }
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// In JSON these are written as on the command line.
macro_rules! serde_as_text {
    ($($type:ty),*) => {$(
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    )*};
}
serde_as_text!(CpuTemplate, SerialTarget, MacAddress);

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut MachineConfig)) -> String {
        let mut config = MachineConfig::default();
        change(&mut config);
        config.validate().expect_err("must be refused").0
    }

    #[test]
    fn the_default_is_valid_and_survives_json() {
        let config = MachineConfig {
            disks: vec![
                "/tmp/a.img,format=auto,readonly,cache=direct,engine=io-uring,bandwidth=10M"
                    .parse()
                    .unwrap(),
            ],
            nets: vec!["bridge=br0,mac=52:54:00:00:00:01,queues=2".parse().unwrap()],
            serial: "socket=/run/x.sock".parse().unwrap(),
            cpu_template: "x86-64-v3".parse().unwrap(),
            dirty_ring: Some(4096),
            ..MachineConfig::default()
        };
        config.validate().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<MachineConfig>(&text).unwrap(), config);
        assert_eq!(
            serde_json::from_str::<MachineConfig>("{}").unwrap(),
            MachineConfig::default()
        );
    }

    #[test]
    fn what_cannot_work_is_refused_in_one_sentence() {
        assert!(refused(|c| c.cpus = 0).contains("between 1 and 254"));
        assert!(refused(|c| c.cpus = 10_000).contains("10000 were asked for"));
        assert!(refused(|c| c.memory = ByteSize(0)).contains("too little"));
        assert!(refused(|c| c.memory = ByteSize((64 << 20) + 1)).contains("multiple"));
        for entries in [0, 128, 5000, 131_072] {
            assert!(refused(|c| c.dirty_ring = Some(entries)).contains("power of two"));
        }
        assert!(refused(|c| c.memory = ByteSize(!4095)).contains("more than a machine can address"));
        assert!(refused(|c| c.cmdline = "x".repeat(2048)).contains("2048 bytes"));
        assert!(refused(|c| c.initrd = Some("i".into())).contains("needs a kernel"));
        assert!(refused(|c| c.disks = vec!["d".parse().unwrap(); 32]).contains("room for 31"));
        assert!(
            serde_json::from_str::<MachineConfig>(r#"{"cpu":3}"#).is_err(),
            "unknown fields are refused"
        );
    }

    #[test]
    fn command_line_words_are_parsed_or_named() {
        assert!(
            "a.img,colour=red"
                .parse::<DiskConfig>()
                .unwrap_err()
                .0
                .contains("colour")
        );
        assert!(
            "readonly"
                .parse::<DiskConfig>()
                .unwrap_err()
                .0
                .contains("needs a path")
        );
        assert!(
            "mac=52:54:00:00:00:01"
                .parse::<NetConfig>()
                .unwrap_err()
                .0
                .contains("tap=NAME")
        );
        assert!(
            "tap=t0,mac=zz"
                .parse::<NetConfig>()
                .unwrap_err()
                .0
                .contains("not a MAC")
        );
        assert!("tap=this-name-is-too-long".parse::<NetConfig>().is_err());
        assert!(
            "x86-64-v9"
                .parse::<CpuTemplate>()
                .unwrap_err()
                .0
                .contains("x86-64-v9")
        );
        assert!("file=".parse::<SerialTarget>().is_err());
    }
}
