//! Both engines do what a disk does, and say what they wrote into guest memory.

use std::os::fd::AsFd;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::disk::tests::{SIZE, contents, dir, new_disk, place};
use crate::disk::{DiskCache, DiskFormat, DiskOptions};
use crate::ram::{PAGE_SIZE, Ram, take_dirty};

pub(crate) fn ram() -> Ram {
    // Two regions that touch, so that buffers can lie across the border.
    Ram::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)]).unwrap()
}

fn wait(engine: &mut dyn Engine, done: &mut Vec<Done>) {
    while engine.in_flight() > 0 {
        engine.start().unwrap();
        let event = engine.event().as_fd().try_clone_to_owned().unwrap();
        let mut polled = [rustix::event::PollFd::new(&event, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        assert!(
            rustix::event::poll(&mut polled, Some(&timeout)).unwrap() > 0,
            "nothing completes"
        );
        engine.reap(done).unwrap();
    }
}

#[derive(Debug, Clone)]
enum Step {
    Read {
        offset: u64,
        len: u64,
        at: u64,
    },
    Write {
        offset: u64,
        len: u64,
        at: u64,
        fill: u8,
        durable: bool,
    },
    Zero {
        offset: u64,
        len: u64,
        keep: bool,
        durable: bool,
    },
    Discard {
        offset: u64,
        len: u64,
    },
    Flush,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let sector = |(offset, len): (u64, u64)| (offset / 4096 * 4096, (len / 512).max(1) * 512);
    let place = || place(SIZE - 100_000).prop_map(sector);
    let at = || prop_oneof![0u64..1_700_000, (0u64..3_000).prop_map(|n| n * 512)];
    let step = prop_oneof![
        3 => (place(), at()).prop_map(|((offset, len), at)| Step::Read { offset, len, at }),
        3 => (place(), at(), 1u8.., any::<bool>())
            .prop_map(|((offset, len), at, fill, durable)| Step::Write { offset, len, at, fill, durable }),
        1 => (place(), any::<bool>(), any::<bool>())
            .prop_map(|((offset, len), keep, durable)| Step::Zero { offset, len, keep, durable }),
        1 => place().prop_map(|(offset, len)| Step::Discard { offset, len }),
        1 => Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..30)
}

/// Three pieces of guest memory of uneven sizes.
fn split(at: u64, len: u64) -> Vec<(GuestAddress, usize)> {
    let third = len / 3;
    let piece = |from: u64, to: u64| (GuestAddress(at + from), (to - from) as usize);
    vec![
        piece(0, third),
        piece(third, third),
        piece(third, 2 * third),
        piece(2 * third, len),
    ]
}

fn one_by_one(engine: &mut dyn Engine, disk: &Disk, steps: Vec<Step>) {
    let ram = ram();
    let mut model = vec![0u8; disk.size() as usize];
    let slice = |offset: u64, len: u64| offset as usize..(offset + len) as usize;
    for (tag, step) in steps.into_iter().enumerate() {
        let buffers = |at, len, for_writing| {
            let buffers = Buffers::in_guest(&ram, split(at, len)).unwrap();
            let must_copy =
                disk.format() == DiskFormat::Qcow2 || !buffers.is_aligned(disk.alignment().memory);
            if must_copy {
                buffers
                    .copied(disk.alignment().memory.max(512), for_writing)
                    .unwrap()
            } else {
                buffers
            }
        };
        let io = |op, offset, len, durable, buffers| Io {
            op,
            offset,
            len,
            durable,
            buffers,
            tag,
        };
        take_dirty(&ram);
        let work = match step {
            Step::Read { offset, len, at } => io(Op::Read, offset, len, false, buffers(at, len, false)),
            Step::Write {
                offset,
                len,
                at,
                fill,
                durable,
            } => {
                ram.write_slice(&vec![fill; len as usize], GuestAddress(at))
                    .unwrap();
                take_dirty(&ram);
                model[slice(offset, len)].fill(fill);
                io(Op::Write, offset, len, durable, buffers(at, len, true))
            }
            Step::Zero {
                offset,
                len,
                keep,
                durable,
            } => {
                model[slice(offset, len)].fill(0);
                io(
                    Op::WriteZeroes { keep_allocated: keep },
                    offset,
                    len,
                    durable,
                    Buffers::none(),
                )
            }
            Step::Discard { offset, len } => {
                model[slice(offset, len)].fill(0);
                io(Op::Discard, offset, len, false, Buffers::none())
            }
            Step::Flush => io(Op::Flush, 0, 0, false, Buffers::none()),
        };
        assert!(engine.has_room());
        engine.submit(work);
        let mut done = Vec::new();
        wait(engine, &mut done);
        let Done { io, result } = done.pop().unwrap();
        result.unwrap();
        assert_eq!(io.tag, tag);
        let written: u32 = if let Step::Read { offset, len, at } = step {
            io.buffers.finish_read(true).unwrap();
            let mut seen = vec![0; len as usize];
            ram.read_slice(&mut seen, GuestAddress(at)).unwrap();
            assert!(
                seen == model[slice(offset, len)],
                "read something else than was written"
            );
            ((at + len).div_ceil(PAGE_SIZE) - at / PAGE_SIZE) as u32
        } else {
            0
        };
        let marked: u32 = take_dirty(&ram)
            .iter()
            .flat_map(|(_, words)| words)
            .map(|word| word.count_ones())
            .sum();
        assert_eq!(marked, written, "pages marked in guest memory");
    }
    assert!(contents(disk) == model, "the disk differs from the model");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn both_engines_are_a_disk(steps in steps(), direct in any::<bool>()) {
        for (format, threads) in [(DiskFormat::Raw, false), (DiskFormat::Raw, true), (DiskFormat::Qcow2, true)] {
            let dir = dir();
            let cache = if direct { DiskCache::Direct } else { DiskCache::Writeback };
            let disk = Arc::new(new_disk(dir.path(), format, cache));
            let mut engine: Box<dyn Engine> = if threads {
                Box::new(pool::Pool::new(&disk, 8, "test").unwrap())
            } else {
                match ring::Ring::new(&disk, 8) {
                    Ok(ring) => Box::new(ring),
                    Err(error) => {
                        crate::disk::tests::skip(&format!("io_uring: {error}"));
                        continue;
                    }
                }
            };
            one_by_one(engine.as_mut(), &disk, steps.clone());
        }
    }
}

/// Many in flight at once, at different places; dropped with work in flight, the engine must wait for it.
#[test]
fn dropping_an_engine_waits_for_what_the_kernel_holds() {
    let dir = dir();
    let disk = Arc::new(new_disk(dir.path(), DiskFormat::Raw, DiskCache::Direct));
    let ram = ram();
    ram.write_slice(&[7; 4096], GuestAddress(0)).unwrap();
    for threads in [false, true] {
        for round in 0..20u64 {
            let mut engine: Box<dyn Engine> = if threads {
                Box::new(pool::Pool::new(&disk, 64, "test").unwrap())
            } else if let Ok(ring) = ring::Ring::new(&disk, 64) {
                Box::new(ring)
            } else {
                return crate::disk::tests::skip("io_uring");
            };
            for n in 0..64u64 {
                let buffers = Buffers::in_guest(&ram, vec![(GuestAddress(0), 4096)]).unwrap();
                let offset = ((n * 7 + round) % 64) * 4096;
                engine.submit(Io {
                    op: Op::Write,
                    offset,
                    len: 4096,
                    durable: n % 8 == 0,
                    buffers,
                    tag: n as usize,
                });
            }
            assert!(!engine.has_room());
            engine.start().unwrap();
            drop(engine);
            assert_eq!(Arc::strong_count(&disk), 1, "a thread still has the disk");
            assert!(contents(&disk)[..64 * 4096].iter().all(|b| *b == 7));
            disk.write_at(&vec![0; 64 * 4096], 0).unwrap();
        }
    }
}

#[test]
fn what_lies_outside_guest_memory_makes_no_buffer() {
    let ram = ram();
    let refused =
        |address: u64, len: usize| Buffers::in_guest(&ram, vec![(GuestAddress(address), len)]).is_none();
    assert!(
        refused(2 << 20, 1) && refused((2 << 20) - 4, 8) && refused(u64::MAX, 2) && refused(u64::MAX - 8, 64)
    );
    assert!(!refused((1 << 20) - 4, 8));
    assert!(
        Buffers::in_guest(&ram, vec![(GuestAddress(0), 1); 2000]).is_none(),
        "more pieces than the kernel takes"
    );
    assert_eq!(ram.num_regions(), 2);
}

#[test]
fn the_user_can_force_an_engine() {
    let dir = dir();
    let path = dir.path().join("disk");
    Disk::create(&path, DiskFormat::Raw, 1 << 20).unwrap();
    let options = DiskOptions {
        engine: EngineKind::Threads,
        ..DiskOptions::new(&path)
    };
    let disk = Arc::new(Disk::open(&options).unwrap());
    drop(for_queue(&disk, 1, "test").unwrap());
}
