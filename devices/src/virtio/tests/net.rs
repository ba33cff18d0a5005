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
    fn net(&self) -> Net {
        let files = self.ours.iter().map(|ours| ours.try_clone().unwrap().into());
        let config = NetDeviceConfig {
            name: "net0".into(),
            mac: [0x52, 0x54, 0, 0, 0, 5],
            mtu: Some(1500),
            limits: NetLimits::default(),
        };
        Net::new(config, Box::new(Sockets(files.collect()))).unwrap()
    }

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

    /// The host takes the next frame of the guest, which is there or will be soon.
    fn host_receives(&mut self) {
        let expected = self.outward.remove(0);
        let mut buffer = vec![0; 70_000];
        let len = loop {
            match self.hosts[0].recv(&mut buffer) {
                Ok(len) => break len,
                Err(_) => std::thread::sleep(Duration::from_micros(50)),
            }
        };
        assert!(buffer[..len] == expected, "a frame of the guest differs");
    }

    /// The guest takes the frame whose first buffer this is. The others appeared with it.
    fn guest_receives(&mut self, guest: &Guest, driver: &mut Driver, first: (u16, u32)) {
        let mut got = self.received_buffer(guest, first);
        let buffers = u16::from_le_bytes([got[10], got[11]]);
        for _ in 1..buffers {
            let next = driver.poll(guest, RECEIVE).expect("half a frame appeared");
            got.extend(self.received_buffer(guest, next));
        }
        let expected = self.inward.remove(0);
        assert!(
            got[HEADER..] == expected[HEADER..],
            "a frame for the guest differs"
        );
    }

    fn received_buffer(&mut self, guest: &Guest, (head, len): (u16, u32)) -> Vec<u8> {
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
        Box::new(self.net())
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
        while !self.outward.is_empty() {
            assert_eq!(driver.wait(guest, SEND).1, 0);
            self.host_receives();
        }
        self.post_receive_buffers(guest, driver);
        while !self.inward.is_empty() {
            let first = driver.wait(guest, RECEIVE);
            self.guest_receives(guest, driver, first);
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

    fn queue_was_reset(&mut self, guest: &Guest, driver: &mut Driver, index: u16) {
        while let Some(answer) = driver.poll(guest, index) {
            match index {
                RECEIVE => self.guest_receives(guest, driver, answer),
                SEND => self.host_receives(),
                _ => self.command = None,
            }
        }
        match index {
            // Frames that were not delivered wait at the host.
            RECEIVE => self.posted.clear(),
            // What was not answered was not sent, and never will be.
            SEND => self.outward.clear(),
            _ if index >= 2 * PAIRS => self.command = None,
            _ => {}
        }
    }
}

/// What the host was too busy to take waits in the guest's queue, and the queues beside it may come and go meanwhile.
#[test]
fn frames_that_the_host_cannot_take_wait_while_other_queues_are_reset() {
    let mut bench = NetBench::new().unwrap();
    let memory = Memory::new();
    let guest = Guest::new(memory.clone(), bench.device(&memory));
    let mut driver = Driver::probe(&guest, u64::MAX);
    bench.submit(&guest, &mut driver);
    bench.complete(&guest, &mut driver);
    for seed in 0..100 {
        let outward = frame(4_000, seed);
        let address = driver.allocate(outward.len() as u32);
        guest.memory.write(address, &outward);
        let buffer = Buffer {
            address,
            len: outward.len() as u32,
            device_writes: false,
        };
        driver.add(&guest, SEND, &[buffer]);
        bench.outward.push(outward);
    }
    driver.kick(&guest, SEND);
    let mut sent = 0;
    for round in 0..20 {
        let index = [RECEIVE, 2, 3, 2 * PAIRS][round % 4];
        driver.reset_queue(&guest, index);
        bench.queue_was_reset(&guest, &mut driver, index);
        driver.add_queue(&guest, index);
        std::thread::sleep(Duration::from_millis(1));
        while driver.poll(&guest, SEND).is_some() {
            sent += 1;
        }
    }
    assert!(
        sent < bench.outward.len(),
        "the host took all, so this test says nothing"
    );
    for n in 0..bench.outward.len() {
        bench.host_receives();
        if n >= sent {
            driver.wait(&guest, SEND);
        }
    }
    bench.submit(&guest, &mut driver);
    bench.complete(&guest, &mut driver);
}

/// The fear: a link that is set up again while the machine stands still stays down for the guest, which looks at it only
/// when it is told to.
#[test]
fn a_link_that_changes_during_a_pause_is_told_when_the_machine_goes_on() {
    let bench = NetBench::new().unwrap();
    let memory = Memory::new();
    let net = bench.net();
    let handle = net.handle();
    let guest = Guest::new(memory.clone(), Box::new(net));
    let driver = Driver::probe(&guest, u64::MAX);
    let link = || guest.read(driver.device + 6, 2) & 1;
    handle.set_link(false);
    assert_eq!((guest.messages.take().len(), link()), (1, 0));
    for (up, told) in [(true, 1), (true, 0), (false, 1)] {
        guest.root.pause();
        handle.set_link(up);
        assert_eq!(guest.messages.take(), []);
        guest.root.resume();
        assert_eq!(guest.messages.take().len(), told, "the link is up: {up}");
        assert_eq!(link(), u64::from(up));
    }
}
