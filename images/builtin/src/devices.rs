//! The devices there are, set up once, before any work.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;

use crate::cpu;
use crate::memory::Memory;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{Block, Shared};
use crate::virtio::lane::Lane;
use crate::virtio::net::Net;
use crate::virtio::{self, Device, EVENT_INDEX};
use crate::work::console::Lines;

/// The vCPU that works with the disk and takes its interrupts.
pub const DISK_CPU: usize = 0;

pub struct Devices {
    pub disk: Option<&'static Shared>,
    net: Option<Place<Net>>,
    entropy: Option<Place<Lane>>,
    console: Option<Place<Lines>>,
    balloon: Option<Place<Balloon>>,
    /// The vCPU that works with all but the disk and takes their interrupts.
    pub net_cpu: usize,
}

/// A device that one worker of a shift has to itself.
struct Place<T: 'static>(&'static UnsafeCell<T>);

impl Devices {
    pub fn find(memory: &mut Memory, cpus: usize) -> Devices {
        let net_cpu = cpus - 1;
        let disk = Block::begin(0, memory, cpu::apic_id_of(DISK_CPU))
            .and_then(|block| keep(memory, Shared::new(block)));
        let apic_id = cpu::apic_id_of(net_cpu);
        let net = Net::begin(0, memory, apic_id).and_then(|net| Place::of(memory, net));
        let entropy = begin_entropy(memory, apic_id).and_then(|lane| Place::of(memory, lane));
        let console = begin_console(memory, apic_id).and_then(|lines| Place::of(memory, lines));
        let balloon = Balloon::begin(memory, apic_id).and_then(|balloon| Place::of(memory, balloon));
        Devices {
            disk,
            net,
            entropy,
            console,
            balloon,
            net_cpu,
        }
    }

    /// The network device, for the one worker of a shift that uses it.
    ///
    /// # Safety
    /// The worker of the last shift that had it must have gone. So with the others.
    pub unsafe fn net(&self) -> Option<&'static mut Net> {
        // SAFETY: the caller vouches that nobody else has it.
        self.net.as_ref().map(|place| unsafe { place.get() })
    }

    /// # Safety
    /// As for `net`.
    pub unsafe fn entropy(&self) -> Option<&'static mut Lane> {
        // SAFETY: as above.
        self.entropy.as_ref().map(|place| unsafe { place.get() })
    }

    /// # Safety
    /// As for `net`.
    pub unsafe fn console(&self) -> Option<&'static mut Lines> {
        // SAFETY: as above.
        self.console.as_ref().map(|place| unsafe { place.get() })
    }

    /// # Safety
    /// As for `net`.
    pub unsafe fn balloon(&self) -> Option<&'static mut Balloon> {
        // SAFETY: as above.
        self.balloon.as_ref().map(|place| unsafe { place.get() })
    }
}

impl<T> Place<T> {
    fn of(memory: &mut Memory, value: T) -> Option<Place<T>> {
        keep(memory, UnsafeCell::new(value)).map(Place)
    }

    /// # Safety
    /// Nobody else may have it.
    #[allow(clippy::mut_from_ref)]
    unsafe fn get(&self) -> &'static mut T {
        // SAFETY: the caller vouches for it.
        unsafe { &mut *self.0.get() }
    }
}

fn begin_entropy(memory: &mut Memory, apic_id: u32) -> Option<Lane> {
    let mut device = Device::begin(virtio::find(4, 0)?, EVENT_INDEX)?;
    let lane = Lane::begin(&mut device, 0, true, memory, apic_id)?;
    device.ready();
    Some(lane)
}

fn begin_console(memory: &mut Memory, apic_id: u32) -> Option<Lines> {
    let mut device = Device::begin(virtio::find(3, 0)?, EVENT_INDEX)?;
    let incoming = Lane::begin(&mut device, 0, true, memory, apic_id)?;
    let outgoing = Lane::begin(&mut device, 1, false, memory, apic_id)?;
    device.ready();
    Some(Lines { incoming, outgoing })
}

/// Puts a value where it stays for good.
fn keep<T>(memory: &mut Memory, value: T) -> Option<&'static T> {
    // SAFETY: taken before any shift and kept; anything is a MaybeUninit.
    let place = unsafe { memory.take_zeroed::<MaybeUninit<T>>(1)? };
    Some(place[0].write(value))
}
