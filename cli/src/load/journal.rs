//! Checks the journal that the built-in guest keeps on its disk: nothing that was acknowledged may be missing.

use std::path::Path;

use anyhow::{Result, bail};
use serde::Serialize;

use super::arrivals::mix;
use super::blocks::{BLOCK, Block, Image, is_sealed, word};

const HEAD_MAGIC: u64 = u64::from_le_bytes(*b"FERRYJNL");
const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"FERRYREC");
const FORMAT: u64 = 1;
const PAYLOAD: usize = 6;
const LAST_WORD: usize = BLOCK / 8 - 1;
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
/// As many missing records as are named.
const NAMED: usize = 10;

/// What a journal holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct JournalReport {
    pub capacity: u64,
    pub seed: u64,
    pub starts: u64,
    /// The highest number found in a sound record.
    pub last: u64,
    /// The highest number that some record says was flushed.
    pub flushed: u64,
    /// What was demanded: the records up to this one.
    pub acknowledged: u64,
    pub demanded: u64,
    pub missing: u64,
    /// The first of them.
    pub missing_numbers: Vec<u64>,
    /// Sound records in places where they do not belong.
    pub misplaced: u64,
}

impl JournalReport {
    pub fn is_whole(&self) -> bool {
        self.missing == 0 && self.misplaced == 0
    }
}

#[derive(Debug, Clone, Copy)]
struct Head {
    capacity: u64,
    seed: u64,
    starts: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    number: u64,
    flushed: u64,
}

fn head(block: &Block) -> Option<Head> {
    let sound = is_sealed(block) && word(block, 0) == HEAD_MAGIC && word(block, 1) == FORMAT;
    let head = Head {
        capacity: word(block, 2),
        seed: word(block, 3),
        starts: word(block, 4),
    };
    (sound && head.capacity > 0).then_some(head)
}

fn entry(block: &Block, seed: u64) -> Option<Entry> {
    let (number, flushed) = (word(block, 1), word(block, 2));
    let origin = mix(number ^ seed);
    let sound = is_sealed(block)
        && word(block, 0) == RECORD_MAGIC
        && word(block, 4) == seed
        && number > 0
        && flushed < number
        && (PAYLOAD..LAST_WORD)
            .all(|i| word(block, i) == mix(origin.wrapping_add((i as u64).wrapping_mul(STEP))));
    sound.then_some(Entry { number, flushed })
}

/// Reads an image or a block device. `acked`: the highest number that the guest reported as flushed; without it the
/// journal's own word is taken.
pub fn check(image: &Path, acked: Option<u64>) -> Result<JournalReport> {
    let name = image.display();
    let image = Image::open(image)?;
    let Some(Head {
        capacity,
        seed,
        starts,
    }) = head(&image.read(0)?)
    else {
        bail!("{name} has no sound journal head in its first block; did a guest with work=disk run on it?");
    };
    let mut entries = std::collections::BTreeMap::new();
    let mut misplaced = 0;
    // Place by place, up to the end of the image: a head with a huge capacity must not make us allocate.
    for place in 0..capacity {
        let Some(entry) = entry(&image.read(1 + place)?, seed) else {
            continue;
        };
        if (entry.number - 1) % capacity == place {
            entries.insert(place, entry);
        } else {
            misplaced += 1;
        }
    }
    let last = entries.values().map(|e| e.number).max().unwrap_or(0);
    let flushed = entries.values().map(|e| e.flushed).max().unwrap_or(0);
    let acknowledged = acked.unwrap_or(flushed);
    let from = acknowledged.saturating_sub(capacity) + 1;
    let mut missing = 0;
    let mut missing_numbers = Vec::new();
    for number in from..=acknowledged {
        let found = entries.get(&((number - 1) % capacity));
        // Its successor in the same place may have been written over it already.
        let kept =
            found.is_some_and(|e| e.number == number || Some(e.number) == number.checked_add(capacity));
        if !kept {
            missing += 1;
            if missing_numbers.len() < NAMED {
                missing_numbers.push(number);
            }
        }
    }
    Ok(JournalReport {
        capacity,
        seed,
        starts,
        last,
        flushed,
        acknowledged,
        demanded: acknowledged.saturating_sub(from - 1),
        missing,
        missing_numbers,
        misplaced,
    })
}

#[cfg(test)]
mod tests {
    use super::super::blocks::CHECKSUM_AT;
    use super::*;
    use std::io::Write as _;

    const CAPACITY: u64 = 50;
    const SEED: u64 = 77;

    fn seal(block: &mut Block) {
        let sum = crc32c::crc32c(&block[..CHECKSUM_AT]);
        block[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
    }

    fn block(words: &[u64]) -> Block {
        let mut block = [0; BLOCK];
        for (i, word) in words.iter().enumerate() {
            block[8 * i..8 * i + 8].copy_from_slice(&word.to_le_bytes());
        }
        block
    }

    fn record(number: u64, flushed: u64) -> Block {
        let origin = mix(number ^ SEED);
        let mut words = vec![RECORD_MAGIC, number, flushed, 123, SEED, 1];
        words.extend(
            (PAYLOAD as u64..LAST_WORD as u64).map(|i| mix(origin.wrapping_add(i.wrapping_mul(STEP)))),
        );
        let mut block = block(&words);
        seal(&mut block);
        block
    }

    /// A journal in which records 1 to `last` were written, the last three without a flush.
    fn journal(last: u64) -> Vec<Block> {
        let mut blocks = vec![[0; BLOCK]; CAPACITY as usize + 1];
        blocks[0] = block(&[HEAD_MAGIC, FORMAT, CAPACITY, SEED, 2]);
        seal(&mut blocks[0]);
        for number in 1..=last {
            let place = 1 + (number - 1) % CAPACITY;
            blocks[place as usize] = record(number, (number - 1).min(last - 3));
        }
        blocks
    }

    fn checked(blocks: &[Block], acked: Option<u64>) -> Result<JournalReport> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        for block in blocks {
            file.write_all(block).unwrap();
        }
        check(file.path(), acked)
    }

    #[test]
    fn a_whole_journal_is_whole_before_and_after_it_wraps() {
        for last in [4, 49, 50, 51, 130] {
            for acked in [None, Some(last - 3), Some(last)] {
                let report = checked(&journal(last), acked).unwrap();
                assert!(report.is_whole(), "{last} {acked:?}: {report:?}");
                assert_eq!((report.last, report.flushed), (last, last - 3));
                assert_eq!(report.demanded, report.acknowledged.min(CAPACITY));
            }
        }
        let mut empty = journal(3);
        empty.iter_mut().skip(1).for_each(|block| block.fill(0));
        assert!(checked(&empty, None).unwrap().is_whole());
    }

    #[test]
    fn anything_acknowledged_that_is_not_there_is_found_and_named() {
        for damage in 0..4096usize {
            if damage % 97 != 0 && damage < CHECKSUM_AT {
                continue;
            }
            let mut blocks = journal(130);
            let place = (120 - 1) % CAPACITY as usize + 1;
            blocks[place][damage] ^= 1;
            let report = checked(&blocks, None).unwrap();
            assert_eq!(report.missing_numbers, [120], "byte {damage}");
        }
        // An old version of the record in its place, as if a write had been lost.
        let mut blocks = journal(130);
        blocks[20] = record(70, 69);
        assert_eq!(checked(&blocks, None).unwrap().missing_numbers, [120]);
        // More acknowledged than there is: the end of the journal was lost.
        let report = checked(&journal(130), Some(133)).unwrap();
        assert_eq!(report.missing_numbers, [131, 132, 133]);
        // A write that went to the wrong place.
        let mut blocks = journal(30);
        blocks[40] = record(7, 6);
        assert_eq!(checked(&blocks, None).unwrap().misplaced, 1);
    }

    #[test]
    fn what_an_unfinished_write_leaves_is_no_damage() {
        let mut blocks = journal(30);
        blocks[31] = record(31, 27);
        blocks[31][2000..].fill(0xee);
        blocks[33] = record(33, 27);
        blocks[34].fill(0x11);
        let report = checked(&blocks, Some(30)).unwrap();
        assert!(report.is_whole(), "{report:?}");
        assert_eq!(report.last, 33);
    }

    #[test]
    fn what_is_no_journal_is_said() {
        let error = |blocks: &[Block]| checked(blocks, None).unwrap_err().to_string();
        assert!(error(&[[0; BLOCK]; 3]).contains("no sound journal head"));
        let mut qcow2 = [0; BLOCK];
        qcow2[..4].copy_from_slice(b"QFI\xfb");
        assert!(error(&[qcow2]).contains("could not open"));
        assert!(error(&journal(10)[..20]).contains("could not read block 20"));
        assert!(check(Path::new("/nowhere"), None).is_err());
    }
}
