//! The devices there are, set up once, before any work.

use core::mem::MaybeUninit;

use crate::cpu;
use crate::memory::Memory;
use crate::virtio::block::{Block, Shared};

/// The vCPU that works with the disk and takes its interrupts.
pub const DISK_CPU: usize = 0;

pub struct Devices {
    pub disk: Option<&'static Shared>,
}

impl Devices {
    pub fn find(memory: &mut Memory, cpus: usize) -> Devices {
        let _ = cpus;
        let disk = Block::begin(0, memory, cpu::apic_id_of(DISK_CPU))
            .and_then(|block| keep(memory, Shared::new(block)));
        Devices { disk }
    }
}

/// Puts a value where it stays for good.
fn keep<T>(memory: &mut Memory, value: T) -> Option<&'static T> {
    // SAFETY: taken before any shift and kept; anything is a MaybeUninit.
    let place = unsafe { memory.take_zeroed::<MaybeUninit<T>>(1)? };
    Some(place[0].write(value))
}
