//! Encoding and decoding a page allocates nothing once the buffers are there.
#![allow(unsafe_code)] // counts allocations, which only a global allocator can see
#![allow(clippy::unwrap_used)] // a test's own helpers

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;

use common::{Dice, FakeBlock, FakeSink, StepClock};
use ferry_migration::block::{BlockKind, Sink, Span};
use ferry_migration::pages::cache::DeltaCache;
use ferry_migration::pages::decode::{Placement, Scratch};
use ferry_migration::pages::encode::{Compression, Encoder, Memory};
use ferry_migration::pages::sent::SentHashes;
use ferry_migration::wire::FrameHeader;

struct Counting;

thread_local! {
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: every call goes to the system's allocator unchanged; counting touches nothing but a thread's own cell.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = COUNT.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`, which is the system's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from the system's allocator with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn no_page_costs_an_allocation() {
    for (kind, units) in [(BlockKind::Memory, 256), (BlockKind::Disk, 17)] {
        let mut dice = Dice::new(3);
        let block = FakeBlock::new(0, kind, units);
        block.fill(&mut dice);
        let sink = Arc::new(FakeSink::new(block.info.clone()));
        let placement = Placement::new(&[sink as Arc<dyn Sink>]);
        let info = std::slice::from_ref(&block.info);
        let memory = Memory {
            cache: DeltaCache::new(4 << 20),
            sent: SentHashes::new(1, info),
        };
        let (mut encoder, mut scratch) = (Encoder::new(Compression::Always), Scratch::new());
        let clock = StepClock::default();
        let mut spent = Vec::new();
        let mut ways = (0, 0);
        for round in 0..12 {
            let before = COUNT.get();
            for first in (0..units).step_by(16) {
                let span = Span {
                    block: block.info.id,
                    first,
                    count: 16.min(units - first) as u32,
                };
                let counts = encoder
                    .encode(&memory, &*block, &block.info, &[span], round, &clock)
                    .unwrap();
                ways = (ways.0 + counts.delta, ways.1 + counts.lz4);
                if encoder.has_frame() {
                    let frame = encoder.frame(&block.info, 1, round);
                    let (head, mut rest) = frame.split_at(FrameHeader::BYTES);
                    let header = FrameHeader::decode(head.try_into().unwrap()).unwrap();
                    placement.place(&header, &mut rest, &mut scratch).unwrap();
                }
            }
            spent.push(COUNT.get() - before);
            for unit in 0..units {
                block.write_unit(unit, &mut dice);
            }
        }
        assert!(ways.1 > 0 && (kind == BlockKind::Disk || ways.0 > 0), "{ways:?}");
        // A slot of the cache gets its page when it is used first, and keeps it.
        let slots = if kind == BlockKind::Memory { units } else { 0 };
        assert!(spent.iter().sum::<u64>() <= slots, "{kind:?}: {spent:?}");
    }
}
