//! The last sent version of hot pages, for differences: bounded, shared by all lanes.

use std::sync::{Mutex, PoisonError};

use crate::block::{BlockId, PAGE_BYTES};

/// A page keeps its slot against another for this many rounds after it was last of use. Without it a working
/// set larger than the cache, written in turn, would throw every page out just before it is needed.
const ROUNDS_KEPT: u32 = 2;

struct Slot {
    owner: Option<(BlockId, u64)>,
    used_in_round: u32,
    page: Box<[u8]>,
}

pub struct DeltaCache {
    slots: Vec<Mutex<Slot>>,
}

impl DeltaCache {
    /// Keeps at most `bytes` of pages.
    pub fn new(bytes: usize) -> Self {
        let slots = (0..bytes / PAGE_BYTES as usize)
            .map(|_| {
                Mutex::new(Slot {
                    owner: None,
                    used_in_round: 0,
                    page: Box::default(),
                })
            })
            .collect();
        DeltaCache { slots }
    }

    fn slot(&self, block: BlockId, unit: u64) -> Option<&Mutex<Slot>> {
        // Neighbours get different slots, whatever the size.
        let spread = (unit ^ u64::from(block.0) << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let at = (u128::from(spread) * self.slots.len() as u128) >> 64;
        self.slots.get(at as usize)
    }

    /// The page's version is `new` from now on. If an older one was kept, `difference` sees (old, new).
    /// Returns what it made of them.
    pub fn replace<T>(
        &self,
        block: BlockId,
        unit: u64,
        round: u32,
        new: &[u8],
        difference: impl FnOnce(&[u8], &[u8]) -> Option<T>,
    ) -> Option<T> {
        let mut slot = self
            .slot(block, unit)?
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let made = if slot.owner == Some((block, unit)) {
            difference(&slot.page, new)
        } else if slot.owner.is_none() || slot.used_in_round.saturating_add(ROUNDS_KEPT) < round {
            None
        } else {
            return None;
        };
        slot.owner = Some((block, unit));
        slot.used_in_round = round;
        if slot.page.len() == new.len() {
            slot.page.copy_from_slice(new);
        } else {
            slot.page = new.into();
        }
        made
    }

    /// Forgets a page: what the other side holds of it is no longer known, or is cheap to say.
    pub fn forget(&self, block: BlockId, unit: u64) {
        if let Some(slot) = self.slot(block, unit) {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if slot.owner == Some((block, unit)) {
                slot.owner = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: BlockId = BlockId(0);

    fn seen(cache: &DeltaCache, unit: u64, round: u32, page: u8) -> Option<u8> {
        cache.replace(B, unit, round, &[page; 4096], |old, _| Some(old[0]))
    }

    #[test]
    fn the_version_sent_last_is_remembered_until_forgotten() {
        let cache = DeltaCache::new(1 << 20);
        assert_eq!(seen(&cache, 5, 1, 10), None);
        assert_eq!(seen(&cache, 5, 2, 20), Some(10));
        assert_eq!(seen(&cache, 5, 3, 30), Some(20));
        cache.forget(B, 5);
        assert_eq!(seen(&cache, 5, 4, 40), None);
    }

    #[test]
    fn a_working_set_larger_than_the_cache_still_hits() {
        let cache = DeltaCache::new(64 * 4096);
        let hits = |round| {
            (0..256)
                .filter(|unit| seen(&cache, *unit, round, 1).is_some())
                .count()
        };
        assert_eq!(hits(1), 0);
        assert!((1..6).map(|r| hits(1 + r)).all(|hit| hit > 40), "{}", hits(7));
    }
}
