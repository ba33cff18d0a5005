//! A simulated block of memory or disk: what each unit holds on either side, who writes to it, and what is noted.
//!
//! A unit's content follows from its number and how often it was written, so that one number stands for it.

use std::sync::{Arc, MutexGuard};

use super::super::Rng;
use super::super::disk::{Disk, Holds};
use super::super::guest::Guest;
use super::super::pages::Scenario;
use super::super::trace::{Class, Trace, Writing};
use super::world::{Shared, World};
use crate::block::{BlockId, BlockInfo, BlockKind, DataError, PAGE_BYTES, Sink, Source, Span};
use crate::units::UnitSet;

/// Not allocated; reads as zeroes.
const HOLE: u32 = 1 << 31;
/// Allocated, and all zeroes.
const ZEROES: u32 = 1 << 30;
const COUNT: u32 = ZEROES - 1;

fn is_zero(unit: u32) -> bool {
    unit & (HOLE | ZEROES) != 0
}

fn same(here: u32, there: u32) -> bool {
    here == there || (is_zero(here) && is_zero(there))
}

/// What every unit holds here and there.
pub(super) struct Contents {
    here: Vec<u32>,
    there: Vec<u32>,
    /// How many units differ.
    differ: u64,
}

impl Contents {
    fn new(here: Vec<u32>) -> Self {
        let there = vec![HOLE; here.len()];
        let differ = here.iter().filter(|unit| !same(**unit, HOLE)).count() as u64;
        Contents { here, there, differ }
    }

    fn change(&mut self, unit: u64, next: impl Fn(u32) -> u32) {
        if let (Some(here), Some(there)) = (self.here.get_mut(unit as usize), self.there.get(unit as usize)) {
            let was = same(*here, *there);
            *here = next(*here);
            self.differ = self.differ + u64::from(was) - u64::from(same(*here, *there));
        }
    }

    fn write(&mut self, unit: u64) {
        self.change(unit, |was| (was + 1) & COUNT);
    }

    fn discard(&mut self, unit: u64) {
        self.change(unit, |was| ((was + 1) & COUNT) | HOLE);
    }

    fn arrive(&mut self, unit: u64, what: u32) {
        if let (Some(here), Some(there)) = (self.here.get(unit as usize), self.there.get_mut(unit as usize)) {
            let was = same(*here, *there);
            *there = what;
            self.differ = self.differ + u64::from(was) - u64::from(same(*here, *there));
        }
    }
}

pub(super) struct Block {
    pub(super) info: BlockInfo,
    contents: Contents,
    writer: Guest,
    discarder: Option<Guest>,
    tracking: bool,
    noted: UnitSet,
    seed: u64,
    wire_bytes_per_page: f64,
    /// What the guest writes at full speed, and may write at most, where that is limited.
    bytes_per_sec: f64,
    most_bytes_per_sec: Option<u64>,
    vcpu_speed: f64,
}

impl Block {
    pub(super) fn memory(scenario: &Scenario) -> Self {
        let pages = scenario.pages();
        let info = BlockInfo {
            id: BlockId(0),
            kind: BlockKind::Memory,
            name: "memory".into(),
            bytes: pages * u64::from(PAGE_BYTES),
        };
        let writer = Guest::new(&scenario.trace, pages, scenario.seed);
        let mut block = Block::new(info, vec![0; pages as usize], writer, scenario.seed);
        block.wire_bytes_per_page = scenario.wire_bytes_per_page;
        block
    }

    pub(super) fn disk(disk: &Disk, number: u16, seed: u64) -> Self {
        let seed = seed ^ (u64::from(number) << 48 | 0xd15c);
        // The same parts and the same seed: the same clusters.
        let guest = |rate: &dyn Fn(&super::super::disk::Part) -> f64| {
            let classes = disk.parts.iter().map(|part| Class {
                part: part.part,
                rate: rate(part),
            });
            let trace = Trace {
                name: String::new(),
                writing: Writing::Classes {
                    classes: classes.collect(),
                    stretches: Vec::new(),
                },
                device_pages: 0,
            };
            Guest::new(&trace, disk.clusters(), seed)
        };
        let writer = guest(&|part| part.writes_per_sec);
        let mut here = vec![HOLE; disk.clusters() as usize];
        for (part, clusters) in disk.parts.iter().zip(writer.classes()) {
            for cluster in clusters {
                if let Some(unit) = here.get_mut(*cluster as usize) {
                    *unit = match part.holds {
                        Holds::Data => 0,
                        Holds::Zeroes => ZEROES,
                        Holds::Hole => HOLE,
                    };
                }
            }
        }
        let info = BlockInfo {
            id: BlockId(number),
            kind: BlockKind::Disk,
            name: format!("disk {}", number - 1),
            bytes: disk.bytes,
        };
        let discards = disk.parts.iter().any(|part| part.discards_per_sec > 0.0);
        let discarder = discards.then(|| guest(&|part| part.discards_per_sec));
        let mut block = Block::new(info, here, writer, seed);
        block.discarder = discarder;
        block.bytes_per_sec = disk.bytes_per_sec();
        block
    }

    fn new(info: BlockInfo, here: Vec<u32>, writer: Guest, seed: u64) -> Self {
        Block {
            noted: UnitSet::empty(info.units()),
            info,
            contents: Contents::new(here),
            writer,
            discarder: None,
            tracking: false,
            seed,
            wire_bytes_per_page: f64::from(PAGE_BYTES),
            bytes_per_sec: 0.0,
            most_bytes_per_sec: None,
            vcpu_speed: 1.0,
        }
    }

    /// The guest writes until then.
    pub(super) fn advance(&mut self, to: f64) {
        let Block {
            contents,
            writer,
            discarder,
            tracking,
            noted,
            ..
        } = self;
        writer.advance(to, |unit| {
            contents.write(unit);
            if *tracking {
                noted.insert(unit);
            }
        });
        if let Some(discarder) = discarder {
            discarder.advance(to, |unit| {
                contents.discard(unit);
                if *tracking {
                    noted.insert(unit);
                }
            });
        }
    }

    pub(super) fn vcpus_run(&mut self, speed: f64) {
        self.vcpu_speed = speed;
        self.set_speed();
    }

    pub(super) fn write_at_most(&mut self, bytes_per_sec: Option<u64>) {
        self.most_bytes_per_sec = bytes_per_sec;
        self.set_speed();
    }

    /// Which part of the time a limit holds writes back.
    pub(super) fn held_back(&self) -> f64 {
        1.0 - self.allowed()
    }

    fn allowed(&self) -> f64 {
        match self.most_bytes_per_sec {
            Some(most) if self.bytes_per_sec > 0.0 => (most as f64 / self.bytes_per_sec).min(1.0),
            _ => 1.0,
        }
    }

    fn set_speed(&mut self) {
        let speed = self.vcpu_speed.min(self.allowed());
        self.writer.set_speed(speed);
        if let Some(discarder) = &mut self.discarder {
            discarder.set_speed(self.vcpu_speed);
        }
    }

    /// How often units were written so far.
    #[cfg(test)]
    pub(super) fn writes(&self) -> u64 {
        self.contents
            .here
            .iter()
            .map(|unit| u64::from(unit & COUNT))
            .sum()
    }

    pub(super) fn units_that_differ(&self) -> u64 {
        self.contents.differ
    }

    pub(super) fn bytes_that_differ(&self) -> u64 {
        self.contents.differ * u64::from(self.info.unit_bytes())
    }

    /// The content of a unit: its number, how often it was written, and noise that no compression shortens.
    fn fill(&self, unit: u64, what: u32, out: &mut [u8]) {
        if is_zero(what) {
            out.fill(0);
            return;
        }
        let mut rng = Rng::new(self.seed ^ unit.rotate_left(32) ^ u64::from(what));
        let noise = self.noise_bytes(unit, out.len());
        let (noisy, rest) = out.split_at_mut(noise.min(out.len()));
        for chunk in noisy.chunks_mut(8) {
            let bytes = rng.bits().to_le_bytes();
            if let Some(bytes) = bytes.get(..chunk.len()) {
                chunk.copy_from_slice(bytes);
            }
        }
        if let Some(head) = noisy.get_mut(..4) {
            head.copy_from_slice(&what.to_le_bytes());
        }
        rest.fill(0);
    }

    /// As much of a page is noise as makes pages as large on the wire as they are to be on average. What is just below a
    /// whole page would not be compressed, so some pages are half noise and others all.
    fn noise_bytes(&self, unit: u64, length: usize) -> usize {
        let (half, whole) = (f64::from(PAGE_BYTES) / 2.0, f64::from(PAGE_BYTES));
        if self.info.kind == BlockKind::Disk || self.wire_bytes_per_page >= whole {
            return length;
        }
        if self.wire_bytes_per_page < half {
            return (self.wire_bytes_per_page as usize).max(LEAST_NOISE);
        }
        let halves = (whole - self.wire_bytes_per_page) / half;
        let fate = (unit.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1u64 << 53) as f64;
        if fate < halves { half as usize } else { length }
    }
}

const LEAST_NOISE: usize = 64;

/// A block as one side's engine sees it.
pub(super) struct End {
    pub(super) world: Arc<Shared>,
    pub(super) at: usize,
}

/// The block in the world that is locked.
fn block<'a>(world: &'a mut MutexGuard<'_, World>, at: usize) -> Result<&'a mut Block, DataError> {
    let missing = || DataError::new(format!("the simulated machine has no block {at}"));
    world.blocks.get_mut(at).ok_or_else(missing)
}

impl End {
    fn with<T>(&self, act: impl FnOnce(&mut Block) -> T) -> Result<T, DataError> {
        let mut world = self.world.lock();
        Ok(act(block(&mut world, self.at)?))
    }

    fn info(&self) -> BlockInfo {
        self.with(|block| block.info.clone()).unwrap_or(BlockInfo {
            id: BlockId(u16::MAX),
            kind: BlockKind::Memory,
            name: "missing".into(),
            bytes: 0,
        })
    }

    /// What a span holds on this side.
    fn read(&self, span: Span, out: &mut [u8], side: fn(&Contents) -> &[u32]) -> Result<(), DataError> {
        self.with(|block| {
            let mut rest = out;
            for unit in span.first..span.end() {
                let bytes = block.info.span_bytes(Span {
                    block: span.block,
                    first: unit,
                    count: 1,
                });
                let (now, later) = rest.split_at_mut(bytes.min(rest.len()));
                let what = side(&block.contents).get(unit as usize).copied().unwrap_or(HOLE);
                block.fill(unit, what, now);
                rest = later;
            }
        })
    }
}

/// The block at the side it leaves.
pub(super) struct Leaving(pub(super) End);

impl Source for Leaving {
    fn info(&self) -> BlockInfo {
        self.0.info()
    }

    fn start_tracking(&self) -> Result<(), DataError> {
        self.0.with(|block| block.tracking = true)
    }

    fn stop_tracking(&self) {
        let _ = self.0.with(|block| block.tracking = false);
    }

    fn first_pass(&self) -> Result<UnitSet, DataError> {
        self.0.with(|block| {
            let mut allocated = UnitSet::empty(block.info.units());
            for (unit, what) in (0..).zip(&block.contents.here) {
                if what & HOLE == 0 {
                    allocated.insert(unit);
                }
            }
            allocated
        })
    }

    fn survey(&self, changed: &mut UnitSet) -> Result<(), DataError> {
        self.0.with(|block| changed.union(&block.noted))
    }

    fn take(&self, spans: &[Span]) -> Result<(), DataError> {
        self.0.with(|block| {
            for span in spans {
                block.noted.remove_run(span.first, u64::from(span.count));
            }
        })
    }

    fn put_back(&self, spans: &[Span]) {
        let _ = self.0.with(|block| {
            for span in spans {
                block.noted.insert_run(span.first, u64::from(span.count));
            }
        });
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        self.0.read(span, out, |contents| &contents.here)
    }

    fn find_zeroes(&self, span: Span, zero: &mut [bool]) -> Result<(), DataError> {
        self.0.with(|block| {
            for (unit, zero) in (span.first..span.end()).zip(zero) {
                *zero = block
                    .contents
                    .here
                    .get(unit as usize)
                    .is_some_and(|what| what & HOLE != 0);
            }
        })
    }
}

/// The block at the side it comes to, which looks at every byte.
pub(super) struct Arriving(pub(super) End);

impl Sink for Arriving {
    fn info(&self) -> BlockInfo {
        self.0.info()
    }

    fn place(&self, span: Span, data: &[u8]) -> Result<(), DataError> {
        self.0.with(|block| {
            let mut expected = vec![0; block.info.unit_bytes() as usize];
            let mut rest = data;
            for unit in span.first..span.end() {
                let one = Span {
                    block: span.block,
                    first: unit,
                    count: 1,
                };
                let (now, later) = rest.split_at(block.info.span_bytes(one).min(rest.len()));
                rest = later;
                let what = now.first_chunk().map_or(HOLE, |head| u32::from_le_bytes(*head));
                let expected = expected.get_mut(..now.len()).unwrap_or_default();
                block.fill(unit, what, expected);
                if is_zero(what) || now != expected {
                    let name = &block.info.name;
                    return Err(DataError::new(format!(
                        "unit {unit} of {name} did not arrive as it was"
                    )));
                }
                block.contents.arrive(unit, what);
            }
            Ok(())
        })?
    }

    fn place_zeroes(&self, span: Span) -> Result<(), DataError> {
        self.0.with(|block| {
            for unit in span.first..span.end() {
                block.contents.arrive(unit, HOLE);
            }
        })
    }

    fn read(&self, span: Span, out: &mut [u8]) -> Result<(), DataError> {
        self.0.read(span, out, |contents| &contents.there)
    }
}
