//! What the device, its threads and its handle have in common.

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};
use vmm_sys_util::eventfd::EventFd;

use super::backend::NetBackend;
use super::control::{Command, OFFLOAD_BITS, offloads};
use super::neighbours::Neighbours;
use super::stats::{Counters, Meter};
use crate::disk::limit::{Bucket, change, charge, wait};
use crate::log_once::LogOnce;
use crate::virtio::device::VirtioInterrupt;

/// How much may pass in each direction; None: as much as can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetLimits {
    pub bandwidth_bytes_per_sec: Option<NonZeroU64>,
    pub packets_per_sec: Option<NonZeroU64>,
}

#[derive(Debug, Default)]
struct Throttle {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Receive,
    Send,
}

/// What the guest, or the user while the machine runs, may change, and what is saved of it.
#[derive(Debug)]
pub(super) struct Settings {
    pub(super) mac: [u8; 6],
    /// The user's wish; the backend may be gone all the same.
    pub(super) link: bool,
    pub(super) announce: bool,
    pub(super) pairs: u16,
    /// Set by the guest's command; None: what the features say.
    pub(super) offloads: Option<u64>,
    pub(super) neighbours: Neighbours,
}

/// Who to tell while the device runs.
struct Running {
    interrupt: Arc<dyn VirtioInterrupt>,
    features: u64,
    wakes: Vec<EventFd>,
}

pub(super) struct Shared {
    pub(super) name: String,
    pub(super) backend: Box<dyn NetBackend>,
    pub(super) counters: Counters,
    settings: Mutex<Settings>,
    /// Copies of what the data path asks for each frame.
    link: AtomicBool,
    gone: AtomicBool,
    pairs: AtomicU16,
    mac: AtomicU64,
    limited: AtomicBool,
    receive: Mutex<Throttle>,
    send: Mutex<Throttle>,
    running: Mutex<Option<Running>>,
    /// The driver has to be told to look at the configuration as soon as the device runs.
    owed: AtomicBool,
    meter: Mutex<Meter>,
    began: Instant,
    complaints: LogOnce,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn mac_bits(mac: [u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = mac;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

impl Shared {
    pub(super) fn new(name: String, backend: Box<dyn NetBackend>, mac: [u8; 6], limits: NetLimits) -> Self {
        let shared = Self {
            name,
            backend,
            counters: Counters::default(),
            settings: Mutex::new(Settings {
                mac,
                link: true,
                announce: false,
                pairs: 1,
                offloads: None,
                neighbours: Neighbours::default(),
            }),
            link: AtomicBool::new(true),
            gone: AtomicBool::new(false),
            pairs: AtomicU16::new(1),
            mac: AtomicU64::new(mac_bits(mac)),
            limited: AtomicBool::new(false),
            receive: Mutex::new(Throttle::default()),
            send: Mutex::new(Throttle::default()),
            running: Mutex::new(None),
            owed: AtomicBool::new(false),
            meter: Mutex::new(Meter::default()),
            began: Instant::now(),
            complaints: LogOnce::new(),
        };
        shared.set_limits(limits);
        shared
    }

    /// Changes settings and brings the copies up to date.
    pub(super) fn change<T>(&self, how: impl FnOnce(&mut Settings) -> T) -> T {
        let mut settings = lock(&self.settings);
        let result = how(&mut settings);
        self.link.store(settings.link, Ordering::Relaxed);
        self.mac.store(mac_bits(settings.mac), Ordering::Relaxed);
        self.pairs.store(settings.pairs, Ordering::Release);
        result
    }

    pub(super) fn look<T>(&self, at: impl FnOnce(&Settings) -> T) -> T {
        at(&lock(&self.settings))
    }

    pub(super) fn link_is_up(&self) -> bool {
        self.link.load(Ordering::Relaxed) && !self.gone.load(Ordering::Relaxed)
    }

    pub(super) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    pub(super) fn active_pairs(&self) -> u16 {
        self.pairs.load(Ordering::Acquire)
    }

    /// The field `status` of the device configuration.
    pub(super) fn status(&self) -> u16 {
        let link = if self.link_is_up() {
            VIRTIO_NET_S_LINK_UP
        } else {
            0
        };
        let announce = if self.look(|s| s.announce) {
            VIRTIO_NET_S_ANNOUNCE
        } else {
            0
        };
        (link | announce) as u16
    }

    pub(super) fn set_link(&self, up: bool) {
        let before = self.status();
        self.change(|s| s.link = up);
        if self.status() != before {
            self.config_changed();
        }
        self.wake();
    }

    /// The host's interface is not there any more. The machine lives on with its link down.
    pub(super) fn backend_gone(&self, error: &io::Error) {
        if !self.gone.swap(true, Ordering::Relaxed) {
            tracing::error!(
                "the host's interface behind {} is gone ({error}); the guest's link is down, the machine goes on",
                self.name
            );
            self.config_changed();
            self.wake();
        }
    }

    /// Asks the guest to announce itself. False: its driver cannot.
    pub(super) fn announce(&self) -> bool {
        let running = lock(&self.running);
        let Some(running) = running.as_ref() else {
            // It is asked for when the device starts, if the driver can do it then.
            self.change(|s| s.announce = true);
            return true;
        };
        if !can_announce(running.features) {
            return false;
        }
        self.change(|s| s.announce = true);
        running.interrupt.config_changed();
        true
    }

    pub(super) fn started(&self, interrupt: Arc<dyn VirtioInterrupt>, features: u64, wakes: Vec<EventFd>) {
        let announce = self.change(|s| {
            s.announce &= can_announce(features);
            s.announce
        });
        *lock(&self.running) = Some(Running {
            interrupt,
            features,
            wakes,
        });
        if self.owed.swap(false, Ordering::Relaxed) || announce {
            self.config_changed();
        }
    }

    /// The state came from elsewhere: what its driver was told of it is not known, and an interrupt too many does no harm.
    pub(super) fn restored(&self) {
        self.owed.store(true, Ordering::Relaxed);
    }

    pub(super) fn stopped(&self) {
        *lock(&self.running) = None;
    }

    fn config_changed(&self) {
        match lock(&self.running).as_ref() {
            Some(running) => running.interrupt.config_changed(),
            None => self.owed.store(true, Ordering::Relaxed),
        }
    }

    /// Has the threads look again at what may pass.
    fn wake(&self) {
        if let Some(running) = lock(&self.running).as_ref() {
            for wake in &running.wakes {
                // Only fails when it is already set to the full.
                let _ = wake.write(1);
            }
        }
    }

    /// Carries out a command of the guest; false is answered with an error.
    pub(super) fn command(&self, command: Command, max_pairs: u16) -> bool {
        match command {
            Command::ReceiveMode | Command::AddressTable => true,
            Command::Address(mac) => {
                self.change(|s| {
                    s.mac = mac;
                    s.neighbours = Neighbours::default();
                });
                true
            }
            Command::AnnounceAck => {
                self.change(|s| s.announce = false);
                true
            }
            Command::Pairs(pairs) => (1..=max_pairs).contains(&pairs) && self.set_pairs(pairs),
            Command::Offloads(bits) => bits & !OFFLOAD_BITS == 0 && self.set_offloads(bits),
        }
    }

    fn set_pairs(&self, pairs: u16) -> bool {
        match self.backend.set_active_pairs(usize::from(pairs)) {
            Ok(()) => {
                self.change(|s| s.pairs = pairs);
                self.wake();
                true
            }
            Err(error) => {
                self.complain(|| format!("the queue pairs in use could not be changed to {pairs}: {error}"));
                false
            }
        }
    }

    fn set_offloads(&self, bits: u64) -> bool {
        match self.backend.set_offloads(offloads(bits)) {
            Ok(()) => {
                self.change(|s| s.offloads = Some(bits));
                true
            }
            Err(error) => {
                self.complain(|| format!("the offloads could not be changed: {error}"));
                false
            }
        }
    }

    pub(super) fn set_limits(&self, limits: NetLimits) {
        let NetLimits {
            bandwidth_bytes_per_sec,
            packets_per_sec,
        } = limits;
        let now = self.now();
        for throttle in [&self.receive, &self.send] {
            let mut throttle = lock(throttle);
            change(&mut throttle.bytes, bandwidth_bytes_per_sec, now);
            change(&mut throttle.packets, packets_per_sec, now);
        }
        let limited = bandwidth_bytes_per_sec.is_some() || packets_per_sec.is_some();
        self.limited.store(limited, Ordering::Relaxed);
        self.wake();
    }

    /// How long the next frame must wait; None: it may pass.
    pub(super) fn must_wait(&self, direction: Direction) -> Option<Duration> {
        if !self.limited.load(Ordering::Relaxed) {
            return None;
        }
        let now = self.now();
        let mut throttle = lock(self.throttle(direction));
        let longest = wait(&mut throttle.bytes, now).max(wait(&mut throttle.packets, now));
        (!longest.is_zero()).then_some(longest)
    }

    /// A frame passed.
    pub(super) fn charge(&self, direction: Direction, bytes: u64) {
        if self.limited.load(Ordering::Relaxed) {
            let mut throttle = lock(self.throttle(direction));
            charge(&mut throttle.bytes, bytes);
            charge(&mut throttle.packets, 1);
        }
    }

    fn throttle(&self, direction: Direction) -> &Mutex<Throttle> {
        match direction {
            Direction::Receive => &self.receive,
            Direction::Send => &self.send,
        }
    }

    /// Has the guest's frame looked at for addresses that it claims.
    pub(super) fn learn(&self, frame: &[u8]) {
        let [_, _, mac @ ..] = self.mac.load(Ordering::Relaxed).to_be_bytes();
        lock(&self.settings).neighbours.learn(mac, frame);
    }

    pub(super) fn stats(&self) -> super::NetStats {
        lock(&self.meter).look(self.now(), self.counters.totals())
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// A guest or host error that may come a million times.
    pub(super) fn complain(&self, what: impl FnOnce() -> String) {
        self.complaints.warn(|| format!("{}: {}", self.name, what()));
    }
}

fn can_announce(features: u64) -> bool {
    use virtio_bindings::virtio_net::{
        VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_STATUS,
    };
    [
        VIRTIO_NET_F_GUEST_ANNOUNCE,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_STATUS,
    ]
    .iter()
    .all(|bit| features & (1 << bit) != 0)
}
