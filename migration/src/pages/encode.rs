//! From the pages of a batch to one frame, without allocating.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use serde::{Deserialize, Serialize};

use crate::block::{BlockInfo, BlockKind, CLUSTER_BYTES, DataError, PAGE_BYTES, Source, Span};
use crate::clock::Clock;
use crate::pages::cache::DeltaCache;
use crate::pages::costs::{Costs, Look};
use crate::pages::sent::SentHashes;
use crate::pages::{delta, repeat};
use crate::wire::{
    Encoding, Entry, FrameHeader, MAX_ENTRIES, MAX_FRAME_BYTES, VERSION, VERSION_WITH_MOSTLY_SAME,
    WINDOW_BYTES,
};

/// Whether pages are made smaller at the cost of time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// While measurement says that it makes the crossing faster.
    #[default]
    Auto,
    Off,
    /// Wherever it makes pages smaller: for links that are paid by the byte.
    Always,
}

/// What units became, in units, and bytes before and after.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageCounts {
    pub zero: u64,
    pub same: u64,
    /// Written, but with what they held: nothing travelled.
    pub unchanged: u64,
    /// Only their names travelled: the other side had the content.
    pub known: u64,
    pub delta: u64,
    /// Eight bytes repeated, and a few others.
    #[serde(default)]
    pub mostly_same: u64,
    pub lz4: u64,
    pub raw: u64,
    pub plain_bytes: u64,
    pub wire_bytes: u64,
}

impl PageCounts {
    pub fn add(&mut self, other: &PageCounts) {
        let PageCounts {
            zero,
            same,
            unchanged,
            known,
            delta,
            mostly_same,
            lz4,
            raw,
            plain_bytes,
            wire_bytes,
        } = *other;
        self.zero += zero;
        self.same += same;
        self.unchanged += unchanged;
        self.known += known;
        self.delta += delta;
        self.mostly_same += mostly_same;
        self.lz4 += lz4;
        self.raw += raw;
        self.plain_bytes += plain_bytes;
        self.wire_bytes += wire_bytes;
    }

    /// How many went in each of the ways.
    pub fn ways(&self) -> [u64; 8] {
        let PageCounts {
            zero,
            same,
            unchanged,
            known,
            delta,
            mostly_same,
            lz4,
            raw,
            plain_bytes: _,
            wire_bytes: _,
        } = *self;
        [zero, same, mostly_same, unchanged, known, delta, lz4, raw]
    }

    pub fn units(&self) -> u64 {
        self.ways().iter().sum()
    }
}

/// What all lanes of a crossing share: knowledge of what the other side holds.
pub struct Memory {
    pub cache: DeltaCache,
    pub sent: SentHashes,
}

impl Memory {
    /// Units were put back: what the other side holds of them is not known any more.
    pub fn forget(&self, span: Span) {
        for unit in span.first..span.end() {
            self.cache.forget(span.block, unit);
            self.sent.forget(span.block, unit);
        }
    }
}

/// Room before the payload: header and the longest table. What the table does not need stays free in front.
const HEAD_ROOM: usize = FrameHeader::BYTES + MAX_ENTRIES * Entry::BYTES;
/// How much is read at once: small enough to be still in the nearest cache when it is looked at.
const READ_BYTES: usize = CLUSTER_BYTES as usize;
/// After so many units in a row that did not get smaller, only every so manieth of a batch is tried.
const PATIENCE: u32 = 4;
/// When probing, how many units of a batch are tried.
const PROBE_UNITS: u32 = 4;

/// One worker's encoder with all its buffers.
pub struct Encoder {
    compression: Compression,
    version: u16,
    frame: Box<[u8]>,
    entries: Vec<Entry>,
    payload_bytes: usize,
    zero: Vec<bool>,
    scratch: Box<[u8]>,
    /// A page of one word, over and over.
    pattern: Box<[u8]>,
    pages_table: CompressTable,
    clusters_table: CompressTable,
    pub costs: Costs,
}

impl Encoder {
    pub fn new(compression: Compression) -> Self {
        Encoder {
            compression,
            version: VERSION,
            frame: vec![0; MAX_FRAME_BYTES].into(),
            entries: Vec::with_capacity(MAX_ENTRIES),
            payload_bytes: 0,
            zero: vec![false; MAX_ENTRIES],
            scratch: vec![0; get_maximum_output_size(CLUSTER_BYTES as usize)].into(),
            pattern: vec![0; PAGE_BYTES as usize].into(),
            pages_table: CompressTable::small(),
            clusters_table: CompressTable::large(),
            costs: Costs::new(),
        }
    }

    /// Uses only what the agreed version of the protocol knows.
    pub fn speak(&mut self, version: u16) {
        self.version = version;
    }

    /// Encodes the spans (of one block, ascending, together at most a window) as they are now.
    pub fn encode(
        &mut self,
        memory: &Memory,
        source: &dyn Source,
        info: &BlockInfo,
        spans: &[Span],
        round: u32,
        clock: &dyn Clock,
    ) -> Result<PageCounts, DataError> {
        self.entries.clear();
        self.payload_bytes = 0;
        let mut counts = PageCounts::default();
        let mut effort = Effort::new(self.compression, &self.costs);
        for span in spans {
            self.zero.clear();
            self.zero.resize(span.count as usize, false);
            source.find_zeroes(*span, &mut self.zero)?;
            let mut unit = span.first;
            while unit < span.end() {
                if self.zero.get((unit - span.first) as usize) == Some(&true) {
                    self.zero(memory, info, unit, round, &mut counts);
                    unit += 1;
                    continue;
                }
                let most = (READ_BYTES / info.unit_bytes() as usize).max(1) as u64;
                let end = (unit..span.end().min(unit + most))
                    .find(|u| self.zero.get((u - span.first) as usize) == Some(&true))
                    .unwrap_or(span.end().min(unit + most));
                let piece = Span {
                    block: span.block,
                    first: unit,
                    count: (end - unit) as u32,
                };
                self.read_and_encode(
                    memory,
                    source,
                    info,
                    piece,
                    round,
                    clock,
                    &mut effort,
                    &mut counts,
                )?;
                unit = end;
            }
        }
        for (look, tries) in Look::ALL.into_iter().zip(&effort.lz4) {
            self.costs.compressed(look, tries.before, tries.after, tries.time);
        }
        Ok(counts)
    }

    #[allow(clippy::too_many_arguments)]
    fn read_and_encode(
        &mut self,
        memory: &Memory,
        source: &dyn Source,
        info: &BlockInfo,
        piece: Span,
        round: u32,
        clock: &dyn Clock,
        effort: &mut Effort,
        counts: &mut PageCounts,
    ) -> Result<(), DataError> {
        let start = HEAD_ROOM + self.payload_bytes;
        let bytes = info.span_bytes(piece);
        let place = self.frame.get_mut(start..start + bytes).ok_or_else(too_long)?;
        source.read(piece, place)?;
        let mut at = start;
        for unit in piece.first..piece.end() {
            let length = info.span_bytes(Span {
                block: piece.block,
                first: unit,
                count: 1,
            });
            self.unit(memory, info, unit, at, length, round, clock, effort, counts);
            at += length;
        }
        Ok(())
    }

    /// Encodes the unit that lies at `at` in the frame, which is at or behind the payload's end.
    #[allow(clippy::too_many_arguments)]
    fn unit(
        &mut self,
        memory: &Memory,
        info: &BlockInfo,
        unit: u64,
        at: usize,
        length: usize,
        round: u32,
        clock: &dyn Clock,
        effort: &mut Effort,
        counts: &mut PageCounts,
    ) {
        let Encoder {
            compression,
            version,
            frame,
            scratch,
            pattern,
            pages_table,
            clusters_table,
            ..
        } = self;
        let Some(content) = frame.get(at..at + length) else {
            return;
        };
        if let Some(pattern) = repeated(content) {
            if pattern == [0; 8] {
                self.zero(memory, info, unit, round, counts);
            } else {
                memory.sent.forget(info.id, unit);
                memory.cache.forget(info.id, unit);
                counts.same += 1;
                counts.plain_bytes += length as u64;
                self.append(info, unit, Encoding::Same, &Made::Small(pattern));
            }
            return;
        }
        counts.plain_bytes += length as u64;
        if *compression != Compression::Off && memory.sent.replace(info.id, unit, content) {
            counts.unchanged += 1;
            return;
        }
        if effort.delta && info.kind == BlockKind::Memory && round > 0 {
            let made = memory.cache.replace(info.id, unit, round, content, |old, new| {
                let (base, room) = scratch.split_at_mut(4);
                base.copy_from_slice(&crc32c::crc32c(old).to_le_bytes());
                let room = room.get_mut(..new.len() / 2)?;
                delta::encode(old, new, room).map(|used| used + 4)
            });
            if let Some(used) = made {
                counts.delta += 1;
                self.append(info, unit, Encoding::Delta, &Made::InScratch(used));
                return;
            }
        } else if round > 0 {
            memory.cache.forget(info.id, unit);
        }
        if *compression != Compression::Off
            && *version >= VERSION_WITH_MOSTLY_SAME
            && let Some(used) = mostly_same(content, pattern, scratch)
        {
            counts.mostly_same += 1;
            self.append(info, unit, Encoding::MostlySame, &Made::InScratch(used));
            return;
        }
        let look = Look::at(content);
        if let Some(tries) = effort.lz4.get_mut(look as usize)
            && tries.worth_one_more()
        {
            let table = if info.unit_bytes() == PAGE_BYTES {
                pages_table
            } else {
                clusters_table
            };
            let start = clock.now();
            let made = compress_into_with_table(content, scratch, table).unwrap_or(length);
            tries.tried(length, made.min(length), clock.now().saturating_sub(start));
            if made < length - length / 8 {
                counts.lz4 += 1;
                self.append(info, unit, Encoding::Lz4, &Made::InScratch(made));
                return;
            }
        }
        counts.raw += 1;
        self.append(info, unit, Encoding::Raw, &Made::InFrame { at, length });
    }

    fn zero(&mut self, memory: &Memory, info: &BlockInfo, unit: u64, round: u32, counts: &mut PageCounts) {
        // In the first round nothing is remembered of any unit.
        if round > 0 {
            memory.sent.forget(info.id, unit);
            memory.cache.forget(info.id, unit);
        }
        counts.zero += 1;
        counts.plain_bytes += info.span_bytes(Span {
            block: info.id,
            first: unit,
            count: 1,
        }) as u64;
        self.append(info, unit, Encoding::Zero, &Made::Nothing);
    }

    fn append(&mut self, info: &BlockInfo, unit: u64, encoding: Encoding, made: &Made) {
        let end = HEAD_ROOM + self.payload_bytes;
        let window = |unit: u64| info.offset(unit) / WINDOW_BYTES;
        let follows = self.entries.last().is_some_and(|last| {
            last.encoding == encoding
                && last.first + u64::from(last.count) == unit
                && window(last.first) == window(unit)
        });
        let joins = follows
            && match (encoding, made) {
                (Encoding::Zero | Encoding::Raw, _) => true,
                (Encoding::Same, Made::Small(pattern)) => {
                    self.frame.get(end - 8..end) == Some(pattern.as_slice())
                }
                _ => false,
            };
        let bytes = match *made {
            Made::Nothing => 0,
            Made::Small(_) if joins => 0,
            Made::Small(pattern) => {
                if let Some(room) = self.frame.get_mut(end..end + 8) {
                    room.copy_from_slice(&pattern);
                }
                8
            }
            Made::InScratch(used) => {
                if let (Some(room), Some(made)) =
                    (self.frame.get_mut(end..end + used), self.scratch.get(..used))
                {
                    room.copy_from_slice(made);
                }
                used
            }
            Made::InFrame { at, length } => {
                if at != end {
                    self.frame.copy_within(at..at + length, end);
                }
                length
            }
        };
        self.payload_bytes += bytes;
        match self.entries.last_mut() {
            Some(last) if joins => {
                last.count += 1;
                last.bytes += bytes as u32;
            }
            _ => self.entries.push(Entry {
                first: unit,
                count: 1,
                encoding,
                bytes: bytes as u32,
            }),
        }
    }

    /// Whether there is anything to send (a batch of unchanged pages needs no frame).
    pub fn has_frame(&self) -> bool {
        !self.entries.is_empty()
    }

    /// The finished frame under its sequence number.
    pub fn frame(&mut self, info: &BlockInfo, sequence: u64, round: u32) -> &[u8] {
        let table_bytes = self.entries.len() * Entry::BYTES;
        let start = HEAD_ROOM - table_bytes;
        let end = HEAD_ROOM + self.payload_bytes;
        if let Some(table) = self.frame.get_mut(start..HEAD_ROOM) {
            for (room, entry) in table.chunks_exact_mut(Entry::BYTES).zip(&self.entries) {
                room.copy_from_slice(&entry.encode());
            }
        }
        let checksum = self.frame.get(start..end).map_or(0, crc32c::crc32c);
        let header = FrameHeader {
            block: info.id,
            entries: self.entries.len() as u16,
            sequence,
            round,
            payload_bytes: self.payload_bytes as u32,
            checksum,
        };
        let start = start - FrameHeader::BYTES;
        if let Some(room) = self.frame.get_mut(start..start + FrameHeader::BYTES) {
            room.copy_from_slice(&header.encode());
        }
        self.frame.get(start..end).unwrap_or_default()
    }
}

/// Where the encoded unit lies before it is appended.
enum Made {
    Nothing,
    Small([u8; 8]),
    InScratch(usize),
    InFrame { at: usize, length: usize },
}

/// How hard this batch is tried, decided once for the batch.
struct Effort {
    delta: bool,
    lz4: [Tries; Look::ALL.len()],
}

impl Effort {
    fn new(compression: Compression, costs: &Costs) -> Self {
        Effort {
            delta: compression != Compression::Off,
            lz4: Look::ALL.map(|look| {
                let (pays, probe) = match compression {
                    Compression::Off => (false, false),
                    Compression::Always => (true, false),
                    Compression::Auto => (costs.lz4_pays(look), costs.probe_now(look)),
                };
                Tries {
                    pays,
                    probes: if probe { PROBE_UNITS } else { 0 },
                    ..Tries::default()
                }
            }),
        }
    }
}

/// Attempts at compressing units of one look, within one batch.
#[derive(Default)]
struct Tries {
    pays: bool,
    probes: u32,
    failures: u32,
    skipped: u32,
    before: usize,
    after: usize,
    time: std::time::Duration,
}

impl Tries {
    fn worth_one_more(&mut self) -> bool {
        if !self.pays {
            let probe = self.probes > 0;
            self.probes = self.probes.saturating_sub(1);
            return probe;
        }
        if self.failures >= PATIENCE && self.skipped < PATIENCE {
            self.skipped += 1;
            return false;
        }
        self.skipped = 0;
        true
    }

    fn tried(&mut self, before: usize, after: usize, time: std::time::Duration) {
        self.before += before;
        self.after += after;
        self.time += time;
        self.failures = if after < before - before / 8 {
            0
        } else {
            self.failures + 1
        };
    }
}

fn too_long() -> DataError {
    DataError::new("a batch is longer than a frame may be")
}

/// If the page is one word repeated but for some places: the word and those, in `out`. This costs so little, at both
/// ends, that it is worth it on any link.
fn mostly_same(content: &[u8], pattern: &mut [u8], out: &mut [u8]) -> Option<usize> {
    if content.len() != pattern.len() {
        return None;
    }
    let word = delta::common_word(content)?;
    if pattern.first_chunk::<8>() != Some(&word) {
        repeat(word, pattern);
    }
    let (head, room) = out.split_first_chunk_mut::<8>()?;
    *head = word;
    let used = delta::encode(pattern, content, room.get_mut(..content.len() / 4)?)?;
    Some(8 + used)
}

/// The eight bytes that the whole content repeats, if it does.
fn repeated(content: &[u8]) -> Option<[u8; 8]> {
    let (first, rest) = content.split_first_chunk::<8>()?;
    let word = u64::from_ne_bytes(*first);
    // In strides, so that the compiler compares many words at once and a difference near the front ends it.
    let mut strides = rest.chunks_exact(256);
    for stride in strides.by_ref() {
        let differs = stride.chunks_exact(8).fold(0, |acc, w| {
            acc | (u64::from_ne_bytes(w.try_into().unwrap_or_default()) ^ word)
        });
        if differs != 0 {
            return None;
        }
    }
    let tail = strides.remainder();
    (tail.len().is_multiple_of(8) && tail.chunks_exact(8).all(|w| w == first)).then_some(*first)
}
