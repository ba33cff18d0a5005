//! Which pages the guest says are free: they need not travel.
//!
//! THE DANGER. A hint is true only until the guest uses the page again, so a hint may never hide a write. The rules:
//!
//! 1. The dirty log is on, and the set of pages still to send has been taken from it, before [`start`] is called.
//! 2. A hint may only strike pages from that set, or from later sets through rule 3.
//! 3. Whatever the dirty log (KVM's or the monitor's) shows after `start` goes to [`wrote`]: a page that was hinted
//!    and then written is no longer free. It travels, also when the hint arrives after the write was harvested in
//!    the same session.
//! 4. [`finish`] (all went well) and [`cancel`] (the crossing failed) end the session, empty the set and let the
//!    guest use its pages again. Hints that still arrive belong to no session and are dropped.
//!
//! The guest keeps a hinted page out of use until the session ends or memory runs short; rule 3 covers the latter.
//!
//! [`start`]: FreePageHints::start
//! [`wrote`]: FreePageHints::wrote
//! [`finish`]: FreePageHints::finish
//! [`cancel`]: FreePageHints::cancel

use std::ops::Range;

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::ram::{PAGE_SIZE, Ram};

/// Command ids of the virtio specification.
const COMMAND_STOP: u32 = 0;
const COMMAND_DONE: u32 = 1;
const FIRST_COMMAND: u32 = 0x8000_0000;

#[derive(Debug)]
pub(super) struct FreePageHints {
    session: Session,
    next_command: u32,
    /// Free pages, by region of memory.
    regions: Vec<Region>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Session {
    /// None since the last one ended, or none ever.
    Over,
    /// The guest has been asked and has not answered with this id yet.
    Asked(u32),
    /// The guest is reporting.
    Reporting(u32),
    /// The guest has reported everything; pages may still be struck by `wrote`.
    Complete(u32),
}

#[derive(Debug)]
struct Region {
    first_page: u64,
    pages: u64,
    free: Vec<u64>,
    /// Written since the session started: no hint may bring them back.
    written: Vec<u64>,
}

/// Pages that need not travel: guest address of a region's start and one bit per page, lowest bit first.
pub type FreePages = Vec<(u64, Vec<u64>)>;

impl FreePageHints {
    pub(super) fn new() -> Self {
        Self {
            session: Session::Over,
            next_command: FIRST_COMMAND,
            regions: Vec::new(),
        }
    }

    /// Begins a session over this memory, forgetting any earlier one.
    pub(super) fn start(&mut self, ram: &Ram) {
        let id = self.next_command;
        self.next_command = id.checked_add(1).unwrap_or(FIRST_COMMAND);
        self.session = Session::Asked(id);
        self.regions = ram.iter().map(Region::new).collect();
    }

    /// What the device configuration shows as the command.
    pub(super) fn command(&self) -> u32 {
        match self.session {
            Session::Over => COMMAND_DONE,
            Session::Asked(id) | Session::Reporting(id) | Session::Complete(id) => id,
        }
    }

    /// The guest began (or ended) to answer.
    pub(super) fn guest_says(&mut self, command: u32) {
        self.session = match self.session {
            Session::Asked(id) if command == id => Session::Reporting(id),
            Session::Reporting(id) if command == COMMAND_STOP => Session::Complete(id),
            other => other,
        };
    }

    /// The guest says that these pages are free. Only whole pages count.
    pub(super) fn hint(&mut self, address: u64, len: u64) {
        let Session::Reporting(_) = self.session else {
            return;
        };
        let first = address.div_ceil(PAGE_SIZE);
        let end = address.saturating_add(len) / PAGE_SIZE;
        for region in &mut self.regions {
            region.set(first..end, |free, written, bits| *free |= bits & !*written);
        }
    }

    /// These pages were written after the session began.
    pub(super) fn wrote(&mut self, address: u64, len: u64) {
        let first = address / PAGE_SIZE;
        let end = address.saturating_add(len).div_ceil(PAGE_SIZE);
        for region in &mut self.regions {
            region.set(first..end, |free, written, bits| {
                *free &= !bits;
                *written |= bits;
            });
        }
    }

    /// True when the guest has reported everything it had.
    pub(super) fn is_complete(&self) -> bool {
        matches!(self.session, Session::Complete(_))
    }

    pub(super) fn free_pages(&self) -> FreePages {
        self.regions
            .iter()
            .map(|region| (region.first_page * PAGE_SIZE, region.free.clone()))
            .collect()
    }

    /// Ends the session, well or not: nothing is free any more as far as anybody here knows.
    pub(super) fn end(&mut self) {
        self.session = Session::Over;
        self.regions.clear();
    }

    /// What a saved state must know: the next session must not have an id the guest has seen.
    pub(super) fn next_command(&self) -> u32 {
        self.next_command
    }

    pub(super) fn restore(&mut self, next_command: u32) {
        self.end();
        self.next_command = next_command.max(FIRST_COMMAND);
    }
}

impl Region {
    fn new(region: &impl GuestMemoryRegion) -> Self {
        let (first_page, pages) = (region.start_addr().0 / PAGE_SIZE, region.len() / PAGE_SIZE);
        let words = vec![0; pages.div_ceil(64) as usize];
        Self {
            first_page,
            pages,
            free: words.clone(),
            written: words,
        }
    }

    /// Applies `change` to each word that the pages touch, with the bits that are theirs.
    fn set(&mut self, pages: Range<u64>, mut change: impl FnMut(&mut u64, &mut u64, u64)) {
        let start = pages.start.saturating_sub(self.first_page);
        let end = pages.end.saturating_sub(self.first_page).min(self.pages);
        if pages.end <= self.first_page || start >= end {
            return;
        }
        let (first_word, last_word) = (start / 64, (end - 1) / 64);
        let words = self.free.iter_mut().zip(&mut self.written).enumerate();
        for (word, (free, written)) in words
            .skip(first_word as usize)
            .take((last_word - first_word + 1) as usize)
        {
            let base = word as u64 * 64;
            let low = start.saturating_sub(base);
            let high = (end - base).min(64);
            let bits = (u64::MAX << low) & (u64::MAX >> (64 - high));
            change(free, written, bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use vm_memory::GuestAddress;

    const MIB: u64 = 1 << 20;

    fn ram() -> Ram {
        Ram::from_ranges(&[(GuestAddress(0), 3 << 20), (GuestAddress(1 << 32), 1 << 20)]).unwrap()
    }

    fn pages(hints: &FreePageHints) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        for (start, words) in hints.free_pages() {
            for bit in
                (0..words.len() as u64 * 64).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 == 1)
            {
                found.insert(start / PAGE_SIZE + bit);
            }
        }
        found
    }

    fn reporting() -> FreePageHints {
        let mut hints = FreePageHints::new();
        hints.start(&ram());
        hints.guest_says(hints.command());
        hints
    }

    #[test]
    fn hints_count_only_inside_the_session_they_answer() {
        let mut hints = FreePageHints::new();
        assert_eq!(hints.command(), COMMAND_DONE);
        hints.hint(0, MIB);
        hints.start(&ram());
        let first = hints.command();
        hints.hint(0, MIB);
        hints.guest_says(first.wrapping_add(5));
        hints.hint(0, MIB);
        assert_eq!(pages(&hints).len(), 0);
        hints.guest_says(first);
        hints.hint(0, MIB);
        assert_eq!(pages(&hints).len(), 256);
        hints.guest_says(COMMAND_STOP);
        assert!(hints.is_complete());
        hints.hint(MIB, MIB);
        assert_eq!(pages(&hints).len(), 256);

        hints.start(&ram());
        assert_ne!(hints.command(), first);
        assert_eq!(pages(&hints).len(), 0);
        // A late answer to the old session.
        hints.guest_says(first);
        hints.hint(0, MIB);
        assert_eq!(pages(&hints).len(), 0);
    }

    #[test]
    fn a_page_written_after_its_hint_travels_and_so_does_one_hinted_after_its_write() {
        let mut hints = reporting();
        hints.hint(0, 8 * PAGE_SIZE);
        hints.wrote(3 * PAGE_SIZE + 100, 1);
        assert_eq!(pages(&hints), BTreeSet::from([0, 1, 2, 4, 5, 6, 7]));
        hints.hint(0, 8 * PAGE_SIZE);
        assert!(!pages(&hints).contains(&3));
    }

    #[test]
    fn the_end_of_a_session_leaves_nothing_free() {
        let mut hints = reporting();
        hints.hint(0, MIB);
        hints.end();
        assert!(hints.free_pages().is_empty());
        assert_eq!(hints.command(), COMMAND_DONE);
        hints.hint(0, MIB);
        assert!(hints.free_pages().is_empty());
    }

    #[test]
    fn a_restored_device_uses_an_id_the_guest_has_not_seen() {
        let hints = reporting();
        let mut new = FreePageHints::new();
        new.restore(hints.next_command());
        new.start(&ram());
        assert_ne!(new.command(), hints.command());
        new.restore(0);
        new.start(&ram());
        assert!(new.command() > COMMAND_DONE);
    }

    proptest! {
        #[test]
        fn the_set_agrees_with_a_plain_one(
            steps in prop::collection::vec((any::<bool>(), 0..1100u64, 0..9000u64, 0..40u64, any::<bool>()), 0..40)) {
            let mut hints = reporting();
            let exists = |page: &u64| *page < 768 || (0x10_0000..0x10_0100).contains(page);
            let (mut free, mut written) = (BTreeSet::new(), BTreeSet::new());
            for (is_hint, page, shift, len, high) in steps {
                let address = page * PAGE_SIZE + shift + if high { (1 << 32) - 300 * PAGE_SIZE } else { 0 };
                let len = len * 1000;
                if is_hint {
                    hints.hint(address, len);
                    let whole = address.div_ceil(PAGE_SIZE)..(address + len) / PAGE_SIZE;
                    free.extend(whole.filter(exists).filter(|page| !written.contains(page)));
                } else {
                    hints.wrote(address, len);
                    let touched = address / PAGE_SIZE..(address + len).div_ceil(PAGE_SIZE);
                    for page in touched {
                        free.remove(&page);
                        written.insert(page);
                    }
                }
                prop_assert_eq!(pages(&hints), free.clone());
            }
        }

        #[test]
        fn any_range_is_harmless(address in any::<u64>(), len in any::<u64>()) {
            let mut hints = reporting();
            hints.hint(address, len);
            hints.wrote(address, len);
            prop_assert_eq!(pages(&hints).len(), 0);
        }
    }
}
