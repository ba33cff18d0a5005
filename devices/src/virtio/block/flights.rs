//! The requests of one queue that were taken and not answered yet.
//!
//! # What a flush promises
//!
//! A flush that was acknowledged is on the disk, with every write acknowledged before the flush was asked for. It
//! follows from one rule: a write is answered only after the host's kernel (or the image format) has completed it.
//! So when a flush is submitted, every write the guest knows to be done, on any queue, is in the file, and syncing
//! the file makes all of them durable. Writes still in flight are not covered and need not be: nobody was told that
//! they are done. Where the guest was promised no volatile cache, each write is durable before it is answered, and
//! a discard or zeroing is followed by a sync.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::request::{self, Action, Bounds, MAX_DATA, Range, Request};
use crate::disk::engine::{Buffers, Done, Engine, Io, Op};
use crate::disk::{Disk, DiskFormat, HeldBy};
use crate::log_once::LogOnce;
use crate::ram::Ram;

/// What the queues of one disk share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) name: String,
    pub(super) disk: Arc<Disk>,
    /// The guest lets writes be answered before they are durable.
    pub(super) writeback: AtomicBool,
    pub(super) refused: LogOnce,
    pub(super) failed: LogOnce,
    pub(super) broken: LogOnce,
}

/// An answer whose status lies in guest memory already: the head of its chain, and how much was written into it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) head: u16,
    pub(super) written: u32,
}

/// Why a request stays in the queue for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotNow {
    /// Until something completes.
    NoRoom,
    /// By a limit, for so long.
    Held(Duration, HeldBy),
}

/// The guest left no place for the answer, or took it away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unanswerable;

pub(super) struct Flights {
    pub(super) shared: Arc<Shared>,
    ram: Ram,
    serial: String,
    /// The guest flushes, so writes may be answered before they are durable, if `Shared::writeback` agrees.
    has_flush: bool,
    /// None after it failed.
    engine: Option<Box<dyn Engine>>,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Bytes of our own memory that copies in flight hold.
    copied_bytes: u64,
    answers: Vec<Answer>,
    /// An answer could not be put into guest memory.
    unanswerable: bool,
    /// Kept only to be used again.
    done: Vec<Done>,
}

/// One request at work.
#[derive(Debug)]
struct Flight {
    head: u16,
    status: GuestAddress,
    /// Ranges still to be worked on after the present one, last first.
    later: Vec<Range>,
    copied: u64,
}

impl Flight {
    fn new(head: u16, status: GuestAddress) -> Self {
        Self {
            head,
            status,
            later: Vec::new(),
            copied: 0,
        }
    }
}

/// What a piece of work is about.
#[derive(Debug, Clone, Copy)]
struct Place {
    op: Op,
    offset: u64,
    len: u64,
}

impl Flights {
    pub(super) fn new(
        shared: Arc<Shared>,
        ram: Ram,
        serial: String,
        has_flush: bool,
        engine: Box<dyn Engine>,
        depth: usize,
    ) -> Self {
        Self {
            shared,
            ram,
            serial,
            has_flush,
            engine: Some(engine),
            flights: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            copied_bytes: 0,
            answers: Vec::new(),
            unanswerable: false,
            done: Vec::new(),
        }
    }

    pub(super) fn ram(&self) -> &Ram {
        &self.ram
    }

    pub(super) fn bounds(&self) -> Bounds {
        let disk = &self.shared.disk;
        Bounds {
            size: disk.size(),
            block_size: disk.block_size(),
            read_only: disk.is_read_only(),
        }
    }

    /// Begins a request, or says why it must stay in the queue. One that stays must come again as it is.
    pub(super) fn accept(&mut self, request: Request) -> Result<(), NotNow> {
        let Request { head, status, action } = request;
        if !self.has_room() {
            return Err(NotNow::NoRoom);
        }
        let (bytes, is_write) = match &action {
            Ok(Action::Read { len, .. }) => (*len, false),
            Ok(Action::Write { len, .. }) => (*len, true),
            Ok(Action::Discard(_) | Action::WriteZeroes(_)) => (0, true),
            Ok(Action::Flush | Action::GetId { .. }) | Err(_) => (0, false),
        };
        // Copies may hold as much memory as the largest request, or a little more.
        if self.copied_bytes > 0 && self.copied_bytes + bytes > MAX_DATA {
            return Err(NotNow::NoRoom);
        }
        if action.is_ok() {
            self.shared
                .disk
                .admit(bytes, is_write)
                .map_err(|(wait, by)| NotNow::Held(wait, by))?;
        }
        let flight = Flight::new(head, status);
        match action {
            Ok(Action::Read { offset, into, .. }) => self.transfer(flight, Op::Read, offset, into),
            Ok(Action::Write { offset, from, .. }) => self.transfer(flight, Op::Write, offset, from),
            Ok(Action::Flush) => {
                let place = Place {
                    op: Op::Flush,
                    offset: 0,
                    len: 0,
                };
                self.begin(flight, place, Buffers::none());
            }
            Ok(Action::GetId { into }) => {
                let written = self.get_id(&into);
                self.answer(&flight, written.is_ok(), written.unwrap_or(0));
            }
            Ok(Action::Discard(ranges)) => self.first_of(flight, Op::Discard, ranges),
            Ok(Action::WriteZeroes(ranges)) => {
                self.first_of(flight, Op::WriteZeroes { keep_allocated: true }, ranges)
            }
            Err(refusal) => {
                let name = &self.shared.name;
                let why = || {
                    format!(
                        "{name}: the guest made a request that was refused: {}",
                        refusal.why
                    )
                };
                self.shared.refused.warn(why);
                self.put_answer(&flight, refusal.status, 0);
            }
        }
        Ok(())
    }

    fn transfer(&mut self, mut flight: Flight, op: Op, offset: u64, pieces: Vec<(GuestAddress, usize)>) {
        let len = request::total(&pieces);
        let place = Place { op, offset, len };
        let disk = &self.shared.disk;
        let alignment = disk.alignment();
        let Some(buffers) = Buffers::in_guest(&self.ram, pieces) else {
            let name = &self.shared.name;
            self.shared
                .refused
                .warn(|| format!("{name}: the guest made a request with data outside its memory"));
            return self.answer(&flight, false, 0);
        };
        if disk.format() == DiskFormat::Raw && buffers.is_aligned(alignment.memory) {
            return self.begin(flight, place, buffers);
        }
        match buffers.copied(alignment.memory.max(alignment.offset), op == Op::Write) {
            Ok(buffers) => {
                flight.copied = len;
                self.begin(flight, place, buffers);
            }
            Err(_) => self.answer(&flight, false, 0),
        }
    }

    /// Works on ranges one after the other.
    fn first_of(&mut self, mut flight: Flight, op: Op, mut ranges: Vec<Range>) {
        ranges.reverse();
        flight.later = ranges;
        self.next_of(flight, op);
    }

    fn next_of(&mut self, mut flight: Flight, op: Op) {
        let Some(Range { offset, len, unmap }) = flight.later.pop() else {
            return self.answer(&flight, true, 0);
        };
        let op = match op {
            Op::WriteZeroes { .. } => Op::WriteZeroes {
                keep_allocated: !unmap,
            },
            other => other,
        };
        self.begin(flight, Place { op, offset, len }, Buffers::none());
    }

    fn begin(&mut self, flight: Flight, place: Place, buffers: Buffers) {
        let Place { op, offset, len } = place;
        let write = !matches!(op, Op::Read | Op::Flush);
        let allowed = self.shared.disk.check(offset, len, write).is_ok();
        let (true, Some(engine), Some(tag)) = (allowed, self.engine.as_mut(), self.free.pop()) else {
            return self.answer(&flight, false, 0);
        };
        if write {
            self.shared.disk.tracker().mark(offset, len);
        }
        self.copied_bytes += flight.copied;
        if let Some(slot) = self.flights.get_mut(tag) {
            *slot = Some(flight);
        }
        let durable = write && !(self.has_flush && self.shared.writeback.load(Ordering::Relaxed));
        engine.submit(Io {
            op,
            offset,
            len,
            durable,
            buffers,
            tag,
        });
    }

    pub(super) fn has_room(&self) -> bool {
        self.engine.as_ref().is_some_and(|engine| engine.has_room()) && !self.free.is_empty()
    }

    pub(super) fn in_flight(&self) -> usize {
        self.engine.as_ref().map_or(0, |engine| engine.in_flight())
    }

    /// Readable when `advance` would find something done.
    pub(super) fn event(&self) -> Option<BorrowedFd<'_>> {
        self.engine.as_ref().map(|engine| engine.event())
    }

    /// Sets to work what was accepted, and collects what is done. True if something could not be set to work now and
    /// this must be called again soon, without an event.
    pub(super) fn advance(&mut self) -> bool {
        let backlog = self.try_advance();
        backlog.unwrap_or_else(|error| {
            self.fail(&error);
            false
        })
    }

    fn try_advance(&mut self) -> io::Result<bool> {
        let mut done = std::mem::take(&mut self.done);
        // The second turn is for what completed at once, and for what completing brought up: a further range.
        for _ in 0..2 {
            let Some(engine) = self.engine.as_mut() else {
                return Ok(false);
            };
            engine.start()?;
            engine.reap(&mut done)?;
            done.drain(..).for_each(|done| self.complete(done));
        }
        self.done = done;
        Ok(self.engine.as_mut().is_some_and(|engine| engine.has_backlog()))
    }

    fn complete(&mut self, done: Done) {
        let Done { io, result } = done;
        let Io {
            op,
            offset,
            len,
            durable: _,
            buffers,
            tag,
        } = io;
        if !matches!(op, Op::Read | Op::Flush) {
            // The second mark, the one that counts: see the tracker.
            self.shared.disk.tracker().mark(offset, len);
        }
        let result = match op {
            Op::Read => buffers.finish_read(result.is_ok()).and(result),
            _ => result,
        };
        self.count(op, len, &result);
        let Some(Some(flight)) = self.flights.get_mut(tag).map(Option::take) else {
            return;
        };
        self.free.push(tag);
        self.copied_bytes = self.copied_bytes.saturating_sub(flight.copied);
        match (result, op) {
            (Err(error), _) => {
                let name = &self.shared.name;
                let path = self.shared.disk.path().display();
                let what = || format!("{name}: the disk image {path} failed a request of the guest: {error}");
                self.shared.failed.warn(what);
                self.answer(&flight, false, 0);
            }
            (Ok(()), Op::Read) => self.answer(&flight, true, len as u32),
            (Ok(()), _) => self.next_of(flight, op),
        }
    }

    fn count(&self, op: Op, len: u64, result: &io::Result<()>) {
        let counters = &self.shared.disk.counters;
        let add = |counter: &AtomicU64, n| {
            counter.fetch_add(n, Ordering::Relaxed);
        };
        if result.is_err() {
            return add(&counters.errors, 1);
        }
        let (requests, bytes) = match op {
            Op::Flush => return add(&counters.flushes, 1),
            Op::Read => (&counters.reads, &counters.read_bytes),
            Op::Write => (&counters.writes, &counters.written_bytes),
            Op::Discard => (&counters.discards, &counters.discarded_bytes),
            Op::WriteZeroes { .. } => (&counters.zeroings, &counters.zeroed_bytes),
        };
        add(requests, 1);
        add(bytes, len);
    }

    /// Writes the serial number, filled up with zeroes. How much was written.
    fn get_id(&self, into: &[(GuestAddress, usize)]) -> Result<u32, GuestMemoryError> {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        id.iter_mut()
            .zip(self.serial.bytes())
            .for_each(|(place, byte)| *place = byte);
        let mut rest = id.as_slice();
        for &(address, len) in into {
            let (now, later) = rest.split_at(len.min(rest.len()));
            self.ram.write_slice(now, address)?;
            rest = later;
        }
        Ok((id.len() - rest.len()) as u32)
    }

    fn answer(&mut self, flight: &Flight, success: bool, written: u32) {
        let status = if success {
            VIRTIO_BLK_S_OK
        } else {
            VIRTIO_BLK_S_IOERR
        };
        self.put_answer(flight, status as u8, written);
    }

    fn put_answer(&mut self, flight: &Flight, status: u8, written: u32) {
        self.unanswerable |= self.ram.write_obj(status, flight.status).is_err();
        self.answers.push(Answer {
            head: flight.head,
            written: written.saturating_add(1),
        });
    }

    /// What was answered since the last call.
    pub(super) fn take_answers(&mut self) -> Result<Vec<Answer>, Unanswerable> {
        if self.unanswerable {
            Err(Unanswerable)
        } else {
            Ok(std::mem::take(&mut self.answers))
        }
    }

    /// Whether the engine works, or worked until it was closed.
    pub(super) fn has_engine(&self) -> bool {
        self.engine.is_some()
    }

    pub(super) fn close(&mut self) {
        drop(self.engine.take());
    }

    /// The engine cannot go on. Dropping it waits for what the kernel holds; the guest gets errors for all of it.
    pub(super) fn fail(&mut self, error: &io::Error) {
        tracing::error!(
            "{}: the host does not serve its image any more: {error}",
            self.shared.name
        );
        self.close();
        let flights: Vec<_> = self.flights.iter_mut().filter_map(Option::take).collect();
        flights.iter().for_each(|flight| self.answer(flight, false, 0));
        // What was in flight may have landed; nobody knows where.
        self.shared.disk.tracker().mark(0, self.shared.disk.size());
    }
}
