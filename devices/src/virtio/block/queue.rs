//! One queue of a disk: takes requests, keeps them in flight, answers them. Runs in its own thread.
//!
//! # What a flush promises
//!
//! A flush that was acknowledged is on the disk, with every write acknowledged before the flush was asked for. It
//! follows from one rule: a write is answered only after the host's kernel (or the image format) has completed it.
//! So when a flush is submitted, every write the guest knows to be done, on any queue, is in the file, and syncing
//! the file makes all of them durable. Writes still in flight are not covered and need not be: nobody was told that
//! they are done. Where the guest was promised no volatile cache, each write is durable before it is answered, and
//! a discard or zeroing is followed by a sync.
//!
//! # Stopping
//!
//! `finish` takes nothing new and waits for everything in flight, so after it the file holds all that was answered,
//! guest memory holds all that was read, and both kinds of dirty marks are set. What waits for a rate limit was
//! never taken from the queue: the position handed back stands before it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use super::request::{self, Action, Bounds, MAX_DATA, Range, Request};
use crate::disk::engine::{Buffers, Done, Engine, Io, Op};
use crate::disk::{Disk, DiskFormat, HeldBy};
use crate::log_once::LogOnce;
use crate::ram::Ram;
use crate::virtio::device::VirtioInterrupt;
use crate::virtio::worker::{More, Poll, Work, clear};

const KICK: u64 = 0;
const ENGINE: u64 = 1;
const TIMER: u64 = 2;
/// A held queue looks again at least this often: the limit may have been lifted meanwhile.
const LONGEST_HOLD: Duration = Duration::from_millis(50);
/// When the kernel is short of something, try again after this.
const BACKLOG_WAIT: Duration = Duration::from_millis(1);

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

pub(super) struct BlockQueue {
    pub(super) index: u16,
    pub(super) queue: Queue,
    pub(super) kick: EventFd,
    pub(super) ram: Ram,
    pub(super) interrupt: Arc<dyn VirtioInterrupt>,
    pub(super) shared: Arc<Shared>,
    pub(super) serial: String,
    /// Writes may be answered before they are durable, if `Shared::writeback` agrees.
    pub(super) has_flush: bool,
    /// None after it failed.
    engine: Option<Box<dyn Engine>>,
    timer: TimerFd,
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Bytes of our own memory that copies in flight hold.
    copied_bytes: u64,
    held: Option<HeldBy>,
    /// The guest broke the rules on this queue: nothing is taken from it any more.
    broken: bool,
    /// Something was answered since the guest was last told.
    answered: bool,
    done: Vec<Done>,
}

/// A request that was taken and not answered yet.
#[derive(Debug)]
struct Flight {
    head: u16,
    status: GuestAddress,
    op: Op,
    /// Ranges still to be worked on after the present one, last first.
    later: Vec<Range>,
    copied: u64,
}

/// Why taking requests ended.
enum Pause {
    Empty,
    NoRoom,
    Held,
    Broken,
    BudgetSpent,
}

pub(super) struct Parts {
    pub(super) index: u16,
    pub(super) queue: Queue,
    pub(super) kick: EventFd,
    pub(super) ram: Ram,
    pub(super) interrupt: Arc<dyn VirtioInterrupt>,
    pub(super) shared: Arc<Shared>,
    pub(super) serial: String,
    pub(super) has_flush: bool,
}

impl BlockQueue {
    pub(super) fn new(parts: Parts, engine: Box<dyn Engine>) -> io::Result<Self> {
        let Parts {
            index,
            queue,
            kick,
            ram,
            interrupt,
            shared,
            serial,
            has_flush,
        } = parts;
        let depth = usize::from(queue.size());
        Ok(Self {
            index,
            queue,
            kick,
            ram,
            interrupt,
            shared,
            serial,
            has_flush,
            engine: Some(engine),
            timer: TimerFd::new().map_err(|error| io::Error::from_raw_os_error(error.errno()))?,
            flights: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            copied_bytes: 0,
            held: None,
            broken: false,
            answered: false,
            done: Vec::new(),
        })
    }

    /// The queue at its position, once the thread has stopped.
    pub(super) fn into_queue(self) -> (u16, Queue) {
        (self.index, self.queue)
    }

    /// Takes what there is, sets it to work and answers what is done.
    fn serve(&mut self) -> More {
        self.release();
        self.reap();
        let mut budget = self.queue.size();
        let more = loop {
            if self.broken {
                break More::Later;
            }
            if self.queue.disable_notification(&self.ram).is_err() {
                self.breaks("its rings are outside memory");
                break More::Later;
            }
            let pause = self.take(&mut budget);
            self.start();
            self.reap();
            match pause {
                Pause::Empty => match self.queue.enable_notification(&self.ram) {
                    Ok(false) => break More::Later,
                    // Something came in between.
                    Ok(true) => {}
                    Err(_) => self.breaks("its rings are outside memory"),
                },
                // Room comes with a completion, the end of a hold with the timer; both call us again.
                Pause::NoRoom if self.has_room() => {}
                Pause::NoRoom | Pause::Held | Pause::Broken => break More::Later,
                Pause::BudgetSpent => break More::Now,
            }
        };
        self.tell();
        more
    }

    fn take(&mut self, budget: &mut u16) -> Pause {
        loop {
            if self.broken {
                return Pause::Broken;
            }
            if *budget == 0 {
                return Pause::BudgetSpent;
            }
            if !self.has_room() {
                return Pause::NoRoom;
            }
            let chain = match self.queue.iter(&self.ram) {
                Ok(mut chains) => chains.next(),
                Err(_) => {
                    self.breaks("its ring of available requests is damaged");
                    return Pause::Broken;
                }
            };
            let Some(chain) = chain else { return Pause::Empty };
            *budget -= 1;
            let head = chain.head_index();
            let request = match request::parse(&self.ram, head, chain, self.bounds()) {
                Ok(request) => request,
                Err(why) => {
                    self.breaks(why);
                    return Pause::Broken;
                }
            };
            if let Some(pause) = self.accept(request) {
                // Not now: the request stays in the queue.
                self.queue.go_to_previous_position();
                return pause;
            }
        }
    }

    fn bounds(&self) -> Bounds {
        let disk = &self.shared.disk;
        Bounds {
            size: disk.size(),
            block_size: disk.block_size(),
            read_only: disk.is_read_only(),
        }
    }

    /// Begins a request, or says why it must wait. One that waits must come again as it is.
    fn accept(&mut self, request: Request) -> Option<Pause> {
        let Request { head, status, action } = request;
        let (bytes, is_write) = match &action {
            Ok(Action::Read { len, .. }) => (*len, false),
            Ok(Action::Write { len, .. }) => (*len, true),
            Ok(Action::Discard(_) | Action::WriteZeroes(_)) => (0, true),
            Ok(Action::Flush | Action::GetId { .. }) | Err(_) => (0, false),
        };
        // Copies may hold as much memory as the largest request, or a little more.
        if self.copied_bytes > 0 && self.copied_bytes + bytes > MAX_DATA {
            return Some(Pause::NoRoom);
        }
        if action.is_ok()
            && let Err((wait, by)) = self.shared.disk.admit(bytes, is_write)
        {
            self.hold(wait, by);
            return Some(Pause::Held);
        }
        match action {
            Ok(Action::Read { offset, into, .. }) => {
                self.transfer(head, status, Op::Read, offset, into);
            }
            Ok(Action::Write { offset, from, .. }) => {
                self.transfer(head, status, Op::Write, offset, from);
            }
            Ok(Action::Flush) => self.begin(head, status, Op::Flush, 0, 0, Vec::new(), Buffers::none(), 0),
            Ok(Action::GetId { into }) => {
                let written = self.get_id(&into);
                self.answer(head, status, written.is_ok(), written.unwrap_or(0));
            }
            Ok(Action::Discard(ranges)) => self.each(head, status, ranges, |_| Op::Discard),
            Ok(Action::WriteZeroes(ranges)) => {
                self.each(head, status, ranges, |range| Op::WriteZeroes {
                    keep_allocated: !range.unmap,
                });
            }
            Err(refusal) => {
                let name = &self.shared.name;
                self.shared.refused.warn(|| {
                    format!(
                        "{name}: the guest made a request that was refused: {}",
                        refusal.why
                    )
                });
                self.put_answer(head, status, refusal.status, 0);
            }
        }
        None
    }

    fn transfer(
        &mut self,
        head: u16,
        status: GuestAddress,
        op: Op,
        offset: u64,
        pieces: Vec<(GuestAddress, usize)>,
    ) {
        let len = request::total(&pieces);
        let disk = &self.shared.disk;
        let alignment = disk.alignment();
        let Some(buffers) = Buffers::in_guest(&self.ram, pieces) else {
            let name = &self.shared.name;
            self.shared
                .refused
                .warn(|| format!("{name}: the guest made a request with data outside its memory"));
            return self.answer(head, status, false, 0);
        };
        let must_copy = disk.format() == DiskFormat::Qcow2 || !buffers.is_aligned(alignment.memory);
        if !must_copy {
            return self.begin(head, status, op, offset, len, Vec::new(), buffers, 0);
        }
        let for_direct = alignment.memory.max(alignment.offset);
        match buffers.copied(for_direct, op == Op::Write) {
            Ok(buffers) => self.begin(head, status, op, offset, len, Vec::new(), buffers, len),
            Err(_) => self.answer(head, status, false, 0),
        }
    }

    /// Works on ranges one after the other.
    fn each(&mut self, head: u16, status: GuestAddress, mut ranges: Vec<Range>, op: impl Fn(&Range) -> Op) {
        ranges.reverse();
        match ranges.pop() {
            Some(first) => self.begin(
                head,
                status,
                op(&first),
                first.offset,
                first.len,
                ranges,
                Buffers::none(),
                0,
            ),
            None => self.answer(head, status, true, 0),
        }
    }

    #[allow(clippy::too_many_arguments)] // The parts of a request, in one call each time.
    fn begin(
        &mut self,
        head: u16,
        status: GuestAddress,
        op: Op,
        offset: u64,
        len: u64,
        later: Vec<Range>,
        buffers: Buffers,
        copied: u64,
    ) {
        let write = !matches!(op, Op::Read | Op::Flush);
        if self.shared.disk.check(offset, len, write).is_err() {
            return self.answer(head, status, false, 0);
        }
        let (Some(tag), Some(engine)) = (self.free.pop(), self.engine.as_mut()) else {
            return self.answer(head, status, false, 0);
        };
        if write {
            self.shared.disk.tracker().mark(offset, len);
        }
        self.copied_bytes += copied;
        if let Some(place) = self.flights.get_mut(tag) {
            *place = Some(Flight {
                head,
                status,
                op,
                later,
                copied,
            });
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

    fn has_room(&self) -> bool {
        self.engine.as_ref().is_some_and(|engine| engine.has_room()) && !self.free.is_empty()
    }

    fn start(&mut self) {
        let Some(engine) = self.engine.as_mut() else {
            return;
        };
        match engine.start() {
            Err(error) => self.engine_failed(&error),
            Ok(()) if engine.has_backlog() => self.arm(BACKLOG_WAIT),
            Ok(()) => {}
        }
    }

    fn reap(&mut self) {
        let Some(engine) = self.engine.as_mut() else {
            return;
        };
        let mut done = std::mem::take(&mut self.done);
        let reaped = engine.reap(&mut done);
        for done in done.drain(..) {
            self.complete(done);
        }
        self.done = done;
        if let Err(error) = reaped {
            return self.engine_failed(&error);
        }
        // A further range, or the rest of a short transfer.
        if self.engine.as_mut().is_some_and(|engine| engine.has_backlog()) {
            self.start();
        }
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
        let disk = &self.shared.disk;
        if !matches!(op, Op::Read | Op::Flush) {
            // The second mark, the one that counts: see the tracker.
            disk.tracker().mark(offset, len);
        }
        let result = match op {
            Op::Read => buffers.finish_read(result.is_ok()).and(result),
            _ => result,
        };
        self.count(op, len, &result);
        let Some(Some(flight)) = self.flights.get_mut(tag).map(Option::take) else {
            return;
        };
        let Flight {
            head,
            status,
            op,
            mut later,
            copied,
        } = flight;
        self.free.push(tag);
        self.copied_bytes = self.copied_bytes.saturating_sub(copied);
        if let Err(error) = &result {
            let name = &self.shared.name;
            let path = self.shared.disk.path().display();
            self.shared
                .failed
                .warn(|| format!("{name}: the disk image {path} failed a request of the guest: {error}"));
            return self.answer(head, status, false, 0);
        }
        match later.pop() {
            Some(next) => {
                let op = match op {
                    Op::WriteZeroes { .. } => Op::WriteZeroes {
                        keep_allocated: !next.unmap,
                    },
                    other => other,
                };
                self.begin(head, status, op, next.offset, next.len, later, Buffers::none(), 0);
            }
            None => self.answer(head, status, true, if op == Op::Read { len as u32 } else { 0 }),
        }
    }

    fn count(&self, op: Op, len: u64, result: &io::Result<()>) {
        let counters = &self.shared.disk.counters;
        let add = |counter: &std::sync::atomic::AtomicU64, n| {
            counter.fetch_add(n, Ordering::Relaxed);
        };
        if result.is_err() {
            return add(&counters.errors, 1);
        }
        match op {
            Op::Read => {
                add(&counters.reads, 1);
                add(&counters.read_bytes, len);
            }
            Op::Write => {
                add(&counters.writes, 1);
                add(&counters.written_bytes, len);
            }
            Op::Flush => add(&counters.flushes, 1),
            Op::Discard => {
                add(&counters.discards, 1);
                add(&counters.discarded_bytes, len);
            }
            Op::WriteZeroes { .. } => {
                add(&counters.zeroings, 1);
                add(&counters.zeroed_bytes, len);
            }
        }
    }

    /// Writes the serial number, filled up with zeroes. How much was written.
    fn get_id(&self, into: &[(GuestAddress, usize)]) -> Result<u32, vm_memory::GuestMemoryError> {
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

    fn answer(&mut self, head: u16, status: GuestAddress, success: bool, written: u32) {
        let byte = if success {
            VIRTIO_BLK_S_OK
        } else {
            VIRTIO_BLK_S_IOERR
        };
        self.put_answer(head, status, byte as u8, written);
    }

    fn put_answer(&mut self, head: u16, status: GuestAddress, byte: u8, written: u32) {
        let put = self.ram.write_obj(byte, status).is_ok()
            && self
                .queue
                .add_used(&self.ram, head, written.saturating_add(1))
                .is_ok();
        if put {
            self.answered = true;
        } else {
            self.breaks("an answer cannot be put where it belongs");
        }
    }

    /// Interrupts the guest if it wants to hear of the answers.
    fn tell(&mut self) {
        if !std::mem::take(&mut self.answered) {
            return;
        }
        match self.queue.needs_notification(&self.ram) {
            Ok(true) => self.interrupt.queue(self.index),
            Ok(false) => {}
            Err(_) => self.breaks("its rings are outside memory"),
        }
    }

    fn breaks(&mut self, why: &str) {
        let name = &self.shared.name;
        let index = self.index;
        self.shared
            .broken
            .warn(|| format!("{name}: queue {index} stopped, the guest must reset the device: {why}"));
        if !std::mem::replace(&mut self.broken, true) {
            self.interrupt.needs_reset();
        }
    }

    /// The engine cannot go on. Dropping it waits for what the kernel holds; the guest gets errors for all of it.
    fn engine_failed(&mut self, error: &io::Error) {
        tracing::error!(
            "{}: queue {} cannot reach its image: {error}",
            self.shared.name,
            self.index
        );
        drop(self.engine.take());
        let flights: Vec<_> = self.flights.iter_mut().filter_map(Option::take).collect();
        for Flight { head, status, .. } in flights {
            self.answer(head, status, false, 0);
        }
        // What was in flight may have landed; nobody knows where.
        self.shared.disk.tracker().mark(0, self.shared.disk.size());
        self.tell();
        self.breaks("the host cannot serve it");
    }

    fn hold(&mut self, wait: Duration, by: HeldBy) {
        self.shared.disk.hold(by, true);
        self.held = Some(by);
        self.arm(wait.min(LONGEST_HOLD));
    }

    fn release(&mut self) {
        if let Some(by) = self.held.take() {
            self.shared.disk.hold(by, false);
        }
    }

    fn arm(&mut self, wait: Duration) {
        // Zero would disarm it.
        if let Err(error) = self.timer.reset(wait.max(Duration::from_micros(1)), None) {
            let error = io::Error::from_raw_os_error(error.errno());
            self.engine_failed(&error);
        }
    }

    fn wait_for_engine(&mut self) -> io::Result<()> {
        let Some(engine) = &self.engine else { return Ok(()) };
        let event = engine.event();
        let mut polled = [rustix::event::PollFd::from_borrowed_fd(
            event,
            rustix::event::PollFlags::IN,
        )];
        // A backlog has no event of its own, hence a limit.
        let limit = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 10_000_000,
        };
        match rustix::event::poll(&mut polled, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Work for BlockQueue {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&self.kick, KICK)?;
        poll.add(&self.timer, TIMER)?;
        match &self.engine {
            Some(engine) => poll.add(&engine.event(), ENGINE),
            None => Ok(()),
        }
    }

    fn ready(&mut self, token: u64, _: &Poll) -> More {
        match token {
            KICK => clear(&self.kick),
            // Armed once, so ready once; reading makes it quiet.
            TIMER => drop(self.timer.wait()),
            _ => {}
        }
        self.serve()
    }

    fn finish(&mut self) {
        self.release();
        while self.engine.as_ref().is_some_and(|engine| engine.in_flight() > 0) {
            self.start();
            if let Err(error) = self.wait_for_engine() {
                self.engine_failed(&error);
            }
            self.reap();
        }
        self.tell();
        drop(self.engine.take());
    }
}
