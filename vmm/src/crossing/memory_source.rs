//! A region of guest memory as the engine's source.
//!
//! Three places note writes, and a page is clean only if none of them has it:
//! - KVM's dirty log, for what the vCPUs write;
//! - the memory's own bitmap, for what the monitor writes (virtqueues, buffers);
//! - `notes` here, for what was harvested from either and not taken yet, or was put back.
//!
//! `survey` moves the monitor's bitmap into `notes` and looks at KVM's log; `take` clears `notes` and protects the
//! pages anew, in that order, and only then does the engine read them. A write that comes between is noted by KVM or by
//! the monitor's bitmap, neither of which `take` forgets: a monitor's write marks the bitmap after its data is in place,
//! so either the read sees the data or the next survey sees the mark.
//!
//! Pages that the guest does not use are left out; `free_memory.rs` says when that is safe.

use std::sync::Arc;

use ferry_migration::block::{BlockId, BlockInfo, DataError, Source, Span};
use ferry_migration::units::UnitSet;
use vm_memory::{Bytes, MemoryRegionAddress};

use super::free_memory::Unused;
use super::notes::{Notes, bits_of};
use super::region::Region;

const PAGE_BYTES: usize = 4096;

/// KVM's notes about one region of memory.
pub trait DirtyLog: Send + Sync {
    fn start(&self) -> Result<(), String>;

    fn stop(&self);

    /// Adds every page noted as written. May forget them (a log that clears as it is read): the caller keeps them.
    fn survey(&self, words: &mut [u64]) -> Result<(), String>;

    /// Protects pages anew: a later write to them is noted. `first_word` counts 64 pages.
    fn clear(&self, first_word: usize, words: &[u64]) -> Result<(), String>;
}

pub struct MemorySource {
    info: BlockInfo,
    region: Region,
    log: Box<dyn DirtyLog>,
    notes: Notes,
    free: Option<Arc<dyn Unused>>,
    /// Free when the guest was asked, and not written since: read as zeroes, and never taken from the log.
    left_out: Notes,
}

impl MemorySource {
    pub fn new(
        id: BlockId,
        region: Region,
        log: Box<dyn DirtyLog>,
        free: Option<Arc<dyn Unused>>,
    ) -> MemorySource {
        let info = region.info(id);
        let notes = Notes::new(info.units());
        let left_out = Notes::new(info.units());
        MemorySource {
            info,
            region,
            log,
            notes,
            free,
            left_out,
        }
    }

    /// Notes what the monitor and the vCPUs wrote since the last time; a page that was left out is no more.
    fn harvest(&self) -> Result<(), DataError> {
        let mut words = vec![0; self.notes.len()];
        self.log.survey(&mut words).map_err(DataError::new)?;
        for written in [&self.region.take_bitmap(), &words] {
            self.left_out.remove(0, written);
            self.notes.add_words(written);
        }
        Ok(())
    }

    /// Leaves out what the guest says is free, but for what is in a log.
    fn leave_out(&self, free: &dyn Unused, first: &mut UnitSet) -> Result<(), DataError> {
        self.left_out.add_words(&free.of_region(self.region.start()));
        self.harvest()?;
        let mut written = UnitSet::empty(self.info.units());
        self.notes.snapshot(&mut written);
        self.left_out.remove(0, written.words());
        let mut left_out = UnitSet::empty(self.info.units());
        self.left_out.snapshot(&mut left_out);
        first.subtract(&left_out);
        Ok(())
    }

    /// Clears notes and protects anew.
    fn clear(&self, first_word: usize, words: &[u64]) -> Result<(), DataError> {
        self.notes.remove(first_word, words);
        if words.iter().all(|word| *word == 0) {
            return Ok(());
        }
        self.log.clear(first_word, words).map_err(DataError::new)
    }
}

impl Source for MemorySource {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn start_tracking(&self) -> Result<(), DataError> {
        self.log.start().map_err(DataError::new)?;
        let Some(free) = &self.free else { return Ok(()) };
        // All that has content is in the first pass, so what was noted before says nothing; what is noted from here on
        // was written after this and is in use, whatever the guest says of it.
        self.left_out.clear();
        self.region.take_bitmap();
        self.log
            .survey(&mut vec![0; self.notes.len()])
            .map_err(DataError::new)?;
        self.clear(0, &vec![u64::MAX; self.notes.len()])?;
        free.begin();
        Ok(())
    }

    fn stop_tracking(&self) {
        self.log.stop();
        self.notes.clear();
        self.left_out.clear();
    }

    fn first_pass(&self) -> Result<UnitSet, DataError> {
        let units = self.info.units();
        let mut empty = UnitSet::full(units);
        empty.subtract(&self.region.populated());
        // The log may have begun with every page noted. Pages that are left out must be clean in it, and a page that
        // the guest touches while we look must not be lost: so clear first, then look again.
        self.clear(0, empty.words())?;
        let mut first = self.region.populated();
        let mut touched_since = UnitSet::full(units);
        touched_since.subtract(&empty);
        first.union(&touched_since);
        if let Some(free) = &self.free {
            self.leave_out(free.as_ref(), &mut first)?;
        }
        Ok(first)
    }

    fn survey(&self, changed: &mut UnitSet) -> Result<(), DataError> {
        self.harvest()?;
        self.notes.snapshot(changed);
        Ok(())
    }

    fn take(&self, spans: &[Span]) -> Result<(), DataError> {
        let (first_word, mut words) = bits_of(spans);
        for (word, left_out) in words.iter_mut().zip(self.left_out.words_from(first_word)) {
            *word &= !left_out;
        }
        self.clear(first_word, &words)
    }

    fn put_back(&self, spans: &[Span]) {
        self.notes.add_spans(spans);
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        let at = MemoryRegionAddress(self.info.offset(span.first));
        self.region.get()?.read_slice(out, at).map_err(|error| {
            DataError::new(format!("guest memory at {:#x} could not be read: {error}", at.0))
        })?;
        for (unit, page) in (span.first..).zip(out.chunks_mut(PAGE_BYTES)) {
            if self.left_out.contains(unit) {
                page.fill(0);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Mutex;

    use ferry_devices::ram::Ram;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    use super::*;

    const PAGES: u64 = 200;

    /// Notes writes as KVM does, in both of its manners.
    struct Log {
        forgets_when_read: bool,
        words: Arc<Mutex<Vec<u64>>>,
    }

    impl DirtyLog for Log {
        fn start(&self) -> Result<(), String> {
            self.words.lock().unwrap().fill(u64::MAX);
            Ok(())
        }

        fn stop(&self) {}

        fn survey(&self, words: &mut [u64]) -> Result<(), String> {
            let mut mine = self.words.lock().unwrap();
            for (word, mine) in words.iter_mut().zip(mine.iter_mut()) {
                *word |= *mine;
                if self.forgets_when_read {
                    *mine = 0;
                }
            }
            Ok(())
        }

        fn clear(&self, first_word: usize, words: &[u64]) -> Result<(), String> {
            for (mine, word) in self.words.lock().unwrap().iter_mut().skip(first_word).zip(words) {
                *mine &= !word;
            }
            Ok(())
        }
    }

    /// A guest that names these pages.
    struct Named(BTreeSet<u64>);

    impl Unused for Named {
        fn begin(&self) {}

        fn of_region(&self, start: GuestAddress) -> Vec<u64> {
            assert_eq!(start, GuestAddress(0));
            let mut words = vec![0; PAGES.div_ceil(64) as usize];
            for page in &self.0 {
                words[(page / 64) as usize] |= 1 << (page % 64);
            }
            words
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        GuestWrites(u64, u8),
        MonitorWrites(u64, u8),
        Round { lost_from: u64 },
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0..PAGES, 1..=255u8).prop_map(|(page, value)| Step::GuestWrites(page, value)),
            2 => (0..PAGES, 1..=255u8).prop_map(|(page, value)| Step::MonitorWrites(page, value)),
            1 => (0..=PAGES).prop_map(|lost_from| Step::Round { lost_from }),
        ]
    }

    proptest! {
        /// Whatever writes whenever, and whatever is lost on the way and put back: after one quiet round the copy is
        /// the memory.
        #[test]
        fn no_write_is_lost(
            forgets_when_read: bool,
            early in prop::collection::vec((0..PAGES, any::<bool>()), 0..8),
            free in prop::option::of(prop::collection::btree_set(0..PAGES, 0..60)),
            steps in prop::collection::vec(step(), 0..60),
        ) {
            let ram = Ram::from_ranges(&[(GuestAddress(0), (PAGES * 4096) as usize)]).unwrap();
            ram.write_obj(0xabu8, GuestAddress(17 * 4096)).unwrap();
            let words = Arc::new(Mutex::new(vec![0; PAGES.div_ceil(64) as usize]));
            let log = Log { forgets_when_read, words: Arc::clone(&words) };
            let region = Region::all(&ram).remove(0);
            // Content that nobody misses where the guest says that it is free.
            for page in 20..40u64 {
                ram.write_obj(0xcdu8, GuestAddress(page * 4096 + 7)).unwrap();
            }
            let unused = free.clone().map(|free| Arc::new(Named(free)) as Arc<dyn Unused>);
            let source = MemorySource::new(BlockId(0), region, Box::new(log), unused);
            source.start_tracking().unwrap();
            let mut written: BTreeSet<u64> = BTreeSet::new();
            let guest_writes = |page: u64, value: u8| {
                // As a vCPU does: around the monitor's bitmap, into KVM's log.
                let before = source.region.take_bitmap();
                ram.write_obj(value, GuestAddress(page * 4096 + 5)).unwrap();
                source.region.take_bitmap();
                let pages = (0..PAGES).filter(|page| before[(page / 64) as usize] >> (page % 64) & 1 == 1);
                for page in pages {
                    ferry_devices::ram::mark_dirty(&ram, GuestAddress(page * 4096), 1).unwrap();
                }
                words.lock().unwrap()[(page / 64) as usize] |= 1 << (page % 64);
            };
            // Between the question and the answer: what is written is in use, whatever the answer says.
            for (page, by_monitor) in early {
                written.insert(page);
                if by_monitor {
                    ram.write_obj(0xeeu8, GuestAddress(page * 4096 + 9)).unwrap();
                } else {
                    guest_writes(page, 0xee);
                }
            }
            let mut todo = source.first_pass().unwrap();
            let named = |page: &u64| free.as_ref().is_some_and(|free| free.contains(page));
            prop_assert!(todo.contains(17) || named(&17));
            prop_assert!(!todo.contains(18) || written.contains(&18), "an untouched page need not travel");
            for page in (0..PAGES).filter(|page| named(page) && !written.contains(page)) {
                prop_assert!(!todo.contains(page), "page {} is free and travels", page);
            }
            let mut copy = vec![0u8; (PAGES * 4096) as usize];

            let round = |todo: &mut UnitSet, copy: &mut Vec<u8>, lost_from: u64| {
                source.survey(todo).unwrap();
                for (first, count) in todo.runs().collect::<Vec<_>>() {
                    let span = Span { block: BlockId(0), first, count: count as u32 };
                    source.take(&[span]).unwrap();
                    if first >= lost_from {
                        source.put_back(&[span]);
                    } else {
                        let at = (first * 4096) as usize;
                        source.read(span, &mut copy[at..at + (count * 4096) as usize]).unwrap();
                    }
                }
                todo.clear();
            };
            for step in steps {
                match step {
                    Step::GuestWrites(page, value) => {
                        written.insert(page);
                        guest_writes(page, value);
                    }
                    Step::MonitorWrites(page, value) => {
                        written.insert(page);
                        ram.write_obj(value, GuestAddress(page * 4096 + 9)).unwrap();
                    }
                    Step::Round { lost_from } => round(&mut todo, &mut copy, lost_from),
                }
            }
            round(&mut todo, &mut copy, PAGES);
            let mut memory = vec![0u8; copy.len()];
            ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
            for page in (0..PAGES).filter(|page| named(page) && !written.contains(page)) {
                memory[(page * 4096) as usize..][..4096].fill(0);
            }
            prop_assert!(memory == copy);
            // Compared by hash, both sides are the same too.
            let all = Span { block: BlockId(0), first: 0, count: PAGES as u32 };
            source.read(all, &mut memory).unwrap();
            prop_assert!(memory == copy);
        }
    }
}
