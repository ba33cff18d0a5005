//! Network: frames arrive whole, once and in order in both directions, across any number of crossings.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Arc;
use std::time::Duration;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};

use crate::testing::driver::{Buffer, Driver};
use crate::testing::guest::{Guest, Memory};
use crate::testing::suspendable::Bench;
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{Net, NetBackend, NetDeviceConfig, NetLimits, Offloads};

const RECEIVE: u16 = 0;
const SEND: u16 = 1;
const PAIRS: u16 = 2;
const HEADER: usize = 12;
const BUFFER: u32 = 2048;

struct Sockets(Vec<OwnedFd>);

impl NetBackend for Sockets {
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

pub(super) struct NetBench {
    hosts: Vec<UnixDatagram>,
    ours: Vec<UnixDatagram>,
    round: u32,
    /// Frames under way to the guest and from it.
    inward: Vec<Vec<u8>>,
    outward: Vec<Vec<u8>>,
    /// Receive buffers that the device has: head and address.
    posted: Vec<(u16, u64)>,
    /// The answer byte of a control command under way.
    command: Option<u64>,
}

fn frame(len: usize, seed: u32) -> Vec<u8> {
    let body = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 11) as u8);
    [0; HEADER].into_iter().chain(body).collect()
}

fn drain(socket: &UnixDatagram) {
    let mut buffer = [0; 70_000];
    while socket.recv(&mut buffer).is_ok() {}
}

impl NetBench {
    fn post_receive_buffers(&mut self, guest: &Guest, driver: &mut Driver) {
        while self.posted.len() < 32 && driver.room(RECEIVE) > 0 {
            let address = driver.allocate(BUFFER);
            let buffer = Buffer {
                address,
                len: BUFFER,
                device_writes: true,
            };
            let head = driver.add(guest, RECEIVE, &[buffer]);
            self.posted.push((head, address));
        }
        driver.kick(guest, RECEIVE);
    }

    fn received_buffer(&mut self, guest: &Guest, driver: &mut Driver) -> Vec<u8> {
        let (head, len) = driver.wait(guest, RECEIVE);
        let at = self.posted.iter().position(|posted| posted.0 == head).unwrap();
        let (_, address) = self.posted.remove(at);
        guest.memory.read(address, len as usize)
    }
}

impl Bench for NetBench {
    fn new() -> Option<Self> {
        let (hosts, ours) = (0..PAIRS).map(|_| UnixDatagram::pair().unwrap()).unzip();
        let bench = Self {
            hosts,
            ours,
            round: 0,
            inward: Vec::new(),
            outward: Vec::new(),
            posted: Vec::new(),
            command: None,
        };
        for socket in bench.hosts.iter().chain(&bench.ours) {
            socket.set_nonblocking(true).unwrap();
        }
        Some(bench)
    }

    fn device(&mut self, _: &Arc<Memory>) -> Box<dyn VirtioDevice> {
        let files = self.ours.iter().map(|ours| ours.try_clone().unwrap().into());
        let config = NetDeviceConfig {
            name: "net0".into(),
            mac: [0x52, 0x54, 0, 0, 0, 5],
            mtu: Some(1500),
            limits: NetLimits::default(),
        };
        Box::new(Net::new(config, Box::new(Sockets(files.collect()))).unwrap())
    }

    fn submit(&mut self, guest: &Guest, driver: &mut Driver) {
        self.round += 1;
        let has = |bit: u32| driver.features & (1 << bit) != 0;
        // A frame in several buffers now and then, where the driver can take it.
        let large = if has(VIRTIO_NET_F_MRG_RXBUF) { 5_000 } else { 1_400 };
        let control = if has(VIRTIO_NET_F_MQ) { 2 * PAIRS } else { 2 };
        let has_control = has(VIRTIO_NET_F_CTRL_VQ);
        self.post_receive_buffers(guest, driver);
        for part in 0..5 {
            let inward = frame([60, large, 14, 1_400, 700][part], self.round * 100 + part as u32);
            self.hosts[0].send(&inward).unwrap();
            self.inward.push(inward);

            let outward = frame(
                [1_400, 14, 60, 9_000, 300][part],
                self.round * 100 + 50 + part as u32,
            );
            let address = driver.allocate(outward.len() as u32);
            guest.memory.write(address, &outward);
            let split = [1, 12, 26, 5_000, 20][part];
            let pieces = [
                (address, split),
                (address + u64::from(split), outward.len() as u32 - split),
            ];
            let pieces = pieces.map(|(address, len)| Buffer {
                address,
                len,
                device_writes: false,
            });
            driver.add(guest, SEND, &pieces);
            self.outward.push(outward);
        }
        driver.kick(guest, SEND);
        if has_control && self.command.is_none() {
            let address = driver.allocate(16);
            guest.memory.write(address, &[0, 0, 1, 0xff]);
            let piece = |address, len, device_writes| Buffer {
                address,
                len,
                device_writes,
            };
            driver.add(
                guest,
                control,
                &[piece(address, 3, false), piece(address + 3, 1, true)],
            );
            driver.kick(guest, control);
            self.command = Some(address + 3);
        }
    }

    fn complete(&mut self, guest: &Guest, driver: &mut Driver) {
        for expected in std::mem::take(&mut self.outward) {
            assert_eq!(driver.wait(guest, SEND).1, 0);
            let mut buffer = vec![0; 70_000];
            let len = loop {
                match self.hosts[0].recv(&mut buffer) {
                    Ok(len) => break len,
                    Err(_) => std::thread::sleep(Duration::from_micros(50)),
                }
            };
            assert!(buffer[..len] == expected, "a frame of the guest differs");
        }
        for expected in std::mem::take(&mut self.inward) {
            let mut got = self.received_buffer(guest, driver);
            let buffers = u16::from_le_bytes([got[10], got[11]]);
            for _ in 1..buffers {
                got.extend(self.received_buffer(guest, driver));
            }
            assert!(
                got[HEADER..] == expected[HEADER..],
                "a frame for the guest differs"
            );
            self.post_receive_buffers(guest, driver);
        }
        if let Some(answer) = self.command.take() {
            let has_pairs = driver.features & (1 << VIRTIO_NET_F_MQ) != 0;
            assert_eq!(driver.wait(guest, if has_pairs { 2 * PAIRS } else { 2 }).1, 1);
            assert_eq!(guest.memory.read(answer, 1), [0]);
        }
    }

    fn forget(&mut self) {
        self.posted.clear();
        self.inward.clear();
        self.outward.clear();
        self.command = None;
        // The device has no buffers now, so it takes nothing while these are emptied.
        for socket in self.hosts.iter().chain(&self.ours) {
            drain(socket);
        }
    }
}
