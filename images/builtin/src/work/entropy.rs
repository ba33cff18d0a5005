//! Asks the entropy device for bytes, and looks whether each that it says it gave was written, and no other.

use core::sync::atomic::{AtomicU64, Ordering};

use super::{Next, Pace};
use crate::damage::{self, Damage};
use crate::virtio::lane::{BUFFER, Lane};

pub static BYTES: AtomicU64 = AtomicU64::new(0);

/// What a buffer is filled with beforehand.
const BEFORE: u8 = 0xa5;
/// So many random bytes in a row do not look like `BEFORE` by chance.
const RUN: usize = 16;

pub struct Entropy {
    pub lane: &'static mut Lane,
    pub pace: Option<Pace>,
}

impl Entropy {
    pub fn step(&mut self, now: u64) -> Next {
        while let Some(wrong) = self.lane.take(check) {
            if let Some((at, got)) = wrong {
                damage::found(Damage {
                    kind: "entropy",
                    item: at as u64,
                    gpa: 0,
                    want: BEFORE as u64,
                    got: got as u64,
                    at_ns: now,
                });
            }
        }
        let (due, next) = match &mut self.pace {
            Some(pace) if self.lane.has_room() => pace.due(now, 4),
            Some(_) => (0, Next::At(u64::MAX)),
            None => (4, Next::At(u64::MAX)),
        };
        for _ in 0..due {
            self.lane.give(|buffer| {
                buffer.fill(BEFORE);
                // Never all of it, so that a byte too many is seen.
                BUFFER - RUN
            });
        }
        self.lane.kick();
        if self.lane.listen() { Next::Now } else { next }
    }
}

/// A byte that should have been written and was not, or the other way round.
fn check(buffer: &[u8; BUFFER], written: usize) -> Option<(usize, u8)> {
    BYTES.fetch_add(written as u64, Ordering::Relaxed);
    let (given, rest) = buffer.split_at(written);
    let missing = given
        .chunks_exact(RUN)
        .position(|run| run.iter().all(|byte| *byte == BEFORE))
        .map(|run| (run * RUN, BEFORE));
    let too_many = rest.iter().position(|byte| *byte != BEFORE);
    missing.or(too_many.map(|at| (written + at, rest[at])))
}
