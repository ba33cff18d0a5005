//! The journal on the disk: numbered, checksummed records, one per block of 4 KiB. JOURNAL.md describes it
//! for other readers. Pure.

use crate::content::mix;

pub const BLOCK: usize = 4096;
pub type Bytes = [u8; BLOCK];
const SUPER_MAGIC: u64 = u64::from_le_bytes(*b"FERRYJNL");
const RECORD_MAGIC: u64 = u64::from_le_bytes(*b"FERRYREC");
const FORMAT: u64 = 1;
const CHECKSUM_AT: usize = BLOCK - 4;
const PAYLOAD: usize = 6;
const WORDS: usize = BLOCK / 8 - 1;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Super {
    /// How many records fit before the oldest is overwritten.
    pub capacity: u64,
    pub seed: u64,
    /// How often a guest has begun to work on this journal.
    pub starts: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// From 1.
    pub number: u64,
    /// The highest number that was acknowledged by a flush when this record was written.
    pub flushed: u64,
    pub time_ns: u64,
    pub seed: u64,
    pub starts: u64,
}

impl Super {
    pub fn write(&self, block: &mut Bytes) {
        block.fill(0);
        put(
            block,
            &[SUPER_MAGIC, FORMAT, self.capacity, self.seed, self.starts],
        );
        seal(block);
    }

    pub fn read(block: &Bytes) -> Option<Super> {
        let sound =
            sealed(block) && word(block, 0) == SUPER_MAGIC && word(block, 1) == FORMAT && word(block, 2) > 0;
        sound.then(|| Super {
            capacity: word(block, 2),
            seed: word(block, 3),
            starts: word(block, 4),
        })
    }

    /// A first block that was one but is not sound.
    pub fn is_damaged(block: &Bytes) -> bool {
        word(block, 0) == SUPER_MAGIC && Super::read(block).is_none()
    }

    /// Where a record lies.
    pub fn block_of(&self, number: u64) -> u64 {
        1 + number.wrapping_sub(1) % self.capacity
    }
}

impl Record {
    pub fn write(&self, block: &mut Bytes) {
        put(
            block,
            &[
                RECORD_MAGIC,
                self.number,
                self.flushed,
                self.time_ns,
                self.seed,
                self.starts,
            ],
        );
        let origin = mix(self.number ^ self.seed);
        for i in PAYLOAD..WORDS {
            set_word(block, i, payload(origin, i));
        }
        set_word(block, WORDS, 0);
        seal(block);
    }

    /// The record in a block, if all of it is sound.
    pub fn read(block: &Bytes) -> Option<Record> {
        if !sealed(block) || word(block, 0) != RECORD_MAGIC {
            return None;
        }
        let [number, flushed, time_ns, seed, starts] = [1, 2, 3, 4, 5].map(|i| word(block, i));
        let origin = mix(number ^ seed);
        let sound = (PAYLOAD..WORDS).all(|i| word(block, i) == payload(origin, i));
        (sound && number > 0 && flushed < number).then_some(Record {
            number,
            flushed,
            time_ns,
            seed,
            starts,
        })
    }
}

/// What a scan of all records finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Scan {
    pub last: u64,
    /// The highest number that some record says was flushed.
    pub flushed: u64,
    pub sound: u64,
    /// Some numbers that were found, each in the place of its remainder.
    recent: [u64; RECENT],
}

/// More than a guest ever has written but not flushed.
const RECENT: usize = 64;

impl Scan {
    pub const EMPTY: Scan = Scan {
        last: 0,
        flushed: 0,
        sound: 0,
        recent: [0; RECENT],
    };

    /// Takes in what block `index` (1..=capacity) holds. False if a record is in a place that is not its own.
    pub fn take(&mut self, journal: &Super, index: u64, record: Option<Record>) -> bool {
        let Some(record) = record.filter(|r| r.seed == journal.seed) else {
            return true;
        };
        self.last = self.last.max(record.number);
        self.flushed = self.flushed.max(record.flushed);
        self.sound += 1;
        let place = &mut self.recent[(record.number % RECENT as u64) as usize];
        *place = record.number.max(*place);
        journal.block_of(record.number) == index
    }

    /// The last record of the unbroken run that begins with what was flushed: the journal goes on after it.
    pub fn end(&self) -> u64 {
        let found = |number: u64| self.recent[(number % RECENT as u64) as usize] == number;
        (self.flushed..)
            .take_while(|&number| number == self.flushed || found(number))
            .last()
            .unwrap_or(self.flushed)
    }
}

/// Records up to `last` that were not overwritten begin here.
pub fn oldest(last: u64, capacity: u64) -> u64 {
    last.saturating_sub(capacity) + 1
}

fn payload(origin: u64, i: usize) -> u64 {
    mix(origin.wrapping_add((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

fn put(block: &mut Bytes, words: &[u64]) {
    for (i, &value) in words.iter().enumerate() {
        set_word(block, i, value);
    }
}

pub fn word(block: &Bytes, i: usize) -> u64 {
    block[8 * i..]
        .first_chunk()
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

pub fn set_word(block: &mut Bytes, i: usize, value: u64) {
    block[8 * i..8 * i + 8].copy_from_slice(&value.to_le_bytes());
}

pub fn seal(block: &mut Bytes) {
    let sum = crc32c(&block[..CHECKSUM_AT]);
    block[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
}

pub fn sealed(block: &Bytes) -> bool {
    block[CHECKSUM_AT..] == crc32c(&block[..CHECKSUM_AT]).to_le_bytes()
}

/// CRC-32C (Castagnoli), as iSCSI and ext4 use it.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, &byte| {
        (sum >> 8) ^ TABLE[((sum ^ byte as u32) & 0xff) as usize]
    })
}

static TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut sum = i as u32;
        let mut bit = 0;
        while bit < 8 {
            sum = if sum & 1 != 0 {
                (sum >> 1) ^ 0x82f6_3b78
            } else {
                sum >> 1
            };
            bit += 1;
        }
        table[i] = sum;
        i += 1;
    }
    table
};
