//! virtio-net: a network card whose other end is a TAP device, or anything else that carries frames.
//!
//! Each queue pair has a thread of its own that moves frames between the host's file and guest memory without a
//! copy. What the user and a crossing need while it runs goes through [`NetHandle`].

mod backend;
mod buffers;
mod control;
mod neighbours;
mod pair;
mod receive;
mod ring;
mod send;
mod shared;
mod stats;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

pub use backend::{NetBackend, Offloads, TapBackend};
pub use neighbours::Neighbours;
pub use shared::NetLimits;
pub use stats::{NetStats, NetTotals};

use super::device::{Activation, DeviceState, VirtioDevice, VirtioKind};
use super::worker::Worker;
use crate::error::DeviceError;
use crate::state::{StateError, decode_body, encode_body};
use pair::{Control, Pair, Waits};
use receive::Receiver;
use ring::Ring;
use send::Sender;
use shared::{Settings, Shared};

/// virtio_net_hdr with num_buffers, which virtio 1 always has.
const HEADER_BYTES: usize = 12;
const NUM_BUFFERS_AT: usize = 10;
const MIN_FRAME_BYTES: usize = 14;
/// Ethernet, a VLAN tag, and the largest IP packet that segmentation offload makes.
const MAX_FRAME_BYTES: usize = 14 + 4 + 65535;
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
const MAX_PAIRS: usize = 16;
const STATE_VERSION: u32 = 1;

/// How the device is made. It is the same on both sides of a crossing.
#[derive(Debug, Clone)]
pub struct NetDeviceConfig {
    /// Such as "net0".
    pub name: String,
    pub mac: [u8; 6],
    /// Told to the guest. None: it uses 1500.
    pub mtu: Option<u16>,
    pub limits: NetLimits,
}

pub struct Net {
    config: NetDeviceConfig,
    max_pairs: u16,
    shared: Arc<Shared>,
    workers: Vec<Worker<Pair>>,
    /// Queues that the guest enabled and that mean nothing with the features it took.
    idle: Vec<(u16, Queue)>,
    /// Frames taken from the host that wait for room in the guest, by queue pair.
    pending: BTreeMap<u16, Vec<u8>>,
}

/// What can be asked of a network device, and told to it, from outside while it runs or not.
#[derive(Clone)]
pub struct NetHandle {
    shared: Arc<Shared>,
}

impl NetHandle {
    /// Rates are smoothed over the last second or, for who looks less often, averaged since he last looked.
    pub fn stats(&self) -> NetStats {
        self.shared.stats()
    }

    pub fn set_limits(&self, limits: NetLimits) {
        self.shared.set_limits(limits);
    }

    /// Plugs the cable in or out.
    pub fn set_link(&self, up: bool) {
        self.shared.set_link(up);
    }

    /// False also when the host's interface has disappeared.
    pub fn link_is_up(&self) -> bool {
        self.shared.link_is_up()
    }

    /// Asks the guest to announce itself to its network, now or as soon as the device starts. False: its driver
    /// cannot, and only the host's announcement is heard.
    pub fn announce(&self) -> bool {
        self.shared.announce()
    }

    /// The guest's address, which it may have changed.
    pub fn mac(&self) -> [u8; 6] {
        self.shared.look(|s| s.mac)
    }

    /// The IP addresses that the guest has claimed so far.
    pub fn neighbours(&self) -> Neighbours {
        self.shared.look(|s| s.neighbours.clone())
    }
}

/// What travels. The queues travel with the transport.
#[derive(Debug, Serialize, Deserialize)]
struct NetState {
    max_pairs: u16,
    mac: [u8; 6],
    link: bool,
    announce: bool,
    pairs: u16,
    offloads: Option<u64>,
    neighbours: Neighbours,
    pending: BTreeMap<u16, Vec<u8>>,
}

impl Net {
    pub fn new(config: NetDeviceConfig, backend: Box<dyn NetBackend>) -> Result<Net, DeviceError> {
        let pairs = backend.files().len();
        if pairs == 0 || pairs > MAX_PAIRS {
            return Err(DeviceError::Invalid(format!(
                "{} has {pairs} queue pairs; it can have between 1 and {MAX_PAIRS}",
                config.name
            )));
        }
        let shared = Shared::new(config.name.clone(), backend, config.mac, config.limits);
        Ok(Net {
            config,
            max_pairs: pairs as u16,
            shared: Arc::new(shared),
            workers: Vec::new(),
            idle: Vec::new(),
            pending: BTreeMap::new(),
        })
    }

    pub fn handle(&self) -> NetHandle {
        NetHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    fn io(&self, what: &'static str) -> impl Fn(io::Error) -> DeviceError {
        let device = self.config.name.clone();
        move |source| DeviceError::Io {
            device: device.clone(),
            what,
            source,
        }
    }

    /// Tells the host what the guest accepts and how many queues it uses. A host interface that is gone cannot be
    /// told; the guest then has its link down.
    fn prepare_backend(&self, features: u64, pairs: u16) -> Result<(), DeviceError> {
        let bits = self.shared.look(|s| s.offloads).unwrap_or(features);
        let told = self
            .shared
            .backend
            .set_offloads(control::offloads(bits))
            .and_then(|()| self.shared.backend.set_active_pairs(usize::from(pairs)));
        match told {
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                self.shared.backend_gone(&error);
                Ok(())
            }
            other => other.map_err(self.io("the host's interface cannot do what the guest needs")),
        }
    }

    fn pair(&self, index: u16, work: &Activation) -> Result<Pair, DeviceError> {
        let file = self
            .shared
            .backend
            .files()
            .get(usize::from(index))
            .ok_or_else(|| DeviceError::Invalid(format!("{} has no queue pair {index}", self.config.name)))?;
        let host = self.io("no file descriptor for a queue thread");
        Ok(Pair {
            index,
            shared: Arc::clone(&self.shared),
            interrupt: Arc::clone(&work.interrupt),
            ram: work.ram.clone(),
            file: OwnedFd::try_clone(file).map_err(&host)?,
            wake: EventFd::new(EFD_NONBLOCK).map_err(&host)?,
            timer: TimerFd::new().map_err(|error| host(error.into()))?,
            receiver: None,
            sender: None,
            control: None,
            waits: Waits::default(),
        })
    }

    /// Sorts the queues to the threads that serve them.
    fn pairs(&mut self, work: &mut Activation) -> Result<Vec<Pair>, DeviceError> {
        let has_pairs = work.has(VIRTIO_NET_F_MQ);
        let served = if has_pairs { self.max_pairs } else { 1 };
        let has_control = work.has(VIRTIO_NET_F_CTRL_VQ);
        let mergeable = work.has(VIRTIO_NET_F_MRG_RXBUF);
        let large = control::OFFLOAD_BITS & !(1 << VIRTIO_NET_F_GUEST_CSUM);
        let large_frames = work.features & large != 0;
        let mut pairs = (0..served)
            .map(|index| self.pair(index, work))
            .collect::<Result<Vec<_>, _>>()?;
        for active in work.queues.drain(..) {
            let index = active.index;
            match pairs.get_mut(usize::from(index / 2)) {
                Some(pair) if index % 2 == 0 => {
                    let pending = self.pending.remove(&pair.index);
                    let ring = Ring::new(index, active.queue);
                    let receiver = Receiver::new(ring, work.ram.clone(), mergeable, large_frames, pending);
                    pair.receiver = Some((receiver, active.kick));
                }
                Some(pair) => {
                    let ring = Ring::new(index, active.queue);
                    pair.sender = Some((Sender::new(ring, work.ram.clone()), active.kick));
                }
                // The control queue comes after the pairs that the driver knows of.
                None if has_control && index == served * 2 => {
                    if let Some(first) = pairs.first_mut() {
                        first.control = Some(Control {
                            index,
                            queue: active.queue,
                            kick: active.kick,
                            max_pairs: served,
                        });
                    }
                }
                None => self.idle.push((index, active.queue)),
            }
        }
        pairs.retain(|pair| pair.receiver.is_some() || pair.sender.is_some() || pair.control.is_some());
        Ok(pairs)
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Net
    }

    fn name(&self) -> &str {
        &self.config.name
    }

    fn offered_features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
            VIRTIO_NET_F_MAC,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_GUEST_UFO,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
            VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_F_MRG_RXBUF,
            VIRTIO_NET_F_STATUS,
            VIRTIO_NET_F_CTRL_VQ,
            VIRTIO_NET_F_CTRL_RX,
            VIRTIO_NET_F_CTRL_MAC_ADDR,
            VIRTIO_NET_F_GUEST_ANNOUNCE,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
        ];
        if self.config.mtu.is_some() {
            bits.push(VIRTIO_NET_F_MTU);
        }
        if self.max_pairs > 1 {
            bits.push(VIRTIO_NET_F_MQ);
        }
        if self.shared.backend.knows_uso() {
            bits.extend([
                VIRTIO_NET_F_GUEST_USO4,
                VIRTIO_NET_F_GUEST_USO6,
                VIRTIO_NET_F_HOST_USO,
            ]);
        }
        bits.iter().fold(0, |all, bit| all | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![QUEUE_SIZE; usize::from(self.max_pairs) * 2];
        sizes.push(CONTROL_QUEUE_SIZE);
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.shared.look(|s| s.mac).to_vec();
        config.extend(self.shared.status().to_le_bytes());
        config.extend(self.max_pairs.to_le_bytes());
        config.extend(self.config.mtu.unwrap_or(0).to_le_bytes());
        let there = usize::try_from(offset)
            .ok()
            .and_then(|offset| config.get(offset..));
        let mut bytes = there.unwrap_or_default().iter();
        for byte in data {
            *byte = bytes.next().copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        // The address is set through the control queue; nothing else is the driver's to write.
    }

    fn start(&mut self, mut work: Activation) -> Result<(), DeviceError> {
        if !self.workers.is_empty() {
            return Err(DeviceError::AlreadyRunning {
                device: self.config.name.clone(),
            });
        }
        let features = work.features;
        let max_pairs = if work.has(VIRTIO_NET_F_MQ) {
            self.max_pairs
        } else {
            1
        };
        let active = self.shared.change(|s| {
            s.pairs = s.pairs.clamp(1, max_pairs);
            s.pairs
        });
        self.prepare_backend(features, active)?;
        let pairs = self.pairs(&mut work)?;
        let wakes = pairs
            .iter()
            .map(|pair| pair.wake.try_clone())
            .collect::<Result<_, _>>()
            .map_err(self.io("no file descriptor for a queue thread"))?;
        self.shared.started(Arc::clone(&work.interrupt), features, wakes);
        for pair in pairs {
            let thread = format!("{}-{}", self.config.name, pair.index);
            match Worker::spawn(&thread, pair) {
                Ok(worker) => self.workers.push(worker),
                Err(error) => {
                    self.stop();
                    return Err(self.io("a queue thread cannot be started")(error));
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue)> {
        self.shared.stopped();
        let mut queues = std::mem::take(&mut self.idle);
        for worker in self.workers.drain(..) {
            let Some(pair) = worker.stop() else {
                tracing::error!(
                    "a queue thread of {} died and its queues are lost; the guest has to reset the device",
                    self.config.name
                );
                continue;
            };
            let remains = pair.into_remains();
            queues.extend(remains.queues);
            if let Some(frame) = remains.pending {
                self.pending.insert(remains.pair, frame);
            }
        }
        queues
    }

    fn reset(&mut self) {
        self.pending.clear();
        let mac = self.config.mac;
        self.shared.change(|s| {
            let link = s.link;
            *s = Settings {
                mac,
                link,
                announce: false,
                pairs: 1,
                offloads: None,
                neighbours: Neighbours::default(),
            };
        });
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let state = self.shared.look(|settings| {
            let Settings {
                mac,
                link,
                announce,
                pairs,
                offloads,
                neighbours,
            } = settings;
            NetState {
                max_pairs: self.max_pairs,
                mac: *mac,
                link: *link,
                announce: *announce,
                pairs: *pairs,
                offloads: *offloads,
                neighbours: neighbours.clone(),
                pending: self.pending.clone(),
            }
        });
        Ok(DeviceState {
            version: STATE_VERSION,
            body: encode_body(&self.config.name, &state)?,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let name = &self.config.name;
        if state.version > STATE_VERSION {
            return Err(StateError::Version {
                name: name.clone(),
                found: state.version,
                known: STATE_VERSION,
            });
        }
        let NetState {
            max_pairs,
            mac,
            link,
            announce,
            pairs,
            offloads,
            mut neighbours,
            pending,
        } = decode_body(name, &state.body)?;
        let mismatch = |why: String| {
            Err(StateError::Mismatch {
                name: name.clone(),
                why,
            })
        };
        if max_pairs != self.max_pairs {
            return mismatch(format!(
                "it was saved with {max_pairs} queue pairs and has {} here; give queues={max_pairs}",
                self.max_pairs
            ));
        }
        if pairs == 0 || pairs > max_pairs {
            return mismatch(format!("{pairs} of {max_pairs} queue pairs are in use"));
        }
        if offloads.is_some_and(|bits| bits & !control::OFFLOAD_BITS != 0) {
            return mismatch("its offloads are none that this program knows".to_owned());
        }
        let lengths = HEADER_BYTES + MIN_FRAME_BYTES..=HEADER_BYTES + MAX_FRAME_BYTES;
        if pending
            .iter()
            .any(|(pair, frame)| *pair >= max_pairs || !lengths.contains(&frame.len()))
        {
            return mismatch("a waiting frame has an impossible length or queue".to_owned());
        }
        neighbours.bound();
        self.pending = pending;
        self.shared.change(|s| {
            *s = Settings {
                mac,
                link,
                announce,
                pairs,
                offloads,
                neighbours,
            };
        });
        self.shared.restored();
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.stop();
    }
}
