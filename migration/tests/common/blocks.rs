//! Memory and disks of both sides: a guest that writes while it is copied, and sinks that remember what arrived.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ferry_migration::block::{BlockId, BlockInfo, BlockKind, DataError, Name, Sink, Source, Span};
use ferry_migration::units::UnitSet;

use super::chance::Dice;

/// One block of a guest: its bytes, and the notes of a careful dirty tracker.
pub struct FakeBlock {
    pub info: BlockInfo,
    pub data: Mutex<Vec<u8>>,
    noted: Mutex<UnitSet>,
    tracking: AtomicBool,
    /// Where the guest itself writes while the engine works; `None`: it does not.
    writer: Mutex<Option<Dice>>,
    /// Of a hundred reads, how many see the guest write in between.
    writes_per_cent: AtomicU64,
    /// Reads fail from now on (a broken disk).
    pub broken: AtomicBool,
}

impl FakeBlock {
    pub fn new(id: u16, kind: BlockKind, units: u64) -> Arc<Self> {
        let mut info = BlockInfo {
            id: BlockId(id),
            kind,
            name: format!("{kind:?} {id}"),
            bytes: 0,
        };
        info.bytes = units * u64::from(info.unit_bytes());
        if kind == BlockKind::Disk {
            // The last cluster of a disk is short.
            info.bytes -= 512 * 3;
        }
        Arc::new(FakeBlock {
            data: Mutex::new(vec![0; info.bytes as usize]),
            noted: Mutex::new(UnitSet::empty(units)),
            tracking: AtomicBool::new(false),
            writer: Mutex::new(None),
            writes_per_cent: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            info,
        })
    }

    /// Fills the block with what real memory is made of: holes, patterns, text, noise.
    pub fn fill(&self, dice: &mut Dice) {
        for unit in 0..self.info.units() {
            self.write_unit(unit, dice);
        }
        self.noted.lock().unwrap().clear();
    }

    pub fn write_unit(&self, unit: u64, dice: &mut Dice) {
        let span = Span {
            block: self.info.id,
            first: unit,
            count: 1,
        };
        let (at, length) = (self.info.offset(unit) as usize, self.info.span_bytes(span));
        let mut data = self.data.lock().unwrap();
        let page = &mut data[at..at + length];
        match dice.below(8) {
            0 | 1 => page.fill(0),
            2 => page.fill(dice.roll() as u8),
            3 => page
                .chunks_mut(2)
                .enumerate()
                .for_each(|(i, c)| c[0] = (i / 7) as u8),
            // Just a word here and there.
            4 | 5 => {
                for _ in 0..1 + dice.below(4) {
                    let place = dice.below(length as u64 / 8) as usize * 8;
                    page[place..place + 8].copy_from_slice(&dice.roll().to_le_bytes());
                }
            }
            // Written with what it holds.
            6 => {}
            _ => page
                .chunks_mut(8)
                .for_each(|c| c.copy_from_slice(&dice.roll().to_le_bytes()[..c.len()])),
        }
        if self.tracking.load(Ordering::Acquire) {
            self.noted.lock().unwrap().insert(unit);
        }
    }

    pub fn guest_writes(&self, dice: Option<Dice>, per_cent: u64) {
        *self.writer.lock().unwrap() = dice;
        self.writes_per_cent.store(per_cent, Ordering::Release);
    }

    fn guest_may_write(&self) {
        let mut writer = self.writer.lock().unwrap();
        if let Some(dice) = writer.as_mut()
            && dice.below(100) < self.writes_per_cent.load(Ordering::Acquire)
        {
            let unit = dice.below(self.info.units());
            self.write_unit(unit, dice);
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.data.lock().unwrap().clone()
    }

    pub fn is_tracking(&self) -> bool {
        self.tracking.load(Ordering::Acquire)
    }

    pub fn noted(&self) -> UnitSet {
        self.noted.lock().unwrap().clone()
    }

    fn range(&self, span: Span) -> std::ops::Range<usize> {
        let at = self.info.offset(span.first) as usize;
        at..at + self.info.span_bytes(span)
    }
}

impl Source for FakeBlock {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn start_tracking(&self) -> Result<(), DataError> {
        self.tracking.store(true, Ordering::Release);
        Ok(())
    }

    fn stop_tracking(&self) {
        self.tracking.store(false, Ordering::Release);
    }

    fn first_pass(&self) -> Result<UnitSet, DataError> {
        let mut set = UnitSet::full(self.info.units());
        if self.info.kind == BlockKind::Disk {
            let data = self.data.lock().unwrap();
            for unit in 0..self.info.units() {
                let span = Span {
                    block: self.info.id,
                    first: unit,
                    count: 1,
                };
                if data[self.range(span)].iter().all(|b| *b == 0) {
                    set.remove(unit);
                }
            }
        }
        Ok(set)
    }

    fn survey(&self, changed: &mut UnitSet) -> Result<(), DataError> {
        changed.union(&self.noted.lock().unwrap());
        Ok(())
    }

    fn take(&self, spans: &[Span]) -> Result<(), DataError> {
        {
            let mut noted = self.noted.lock().unwrap();
            spans
                .iter()
                .for_each(|span| noted.remove_run(span.first, u64::from(span.count)));
        }
        self.guest_may_write();
        Ok(())
    }

    fn put_back(&self, spans: &[Span]) {
        let mut noted = self.noted.lock().unwrap();
        spans
            .iter()
            .for_each(|span| noted.insert_run(span.first, u64::from(span.count)));
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        if self.broken.load(Ordering::Acquire) {
            return Err(DataError::new("the medium is broken"));
        }
        self.guest_may_write();
        out.copy_from_slice(&self.data.lock().unwrap()[self.range(span)]);
        self.guest_may_write();
        Ok(())
    }
}

/// A block at the incoming side.
pub struct FakeSink {
    pub info: BlockInfo,
    data: Mutex<Vec<u8>>,
    /// Content from an earlier time, by name.
    library: BTreeMap<[u8; 32], Vec<u8>>,
    pub room_left: AtomicU64,
    pub in_place: bool,
    pub taken_from_library: AtomicU64,
}

impl FakeSink {
    pub fn new(info: BlockInfo) -> Self {
        let data = Mutex::new(vec![0; info.bytes as usize]);
        let in_place = info.kind == BlockKind::Memory;
        let room_left = AtomicU64::new(u64::MAX);
        let (library, taken_from_library) = (BTreeMap::new(), AtomicU64::new(0));
        FakeSink {
            info,
            data,
            library,
            room_left,
            in_place,
            taken_from_library,
        }
    }

    pub fn with_library(mut self, content: &[u8]) -> Self {
        for unit in content.chunks(self.info.unit_bytes() as usize) {
            self.library.insert(Name::of(unit).0, unit.to_vec());
        }
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.data.lock().unwrap().clone()
    }

    fn range(&self, span: Span) -> std::ops::Range<usize> {
        let at = self.info.offset(span.first) as usize;
        at..at + self.info.span_bytes(span)
    }
}

impl Sink for FakeSink {
    fn info(&self) -> BlockInfo {
        self.info.clone()
    }

    fn place(&self, span: Span, data: &[u8]) -> Result<(), DataError> {
        if self.room_left.load(Ordering::Acquire) < data.len() as u64 {
            return Err(DataError::no_space("the disk there is full"));
        }
        self.room_left.fetch_sub(data.len() as u64, Ordering::AcqRel);
        self.data.lock().unwrap()[self.range(span)].copy_from_slice(data);
        Ok(())
    }

    fn place_zeroes(&self, span: Span) -> Result<(), DataError> {
        self.data.lock().unwrap()[self.range(span)].fill(0);
        Ok(())
    }

    fn fill_in_place(&self, span: Span, fill: &mut dyn FnMut(&mut [u8])) -> Result<bool, DataError> {
        if self.in_place {
            fill(&mut self.data.lock().unwrap()[self.range(span)]);
        }
        Ok(self.in_place)
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        out.copy_from_slice(&self.data.lock().unwrap()[self.range(span)]);
        Ok(())
    }

    fn has_library(&self) -> bool {
        !self.library.is_empty()
    }

    fn place_known(&self, unit: u64, name: &Name) -> Result<bool, DataError> {
        let Some(content) = self.library.get(&name.0) else {
            return Ok(false);
        };
        let span = Span {
            block: self.info.id,
            first: unit,
            count: 1,
        };
        self.taken_from_library.fetch_add(1, Ordering::AcqRel);
        self.place(span, content).map(|()| true)
    }
}
