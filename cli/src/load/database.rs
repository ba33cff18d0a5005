//! Checks the database that the built-in guest keeps on its disk: every row is sound, and no update that was committed is
//! missing from the table and its log. The format is in images/builtin/JOURNAL.md.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;

use super::arrivals::mix;
use super::blocks::{BLOCK, Block, Image, is_sealed, word};

const HEADER_MAGIC: u64 = u64::from_le_bytes(*b"FERRYTAB");
const LOG_MAGIC: u64 = u64::from_le_bytes(*b"FERRYLOG");
const FORMAT: u64 = 1;
const LOG_HEADER: usize = 5;
const MOST_UPDATES: u64 = (BLOCK as u64 - 8) / 8 - LOG_HEADER as u64;
const ROW_WORDS: usize = 32;
const ROWS_PER_BLOCK: usize = BLOCK / 8 / ROW_WORDS;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// As many bad rows as are named.
const NAMED: usize = 10;

/// What a database holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DatabaseReport {
    pub rows: u64,
    pub seed: u64,
    pub epoch: u64,
    /// Blocks of the log that belong to this epoch, in sequence.
    pub log_blocks: u64,
    /// Updates that a restart would have, from the table and the log.
    pub committed: u64,
    /// What was demanded.
    pub demanded: u64,
    /// Rows of the table that are not what their version says.
    pub damaged: u64,
    /// The first of them.
    pub damaged_rows: Vec<u64>,
    /// Updates in the log that no guest can have written: a row that is not there, or a count that does not add up.
    pub impossible: u64,
    /// Sound blocks of this epoch after one that is missing: each is written only when the one before is safe.
    pub beyond_a_hole: u64,
    /// Rows of the table that are older than the log's first update of them: a part of the table was not saved, or lost.
    pub outdated: u64,
}

impl DatabaseReport {
    pub fn is_whole(&self) -> bool {
        self.damaged + self.impossible + self.beyond_a_hole + self.outdated == 0
            && self.committed >= self.demanded
    }
}

struct Header {
    rows: u64,
    log_blocks: u64,
    epoch: u64,
    committed: u64,
    seed: u64,
}

fn header(block: &Block) -> Option<Header> {
    let sound = is_sealed(block) && word(block, 0) == HEADER_MAGIC && word(block, 1) == FORMAT;
    let [rows, log_blocks, epoch, committed, seed] = [2, 3, 4, 5, 6].map(|at| word(block, at));
    (sound && rows > 0).then_some(Header {
        rows,
        log_blocks,
        epoch,
        committed,
        seed,
    })
}

/// A sound block of the log.
struct Group {
    epoch: u64,
    sequence: u64,
    committed: u64,
    count: u64,
}

fn group(block: &Block) -> Option<Group> {
    let [epoch, sequence, committed, count] = [1, 2, 3, 4].map(|at| word(block, at));
    let sound = is_sealed(block) && word(block, 0) == LOG_MAGIC && count <= MOST_UPDATES;
    sound.then_some(Group {
        epoch,
        sequence,
        committed,
        count,
    })
}

/// The version of the row at this place of a block, if it is the row `id` and sound.
fn version_of(block: &Block, place: usize, id: u64, seed: u64) -> Option<u32> {
    let at = |index: usize| word(block, place * ROW_WORDS + index);
    let origin = mix(at(0) ^ mix(seed));
    let sound = u64::from(at(0) as u32) == id
        && at(1) == seed
        && (2..ROW_WORDS).all(|i| at(i) == mix(origin.wrapping_add((i as u64).wrapping_mul(STEP))));
    sound.then_some((at(0) >> 32) as u32)
}

/// Reads an image or a block device. `committed`: the most updates that the guest reported as committed.
pub fn check(path: &Path, committed: Option<u64>) -> Result<DatabaseReport> {
    let image = Image::open(path)?;
    let base = image.blocks()? / 2;
    let Some(head) = header(&image.read(base)?) else {
        bail!(
            "{} has no sound database in its second half; did a guest with work=database run on it?",
            path.display()
        );
    };
    let mut report = DatabaseReport {
        rows: head.rows,
        seed: head.seed,
        epoch: head.epoch,
        log_blocks: 0,
        committed: head.committed,
        demanded: committed.unwrap_or(0),
        damaged: 0,
        damaged_rows: Vec::new(),
        impossible: 0,
        beyond_a_hole: 0,
        outdated: 0,
    };
    let mut unbroken = true;
    // The first and the last version of each row in the log.
    let mut versions: HashMap<u32, (u32, u32)> = HashMap::new();
    // Up to the end of the image: a header with a huge log or table must not keep us busy for ever.
    for sequence in 1..=head.log_blocks {
        let block = image.read(base.saturating_add(sequence))?;
        let found = group(&block).filter(|group| (group.epoch, group.sequence) == (head.epoch, sequence));
        let Some(group) = found else {
            unbroken = false;
            continue;
        };
        if !unbroken {
            report.beyond_a_hole += 1;
            continue;
        }
        if report.committed.checked_add(group.count) != Some(group.committed) {
            report.impossible += 1;
        }
        for at in 0..group.count {
            let update = word(&block, LOG_HEADER + at as usize);
            let (row, version) = (update as u32, (update >> 32) as u32);
            match versions.get_mut(&row) {
                Some((_, last)) if last.wrapping_add(1) == version => *last = version,
                None if u64::from(row) < head.rows => _ = versions.insert(row, (version, version)),
                _ => report.impossible += 1,
            }
        }
        report.committed = group.committed;
        report.log_blocks += 1;
    }
    let table = base.saturating_add(1).saturating_add(head.log_blocks);
    for first in (0..head.rows).step_by(ROWS_PER_BLOCK) {
        let block = image.read(table.saturating_add(first / ROWS_PER_BLOCK as u64))?;
        for (place, id) in (first..head.rows).take(ROWS_PER_BLOCK).enumerate() {
            let Some(version) = version_of(&block, place, id, head.seed) else {
                report.damaged += 1;
                if report.damaged_rows.len() < NAMED {
                    report.damaged_rows.push(id);
                }
                continue;
            };
            // While the table is being saved a row may be newer than the log's first update of it, never older.
            let first = versions.get(&(id as u32)).map(|(first, _)| *first);
            if first.is_some_and(|first| version.wrapping_add(1).wrapping_sub(first) > u32::MAX / 2) {
                report.outdated += 1;
            }
        }
    }
    Ok(report)
}
