//! What each request does, and that the device is a disk under any mix of them.

use super::*;

#[derive(Debug, Clone)]
enum Step {
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        offset: u64,
        len: u32,
        fill: u8,
    },
    Discard {
        offset: u64,
        len: u32,
    },
    Zero {
        offset: u64,
        len: u32,
        unmap: bool,
    },
    Flush,
    /// Stop, save, restore into a new device on the same image, go on.
    Move,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = || {
        (0..SIZE / 512 - 1024, 1u64..200).prop_map(|(sector, sectors)| (sector * 512, (sectors * 512) as u32))
    };
    let step = prop_oneof![
        6 => place().prop_map(|(offset, len)| Step::Read { offset, len }),
        6 => (place(), any::<u8>()).prop_map(|((offset, len), fill)| Step::Write { offset, len, fill }),
        2 => place().prop_map(|(offset, len)| Step::Discard { offset: offset / 4096 * 4096, len: len.next_multiple_of(4096) }),
        2 => (place(), any::<bool>()).prop_map(|((offset, len), unmap)| Step::Zero { offset, len, unmap }),
        2 => Just(Step::Flush),
        1 => Just(Step::Move),
    ];
    prop::collection::vec(step, 1..60)
}

/// Whether this kernel has what the io_uring engine needs; says so if not.
fn has_io_uring(options: &DiskOptions) -> bool {
    let disk = Arc::new(Disk::open(options).unwrap());
    let made = engine::for_queue(&disk, 1, "probe");
    if let Err(error) = &made {
        skip(&format!("io_uring: {error}"));
    }
    made.is_ok()
}

/// A step in flight: what its memory must look like when it is answered.
struct Asked {
    offset: u64,
    len: u64,
    at: u64,
    reads: bool,
}

fn overlaps(asked: &[Asked], offset: u64, len: u64) -> bool {
    asked
        .iter()
        .any(|other| offset < other.offset + other.len && other.offset < offset + len)
}

fn is_a_disk(options: &DiskOptions, steps: Vec<Step>, event_idx: bool) {
    let features = ALL_FEATURES
        | if event_idx {
            1 << VIRTIO_RING_F_EVENT_IDX
        } else {
            0
        };
    let mut rig = Rig::new(options, 2, features);
    rig.disk.tracker().start();
    let mut model = vec![0u8; rig.disk.size() as usize];
    let before = model.clone();
    let mut memory_before = vec![0; (DATA + DATA_LEN) as usize];
    rig.ram.read_slice(&mut memory_before, GuestAddress(0)).unwrap();
    take_dirty(&rig.ram);
    let mut asked: Vec<Asked> = Vec::new();
    let mut at = 0;
    for (n, step) in steps.into_iter().enumerate() {
        let (offset, len) = match step {
            Step::Read { offset, len }
            | Step::Write { offset, len, .. }
            | Step::Discard { offset, len }
            | Step::Zero { offset, len, .. } => (offset, u64::from(len)),
            Step::Flush => (0, 0),
            Step::Move => (0, 0),
        };
        // Direct I/O may want larger blocks than sectors.
        let block = u64::from(rig.disk.block_size());
        let (offset, len) = (offset / block * block, len.next_multiple_of(block));
        // Requests at one place at once have no defined order, and memory in use is not used twice.
        if overlaps(&asked, offset, len) || at + len + 512 > DATA_LEN || asked.len() > 20 {
            settle(&mut rig, &mut asked, &model);
            at = 0;
        }
        let range = offset as usize..(offset + len) as usize;
        let queue = n % 2;
        // Uneven addresses and pieces now and then.
        let memory = DATA + at + if n % 5 == 0 { 3 } else { 0 };
        let half = ((len as u32 / 2) | 1).min(len as u32);
        let pieces = [(memory, half), (memory + u64::from(half), len as u32 - half)];
        match step {
            Step::Read { .. } => {
                rig.drivers[queue].request(VIRTIO_BLK_T_IN, offset / 512, &pieces, true);
                asked.push(Asked {
                    offset,
                    len,
                    at: memory,
                    reads: true,
                });
            }
            Step::Write { fill, .. } => {
                rig.ram
                    .write_slice(&vec![fill; len as usize], GuestAddress(memory))
                    .unwrap();
                rig.drivers[queue].request(VIRTIO_BLK_T_OUT, offset / 512, &pieces, false);
                model[range].fill(fill);
                asked.push(Asked {
                    offset,
                    len,
                    at: memory,
                    reads: false,
                });
            }
            Step::Discard { .. } | Step::Zero { .. } => {
                let (kind, flags) = match step {
                    Step::Zero { unmap, .. } => (VIRTIO_BLK_T_WRITE_ZEROES, u32::from(unmap)),
                    _ => (VIRTIO_BLK_T_DISCARD, 0),
                };
                put_range(&rig.ram, memory, offset / 512, (len / 512) as u32, flags);
                rig.drivers[queue].request(kind, 0, &[(memory, 16)], false);
                model[range].fill(0);
                asked.push(Asked {
                    offset,
                    len,
                    at: memory,
                    reads: false,
                });
            }
            Step::Flush => {
                rig.drivers[queue].request(VIRTIO_BLK_T_FLUSH, 0, &[], false);
            }
            Step::Move => {
                // With requests in the queue and in flight.
                rig.drivers.iter().for_each(Driver::kick);
                rig.stop();
                let state = rig.device.save().unwrap();
                let mut there = BlockDevice::new("disk0", Arc::clone(&rig.disk), None, 2).unwrap();
                there.restore(&state).unwrap();
                assert_eq!(there.save().unwrap(), state);
                rig.device = there;
                // The queues travel as positions.
                rig.stopped = rig
                    .stopped
                    .drain(..)
                    .map(|(index, queue)| (index, Queue::try_from(queue.state()).unwrap()))
                    .collect();
                rig.start();
            }
        }
        at += len.max(16) + 3;
    }
    settle(&mut rig, &mut asked, &model);
    rig.stop();
    assert!(contents(&rig.disk) == model, "the disk differs from the model");
    let dirty = rig.disk.tracker().take();
    for (n, (old, new)) in before
        .chunks(CLUSTER_SIZE as usize)
        .zip(model.chunks(CLUSTER_SIZE as usize))
        .enumerate()
    {
        assert!(
            old == new || dirty.iter().any(|run| run.contains(&(n as u64))),
            "cluster {n} changed unseen"
        );
    }
    // What changed in guest memory is marked (the driver's own writes are marked, too: that side is not measured here,
    // see `what_the_device_writes_into_memory_is_marked`).
    let mut memory = vec![0; memory_before.len()];
    rig.ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
    let marked = take_dirty(&rig.ram);
    let is_marked = |page: u64| {
        marked.iter().any(|(start, words)| {
            page.checked_sub(start.0 / PAGE_SIZE)
                .and_then(|n| words.get(n as usize / 64).map(|word| word >> (n % 64) & 1 == 1))
                .unwrap_or(false)
        })
    };
    for (page, (old, new)) in memory_before.chunks(4096).zip(memory.chunks(4096)).enumerate() {
        assert!(old == new || is_marked(page as u64), "page {page} changed unseen");
    }
}

fn settle(rig: &mut Rig, asked: &mut Vec<Asked>, model: &[u8]) {
    for (head, _, status) in rig.finish() {
        assert_eq!(status, 0, "request {head}");
    }
    for Asked {
        offset,
        len,
        at,
        reads,
    } in asked.drain(..)
    {
        if reads {
            let mut seen = vec![0; len as usize];
            rig.ram.read_slice(&mut seen, GuestAddress(at)).unwrap();
            assert!(
                seen == model[offset as usize..(offset + len) as usize],
                "read something else than was written"
            );
        }
    }
}

pub(super) fn put_range(ram: &Ram, at: u64, sector: u64, sectors: u32, flags: u32) {
    let mut range = [0; 16];
    range[..8].copy_from_slice(&sector.to_le_bytes());
    range[8..12].copy_from_slice(&sectors.to_le_bytes());
    range[12..].copy_from_slice(&flags.to_le_bytes());
    ram.write_slice(&range, GuestAddress(at)).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn the_device_is_a_disk_over_io_uring(steps in steps(), direct in any::<bool>(), event_idx in any::<bool>()) {
        let dir = dir();
        let cache = if direct { DiskCache::Direct } else { DiskCache::Writeback };
        let options = DiskOptions { cache, engine: EngineKind::IoUring, ..image(dir.path(), DiskFormat::Raw) };
        if has_io_uring(&options) {
            is_a_disk(&options, steps, event_idx);
        }
    }

    #[test]
    fn the_device_is_a_disk_over_threads(steps in steps(), direct in any::<bool>(), event_idx in any::<bool>()) {
        let dir = dir();
        let cache = if direct { DiskCache::Direct } else { DiskCache::Writethrough };
        let options = DiskOptions { cache, engine: EngineKind::Threads, ..image(dir.path(), DiskFormat::Raw) };
        is_a_disk(&options, steps, event_idx);
    }

    #[test]
    fn the_device_is_a_disk_over_qcow2(steps in steps(), event_idx in any::<bool>()) {
        let dir = dir();
        let options = image(dir.path(), DiskFormat::Qcow2);
        is_a_disk(&options, steps, event_idx);
        crate::disk::tests::check_qcow2(&options.path);
    }
}

/// The fear: io_uring and threads write into guest memory behind the bitmap's back. Only the device writes here: the
/// driver's own marks are taken away after it has asked.
#[test]
fn what_the_device_writes_into_memory_is_marked() {
    for (format, engine, cache) in [
        (DiskFormat::Raw, EngineKind::Auto, DiskCache::Writeback),
        (DiskFormat::Raw, EngineKind::Auto, DiskCache::Direct),
        (DiskFormat::Raw, EngineKind::Threads, DiskCache::Writeback),
        (DiskFormat::Qcow2, EngineKind::Threads, DiskCache::Writeback),
    ] {
        let dir = dir();
        let mut rig = Rig::new(
            &DiskOptions {
                engine,
                cache,
                ..image(dir.path(), format)
            },
            1,
            ALL_FEATURES,
        );
        rig.disk.write_at(&[7; 200_000], 0).unwrap();
        rig.stop();
        for n in 0..30u64 {
            rig.drivers[0].request(
                VIRTIO_BLK_T_IN,
                n * 8,
                &[(DATA + n * 12_288 + n % 2 * 100, 8192)],
                true,
            );
        }
        let mut before = vec![0; (DATA + DATA_LEN) as usize];
        rig.ram.read_slice(&mut before, GuestAddress(0)).unwrap();
        take_dirty(&rig.ram);
        rig.start();
        rig.drivers[0].kick();
        let deadline = Instant::now() + WAIT;
        while rig
            .ram
            .load::<u16>(GuestAddress(rig.drivers[0].used() + 2), Ordering::SeqCst)
            .unwrap()
            != 30
        {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
        rig.stop();
        let marked = take_dirty(&rig.ram);
        let mut after = vec![0; before.len()];
        rig.ram.read_slice(&mut after, GuestAddress(0)).unwrap();
        let pages: Vec<bool> = marked
            .iter()
            .flat_map(|(_, words)| words)
            .flat_map(|word| (0..64).map(move |bit| word >> bit & 1 == 1))
            .collect();
        let changed: Vec<bool> = before
            .chunks(4096)
            .zip(after.chunks(4096))
            .map(|(old, new)| old != new)
            .collect();
        assert!(
            changed.iter().filter(|changed| **changed).count() >= 62,
            "reads, statuses and the used ring"
        );
        let unseen: Vec<_> = (0..changed.len())
            .filter(|page| changed[*page] && !pages[*page])
            .collect();
        assert!(unseen.is_empty(), "pages {unseen:?} changed unseen");
    }
}

#[test]
fn the_guest_is_told_about_its_disk() {
    let dir = dir();
    let rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 3, ALL_FEATURES);
    let word = |at: u64| u32::from_le_bytes(rig.config::<4>(at));
    assert_eq!(u64::from_le_bytes(rig.config::<8>(0)), rig.disk.size() / 512);
    assert_eq!((word(12), word(20)), (254, 512), "seg_max, blk_size");
    assert_eq!(
        rig.config::<4>(24),
        [3, 0, 8, 0],
        "8 logical blocks to a physical one"
    );
    assert_eq!(rig.config::<4>(32), [1, 0, 3, 0], "writeback, queues");
    assert_eq!([36, 40, 44, 48, 52].map(word), [1 << 21, 32, 8, 1 << 16, 32]);
    assert_eq!(
        rig.config::<8>(56),
        [1, 0, 0, 0, 0, 0, 0, 0],
        "and nothing behind the end"
    );
    assert_eq!(rig.config::<2>(u64::MAX), [0, 0]);
    let features = rig.device.offered_features();
    let has = |bit: u32| features >> bit & 1 == 1;
    assert!(
        has(VIRTIO_BLK_F_DISCARD)
            && has(VIRTIO_BLK_F_WRITE_ZEROES)
            && has(VIRTIO_BLK_F_MQ)
            && !has(VIRTIO_BLK_F_RO)
    );
    assert_eq!(rig.device.queue_sizes(), [256; 3]);
}

#[test]
fn get_id_answers_twenty_bytes() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    rig.ram.write_slice(&[0xee; 32], GuestAddress(DATA)).unwrap();
    let answer = rig.ask(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 7), (DATA + 7, 13)], true);
    assert_eq!(answer, (21, 0));
    let mut id = [0; 21];
    rig.ram.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0\xee");
}

#[test]
fn a_read_only_disk_reads_and_refuses_to_write() {
    let dir = dir();
    drop(Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES));
    let options = DiskOptions {
        read_only: true,
        ..image(dir.path(), DiskFormat::Raw)
    };
    let mut rig = Rig::new(&options, 1, ALL_FEATURES);
    assert!(rig.device.offered_features() >> VIRTIO_BLK_F_RO & 1 == 1);
    assert!(rig.device.offered_features() >> VIRTIO_BLK_F_DISCARD & 1 == 0);
    assert_eq!(rig.read(0, 4096).1, 0);
    assert_eq!(rig.write(0, &[1; 512]), VIRTIO_BLK_S_IOERR as u8);
    put_range(&rig.ram, DATA, 0, 8, 0);
    assert_eq!(
        rig.ask(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)], false).1,
        VIRTIO_BLK_S_IOERR as u8
    );
    assert_eq!(
        rig.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16)], false).1,
        VIRTIO_BLK_S_IOERR as u8
    );
    assert_eq!(rig.ask(VIRTIO_BLK_T_FLUSH, 0, &[], false).1, 0);
}

#[test]
fn several_ranges_in_one_request_are_all_done() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    assert_eq!(rig.write(0, &[9; 1 << 20]), 0);
    for n in 0..32 {
        put_range(&rig.ram, DATA + n * 16, n * 64, 8, 1);
    }
    assert_eq!(
        rig.ask(
            VIRTIO_BLK_T_WRITE_ZEROES,
            0,
            &[(DATA, 500), (DATA + 500, 12)],
            false
        ),
        (1, 0)
    );
    let now = contents(&rig.disk);
    for (n, block) in now[..1 << 20].chunks(4096).enumerate() {
        assert!(
            block.iter().all(|b| *b == if n % 8 == 0 { 0 } else { 9 }),
            "block {n}"
        );
    }
    assert_eq!(rig.disk.stats().zeroed_bytes, 32 * 4096);
}

#[test]
fn what_was_done_is_counted() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    assert_eq!(rig.write(4096, &[1; 8192]), 0);
    assert_eq!(rig.read(0, 4096).1, 0);
    assert_eq!(rig.ask(VIRTIO_BLK_T_FLUSH, 0, &[], false).1, 0);
    put_range(&rig.ram, DATA, 0, 16, 0);
    assert_eq!(rig.ask(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)], false).1, 0);
    let stats = rig.disk.stats();
    assert_eq!(
        (stats.writes, stats.written_bytes, stats.reads, stats.read_bytes),
        (1, 8192, 1, 4096)
    );
    assert_eq!(
        (stats.flushes, stats.discards, stats.discarded_bytes, stats.errors),
        (1, 1, 8192, 0)
    );
}
