//! From the host into the guest: one readv for each frame, straight into the guest's buffers.
//!
//! A frame that was taken from the host is never lost: one that does not fit the buffers that are there waits in
//! `pending` for more of them, and is saved with the machine.

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::time::Duration;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::buffers::ReceiveBuffers;
use super::ring::{Broken, Ring};
use super::shared::{Direction, Shared};
use super::stats::NetTotals;
use super::{HEADER_BYTES, MAX_FRAME_BYTES, MIN_FRAME_BYTES};
use crate::ram::Ram;

/// Frames in one go, so that sending and stopping get their turn.
const BATCH: usize = 128;
/// Enough for a frame without segmentation, and for several of them at once.
const SMALL_ROOM: usize = 16 << 10;

/// Why it stopped receiving for now.
#[derive(Debug)]
pub(super) enum Pause {
    /// The host has nothing.
    Empty,
    /// There may be more; others first.
    Batch,
    /// The guest has given no buffers, or too few. It will kick.
    NoBuffers,
    Limited(Duration),
    Gone(io::Error),
}

pub(super) struct Receiver {
    pub(super) ring: Ring,
    ram: Ram,
    buffers: ReceiveBuffers,
    spill: Vec<u8>,
    used: Vec<(u16, u32)>,
    pending: Option<Vec<u8>>,
    mergeable: bool,
    room_wanted: usize,
}

impl Receiver {
    pub(super) fn new(
        ring: Ring,
        ram: Ram,
        mergeable: bool,
        large_frames: bool,
        pending: Option<Vec<u8>>,
    ) -> Self {
        let largest = HEADER_BYTES + MAX_FRAME_BYTES;
        Self {
            ring,
            buffers: ReceiveBuffers::new(ram.clone()),
            ram,
            // One byte more than the largest frame, so that a larger one is noticed.
            spill: vec![0; largest + 1],
            used: Vec::new(),
            pending,
            mergeable,
            room_wanted: if large_frames { largest } else { SMALL_ROOM },
        }
    }

    /// Moves frames until something stops it.
    pub(super) fn receive(&mut self, file: BorrowedFd<'_>, shared: &Shared) -> Result<Pause, Broken> {
        let mut done = NetTotals::default();
        let result = self.receive_some(file, shared, &mut done);
        shared.counters.add(done);
        result
    }

    fn receive_some(
        &mut self,
        file: BorrowedFd<'_>,
        shared: &Shared,
        done: &mut NetTotals,
    ) -> Result<Pause, Broken> {
        self.ring.spare_kicks(&self.ram)?;
        for _ in 0..BATCH {
            if !self.gather(shared, done)? {
                return Ok(Pause::NoBuffers);
            }
            if let Some(wait) = shared.must_wait(Direction::Receive) {
                return Ok(Pause::Limited(wait));
            }
            if let Some(frame) = self.pending.take() {
                self.buffers.copy_in(&frame)?;
                self.deliver(frame.len(), shared, done)?;
                continue;
            }
            match self.buffers.read_from(file, self.mergeable, &mut self.spill) {
                Ok(bytes) => self.place(bytes, shared, done)?,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return Ok(Pause::Empty),
                    ErrorKind::Interrupted => {}
                    ErrorKind::OutOfMemory => done.received_dropped += 1,
                    _ => return Ok(Pause::Gone(error)),
                },
            }
        }
        Ok(Pause::Batch)
    }

    /// Takes buffers from the guest. False: it has to give more first, and has been asked to kick.
    fn gather(&mut self, shared: &Shared, done: &mut NetTotals) -> Result<bool, Broken> {
        loop {
            let waiting = self.pending.as_ref().map_or(0, Vec::len);
            let wanted = if self.mergeable {
                self.room_wanted.max(waiting)
            } else {
                1
            };
            let before = self.buffers.count();
            let mut available = self.ring.queue.iter(&self.ram).map_err(|_| Broken::Available)?;
            while self.buffers.bytes() < wanted && !self.buffers.is_full() {
                let Some(chain) = available.next() else { break };
                self.buffers.push(chain)?;
            }
            if !self.buffers.is_empty() && self.buffers.room(self.mergeable) >= waiting {
                return Ok(true);
            }
            if waiting > 0 && self.can_never_hold_more() {
                shared.complain(|| "a frame is larger than all the guest's receive buffers".to_owned());
                done.received_dropped += 1;
                self.pending = None;
                continue;
            }
            if !self.ring.ask_for_kick(&self.ram)? {
                return Ok(false);
            }
            // There are more, says the index; if none could be taken all the same, the ring is unreadable.
            if self.buffers.count() == before {
                let mut available = self.ring.queue.iter(&self.ram).map_err(|_| Broken::Available)?;
                let chain = available.next().ok_or(Broken::Available)?;
                self.buffers.push(chain)?;
            }
        }
    }

    fn can_never_hold_more(&self) -> bool {
        self.buffers.is_full()
            || self.buffers.count() >= self.ring.queue.size()
            || (!self.mergeable && !self.buffers.is_empty())
    }

    /// `bytes` were read, header included: into the buffers, and into the spill what they could not hold.
    fn place(&mut self, bytes: usize, shared: &Shared, done: &mut NetTotals) -> Result<(), Broken> {
        if !(HEADER_BYTES + MIN_FRAME_BYTES..=HEADER_BYTES + MAX_FRAME_BYTES).contains(&bytes) {
            shared.complain(|| format!("the host gave a frame of {bytes} bytes, which was dropped"));
            done.received_dropped += 1;
            return Ok(());
        }
        let room = self.buffers.room(self.mergeable);
        if bytes <= room {
            return self.deliver(bytes, shared, done);
        }
        if !self.mergeable {
            shared.complain(|| format!("a frame of {bytes} bytes does not fit the guest's buffer of {room}"));
            done.received_dropped += 1;
            return Ok(());
        }
        let mut frame = vec![0; room];
        let copied = self.buffers.copy_out(&mut frame);
        let rest = self.spill.get(..bytes - room).filter(|_| copied == room);
        frame.extend_from_slice(rest.ok_or(Broken::Descriptor)?);
        self.pending = Some(frame);
        Ok(())
    }

    /// The first `bytes` of the buffers hold a frame: the guest gets it.
    fn deliver(&mut self, bytes: usize, shared: &Shared, done: &mut NetTotals) -> Result<(), Broken> {
        self.buffers.use_up(bytes, &mut self.used)?;
        self.ring.publish(&self.ram, &self.used)?;
        let frame = (bytes - HEADER_BYTES) as u64;
        shared.charge(Direction::Receive, frame);
        done.received_packets += 1;
        done.received_bytes += frame;
        Ok(())
    }

    pub(super) fn wants_interrupt(&mut self) -> bool {
        self.ring.wants_interrupt(&self.ram)
    }

    /// Puts unused buffers back and gives up the queue and the frame that had no room yet.
    pub(super) fn finish(mut self) -> (u16, Queue, Option<Vec<u8>>) {
        self.ring.put_back(self.buffers.count());
        self.buffers.clear();
        (self.ring.index, self.ring.queue, self.pending)
    }
}
