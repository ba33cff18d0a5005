//! The allocator of the LMDT paper: a memory of which a working set is written at a rate, and a sweep that
//! checks all of it all the time.

use super::{Next, Pace};
use crate::evidence::Evidence;
use crate::pick::Picker;

const BATCH: u64 = 16;

pub struct Writer {
    pub evidence: &'static Evidence,
    /// Writes the pages `first..` that the picker names.
    pub first: u64,
    pub picker: Picker,
    /// None: as fast as it goes.
    pub pace: Option<Pace>,
    pub whole: bool,
}

impl Writer {
    pub fn step(&mut self, now: u64) -> Next {
        if !self.evidence.is_filled() {
            return Next::At(now + 1_000_000);
        }
        let (due, next) = match &mut self.pace {
            None => (BATCH, Next::Now),
            Some(pace) => pace.due(now, BATCH),
        };
        for _ in 0..due {
            self.evidence
                .write(self.first + self.picker.next(), self.whole, now);
        }
        next
    }
}

/// Fills the pages first, then checks them.
pub struct Sweeper {
    pub evidence: &'static Evidence,
    pub pace: Option<Pace>,
}

impl Sweeper {
    pub fn step(&mut self, now: u64) -> Next {
        if self.evidence.fill_some() {
            return Next::Now;
        }
        if !self.evidence.is_filled() {
            return Next::At(now + 1_000_000);
        }
        let (due, next) = match &mut self.pace {
            None => (BATCH, Next::Now),
            Some(pace) => pace.due(now, BATCH),
        };
        self.evidence.check_some(due, now);
        next
    }
}
