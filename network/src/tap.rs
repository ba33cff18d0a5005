//! TAP devices: the host's end of a guest's network card, made and removed by us or given by the user.
//!
//! A TAP that we make is not persistent: it belongs to its open files, so the kernel removes it (and takes it out of
//! its bridge) when the process ends, however it ends. Nothing has to be cleaned up after a crash.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use crate::interface::{self, Control};

/// Size of the virtio header before every frame: virtio_net_hdr with num_buffers, as virtio 1.x wants it.
pub const GUEST_HEADER_BYTES: usize = 12;
/// The kernel's MAX_TAP_QUEUES is 256; the device offers fewer.
const MAX_QUEUE_PAIRS: u16 = 16;
/// Ethernet frame with the largest IP packet that segmentation offload makes.
pub(crate) const MAX_FRAME_BYTES: usize = 14 + 65535;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapConfig {
    /// None: the kernel chooses a free name.
    pub name: Option<String>,
    /// Make the TAP and attach it to this bridge. None: use the TAP `name`, make it if it is not there.
    pub bridge: Option<String>,
    pub queue_pairs: u16,
    /// The guest's address, from which the TAP's own is derived.
    pub guest_mac: [u8; 6],
}

#[derive(Debug, thiserror::Error)]
pub enum TapError {
    #[error("a network device has between 1 and {MAX_QUEUE_PAIRS} queue pairs, {0} were asked for")]
    QueuePairs(u16),
    #[error(
        "/dev/net/tun cannot be opened: {0}; is the tun module loaded (modprobe tun) and may this user open it?"
    )]
    NoTun(io::Error),
    #[error(
        "the TAP device {0} cannot be opened: it belongs to another user; run as its owner or with CAP_NET_ADMIN"
    )]
    NotPermitted(String),
    #[error("the TAP device {0} is in use by another process; stop that one or choose another name")]
    InUse(String),
    #[error(
        "the interface {0} is no TAP device, or was made without multi_queue while several queues were asked for; \
         make it with: ip tuntap add dev {0} mode tap multi_queue"
    )]
    NotATap(String),
    #[error("there is already an interface {0}; leave out tap=NAME and a free name is chosen")]
    NameTaken(String),
    #[error("there is no bridge {0}; make it with: ip link add {0} type bridge && ip link set {0} up")]
    NoBridge(String),
    #[error("{what} failed: {source}")]
    Os { what: String, source: io::Error },
}

fn os(what: impl Into<String>) -> impl FnOnce(io::Error) -> TapError {
    let what = what.into();
    move |source| TapError::Os { what, source }
}

/// An open TAP device with its queue files.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
    control: Control,
}

impl Tap {
    /// Opens or makes the TAP. It is left as it was found: a new one is down until [`Tap::join`].
    pub fn open(config: &TapConfig) -> Result<Tap, TapError> {
        if config.queue_pairs == 0 || config.queue_pairs > MAX_QUEUE_PAIRS {
            return Err(TapError::QueuePairs(config.queue_pairs));
        }
        let control = Control::new().map_err(os("opening a socket for interface requests"))?;
        let wanted = config.name.as_deref().unwrap_or("ferry%d");
        let multi = libc::IFF_MULTI_QUEUE;
        let ours = config.bridge.is_some() || config.name.is_none();

        let mut flags = if config.queue_pairs > 1 { multi } else { 0 };
        if ours {
            if let Some(bridge) = &config.bridge
                && control.index(bridge).is_err()
            {
                return Err(TapError::NoBridge(bridge.clone()));
            }
            if config.name.is_some() && control.index(wanted).is_ok() {
                return Err(TapError::NameTaken(wanted.to_owned()));
            }
        }

        let mut queues = Vec::with_capacity(usize::from(config.queue_pairs));
        let mut name = wanted.to_owned();
        for _ in 0..config.queue_pairs {
            let queue = interface::open_tun().map_err(TapError::NoTun)?;
            let mut attached = interface::attach_tap(&queue, &name, flags);
            // The kernel attaches a file to an existing TAP only with the flag that it was made with.
            if matches!(&attached, Err(e) if e.raw_os_error() == Some(libc::EINVAL)) && flags == 0 && !ours {
                flags = multi;
                attached = interface::attach_tap(&queue, &name, flags);
            }
            name = attached.map_err(|error| match error.raw_os_error() {
                Some(libc::EPERM) => TapError::NotPermitted(name.clone()),
                Some(libc::EBUSY) => TapError::InUse(name.clone()),
                Some(libc::EINVAL) => TapError::NotATap(name.clone()),
                _ => os(format!("opening the TAP device {name}"))(error),
            })?;
            interface::set_header_bytes(&queue, GUEST_HEADER_BYTES)
                .map_err(os(format!("setting the header size of {name}")))?;
            interface::clear_offloads(&queue).map_err(os(format!("setting the offloads of {name}")))?;
            queues.push(queue);
        }
        let tap = Tap {
            name,
            queues,
            control,
        };
        if let Some(bridge) = &config.bridge {
            tap.enter_bridge(bridge, config.guest_mac)?;
        }
        Ok(tap)
    }

    /// A bridge takes the lowest MAC address of its ports as its own. A port that comes and goes with a low address
    /// would change the host's address each time, so ours gets the highest first byte that a unicast, locally
    /// administered address can have.
    fn enter_bridge(&self, bridge: &str, guest_mac: [u8; 6]) -> Result<(), TapError> {
        let [_, b, c, d, e, f] = guest_mac;
        self.control
            .set_mac(&self.name, [0xfe, b, c, d, e, f])
            .map_err(os(format!("setting the address of {}", self.name)))?;
        self.control
            .add_to_bridge(bridge, &self.name)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::ENODEV) => TapError::NoBridge(bridge.to_owned()),
                _ => os(format!("attaching {} to the bridge {bridge}", self.name))(error),
            })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn queue_pairs(&self) -> u16 {
        self.queues.len() as u16
    }

    /// Copies of the queue files, one for each pair, for the device. The interface lives until the last copy closes.
    pub fn queue_files(&self) -> Result<Vec<OwnedFd>, TapError> {
        self.queues
            .iter()
            .map(|queue| queue.try_clone().map(OwnedFd::from))
            .collect::<io::Result<_>>()
            .map_err(os(format!("copying the queue files of {}", self.name)))
    }

    /// Takes the guest onto the network: interface up, carrier on. Packets for it are queued from here on.
    pub fn join(&self) -> Result<(), TapError> {
        self.set_carrier(true)?;
        self.set_up(true)
    }

    /// Takes the guest off the network. A bridge forgets at once where the guest's address was, so what is still
    /// sent to it is flooded and finds the other side. Where the user may not bring the interface down (a TAP
    /// made for him by root), the carrier goes off, which bridges notice too.
    pub fn leave(&self) -> Result<(), TapError> {
        match self.control.set_up(&self.name, false) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => self.set_carrier(false),
            other => other.map_err(os(format!("taking {} down", self.name))),
        }
    }

    pub fn set_up(&self, up: bool) -> Result<(), TapError> {
        match self.control.set_up(&self.name, up) {
            Err(error)
                if error.raw_os_error() == Some(libc::EPERM)
                    && self.control.is_up(&self.name).ok() == Some(up) =>
            {
                Ok(())
            }
            other => other.map_err(os(format!(
                "taking {} {}",
                self.name,
                if up { "up" } else { "down" }
            ))),
        }
    }

    pub fn is_up(&self) -> Result<bool, TapError> {
        self.control
            .is_up(&self.name)
            .map_err(os(format!("asking for the state of {}", self.name)))
    }

    pub fn set_carrier(&self, on: bool) -> Result<(), TapError> {
        let Some(queue) = self.queues.first() else {
            return Ok(());
        };
        interface::set_carrier(queue, on).map_err(os(format!("setting the carrier of {}", self.name)))
    }

    /// The host side's own address, not the guest's.
    pub fn mac(&self) -> Result<[u8; 6], TapError> {
        self.control
            .mac(&self.name)
            .map_err(os(format!("asking for the address of {}", self.name)))
    }

    pub fn mtu(&self) -> Result<u16, TapError> {
        self.control
            .mtu(&self.name)
            .map_err(os(format!("asking for the MTU of {}", self.name)))
    }

    pub fn set_mtu(&self, mtu: u16) -> Result<(), TapError> {
        self.control
            .set_mtu(&self.name, mtu)
            .map_err(os(format!("setting the MTU of {} to {mtu}", self.name)))
    }

    /// Throws away what is queued for the guest and says how many frames that was. An incoming machine whose TAP is
    /// up before the switch drops what others flooded to it this way, so that the queue has room when it counts.
    pub fn discard_queued(&self) -> u64 {
        let mut frame = vec![0u8; GUEST_HEADER_BYTES + MAX_FRAME_BYTES];
        let mut discarded = 0;
        for mut queue in &self.queues {
            while matches!(queue.read(&mut frame), Ok(n) if n > 0) {
                discarded += 1;
            }
        }
        discarded
    }

    /// A hand that sends frames as if the guest had sent them.
    pub fn sender(&self) -> Result<FrameSender, TapError> {
        let queue = self
            .queues
            .first()
            .ok_or(TapError::QueuePairs(0))?
            .try_clone()
            .map_err(os(format!("copying a queue file of {}", self.name)))?;
        Ok(FrameSender {
            name: self.name.clone(),
            queue,
        })
    }
}

/// Sends whole frames into the network at the guest's place. It does not keep the machine waiting and does not use
/// the guest's queues.
#[derive(Debug)]
pub struct FrameSender {
    name: String,
    queue: File,
}

impl FrameSender {
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        let mut with_header = vec![0u8; GUEST_HEADER_BYTES];
        with_header.extend_from_slice(frame);
        (&self.queue).write(&with_header).map(drop)
    }
}
