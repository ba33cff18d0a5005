//! A virtio block device that several workers share: requests go into slots, answers are fetched by slot.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

use super::queue::{Piece, Queue};
use super::{Device, EVENT_INDEX};
use crate::memory::Memory;

pub const BLOCK: u64 = 4096;
pub const SLOTS: usize = 32;
/// The most one request moves.
pub const LARGEST: usize = 16 * BLOCK as usize;
const FLUSH: u64 = 1 << 9;
const READ_ONLY: u64 = 1 << 5;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Read = 0,
    Write = 1,
    Flush = 4,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    InFlight(u16),
    /// In flight, for a worker that has gone.
    Forgotten(u16),
    Done,
}

/// What the device reads and writes for one request.
#[repr(C, align(4096))]
struct Slot {
    data: [u8; LARGEST],
    header: [u64; 2],
    status: u8,
}

pub struct Block {
    queue: Queue,
    slots: &'static mut [Slot],
    states: [State; SLOTS],
    pub blocks: u64,
    pub read_only: bool,
    can_flush: bool,
}

impl Block {
    pub fn begin(nth: usize, memory: &mut Memory, apic_id: u32) -> Option<Block> {
        let function = super::find(2, nth)?;
        let mut device = Device::begin(function, FLUSH | READ_ONLY | EVENT_INDEX)?;
        let queue = device.queue(0, 128, memory, apic_id)?;
        // SAFETY: made before any shift, kept for good; plain numbers.
        let slots = unsafe { memory.take_zeroed::<Slot>(SLOTS)? };
        device.ready();
        let sectors = device.config.get::<u32>(0) as u64 | (device.config.get::<u32>(4) as u64) << 32;
        Some(Block {
            queue,
            slots,
            states: [State::Free; SLOTS],
            blocks: sectors * 512 / BLOCK,
            read_only: device.features & READ_ONLY != 0,
            can_flush: device.features & FLUSH != 0,
        })
    }

    /// A free slot's buffer, to be filled before `submit`.
    pub fn buffer(&mut self) -> Option<(usize, &mut [u8; LARGEST])> {
        let slot = self.states.iter().position(|s| *s == State::Free)?;
        Some((slot, &mut self.slots[slot].data))
    }

    /// Starts a request with this slot's buffer. False if the queue is full: try again later.
    pub fn submit(&mut self, slot: usize, kind: Kind, block: u64, length: usize) -> bool {
        if kind == Kind::Flush && !self.can_flush {
            self.slots[slot].status = 0;
            self.states[slot] = State::Done;
            return true;
        }
        let place = &mut self.slots[slot];
        place.header = [
            kind as u64,
            if kind == Kind::Flush {
                0
            } else {
                block * BLOCK / 512
            },
        ];
        place.status = 0xff;
        let header = Piece {
            address: &raw const place.header as u64,
            length: 16,
            device_writes: false,
        };
        let status = Piece {
            address: &raw const place.status as u64,
            length: 1,
            device_writes: true,
        };
        let data = Piece {
            address: &raw const place.data as u64,
            length: length as u32,
            device_writes: kind == Kind::Read,
        };
        let head = if kind == Kind::Flush {
            self.queue.add(&[header, status])
        } else {
            self.queue.add(&[header, data, status])
        };
        self.states[slot] = head.map_or(State::Free, State::InFlight);
        head.is_some()
    }

    /// Tells the device, and collects what it has finished.
    pub fn turn(&mut self) {
        self.queue.kick();
        while let Some((head, _)) = self.queue.pop() {
            for state in &mut self.states {
                if *state == State::InFlight(head) {
                    *state = State::Done;
                } else if *state == State::Forgotten(head) {
                    *state = State::Free;
                }
            }
        }
    }

    /// The answer of a finished request, once: whether it went well, and its buffer, free from now on.
    pub fn answer(&mut self, slot: usize) -> Option<(bool, &[u8; LARGEST])> {
        if self.states[slot] != State::Done {
            return None;
        }
        self.states[slot] = State::Free;
        let place = &self.slots[slot];
        // SAFETY: the device wrote the status; it is read once.
        let status = unsafe { (&raw const place.status).read_volatile() };
        Some((status == 0, &place.data))
    }

    /// Asks for an interrupt at the next answer; true if there is one already, for whomever.
    pub fn listen(&mut self) -> bool {
        self.queue.listen() || self.states.contains(&State::Done)
    }
}

/// A device shared by workers on any vCPU.
pub struct Shared {
    busy: AtomicBool,
    block: UnsafeCell<Block>,
}
// SAFETY: `with` lets one in at a time.
unsafe impl Sync for Shared {}

impl Shared {
    pub const fn new(block: Block) -> Shared {
        Shared {
            busy: AtomicBool::new(false),
            block: UnsafeCell::new(block),
        }
    }

    pub fn with<T>(&self, act: impl FnOnce(&mut Block) -> T) -> T {
        while self.busy.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
        // SAFETY: alone until `busy` is false again.
        let result = act(unsafe { &mut *self.block.get() });
        self.busy.store(false, Ordering::Release);
        result
    }

    /// Gives up what was asked for by workers that have gone.
    pub fn forget(&self) {
        self.with(|block| {
            for state in &mut block.states {
                if *state == State::Done {
                    *state = State::Free;
                } else if let State::InFlight(head) = *state {
                    *state = State::Forgotten(head);
                }
            }
        });
    }
}
