//! A device whose other end is a socket that carries datagrams: everything that does not need a TAP.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::time::Duration;

use virtio_bindings::virtio_net::*;

use super::driver::{Driver, uninterrupted};
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{HEADER_BYTES, Net, NetBackend, NetDeviceConfig, NetLimits, Offloads};

pub(super) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 5];
pub(super) const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
pub(super) const CONTROL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << VIRTIO_NET_F_MQ;
pub(super) const LARGE: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

pub(super) struct Sockets {
    pub(super) ours: Vec<OwnedFd>,
    pub(super) told: std::sync::Arc<Mutex<Vec<String>>>,
}

impl NetBackend for Sockets {
    fn files(&self) -> &[OwnedFd] {
        &self.ours
    }
    fn knows_uso(&self) -> bool {
        false
    }
    fn set_offloads(&self, guest_accepts: Offloads) -> io::Result<()> {
        self.told.lock().unwrap().push(format!("{guest_accepts:?}"));
        Ok(())
    }
    fn set_active_pairs(&self, pairs: usize) -> io::Result<()> {
        self.told.lock().unwrap().push(format!("pairs {pairs}"));
        Ok(())
    }
}

pub(super) struct Setup {
    pub(super) device: Net,
    pub(super) hosts: Vec<UnixDatagram>,
    pub(super) driver: Driver,
    pub(super) told: std::sync::Arc<Mutex<Vec<String>>>,
}

pub(super) fn config(limits: NetLimits) -> NetDeviceConfig {
    NetDeviceConfig {
        name: "net0".into(),
        mac: MAC,
        mtu: Some(1500),
        limits,
    }
}

pub(super) fn device(
    pairs: usize,
    limits: NetLimits,
) -> (Net, Vec<UnixDatagram>, std::sync::Arc<Mutex<Vec<String>>>) {
    let mut hosts = Vec::new();
    let mut ours = Vec::new();
    for _ in 0..pairs {
        let (host, our) = UnixDatagram::pair().unwrap();
        our.set_nonblocking(true).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        hosts.push(host);
        ours.push(our.into());
    }
    let told = std::sync::Arc::default();
    let backend = Sockets {
        ours,
        told: std::sync::Arc::clone(&told),
    };
    (Net::new(config(limits), Box::new(backend)).unwrap(), hosts, told)
}

pub(super) fn setup(pairs: usize, features: u64) -> Setup {
    let (mut device, hosts, told) = device(pairs, NetLimits::default());
    let driver = Driver::new(&device.queue_sizes(), features);
    let queues = driver.queues();
    driver.start(&mut device, queues);
    Setup {
        device,
        hosts,
        driver,
        told,
    }
}

/// A header of zeroes and a recognisable frame.
pub(super) fn frame(len: usize, seed: u32) -> Vec<u8> {
    let body = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8);
    [0; HEADER_BYTES].into_iter().chain(body).collect()
}

/// What a guest reads has the number of buffers in its header.
pub(super) fn body(frame: &[u8]) -> &[u8] {
    &frame[HEADER_BYTES..]
}

pub(super) fn host_receives(host: &UnixDatagram) -> Vec<u8> {
    let mut buffer = vec![0; 100_000];
    let len = uninterrupted(|| host.recv(&mut buffer)).unwrap();
    buffer.truncate(len);
    buffer
}
