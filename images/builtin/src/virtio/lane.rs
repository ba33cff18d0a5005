//! One queue of a device and equal buffers for it, all moving in one direction: enough for entropy and a console.

use super::Device;
use super::queue::{Piece, Queue};
use crate::memory::Memory;

pub const BUFFER: usize = 4096;
const COUNT: usize = 16;

pub struct Lane {
    queue: Queue,
    buffers: &'static mut [[u8; BUFFER]],
    device_writes: bool,
    /// Which buffer a descriptor belongs to.
    owner: [u8; COUNT],
    free: [u8; COUNT],
    free_count: usize,
}

impl Lane {
    pub fn begin(
        device: &mut Device,
        index: u16,
        device_writes: bool,
        memory: &mut Memory,
        apic_id: u32,
    ) -> Option<Lane> {
        let queue = device.queue(index, COUNT as u16, memory, apic_id)?;
        // SAFETY: made before any shift, kept for good; plain bytes.
        let buffers = unsafe { memory.take_zeroed(COUNT)? };
        let free_count = (queue.size() as usize).min(COUNT);
        Some(Lane {
            queue,
            buffers,
            device_writes,
            owner: [0; COUNT],
            free: core::array::from_fn(|i| i as u8),
            free_count,
        })
    }

    pub fn has_room(&self) -> bool {
        self.free_count > 0
    }

    /// Gives the device a buffer after `fill` has said how much of it counts. Nothing happens without room.
    pub fn give(&mut self, fill: impl FnOnce(&mut [u8; BUFFER]) -> usize) {
        let Some(at) = self.free_count.checked_sub(1) else {
            return;
        };
        let index = self.free[at];
        let buffer = &mut self.buffers[index as usize];
        let length = fill(buffer).min(BUFFER) as u32;
        let piece = Piece {
            address: &raw const *buffer as u64,
            length,
            device_writes: self.device_writes,
        };
        if let Some(head) = self.queue.add(&[piece]) {
            self.owner[head as usize % COUNT] = index;
            self.free_count = at;
        }
    }

    /// Takes a buffer back that the device has finished with; `look` sees all of it and how much was written.
    pub fn take<T>(&mut self, look: impl FnOnce(&[u8; BUFFER], usize) -> T) -> Option<T> {
        let (head, written) = self.queue.pop()?;
        let index = self.owner[head as usize % COUNT];
        self.free[self.free_count] = index;
        self.free_count += 1;
        Some(look(
            &self.buffers[index as usize],
            (written as usize).min(BUFFER),
        ))
    }

    pub fn kick(&mut self) {
        self.queue.kick();
    }

    /// Asks for an interrupt at the next buffer; true if one is there already.
    pub fn listen(&mut self) -> bool {
        self.queue.listen()
    }
}
