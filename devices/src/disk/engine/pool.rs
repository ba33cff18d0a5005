//! The engine of threads: for formats that are code, and for kernels without io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::EventfdFlags;
use rustix::fd::OwnedFd;

use super::{Done, Engine, Io, Op};
use crate::disk::{Disk, Image};

/// Enough to keep a disk busy, few enough for a host with many machines.
const THREADS: usize = 4;

pub(super) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    depth: usize,
    in_flight: usize,
}

struct Shared {
    disk: Arc<Disk>,
    work: Mutex<Work>,
    wake: Condvar,
    done: Mutex<Vec<Done>>,
    event: OwnedFd,
}

#[derive(Default)]
struct Work {
    waiting: VecDeque<Io>,
    closing: bool,
}

impl Pool {
    pub(super) fn new(disk: &Arc<Disk>, depth: usize, name: &str) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            disk: Arc::clone(disk),
            work: Mutex::default(),
            wake: Condvar::new(),
            done: Mutex::default(),
            event: rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
            depth,
            in_flight: 0,
        };
        for n in 0..THREADS.min(depth) {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("{name}-io{n}"));
            // Should this fail, dropping the pool ends the threads there are.
            pool.threads.push(thread.spawn(move || shared.serve())?);
        }
        Ok(pool)
    }
}

impl Shared {
    fn serve(&self) {
        while let Some(mut io) = self.next() {
            let result = execute(&self.disk, &mut io);
            lock(&self.done).push(Done { io, result });
            // It can only fail when the counter is full, and then the event is set anyway.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    /// The next piece of work; nothing when the pool closes and all is done.
    fn next(&self) -> Option<Io> {
        let mut work = lock(&self.work);
        loop {
            if let Some(io) = work.waiting.pop_front() {
                return Some(io);
            }
            if work.closing {
                return None;
            }
            work = self.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn execute(disk: &Disk, io: &mut Io) -> io::Result<()> {
    let (image, offset, len) = (&disk.image, io.offset, io.len);
    let mut durable = io.durable;
    match (io.op, image) {
        (Op::Read, Image::Raw(raw)) => io.buffers.read_from(&raw.file, offset)?,
        (Op::Write, Image::Raw(raw)) => {
            // The write itself sees to it.
            durable = false;
            io.buffers.write_to(&raw.file, offset, io.durable)?;
        }
        (Op::Read, Image::Qcow2(_)) => {
            let data = io.buffers.copy_mut().ok_or(io::ErrorKind::InvalidInput)?;
            image.read_at(data, offset)?;
        }
        (Op::Write, Image::Qcow2(_)) => {
            let data = io.buffers.copy().ok_or(io::ErrorKind::InvalidInput)?;
            image.write_at(data, offset)?;
        }
        (Op::Flush, _) => return image.flush(),
        // A discard is advice; an image that cannot follow it stays as it is.
        (Op::Discard, _) => drop(image.punch(offset, len)?),
        (Op::WriteZeroes { keep_allocated }, _) => image.write_zeroes(offset, len, keep_allocated)?,
    }
    if durable { image.flush() } else { Ok(()) }
}

impl Engine for Pool {
    fn has_room(&self) -> bool {
        self.in_flight < self.depth
    }

    fn submit(&mut self, io: Io) {
        self.in_flight += 1;
        lock(&self.shared.work).waiting.push_back(io);
        self.shared.wake.notify_one();
    }

    fn start(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn has_backlog(&mut self) -> bool {
        false
    }

    fn reap(&mut self, done: &mut Vec<Done>) -> io::Result<()> {
        // First the event, then the list: what comes in between sets the event again.
        match rustix::io::read(&self.shared.event, &mut [0; 8]) {
            Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut finished = lock(&self.shared.done);
        self.in_flight -= finished.len();
        done.append(&mut finished);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.work).closing = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a disk thread panicked");
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
