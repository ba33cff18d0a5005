//! A table in memory and on disk. Updates of a part of its rows are written to a log and flushed, then made
//! in memory; when the log is full, the table is saved and the log begins anew. All rows are checked all the
//! time, and after a restart the table is loaded and the log replayed.

use core::sync::atomic::{AtomicU64, Ordering};

use super::io::Io;
use super::{Next, Pace};
use crate::damage::{self, Damage};
use crate::pick::{Order, Picker};
use crate::serial;
use crate::table::{self, Header, LogHead, ROWS_PER_BLOCK, Row, UPDATES_PER_BLOCK, Update};
use crate::virtio::block::{BLOCK, Kind, LARGEST, Shared};

pub static COMMITTED: AtomicU64 = AtomicU64::new(0);
pub static CHECKPOINTS: AtomicU64 = AtomicU64::new(0);
pub static CHECKED: AtomicU64 = AtomicU64::new(0);

pub const LOG_BLOCKS: u64 = 256;
const BLOCK_BYTES: usize = BLOCK as usize;
const CHUNK_BLOCKS: u64 = (LARGEST / BLOCK_BYTES) as u64;
pub const ROWS_PER_CHUNK: usize = CHUNK_BLOCKS as usize * ROWS_PER_BLOCK;
const ROWS_PER_CHECK: usize = 16;

/// What to do next, and after it; each is one request to the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    ReadHeader,
    Load(u64),
    Replay(u64),
    /// Save the chunks that changed, from this one on.
    Save(u64),
    FlushTable,
    WriteHeader,
    FlushHeader,
    Run,
    FlushLog,
}

pub struct Rows {
    pub rows: &'static mut [Row],
    /// The version each row must have, kept apart.
    pub versions: &'static mut [u32],
    /// Which chunks differ from the disk.
    pub changed: &'static mut [bool],
    /// The updates that are on their way to the log.
    pub group: &'static mut [Update],
}

pub struct Database {
    io: Io,
    base: u64,
    head: Header,
    table: Rows,
    phase: Phase,
    waiting: Option<usize>,
    picker: Picker,
    pace: Option<Pace>,
    check_pace: Option<Pace>,
    check_cursor: usize,
    group_size: usize,
    sequence: u64,
    replayed: u64,
    opened: bool,
}

impl Database {
    /// `base` is its first block; `hot` rows are updated.
    pub fn new(
        disk: &'static Shared,
        base: u64,
        table: Rows,
        seed: u64,
        hot: u64,
        pace: Option<Pace>,
        check: Option<Pace>,
    ) -> Self {
        let head = Header {
            rows: table.rows.len() as u64,
            log_blocks: LOG_BLOCKS,
            epoch: 0,
            committed: 0,
            seed,
        };
        Database {
            io: Io::new(disk),
            base,
            head,
            table,
            phase: Phase::ReadHeader,
            waiting: None,
            picker: Picker::new(Order::Random, hot, seed),
            pace,
            check_pace: check,
            check_cursor: 0,
            group_size: 0,
            sequence: 1,
            replayed: 0,
            opened: false,
        }
    }

    pub fn step(&mut self, now: u64) -> Next {
        let check = self.check_some(now);
        let work = Io::turn(self, |w| &mut w.io, now, |w| w.go_on(now));
        match (check, work) {
            (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
            _ => Next::Now,
        }
    }

    fn go_on(&mut self, now: u64) -> Next {
        if let Some(slot) = self.waiting {
            return if self.finish(slot, now) {
                Next::Now
            } else {
                Next::At(u64::MAX)
            };
        }
        if self.phase == Phase::Run {
            let (due, next) = match &mut self.pace {
                _ if self.io.is_read_only() => (0, Next::At(u64::MAX)),
                None => (UPDATES_PER_BLOCK as u64, Next::Now),
                Some(pace) => pace.due(now, UPDATES_PER_BLOCK as u64),
            };
            // A group that could not be written is still there.
            if due == 0 && self.group_size == 0 {
                return next;
            }
            while self.group_size < due as usize {
                let row = self.picker.next() as u32;
                let before = self.table.group[..self.group_size]
                    .iter()
                    .rev()
                    .find(|u| u.0 == row)
                    .map(|u| u.1);
                let version = before
                    .unwrap_or(self.table.versions[row as usize])
                    .wrapping_add(1);
                self.table.group[self.group_size] = (row, version);
                self.group_size += 1;
            }
        }
        self.waiting = self.ask();
        Next::Now
    }

    /// Starts the request of this phase.
    fn ask(&mut self) -> Option<usize> {
        let io = &self.io;
        let (base, head) = (self.base, self.head);
        let table_at = base + 1 + head.log_blocks;
        match self.phase {
            Phase::ReadHeader => io.request(Kind::Read, base, BLOCK_BYTES, |_| {}),
            Phase::Load(chunk) => {
                let blocks = CHUNK_BLOCKS.min(head.table_blocks() - chunk * CHUNK_BLOCKS);
                io.request(
                    Kind::Read,
                    table_at + chunk * CHUNK_BLOCKS,
                    blocks as usize * BLOCK_BYTES,
                    |_| {},
                )
            }
            Phase::Replay(sequence) => io.request(Kind::Read, base + sequence, BLOCK_BYTES, |_| {}),
            Phase::Save(chunk) => {
                let first = chunk as usize * ROWS_PER_CHUNK;
                let rows = &self.table.rows[first..(first + ROWS_PER_CHUNK).min(self.table.rows.len())];
                let length = size_of_val(rows).next_multiple_of(BLOCK_BYTES);
                io.request(Kind::Write, table_at + chunk * CHUNK_BLOCKS, length, |bytes| {
                    for (place, word) in bytes.chunks_exact_mut(8).zip(rows.iter().flatten()) {
                        place.copy_from_slice(&word.to_le_bytes());
                    }
                })
            }
            Phase::FlushTable | Phase::FlushHeader | Phase::FlushLog => io.request(Kind::Flush, 0, 0, |_| {}),
            Phase::WriteHeader => {
                let next = Header {
                    epoch: head.epoch + 1,
                    ..head
                };
                io.request(Kind::Write, base, BLOCK_BYTES, |bytes| {
                    if let Some(block) = bytes.first_chunk_mut() {
                        next.write(block);
                    }
                })
            }
            Phase::Run => {
                let updates = &self.table.group[..self.group_size];
                let committed = head.committed + updates.len() as u64;
                let log = LogHead {
                    epoch: head.epoch,
                    sequence: self.sequence,
                    committed,
                };
                io.request(Kind::Write, base + self.sequence, BLOCK_BYTES, |bytes| {
                    if let Some(block) = bytes.first_chunk_mut() {
                        log.write(updates, block);
                    }
                })
            }
        }
    }

    /// Acts on the answer to this phase's request; false if there is none yet. What failed is asked again.
    fn finish(&mut self, slot: usize, now: u64) -> bool {
        let (phase, head) = (self.phase, self.head);
        let Database { io, table, .. } = self;
        let (mut found, mut replayed) = (None, None);
        let look = |bytes: &[u8]| match phase {
            Phase::ReadHeader => {
                found = bytes.first_chunk().and_then(Header::read);
                if bytes.first_chunk().is_some_and(Header::is_damaged) {
                    damage::found(Damage {
                        kind: "row",
                        item: u64::MAX,
                        gpa: 0,
                        want: 0,
                        got: 0,
                        at_ns: now,
                    });
                }
            }
            Phase::Load(chunk) => table.load(chunk as usize, bytes, head.seed, now),
            Phase::Replay(sequence) => {
                if let Some((log, updates)) = bytes.first_chunk().and_then(LogHead::read)
                    && (log.epoch, log.sequence) == (head.epoch, sequence)
                {
                    replayed = Some((
                        log.committed,
                        updates.map(|update| table.set(update, head.seed)).count(),
                    ));
                }
            }
            _ => {}
        };
        let Some(good) = io.answer(slot, now, look) else {
            return false;
        };
        self.waiting = None;
        if good {
            self.advance(found, replayed);
        }
        true
    }

    fn advance(&mut self, found: Option<Header>, replayed: Option<(u64, usize)>) {
        let chunks = (self.table.rows.len()).div_ceil(ROWS_PER_CHUNK) as u64;
        self.phase = match self.phase {
            Phase::ReadHeader => match found {
                Some(head) if (head.rows, head.log_blocks) == (self.head.rows, LOG_BLOCKS) => {
                    self.head = head;
                    Phase::Load(0)
                }
                _ => {
                    for id in 0..self.table.rows.len() as u32 {
                        self.table.set((id, 1), self.head.seed);
                    }
                    self.changed_from(0, chunks)
                }
            },
            Phase::Load(chunk) if chunk + 1 < chunks => Phase::Load(chunk + 1),
            Phase::Load(_) => Phase::Replay(1),
            Phase::Replay(sequence) => match replayed {
                Some((committed, updates)) => {
                    self.head.committed = committed;
                    self.replayed += updates as u64;
                    if sequence < self.head.log_blocks {
                        Phase::Replay(sequence + 1)
                    } else {
                        self.changed_from(0, chunks)
                    }
                }
                None => self.changed_from(0, chunks),
            },
            Phase::Save(chunk) => {
                self.table.changed[chunk as usize] = false;
                self.changed_from(chunk + 1, chunks)
            }
            Phase::FlushTable => Phase::WriteHeader,
            Phase::WriteHeader => Phase::FlushHeader,
            Phase::FlushHeader => {
                self.head.epoch += 1;
                self.sequence = 1;
                CHECKPOINTS.fetch_add(1, Ordering::Relaxed);
                self.tell();
                Phase::Run
            }
            Phase::Run => Phase::FlushLog,
            Phase::FlushLog => {
                for i in 0..self.group_size {
                    self.table.set(self.table.group[i], self.head.seed);
                }
                self.head.committed += self.group_size as u64;
                self.group_size = 0;
                self.sequence += 1;
                COMMITTED.store(self.head.committed, Ordering::Relaxed);
                if self.sequence > self.head.log_blocks {
                    self.changed_from(0, chunks)
                } else {
                    Phase::Run
                }
            }
        };
    }

    fn changed_from(&self, chunk: u64, chunks: u64) -> Phase {
        (chunk..chunks)
            .find(|&c| self.table.changed[c as usize])
            .map_or(Phase::FlushTable, Phase::Save)
    }

    fn tell(&mut self) {
        if !self.opened {
            self.opened = true;
            COMMITTED.store(self.head.committed, Ordering::Relaxed);
            let (head, replayed) = (self.head, self.replayed);
            serial::report(|l| {
                l.word("t", "database")
                    .number("rows", head.rows)
                    .number("epoch", head.epoch);
                l.number("replayed", replayed).number("committed", head.committed);
            });
        }
    }

    fn check_some(&mut self, now: u64) -> Next {
        if !self.opened {
            return Next::At(u64::MAX);
        }
        let (due, next) = match &mut self.check_pace {
            None => (ROWS_PER_CHECK as u64, Next::Now),
            Some(pace) => pace.due(now, ROWS_PER_CHECK as u64),
        };
        for _ in 0..due {
            let id = self.check_cursor;
            self.check_cursor = (id + 1) % self.table.rows.len();
            let want = table::row(id as u32, self.table.versions[id], self.head.seed);
            let got = &self.table.rows[id];
            if let Some(i) = (0..want.len()).find(|&i| got[i] != want[i]) {
                let gpa = &raw const got[i] as u64;
                damage::found(Damage {
                    kind: "row",
                    item: id as u64,
                    gpa,
                    want: want[i],
                    got: got[i],
                    at_ns: now,
                });
            }
        }
        CHECKED.fetch_add(due, Ordering::Relaxed);
        next
    }
}

impl Rows {
    fn set(&mut self, (id, version): Update, seed: u64) {
        let id = id as usize;
        if id < self.rows.len() {
            self.rows[id] = table::row(id as u32, version, seed);
            self.versions[id] = version;
            self.changed[id / ROWS_PER_CHUNK] = true;
        }
    }

    /// Takes in a chunk of the table on disk.
    fn load(&mut self, chunk: usize, bytes: &[u8], seed: u64, now: u64) {
        let first = chunk * ROWS_PER_CHUNK;
        let last = (first + ROWS_PER_CHUNK).min(self.rows.len());
        for (id, bytes) in (first..last).zip(bytes.chunks_exact(size_of::<Row>())) {
            for (word, bytes) in self.rows[id].iter_mut().zip(bytes.chunks_exact(8)) {
                *word = bytes.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));
            }
            match table::version_of(&self.rows[id], id as u32, seed) {
                Some(version) => self.versions[id] = version,
                None => {
                    let got = self.rows[id][0];
                    damage::found(Damage {
                        kind: "row",
                        item: id as u64,
                        gpa: 0,
                        want: id as u64,
                        got,
                        at_ns: now,
                    });
                }
            }
        }
    }
}
