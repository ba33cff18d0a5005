//! Memory that the guest does not use need not travel: the guest is asked, once for each crossing, by its balloon.
//!
//! THE DANGER is a page that was free when the guest was asked and is in use when it matters. Therefore, in this order:
//!
//! 1. Every region's dirty log is on and clean (`MemorySource::start_tracking`): from here on each write is in a log.
//! 2. The guest is asked. What it names is free at that moment, or was written after step 1.
//! 3. A region leaves out what was named and is in no log, and *does not take* those pages from the log: a write that
//!    comes later is still there at the next survey, and then the page travels like any other (`MemorySource::survey`).
//!
//! What was left out reads as zeroes, here when it is compared and there because nothing was placed. The question ends
//! as soon as the answer is in, so that the guest has all its pages again while it is copied.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ferry_devices::virtio::balloon::{BalloonControl, FreePages};
use vm_memory::GuestAddress;

/// A guest that takes longer has its say on what it named until then.
const PATIENCE: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(1);

/// Says which pages of a region need not travel.
pub trait Unused: Send + Sync {
    /// Every log is clean and on: what was known before is forgotten.
    fn begin(&self);
    /// One bit for each page of the region that starts here; nothing where nothing is known.
    fn of_region(&self, start: GuestAddress) -> Vec<u64>;
}

/// The balloon of a machine that crosses.
pub struct FreeMemory {
    balloon: Arc<BalloonControl>,
    answer: Mutex<Option<FreePages>>,
}

impl FreeMemory {
    pub fn new(balloon: Arc<BalloonControl>) -> FreeMemory {
        FreeMemory {
            balloon,
            answer: Mutex::new(None),
        }
    }

    fn ask(&self) -> FreePages {
        if !self.balloon.start_hints() {
            return Vec::new();
        }
        let until = Instant::now() + PATIENCE;
        while !self.balloon.hints_complete() && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
        let free = self.balloon.free_pages();
        self.balloon.end_hints();
        let pages: u64 = free
            .iter()
            .flat_map(|(_, words)| words)
            .map(|word| u64::from(word.count_ones()))
            .sum();
        tracing::info!(
            "the guest says that {pages} pages are free; they do not travel unless it writes to them"
        );
        free
    }
}

impl Unused for FreeMemory {
    fn begin(&self) {
        *self.answer.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    fn of_region(&self, start: GuestAddress) -> Vec<u64> {
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = answer.get_or_insert_with(|| self.ask());
        let found = answer.iter().find(|(region, _)| *region == start.0);
        found.map(|(_, words)| words.clone()).unwrap_or_default()
    }
}
