//! The devices there are, set up once, before any work.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use crate::cpu;
use crate::memory::Memory;
use crate::virtio::block::{Block, Shared};
use crate::virtio::net::Net;

/// The vCPU that works with the disk and takes its interrupts.
pub const DISK_CPU: usize = 0;

pub struct Devices {
    pub disk: Option<&'static Shared>,
    net: Option<&'static NetPlace>,
    /// The vCPU that works with the network and takes its interrupts.
    pub net_cpu: usize,
}

struct NetPlace(UnsafeCell<Net>);
// SAFETY: see `net`.
unsafe impl Sync for NetPlace {}

impl Devices {
    pub fn find(memory: &mut Memory, cpus: usize) -> Devices {
        let net_cpu = cpus - 1;
        let disk = Block::begin(0, memory, cpu::apic_id_of(DISK_CPU))
            .and_then(|block| keep(memory, Shared::new(block)));
        let net = Net::begin(0, memory, cpu::apic_id_of(net_cpu))
            .and_then(|net| keep(memory, NetPlace(UnsafeCell::new(net))));
        Devices { disk, net, net_cpu }
    }

    /// The network device, for the one worker of a shift that uses it.
    ///
    /// # Safety
    /// The worker of the last shift that had it must have gone.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn net(&self) -> Option<&'static mut Net> {
        // SAFETY: the caller vouches that nobody else has it.
        self.net.map(|place| unsafe { &mut *place.0.get() })
    }
}

/// Puts a value where it stays for good.
fn keep<T>(memory: &mut Memory, value: T) -> Option<&'static T> {
    // SAFETY: taken before any shift and kept; anything is a MaybeUninit.
    let place = unsafe { memory.take_zeroed::<MaybeUninit<T>>(1)? };
    Some(place[0].write(value))
}
