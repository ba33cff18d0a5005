//! The host's end of a network device: files on which one read or write is one frame with its virtio header.
#![allow(unsafe_code)] // two TUN ioctls that take an integer and a struct

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// What the other side may leave undone because the receiver can do it. Checksum is the base of all the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    pub checksum: bool,
    pub tso4: bool,
    pub tso6: bool,
    pub ecn: bool,
    pub ufo: bool,
    pub uso4: bool,
    pub uso6: bool,
}

/// What the device stands on. The files do not block.
pub trait NetBackend: Send + Sync {
    /// One for each queue pair.
    fn files(&self) -> &[OwnedFd];
    /// UDP segmentation, which older kernels do not know.
    fn knows_uso(&self) -> bool;
    /// What the guest accepts from now on in the frames that are read here.
    fn set_offloads(&self, guest_accepts: Offloads) -> io::Result<()>;
    /// Spreads received frames over the first `pairs` files only.
    fn set_active_pairs(&self, pairs: usize) -> io::Result<()>;
}

/// The queue files of a TAP device that was opened with IFF_VNET_HDR and a header of 12 bytes.
#[derive(Debug)]
pub struct TapBackend {
    queues: Vec<OwnedFd>,
    knows_uso: bool,
    attached: Mutex<usize>,
}

impl TapBackend {
    pub fn new(queues: Vec<OwnedFd>) -> io::Result<Self> {
        let first = queues
            .first()
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "a TAP has at least one queue"))?;
        let knows_uso =
            set_offload_bits(first, libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6).is_ok();
        set_offload_bits(first, 0)?;
        let attached = Mutex::new(queues.len());
        Ok(Self {
            queues,
            knows_uso,
            attached,
        })
    }
}

impl NetBackend for TapBackend {
    fn files(&self) -> &[OwnedFd] {
        &self.queues
    }

    fn knows_uso(&self) -> bool {
        self.knows_uso
    }

    fn set_offloads(&self, guest_accepts: Offloads) -> io::Result<()> {
        let Some(first) = self.queues.first() else {
            return Ok(());
        };
        set_offload_bits(first, offload_bits(guest_accepts))
    }

    fn set_active_pairs(&self, pairs: usize) -> io::Result<()> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        // A TAP with one queue cannot detach it, and the first is never detached.
        let wanted = pairs.clamp(1, self.queues.len());
        while *attached != wanted {
            let attach = wanted > *attached;
            let index = if attach { *attached } else { *attached - 1 };
            let Some(queue) = self.queues.get(index) else {
                break;
            };
            set_attached(queue, attach)?;
            *attached = if attach { *attached + 1 } else { *attached - 1 };
        }
        Ok(())
    }
}

/// The kernel refuses segmentation for a receiver that cannot do checksums.
fn offload_bits(offloads: Offloads) -> libc::c_uint {
    let Offloads {
        checksum,
        tso4,
        tso6,
        ecn,
        ufo,
        uso4,
        uso6,
    } = offloads;
    if !checksum {
        return 0;
    }
    let bits = [
        (true, libc::TUN_F_CSUM),
        (tso4, libc::TUN_F_TSO4),
        (tso6, libc::TUN_F_TSO6),
        (ecn && (tso4 || tso6), libc::TUN_F_TSO_ECN),
        (ufo, libc::TUN_F_UFO),
        // The kernel takes both or none.
        (uso4 && uso6, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    bits.iter()
        .filter(|(on, _)| *on)
        .fold(0, |all, (_, bit)| all | bit)
}

fn set_offload_bits(queue: &OwnedFd, bits: libc::c_uint) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let result = unsafe {
        libc::ioctl(
            queue.as_raw_fd(),
            libc::TUNSETOFFLOAD as _,
            libc::c_ulong::from(bits),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn set_attached(queue: &OwnedFd, attach: bool) -> io::Result<()> {
    let flag = if attach {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    // SAFETY: ifreq is a plain C struct of integers and arrays; all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    // SAFETY: TUNSETQUEUE reads an ifreq, which lives through the call.
    let result = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE as _, &raw mut request) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
