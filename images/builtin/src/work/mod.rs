//! The workloads: each is cut into short steps, so that whoever runs them can do other things in between.

pub mod allocator;
pub mod balloon;
pub mod blocks;
pub mod console;
pub mod database;
pub mod disk;
pub mod entropy;
pub mod gc;
pub mod io;
pub mod server;
pub mod spin;

use crate::plan::{CATCH_UP_NS, Rate};

/// When a worker wants to run again.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Next {
    Now,
    At(u64),
}

/// One thread of work; stays on one vCPU.
pub enum Worker {
    Writer(allocator::Writer),
    Sweeper(allocator::Sweeper),
    Collector(gc::Collector),
    Spinner(spin::Spinner),
    Journal(disk::Journal),
    Blocks(blocks::Blocks),
    Database(database::Database),
    Server(server::Server),
    Entropy(entropy::Entropy),
    Console(console::Console),
    Balloon(balloon::Keeper),
}

impl Worker {
    /// Does a little work, well below a millisecond.
    pub fn step(&mut self, now: u64) -> Next {
        match self {
            Worker::Writer(w) => w.step(now),
            Worker::Sweeper(w) => w.step(now),
            Worker::Collector(w) => w.step(now),
            Worker::Spinner(w) => w.step(now),
            Worker::Journal(w) => w.step(now),
            Worker::Blocks(w) => w.step(now),
            Worker::Database(w) => w.step(now),
            Worker::Server(w) => w.step(now),
            Worker::Entropy(w) => w.step(now),
            Worker::Console(w) => w.step(now),
            Worker::Balloon(w) => w.step(now),
        }
    }
}

/// Spreads a rate evenly over time.
pub struct Pace {
    per_second_micro: u64,
    /// What a stall of more than this has put off is not caught up with.
    catch_up_ns: u64,
    done: u64,
    since: Option<u64>,
}

/// Work is asked for at most this often, so that a slow rate lets the vCPU sleep.
const QUANTUM_NS: u64 = 4_000_000;

impl Pace {
    /// None: as fast as it goes.
    pub fn of(rate: Rate, parts: u64) -> Option<Pace> {
        match rate {
            Rate::Off => Some(Pace::new(0)),
            Rate::PerSecond(rate) => Some(Pace::new(rate.saturating_mul(1_000_000) / parts)),
            Rate::Max => None,
        }
    }

    pub fn new(per_second_micro: u64) -> Pace {
        Pace {
            per_second_micro,
            catch_up_ns: CATCH_UP_NS,
            done: 0,
            since: None,
        }
    }

    pub fn catching_up(self, catch_up_ns: u64) -> Pace {
        Pace { catch_up_ns, ..self }
    }

    /// How many of at most `batch` are due, and when to ask again.
    pub fn due(&mut self, now: u64, batch: u64) -> (u64, Next) {
        if self.per_second_micro == 0 {
            return (0, Next::At(u64::MAX));
        }
        let since = *self.since.get_or_insert(now);
        let target = |at: u64| {
            (at.saturating_sub(since) as u128 * self.per_second_micro as u128 / 1_000_000_000_000_000) as u64
        };
        let oldest = target(now.saturating_sub(self.catch_up_ns));
        self.done = self.done.max(oldest);
        let due = target(now).saturating_sub(self.done).min(batch);
        self.done += due;
        if self.done < target(now) {
            return (due, Next::Now);
        }
        let next = since as u128
            + (self.done as u128 + 1) * 1_000_000_000_000_000 / self.per_second_micro as u128
            + 1;
        (due, Next::At((next as u64).max(now + QUANTUM_NS)))
    }
}
