//! One worker's dealings with a shared disk: requests that wait for room, answers that may be errors.

use core::sync::atomic::{AtomicU64, Ordering};

use super::Next;
use crate::virtio::block::{Kind, Shared};

pub static IO_ERRORS: AtomicU64 = AtomicU64::new(0);

const RETRY_NS: u64 = 20_000_000;

pub struct Io {
    disk: &'static Shared,
    retry_at: u64,
}

impl Io {
    pub fn new(disk: &'static Shared) -> Io {
        Io { disk, retry_at: 0 }
    }

    /// Collects answers, lets the worker act on them unless it must wait after an error, and tells the disk
    /// what was asked for. A worker that waits for an answer gives `Next::At`.
    pub fn turn<T>(
        worker: &mut T,
        io: fn(&mut T) -> &mut Io,
        now: u64,
        act: impl FnOnce(&mut T) -> Next,
    ) -> Next {
        let (disk, retry_at) = (io(worker).disk, io(worker).retry_at);
        if now < retry_at {
            return Next::At(retry_at);
        }
        disk.with(|d| d.turn());
        let next = act(worker);
        disk.with(|d| {
            d.turn();
            match next {
                Next::At(_) if d.listen() => Next::Now,
                next => next,
            }
        })
    }

    /// Starts a request, its buffer filled by `fill`. None: no room just now.
    pub fn request(
        &self,
        kind: Kind,
        block: u64,
        length: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> Option<usize> {
        self.disk.with(|d| {
            let (slot, buffer) = d.buffer()?;
            fill(&mut buffer[..length]);
            d.submit(slot, kind, block, length).then_some(slot)
        })
    }

    /// Whether a request went well, once it is finished; `look` sees what it read.
    pub fn answer(&mut self, slot: usize, now: u64, look: impl FnOnce(&[u8])) -> Option<bool> {
        let good = self.disk.with(|d| {
            let (good, bytes) = d.answer(slot)?;
            if good {
                look(bytes);
            }
            Some(good)
        })?;
        if !good {
            IO_ERRORS.fetch_add(1, Ordering::Relaxed);
            self.retry_at = now + RETRY_NS;
        }
        Some(good)
    }

    pub fn is_read_only(&self) -> bool {
        self.disk.with(|d| d.read_only)
    }
}
