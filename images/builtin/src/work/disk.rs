//! A journal on a disk: numbered records are written and flushed in groups, read back and checked all the
//! time, and found again after a restart.

use core::sync::atomic::{AtomicU64, Ordering};

use super::io::Io;
use super::{Next, Pace};
use crate::damage::{self, Damage};
use crate::journal::{Bytes, Record, Scan, Super, oldest};
use crate::serial;
use crate::virtio::block::{BLOCK, Kind, SLOTS, Shared};

pub static LAST: AtomicU64 = AtomicU64::new(0);
pub static ACKNOWLEDGED: AtomicU64 = AtomicU64::new(0);
pub static CHECKED: AtomicU64 = AtomicU64::new(0);

pub const LARGEST_GROUP: usize = 16;
const BLOCKS_PER_READ: u64 = 16;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Open,
    Opening(usize),
    Scan(u64),
    Scanning(usize, u64),
    Begin,
    Beginning(usize),
    BeginFlush,
    BeginFlushing(usize),
    Run,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Group {
    Waiting,
    Writing {
        slots: [Option<u8>; LARGEST_GROUP],
        size: u64,
        failed: bool,
    },
    Flush {
        last: u64,
    },
    Flushing {
        slot: usize,
        last: u64,
    },
}

pub struct Journal {
    io: Io,
    head: Super,
    /// Begin anew, whatever the disk holds.
    fresh: bool,
    group_size: u64,
    pace: Option<Pace>,
    read_pace: Pace,
    phase: Phase,
    group: Group,
    scan: Scan,
    last: u64,
    acknowledged: u64,
    check_next: u64,
    reading: Option<(usize, u64, u64)>,
}

impl Journal {
    /// `capacity` is in records; `seed` and it hold for a fresh journal only.
    pub fn new(
        disk: &'static Shared,
        capacity: u64,
        seed: u64,
        fresh: bool,
        group: usize,
        pace: Option<Pace>,
    ) -> Journal {
        Journal {
            io: Io::new(disk),
            head: Super {
                capacity,
                seed,
                starts: 0,
            },
            fresh,
            group_size: group.clamp(1, LARGEST_GROUP) as u64,
            pace,
            read_pace: Pace::new(200_000_000),
            phase: Phase::Open,
            group: Group::Waiting,
            scan: Scan::EMPTY,
            last: 0,
            acknowledged: 0,
            check_next: 1,
            reading: None,
        }
    }

    pub fn step(&mut self, now: u64) -> Next {
        Io::turn(
            self,
            |w| &mut w.io,
            now,
            |w| {
                if w.phase == Phase::Run {
                    w.run(now)
                } else {
                    w.open(now)
                }
            },
        )
    }

    /// From nothing known to a journal that is ready for its next record.
    fn open(&mut self, now: u64) -> Next {
        const WAIT: Next = Next::At(u64::MAX);
        let block = BLOCK as usize;
        match self.phase {
            Phase::Open => self.try_phase(self.io.request(Kind::Read, 0, block, |_| {}).map(Phase::Opening)),
            Phase::Opening(slot) => {
                let mut found = None;
                let look = |b: &[u8]| {
                    found = b.first_chunk().and_then(Super::read);
                    if b.first_chunk().is_some_and(Super::is_damaged) {
                        found_damage(0, 0, now);
                    }
                };
                match self.io.answer(slot, now, look) {
                    None => return WAIT,
                    Some(false) => self.phase = Phase::Open,
                    Some(true) => match found.filter(|_| !self.fresh) {
                        Some(head) => (self.head, self.phase) = (head, Phase::Scan(1)),
                        None => self.phase = Phase::Begin,
                    },
                }
            }
            Phase::Scan(from) if from > self.head.capacity => self.phase = Phase::Begin,
            Phase::Scan(from) => {
                let count = BLOCKS_PER_READ.min(self.head.capacity + 1 - from) as usize;
                self.try_phase(
                    self.io
                        .request(Kind::Read, from, count * block, |_| {})
                        .map(|s| Phase::Scanning(s, from)),
                );
            }
            Phase::Scanning(slot, from) => {
                let (head, mut scan) = (self.head, self.scan);
                let count = BLOCKS_PER_READ.min(head.capacity + 1 - from);
                let look = |bytes: &[u8]| {
                    for (i, bytes) in (from..from + count).zip(bytes.chunks_exact(block)) {
                        let record = bytes.first_chunk().and_then(Record::read);
                        if !scan.take(&head, i, record) {
                            found_damage(record.map_or(0, |r| r.number), i, now);
                        }
                    }
                };
                match self.io.answer(slot, now, look) {
                    None => return WAIT,
                    Some(false) => self.phase = Phase::Scan(from),
                    Some(true) => (self.scan, self.phase) = (scan, Phase::Scan(from + count)),
                }
            }
            Phase::Begin => {
                let head = Super {
                    starts: self.head.starts + 1,
                    ..self.head
                };
                let fill = |b: &mut [u8]| {
                    if let Some(b) = b.first_chunk_mut() {
                        head.write(b);
                    }
                };
                self.try_phase(self.io.request(Kind::Write, 0, block, fill).map(Phase::Beginning));
            }
            Phase::Beginning(slot) => match self.io.answer(slot, now, |_| {}) {
                None => return WAIT,
                Some(good) => self.phase = if good { Phase::BeginFlush } else { Phase::Begin },
            },
            Phase::BeginFlush => self.try_phase(
                self.io
                    .request(Kind::Flush, 0, 0, |_| {})
                    .map(Phase::BeginFlushing),
            ),
            Phase::BeginFlushing(slot) => match self.io.answer(slot, now, |_| {}) {
                None => return WAIT,
                Some(false) => self.phase = Phase::BeginFlush,
                Some(true) => self.opened(),
            },
            Phase::Run => {}
        }
        Next::Now
    }

    fn try_phase(&mut self, next: Option<Phase>) {
        self.phase = next.unwrap_or(self.phase);
    }

    /// Records after the last flushed one may be missing or torn; all before the first such are checked again.
    fn opened(&mut self) {
        self.head.starts += 1;
        self.phase = Phase::Run;
        let scan = self.scan;
        let end = scan.end();
        (self.last, self.acknowledged) = (end, end);
        self.check_next = oldest(end, self.head.capacity);
        LAST.store(self.last, Ordering::Relaxed);
        ACKNOWLEDGED.store(self.acknowledged, Ordering::Relaxed);
        let head = self.head;
        serial::report(|l| {
            l.word("t", "journal")
                .number("starts", head.starts)
                .number("capacity", head.capacity);
            l.number("sound", scan.sound)
                .number("flushed", scan.flushed)
                .number("end", end)
                .number("last", scan.last);
        });
    }

    fn run(&mut self, now: u64) -> Next {
        let write = self.write_group(now);
        let read = self.read_back(now);
        match (write, read) {
            (Next::At(a), Next::At(b)) => Next::At(a.min(b)),
            _ => Next::Now,
        }
    }

    fn write_group(&mut self, now: u64) -> Next {
        const WAIT: Next = Next::At(u64::MAX);
        match self.group {
            Group::Waiting => {
                if self.io.is_read_only() {
                    return WAIT;
                }
                let (due, next) = match &mut self.pace {
                    None => (self.group_size, Next::Now),
                    Some(pace) => pace.due(now, self.group_size),
                };
                if due == 0 {
                    return next;
                }
                let mut slots = [None; LARGEST_GROUP];
                let mut size = 0;
                while size < due {
                    let record = Record {
                        number: self.last + size + 1,
                        flushed: self.acknowledged,
                        time_ns: now,
                        seed: self.head.seed,
                        starts: self.head.starts,
                    };
                    let fill = |b: &mut [u8]| {
                        if let Some(b) = b.first_chunk_mut() {
                            record.write(b);
                        }
                    };
                    let at = self.head.block_of(record.number);
                    let Some(slot) = self.io.request(Kind::Write, at, BLOCK as usize, fill) else {
                        break;
                    };
                    slots[size as usize] = Some(slot as u8);
                    size += 1;
                }
                if size == 0 {
                    return Next::Now;
                }
                self.group = Group::Writing {
                    slots,
                    size,
                    failed: false,
                };
                WAIT
            }
            Group::Writing {
                mut slots,
                size,
                mut failed,
            } => {
                for place in &mut slots {
                    if let Some(good) = place.and_then(|slot| self.io.answer(slot as usize, now, |_| {})) {
                        *place = None;
                        failed |= !good;
                    }
                }
                if slots.iter().any(Option::is_some) {
                    self.group = Group::Writing { slots, size, failed };
                    return WAIT;
                }
                // A record that could not be written is written again, under the same number.
                self.group = if failed {
                    Group::Waiting
                } else {
                    Group::Flush {
                        last: self.last + size,
                    }
                };
                Next::Now
            }
            Group::Flush { last } => {
                if let Some(slot) = self.io.request(Kind::Flush, 0, 0, |_| {}) {
                    self.group = Group::Flushing { slot, last };
                }
                Next::Now
            }
            Group::Flushing { slot, last } => match self.io.answer(slot, now, |_| {}) {
                None => WAIT,
                Some(false) => {
                    self.group = Group::Flush { last };
                    Next::Now
                }
                Some(true) => {
                    (self.last, self.acknowledged, self.group) = (last, last, Group::Waiting);
                    LAST.store(last, Ordering::Relaxed);
                    ACKNOWLEDGED.store(last, Ordering::Relaxed);
                    Next::Now
                }
            },
        }
    }

    /// Reads acknowledged records that the group being written does not overwrite.
    fn read_back(&mut self, now: u64) -> Next {
        if let Some((slot, first, count)) = self.reading {
            let (head, mut wrong) = (self.head, None);
            let look = |bytes: &[u8]| {
                for (number, bytes) in (first..first + count).zip(bytes.chunks_exact(BLOCK as usize)) {
                    let record: Option<Record> = bytes
                        .first_chunk::<{ BLOCK as usize }>()
                        .and_then(|b: &Bytes| Record::read(b));
                    if record.is_none_or(|r| {
                        r.seed != head.seed || ![number, number + head.capacity].contains(&r.number)
                    }) {
                        wrong = wrong.or(Some((number, record.map_or(0, |r| r.number))));
                    }
                }
            };
            match self.io.answer(slot, now, look) {
                None => return Next::At(u64::MAX),
                Some(false) => self.check_next = first,
                Some(true) => _ = CHECKED.fetch_add(count, Ordering::Relaxed),
            }
            if let Some((want, got)) = wrong {
                damage::found(Damage {
                    kind: "journal",
                    item: want,
                    gpa: 0,
                    want,
                    got,
                    at_ns: now,
                });
            }
            self.reading = None;
            return Next::Now;
        }
        let safe = oldest(self.acknowledged + 2 * LARGEST_GROUP as u64, self.head.capacity);
        if self.check_next < safe || self.check_next > self.acknowledged {
            self.check_next = safe;
        }
        if self.check_next > self.acknowledged {
            return Next::At(now + 10_000_000);
        }
        let (due, next) = self.read_pace.due(now, 1);
        if due == 0 {
            return next;
        }
        let first = self.check_next;
        let at = self.head.block_of(first);
        let count = BLOCKS_PER_READ
            .min(self.acknowledged + 1 - first)
            .min(self.head.capacity + 1 - at);
        if let Some(slot) = self.io.request(Kind::Read, at, (count * BLOCK) as usize, |_| {}) {
            self.reading = Some((slot, first, count));
            self.check_next = first + count;
        }
        Next::Now
    }
}

fn found_damage(number: u64, block: u64, now: u64) {
    damage::found(Damage {
        kind: "journal",
        item: number,
        gpa: 0,
        want: number,
        got: block,
        at_ns: now,
    });
}

const _: () = assert!(SLOTS > LARGEST_GROUP + 2);
