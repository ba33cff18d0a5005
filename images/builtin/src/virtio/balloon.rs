//! A virtio balloon: gives pages to the host and takes them back, tells it statistics, and says which pages are free.

use super::queue::{Piece, Queue};
use super::{Device, EVENT_INDEX};
use crate::memory::{Memory, PAGE};

const STATS: u64 = 1 << 1;
const HINTS: u64 = 1 << 3;
const REPORTING: u64 = 1 << 5;
/// Commands below this one are "stop" and "done".
const FIRST_COMMAND: u32 = 2;
pub const MOST_NUMBERS: usize = 512;
const SIZE: u16 = 128;

/// A queue, and how many requests in it the device has not answered.
struct Lane {
    queue: Queue,
    pending: u16,
}

impl Lane {
    fn begin(device: &mut Device, index: &mut u16, memory: &mut Memory, apic_id: u32) -> Option<Lane> {
        let queue = device.queue(*index, SIZE, memory, apic_id)?;
        *index += 1;
        Some(Lane { queue, pending: 0 })
    }

    fn add(&mut self, piece: Piece) -> bool {
        let added = self.queue.add(&[piece]).is_some();
        self.pending += added as u16;
        added
    }

    fn send(&mut self, piece: Piece) -> bool {
        let added = self.add(piece);
        self.queue.kick();
        added
    }

    /// True once for each request that the device has answered.
    fn answered(&mut self) -> bool {
        let answered = self.queue.pop().is_some();
        self.pending -= answered as u16;
        answered
    }
}

/// What the device reads, apart from the pages themselves.
#[repr(C, align(4096))]
struct Papers {
    numbers: [u32; MOST_NUMBERS],
    /// Tag and value, ten bytes each.
    stats: [u8; 20],
    command: u32,
    stop: u32,
}

pub struct Balloon {
    device: Device,
    inflate: Lane,
    deflate: Lane,
    stats: Option<Lane>,
    hints: Option<Lane>,
    reporting: Option<Lane>,
    papers: &'static mut Papers,
    command_seen: u32,
}

/// A request to give pages to the host or to take them back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Move {
    Give,
    TakeBack,
}

impl Balloon {
    pub fn begin(memory: &mut Memory, apic_id: u32) -> Option<Balloon> {
        let function = super::find(5, 0)?;
        let mut device = Device::begin(function, STATS | HINTS | REPORTING | EVENT_INDEX)?;
        let features = device.features;
        let mut index = 0;
        let mut lane = |device: &mut Device, memory: &mut Memory, feature: u64| {
            // A queue whose feature is not agreed does not exist, and those behind it move up.
            let is_there = feature == 0 || features & feature != 0;
            is_there
                .then(|| Lane::begin(device, &mut index, memory, apic_id))
                .flatten()
        };
        let inflate = lane(&mut device, memory, 0)?;
        let deflate = lane(&mut device, memory, 0)?;
        let stats = lane(&mut device, memory, STATS);
        let hints = lane(&mut device, memory, HINTS);
        let reporting = lane(&mut device, memory, REPORTING);
        device.watch_config(apic_id);
        // SAFETY: made before any shift, kept for good; plain numbers.
        let papers = unsafe { &mut memory.take_zeroed::<Papers>(1)?[0] };
        device.ready();
        Some(Balloon {
            device,
            inflate,
            deflate,
            stats,
            hints,
            reporting,
            papers,
            command_seen: 0,
        })
    }

    /// How many pages the host wants.
    pub fn target(&self) -> u64 {
        self.device.config.get::<u32>(0) as u64
    }

    pub fn tell_given(&mut self, pages: u64) {
        self.device.config.set(4, pages as u32);
    }

    /// Gives pages or takes them back, by their addresses. Only one such request at a time.
    pub fn start_move(&mut self, what: Move, addresses: impl Iterator<Item = u64>) -> bool {
        let mut count = 0;
        for (place, address) in self.papers.numbers.iter_mut().zip(addresses) {
            *place = (address / PAGE) as u32;
            count += 1;
        }
        let piece = Piece {
            address: self.papers.numbers.as_ptr() as u64,
            length: 4 * count,
            device_writes: false,
        };
        let lane = match what {
            Move::Give => &mut self.inflate,
            Move::TakeBack => &mut self.deflate,
        };
        count > 0 && lane.send(piece)
    }

    pub fn move_done(&mut self, what: Move) -> bool {
        match what {
            Move::Give => self.inflate.answered(),
            Move::TakeBack => self.deflate.answered(),
        }
    }

    /// Whether the host can be lent free pages.
    pub fn can_report(&self) -> bool {
        self.reporting.as_ref().is_some_and(|lane| lane.pending == 0)
    }

    /// Lends free pages to the host until `report_done`; they come back with any content.
    pub fn report(&mut self, address: u64, bytes: u64) -> bool {
        let piece = Piece {
            address,
            length: bytes as u32,
            device_writes: true,
        };
        self.reporting.as_mut().is_some_and(|lane| lane.send(piece))
    }

    pub fn report_done(&mut self) -> bool {
        self.reporting.as_mut().is_some_and(Lane::answered)
    }

    /// Gives the host fresh numbers when it wants some: it keeps them until it asks for the next.
    pub fn tell_stats(&mut self, free_bytes: u64, total_bytes: u64) {
        let Some(lane) = &mut self.stats else { return };
        lane.answered();
        if lane.pending > 0 {
            return;
        }
        for (entry, (tag, value)) in [(4u16, free_bytes), (5, total_bytes)].into_iter().enumerate() {
            let at = 10 * entry;
            self.papers.stats[at..at + 2].copy_from_slice(&tag.to_le_bytes());
            self.papers.stats[at + 2..at + 10].copy_from_slice(&value.to_le_bytes());
        }
        lane.send(Piece {
            address: self.papers.stats.as_ptr() as u64,
            length: 20,
            device_writes: false,
        });
    }

    /// A new question which pages are free, if the host asks one.
    pub fn asked_for_hints(&mut self) -> bool {
        let Some(lane) = &mut self.hints else {
            return false;
        };
        while lane.answered() {}
        let command = self.device.config.get::<u32>(8);
        if command == self.command_seen || lane.pending > 0 {
            return false;
        }
        self.command_seen = command;
        command >= FIRST_COMMAND
    }

    /// Answers it: these ranges are free, from now until they are written to.
    pub fn hint(&mut self, ranges: impl Iterator<Item = (u64, u64)>) {
        let Some(lane) = &mut self.hints else { return };
        let word = |at: *const u32| Piece {
            address: at as u64,
            length: 4,
            device_writes: false,
        };
        self.papers.command = self.command_seen;
        self.papers.stop = 0;
        let first = word(&raw const self.papers.command);
        let last = word(&raw const self.papers.stop);
        lane.add(first);
        // Room is left for the last word, which must come.
        for (address, bytes) in ranges.take(SIZE as usize / 2) {
            lane.add(Piece {
                address,
                length: bytes as u32,
                device_writes: true,
            });
        }
        lane.send(last);
    }

    /// Waits until the host has nothing of ours in its hands but what it keeps (a question for statistics).
    pub fn settle(&mut self) {
        let optional = [self.hints.as_mut(), self.reporting.as_mut()];
        let lanes = [Some(&mut self.inflate), Some(&mut self.deflate)];
        for lane in lanes.into_iter().chain(optional).flatten() {
            while lane.pending > 0 {
                lane.answered();
                core::hint::spin_loop();
            }
        }
    }

    /// Asks for interrupts; true if something has come already.
    pub fn listen(&mut self) -> bool {
        let optional = [self.stats.as_mut(), self.reporting.as_mut()];
        let mut come = self.inflate.queue.listen() | self.deflate.queue.listen();
        for lane in optional.into_iter().flatten() {
            come |= lane.queue.listen();
        }
        come
    }
}
