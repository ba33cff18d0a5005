//! The database on the disk: a header, a log of updates, and a table of rows. JOURNAL.md describes it for
//! other readers. Pure.

use crate::content::mix;
use crate::journal::{BLOCK, Bytes, seal, sealed, set_word, word};

pub const ROW_WORDS: usize = 32;
pub const ROWS_PER_BLOCK: usize = BLOCK / 8 / ROW_WORDS;
pub type Row = [u64; ROW_WORDS];
/// Updates one block of the log holds.
pub const UPDATES_PER_BLOCK: usize = (BLOCK - 8) / 8 - LOG_HEADER;
const LOG_HEADER: usize = 5;
const HEADER_MAGIC: u64 = u64::from_le_bytes(*b"FERRYTAB");
const LOG_MAGIC: u64 = u64::from_le_bytes(*b"FERRYLOG");
const FORMAT: u64 = 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub rows: u64,
    pub log_blocks: u64,
    /// Log blocks of other epochs are of the past.
    pub epoch: u64,
    /// Updates that are in the table.
    pub committed: u64,
    pub seed: u64,
}

impl Header {
    pub fn write(&self, block: &mut Bytes) {
        block.fill(0);
        for (i, value) in [
            HEADER_MAGIC,
            FORMAT,
            self.rows,
            self.log_blocks,
            self.epoch,
            self.committed,
            self.seed,
        ]
        .into_iter()
        .enumerate()
        {
            set_word(block, i, value);
        }
        seal(block);
    }

    pub fn read(block: &Bytes) -> Option<Header> {
        let sound = sealed(block) && word(block, 0) == HEADER_MAGIC && word(block, 1) == FORMAT;
        let [rows, log_blocks, epoch, committed, seed] = [2, 3, 4, 5, 6].map(|i| word(block, i));
        sound.then_some(Header {
            rows,
            log_blocks,
            epoch,
            committed,
            seed,
        })
    }

    /// A header that was one but is not sound.
    pub fn is_damaged(block: &Bytes) -> bool {
        word(block, 0) == HEADER_MAGIC && Header::read(block).is_none()
    }

    pub fn table_blocks(&self) -> u64 {
        self.rows.div_ceil(ROWS_PER_BLOCK as u64)
    }
}

/// One update: a row gets a version.
pub type Update = (u32, u32);

/// A block of the log: updates that were committed together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogHead {
    pub epoch: u64,
    /// From 1 in every epoch.
    pub sequence: u64,
    /// Updates committed since the database was made, these included.
    pub committed: u64,
}

impl LogHead {
    pub fn write(&self, updates: &[Update], block: &mut Bytes) {
        block.fill(0);
        let updates = &updates[..updates.len().min(UPDATES_PER_BLOCK)];
        for (i, value) in [
            LOG_MAGIC,
            self.epoch,
            self.sequence,
            self.committed,
            updates.len() as u64,
        ]
        .into_iter()
        .enumerate()
        {
            set_word(block, i, value);
        }
        for (i, &(row, version)) in updates.iter().enumerate() {
            set_word(block, LOG_HEADER + i, row as u64 | (version as u64) << 32);
        }
        seal(block);
    }

    /// The head and the updates of a sound block.
    pub fn read(block: &Bytes) -> Option<(LogHead, impl Iterator<Item = Update> + '_)> {
        let [epoch, sequence, committed, count] = [1, 2, 3, 4].map(|i| word(block, i));
        let sound = sealed(block) && word(block, 0) == LOG_MAGIC && count as usize <= UPDATES_PER_BLOCK;
        let updates = (0..count as usize)
            .map(|i| word(block, LOG_HEADER + i))
            .map(|w| (w as u32, (w >> 32) as u32));
        sound.then_some((
            LogHead {
                epoch,
                sequence,
                committed,
            },
            updates,
        ))
    }
}

/// What a row of this version contains.
pub fn row(id: u32, version: u32, seed: u64) -> Row {
    let name = id as u64 | (version as u64) << 32;
    let origin = mix(name ^ mix(seed));
    core::array::from_fn(|i| match i {
        0 => name,
        1 => seed,
        _ => mix(origin.wrapping_add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))),
    })
}

/// The version of a row that is sound in itself and is row `id`.
pub fn version_of(found: &Row, id: u32, seed: u64) -> Option<u32> {
    let version = (found[0] >> 32) as u32;
    (*found == row(id, version, seed)).then_some(version)
}
