//! The io_uring engine: raw images, straight between the file and guest memory.
#![allow(unsafe_code)] // Submissions carry addresses that must stay valid until they complete.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{IoUring, Probe, opcode, squeue};

use super::{Done, Engine, Io, Op};
use crate::disk::raw::RawImage;
use crate::disk::{Disk, Image};

pub(super) struct Ring {
    /// Before `slots`: dropped first, when nothing is in flight any more.
    ring: IoUring,
    disk: Arc<Disk>,
    /// What is in flight; a submission carries its index. The boxes keep still what the kernel points to.
    slots: Vec<Option<Box<Flight>>>,
    free: Vec<usize>,
    /// Parts that are submitted again when there is time: the rest of a short transfer, the sync after a discard.
    again: VecDeque<usize>,
}

struct Flight {
    io: Io,
    /// How far a short transfer got.
    done: u64,
    stage: Stage,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Work,
    /// The work is done and must yet become durable.
    Sync,
}

impl Ring {
    pub(super) fn new(disk: &Arc<Disk>, depth: usize) -> io::Result<Self> {
        let entries = u32::try_from(depth.next_power_of_two()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let ring = IoUring::builder().dontfork().build(entries)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) || !ring.params().is_feature_nodrop() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring is too old",
            ));
        }
        Ok(Self {
            ring,
            disk: Arc::clone(disk),
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            again: VecDeque::new(),
        })
    }

    /// Queues the next part of a flight. There are as many entries as slots, and a slot has one part at a time, so
    /// only entries that the kernel has not taken yet can be in the way.
    fn push(&mut self, slot: usize) -> io::Result<()> {
        let Some(Some(flight)) = self.slots.get(slot) else {
            return Ok(());
        };
        let Image::Raw(raw) = &self.disk.image else {
            return Err(io::ErrorKind::Unsupported.into());
        };
        let entry = flight.entry(raw).user_data(slot as u64);
        loop {
            // SAFETY: the entry points to memory that the flight in this slot keeps alive and unmoved. The slot is
            // emptied only when the kernel has completed the entry, and dropping the ring waits for all of them
            // (see `Drop`). The file stays open as long as `disk`.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return Ok(());
            }
            self.ring.submit()?;
        }
    }

    /// Takes one completion: the flight is over, or has another part to do.
    fn complete(&mut self, slot: usize, result: i32, done: &mut Vec<Done>) {
        let Some(Some(flight)) = self.slots.get_mut(slot) else {
            tracing::error!("io_uring completed something that was not submitted");
            return;
        };
        match flight.step(result, &self.disk) {
            Some(result) => {
                if let Some(flight) = self.slots.get_mut(slot).and_then(Option::take) {
                    self.free.push(slot);
                    done.push(Done {
                        io: flight.io,
                        result,
                    });
                }
            }
            None => self.again.push_back(slot),
        }
    }

    fn fail(&mut self, slot: usize, error: io::Error, done: &mut Vec<Done>) {
        if let Some(flight) = self.slots.get_mut(slot).and_then(Option::take) {
            self.free.push(slot);
            done.push(Done {
                io: flight.io,
                result: Err(error),
            });
        }
    }
}

impl Flight {
    fn entry(&self, raw: &RawImage) -> squeue::Entry {
        let Io {
            op,
            offset,
            len,
            durable,
            buffers,
            tag: _,
        } = &self.io;
        let fd = Fd(raw.file.as_raw_fd());
        let pieces = buffers.rest();
        let (pointer, count) = (pieces.as_ptr(), pieces.len() as u32);
        let at = offset + self.done;
        match (self.stage, op) {
            (Stage::Sync, _) | (_, Op::Flush) => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
            (_, Op::Read) => opcode::Readv::new(fd, pointer, count).offset(at).build(),
            (_, Op::Write) => {
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, pointer, count)
                    .offset(at)
                    .rw_flags(flags)
                    .build()
            }
            (
                _,
                Op::Discard
                | Op::WriteZeroes {
                    keep_allocated: false,
                },
            ) => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, *len)
                    .offset(*offset)
                    .mode(mode)
                    .build()
            }
            (_, Op::WriteZeroes { keep_allocated: true }) => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                opcode::Fallocate::new(fd, *len)
                    .offset(*offset)
                    .mode(mode)
                    .build()
            }
        }
    }

    /// The kernel has done a part. The result of the whole, or nothing if there is another part to do.
    fn step(&mut self, result: i32, disk: &Disk) -> Option<io::Result<()>> {
        let (op, offset, len) = (self.io.op, self.io.offset, self.io.len);
        if result == -libc::EINTR || result == -libc::EAGAIN {
            return None;
        }
        if result < 0 {
            let error = io::Error::from_raw_os_error(-result);
            let unsupported = result == -libc::EOPNOTSUPP && self.stage == Stage::Work;
            let fallback = match op {
                Op::Discard if unsupported => Ok(()),
                // Rare: a file system that cannot zero a range. It is done here and now, and the queue waits.
                Op::WriteZeroes { keep_allocated } if unsupported => {
                    disk.image.write_zeroes(offset, len, keep_allocated)
                }
                _ => Err(error),
            };
            if let Err(error) = fallback {
                return Some(Err(error));
            }
        }
        match op {
            Op::Read | Op::Write => {
                let moved = u64::from(result.unsigned_abs());
                self.done += moved;
                self.io.buffers.advance(moved as usize);
                if self.done >= len {
                    Some(Ok(()))
                } else if moved == 0 {
                    Some(Err(io::ErrorKind::UnexpectedEof.into()))
                } else {
                    None
                }
            }
            Op::Discard | Op::WriteZeroes { .. } if self.io.durable && self.stage == Stage::Work => {
                self.stage = Stage::Sync;
                None
            }
            Op::Flush | Op::Discard | Op::WriteZeroes { .. } => Some(Ok(())),
        }
    }
}

impl Engine for Ring {
    fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    fn submit(&mut self, io: Io) {
        let Some(slot) = self.free.pop() else {
            debug_assert!(false, "submitted without room");
            return;
        };
        let flight = Box::new(Flight {
            io,
            done: 0,
            stage: Stage::Work,
        });
        if let Some(place) = self.slots.get_mut(slot) {
            *place = Some(flight);
        }
        self.again.push_back(slot);
    }

    fn start(&mut self) -> io::Result<()> {
        while let Some(slot) = self.again.pop_front() {
            if let Err(error) = self.push(slot) {
                self.again.push_front(slot);
                return Err(error);
            }
        }
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory or of completion space for now: reaping helps, then comes the next start.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    return Ok(());
                }
                other => drop(other?),
            }
        }
        Ok(())
    }

    fn has_backlog(&mut self) -> bool {
        !self.again.is_empty() || !self.ring.submission().is_empty()
    }

    fn reap(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        loop {
            let Some(completion) = self.ring.completion().next() else {
                break;
            };
            self.complete(completion.user_data() as usize, completion.result(), done);
        }
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn event(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring, which this borrow keeps alive.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut done = Vec::new();
        // What was never given to the kernel need not be waited for.
        for slot in std::mem::take(&mut self.again) {
            self.fail(slot, io::ErrorKind::Interrupted.into(), &mut done);
        }
        while self.in_flight() > 0 {
            let waited = self.ring.submit_and_wait(1);
            let interrupted = |error: &io::Error| error.kind() == io::ErrorKind::Interrupted;
            if waited.as_ref().is_err_and(|error| !interrupted(error)) || self.reap(&mut done).is_err() {
                // The kernel may still write to this memory: it must never be given to anybody else.
                std::mem::forget(std::mem::take(&mut self.slots));
                tracing::error!("io_uring failed with requests in flight; their memory is kept for ever");
                return;
            }
            for slot in std::mem::take(&mut self.again) {
                self.fail(slot, io::ErrorKind::Interrupted.into(), &mut done);
            }
        }
    }
}
