//! A short hash of what was sent last for every unit, so that a page that was written with what it already
//! held need not travel again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::block::{BlockId, BlockInfo};

/// Eight bytes for each unit. 64 bits and a seed the guest cannot know: no guest can make two pages that
/// collide on purpose, and by chance it happens once in 2^64 comparisons.
pub struct SentHashes {
    seed: u64,
    blocks: BTreeMap<BlockId, Box<[AtomicU64]>>,
}

/// No statement about the unit.
const UNKNOWN: u64 = 0;

impl SentHashes {
    pub fn new(seed: u64, blocks: &[BlockInfo]) -> Self {
        let table = |info: &BlockInfo| (0..info.units()).map(|_| AtomicU64::new(UNKNOWN)).collect();
        SentHashes {
            seed,
            blocks: blocks.iter().map(|info| (info.id, table(info))).collect(),
        }
    }

    fn cell(&self, block: BlockId, unit: u64) -> Option<&AtomicU64> {
        self.blocks.get(&block)?.get(usize::try_from(unit).ok()?)
    }

    /// Notes `content` as what the other side will hold; true if it held just that before.
    pub fn replace(&self, block: BlockId, unit: u64, content: &[u8]) -> bool {
        let hash = xxhash_rust::xxh3::xxh3_64_with_seed(content, self.seed).max(UNKNOWN + 1);
        self.cell(block, unit)
            .is_some_and(|cell| cell.swap(hash, Ordering::Relaxed) == hash)
    }

    /// What the other side holds is not known, or not by hash.
    pub fn forget(&self, block: BlockId, unit: u64) {
        if let Some(cell) = self.cell(block, unit) {
            cell.store(UNKNOWN, Ordering::Relaxed);
        }
    }
}
