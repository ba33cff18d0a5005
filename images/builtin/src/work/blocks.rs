//! Requests to a disk as fast as it answers them, for measurements. What the disk held is lost where it writes.

use core::sync::atomic::{AtomicU64, Ordering};

use super::Next;
use super::io::Io;
use crate::pick::{Order, Picker};
use crate::virtio::block::{BLOCK, Kind, SLOTS, Shared};

pub static DONE: AtomicU64 = AtomicU64::new(0);
pub static BYTES: AtomicU64 = AtomicU64::new(0);

/// What is asked for, over and over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ask {
    pub write: bool,
    pub order: Order,
    /// Bytes of each request.
    pub bytes: u64,
    /// Requests in flight.
    pub depth: usize,
}

pub struct Blocks {
    io: Io,
    ask: Ask,
    place: Picker,
    in_flight: [Option<u8>; SLOTS],
    serial: u64,
}

impl Blocks {
    /// None on a disk that is smaller than a request, or read-only and to be written.
    pub fn new(disk: &'static Shared, ask: Ask, seed: u64) -> Option<Blocks> {
        let (blocks, read_only) = disk.with(|d| (d.blocks, d.read_only));
        let places = blocks / (ask.bytes / BLOCK);
        (places > 0 && !(ask.write && read_only)).then(|| Blocks {
            io: Io::new(disk),
            ask,
            place: Picker::new(ask.order, places, seed),
            in_flight: [None; SLOTS],
            serial: 0,
        })
    }

    pub fn step(&mut self, now: u64) -> Next {
        Io::turn(self, |w| &mut w.io, now, |w| w.refill(now))
    }

    fn refill(&mut self, now: u64) -> Next {
        let Ask {
            write, bytes, depth, ..
        } = self.ask;
        for place in self.in_flight.iter_mut().take(depth) {
            if let Some(slot) = *place {
                match self.io.answer(usize::from(slot), now, |_| {}) {
                    None => continue,
                    Some(good) => {
                        *place = None;
                        if good {
                            DONE.fetch_add(1, Ordering::Relaxed);
                            BYTES.fetch_add(bytes, Ordering::Relaxed);
                        }
                    }
                }
            }
            let kind = if write { Kind::Write } else { Kind::Read };
            let block = self.place.next() * (bytes / BLOCK);
            self.serial += 1;
            let serial = self.serial;
            let slot = self.io.request(kind, block, bytes as usize, |buffer| {
                // Not always the same block, so that no layer below can leave it out.
                if let (true, Some(head)) = (write, buffer.first_chunk_mut()) {
                    *head = serial.to_le_bytes();
                }
            });
            *place = slot.map(|slot| slot as u8);
        }
        Next::At(u64::MAX)
    }
}
