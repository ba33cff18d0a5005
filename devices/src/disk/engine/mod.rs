//! How a queue's requests reach the image: io_uring, or threads. One engine per queue, used by that queue's thread.

mod buffers;
mod pool;
mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub(crate) use buffers::Buffers;

use super::{Disk, EngineKind, Image};

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Read,
    Write,
    Flush,
    Discard,
    /// `keep_allocated`: the guest did not allow its space to be given back.
    WriteZeroes {
        keep_allocated: bool,
    },
}

/// One piece of work. Its place was checked against the disk.
#[derive(Debug)]
pub(crate) struct Io {
    pub(crate) op: Op,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// It counts as done only when it is on the disk.
    pub(crate) durable: bool,
    pub(crate) buffers: Buffers,
    /// Which request of the queue it belongs to.
    pub(crate) tag: usize,
}

#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) io: Io,
    pub(crate) result: io::Result<()>,
}

/// Takes work and gives it back done, in any order. Dropping an engine waits for what is in flight.
pub(crate) trait Engine: Send {
    /// Whether one more piece fits.
    fn has_room(&self) -> bool;
    /// Takes one piece; there must be room.
    fn submit(&mut self, io: Io);
    /// Sets to work what was submitted.
    fn start(&mut self) -> io::Result<()>;
    /// Whether something waits for another `start`, because it was not finished or the kernel did not take it.
    fn has_backlog(&mut self) -> bool;
    /// Collects what is done, without waiting.
    fn reap(&mut self, done: &mut Vec<Done>) -> io::Result<()>;
    fn in_flight(&self) -> usize;
    /// Readable when `reap` would find something.
    fn event(&self) -> BorrowedFd<'_>;
}

const CHOICE: &str = "FERRY_DISK_ENGINE";

/// Makes the engine for one queue; `depth` is how much may be in flight, `name` begins the names of its threads.
pub(crate) fn for_queue(disk: &Arc<Disk>, depth: usize, name: &str) -> io::Result<Box<dyn Engine>> {
    let wanted = match std::env::var(CHOICE).as_deref() {
        Ok("io-uring") => EngineKind::IoUring,
        Ok("threads") => EngineKind::Threads,
        Ok(other) => {
            tracing::warn!("{CHOICE}={other} is not known; it can be io-uring or threads");
            disk.engine()
        }
        Err(_) => disk.engine(),
    };
    let is_raw = matches!(disk.image, Image::Raw(_));
    match wanted {
        EngineKind::Threads => {}
        EngineKind::IoUring if !is_raw => {
            tracing::warn!("{name}: qcow2 images go through threads, not io_uring");
        }
        EngineKind::IoUring => return Ok(Box::new(ring::Ring::new(disk, depth)?)),
        EngineKind::Auto if !is_raw => {}
        EngineKind::Auto => match ring::Ring::new(disk, depth) {
            Ok(ring) => return Ok(Box::new(ring)),
            Err(error) => tracing::info!("{name}: io_uring cannot be used here ({error}); using threads"),
        },
    }
    Ok(Box::new(pool::Pool::new(disk, depth, name)?))
}
