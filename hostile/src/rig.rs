//! A small machine without KVM: memory, a PCI bus, and every virtio device on back ends that need nothing of the host.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::Arc;

use ferry_devices::bus::{Bus, BusDevice};
use ferry_devices::disk::{Disk, DiskFormat, DiskOptions, EngineKind};
use ferry_devices::error::DeviceError;
use ferry_devices::irq::{MsiController, MsiMessage, NoBinder};
use ferry_devices::pci::access::{ECAM_LEN, Ecam};
use ferry_devices::pci::root::PciRoot;
use ferry_devices::pci::virtio::VirtioPci;
use ferry_devices::ram::Ram;
use ferry_devices::virtio::balloon::{Balloon, BalloonControl, Reclaim};
use ferry_devices::virtio::block::BlockDevice;
use ferry_devices::virtio::console::{Console, Input};
use ferry_devices::virtio::device::VirtioDevice;
use ferry_devices::virtio::net::{Net, NetBackend, NetDeviceConfig, NetLimits, Offloads};
use ferry_devices::virtio::rng::Rng;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub(crate) const LOW: u64 = 1 << 20;
pub(crate) const HIGH_START: u64 = 1 << 32;
pub(crate) const HIGH: u64 = 64 << 10;
pub(crate) const ECAM: u64 = 0xe000_0000;
const WINDOW: Range<u64> = 0xc000_0000..ECAM;

/// Interrupts that go nowhere.
struct Unheard;

impl MsiController for Unheard {
    fn set(&self, _: usize, _: Option<MsiMessage>) -> Result<(), DeviceError> {
        Ok(())
    }

    fn trigger(&self, _: usize) {}
}

/// Gives no memory back, but looks at what it is asked to, as the real one does.
struct Zeroes(Ram);

impl Reclaim for Zeroes {
    fn release(&self, range: Range<u64>) -> io::Result<()> {
        assert!(
            range.start < range.end && range.start.is_multiple_of(4096) && range.end.is_multiple_of(4096)
        );
        let len = (range.end - range.start) as usize;
        assert!(len as u64 <= LOW + HIGH, "more than all memory is given back");
        self.0
            .write_slice(&vec![0; len], GuestAddress(range.start))
            .map_err(io::Error::other)
    }
}

/// Both ends of a wire; the host's end never blocks.
struct Wire(Vec<OwnedFd>);

impl NetBackend for Wire {
    fn files(&self) -> &[OwnedFd] {
        &self.0
    }

    fn knows_uso(&self) -> bool {
        true
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn set_active_pairs(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
}

/// What the outside world can do to a device.
#[derive(Default)]
pub(crate) struct Outside {
    pub(crate) wire: Option<UnixDatagram>,
    pub(crate) keys: Option<Arc<Input>>,
    pub(crate) balloon: Option<Arc<BalloonControl>>,
}

/// A file that is nowhere, and the path that leads to it while it is open.
pub(crate) fn nameless(content: &[u8], len: u64) -> (File, PathBuf) {
    let fd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(content).unwrap();
    file.set_len(len.max(content.len() as u64)).unwrap();
    let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
    (file, path)
}

pub(crate) fn block(how: u8) -> Box<dyn VirtioDevice> {
    // The file stays while the disk has it open.
    let (_file, path) = nameless(b"first sector", 256 << 10);
    let options = DiskOptions {
        format: Some(DiskFormat::Raw),
        read_only: how & 2 != 0,
        engine: if how & 1 == 0 {
            EngineKind::Threads
        } else {
            EngineKind::Auto
        },
        ..DiskOptions::new(path)
    };
    let disk = Disk::open(&options).unwrap();
    Box::new(BlockDevice::new("disk0", Arc::new(disk), None, 1 + u16::from(how >> 2 & 1)).unwrap())
}

pub(crate) fn net(outside: &mut Outside) -> Box<dyn VirtioDevice> {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    outside.wire = Some(ours);
    let config = NetDeviceConfig {
        name: "net0".to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: None,
        limits: NetLimits::default(),
    };
    Box::new(Net::new(config, Box::new(Wire(vec![theirs.into()]))).unwrap())
}

pub(crate) fn rng() -> Box<dyn VirtioDevice> {
    Box::new(Rng::new("rng").unwrap())
}

pub(crate) fn console(outside: &mut Outside) -> Box<dyn VirtioDevice> {
    let device = Console::new("console", Box::new(io::sink())).unwrap();
    outside.keys = Some(device.input());
    Box::new(device)
}

pub(crate) fn balloon(ram: &Ram, outside: &mut Outside) -> Box<dyn VirtioDevice> {
    let device = Balloon::new("balloon", ram.clone(), Arc::new(Zeroes(ram.clone()))).unwrap();
    outside.balloon = Some(device.control());
    Box::new(device)
}

pub(crate) fn memory() -> Ram {
    Ram::from_ranges(&[
        (GuestAddress(0), LOW as usize),
        (GuestAddress(HIGH_START), HIGH as usize),
    ])
    .unwrap()
}

/// The bus with its functions, from slot 1 on.
pub(crate) struct Rig {
    pub(crate) ram: Ram,
    pub(crate) bus: Arc<Bus>,
    pub(crate) root: Arc<PciRoot>,
    pub(crate) functions: Vec<Arc<VirtioPci>>,
}

impl Rig {
    pub(crate) fn new(ram: Ram, devices: Vec<Box<dyn VirtioDevice>>) -> Self {
        let bus = Arc::new(Bus::new("memory"));
        let places = vec![0..LOW, HIGH_START..HIGH_START + HIGH];
        let root = Arc::new(PciRoot::new(&bus, places, WINDOW));
        bus.insert(ECAM..ECAM + ECAM_LEN, Arc::new(Ecam::new(root.clone())))
            .unwrap();
        let functions = (1..).zip(devices).map(|(slot, device)| {
            let function = VirtioPci::new(slot, device, ram.clone(), Arc::new(Unheard), Arc::new(NoBinder));
            let function = Arc::new(function.unwrap());
            root.add(slot, function.clone()).unwrap();
            function
        });
        let functions = functions.collect();
        Self {
            ram,
            bus,
            root,
            functions,
        }
    }

    /// Straight into the first function's BAR, wherever it is.
    pub(crate) fn poke(&self, offset: u64, value: u64, len: usize) {
        let bytes = value.to_le_bytes();
        self.functions[0].write(offset, &bytes[..len]);
    }

    pub(crate) fn peek(&self, offset: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.functions[0].read(offset, &mut bytes[..len]);
        u64::from_le_bytes(bytes)
    }

    /// What the guest writes into its own memory; outside of it nothing happens.
    pub(crate) fn store(&self, address: u64, bytes: &[u8]) {
        if self.ram.check_range(GuestAddress(address), bytes.len()) {
            self.ram.write_slice(bytes, GuestAddress(address)).unwrap();
        }
    }
}
