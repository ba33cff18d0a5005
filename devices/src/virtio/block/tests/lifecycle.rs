//! Stopping, saving, limits, promises about durability, and disks that fail.

use super::*;
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::disk::engine::{Done, Engine, Io, Op};

/// An engine whose work is done when the test says so.
#[derive(Clone)]
struct Paper {
    desk: Arc<Mutex<Desk>>,
    event: Arc<OwnedFd>,
}

#[derive(Default)]
struct Desk {
    waiting: VecDeque<Io>,
    done: Vec<Done>,
    seen: Vec<(Op, bool)>,
}

impl Paper {
    fn new() -> Self {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap();
        Self {
            desk: Arc::default(),
            event: Arc::new(event),
        }
    }

    /// Waits until this much has been submitted in all.
    fn wait_for(&self, count: usize) {
        let deadline = Instant::now() + WAIT;
        while self.desk.lock().unwrap().seen.len() < count {
            assert!(Instant::now() < deadline, "the device asked for less");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn complete_one(&self) {
        let mut desk = self.desk.lock().unwrap();
        let io = desk.waiting.pop_front().unwrap();
        desk.done.push(Done { io, result: Ok(()) });
        rustix::io::write(&self.event, &1u64.to_ne_bytes()).unwrap();
    }
}

impl Engine for Paper {
    fn has_room(&self) -> bool {
        true
    }

    fn submit(&mut self, io: Io) {
        let mut desk = self.desk.lock().unwrap();
        desk.seen.push((io.op, io.durable));
        desk.waiting.push_back(io);
    }

    fn start(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn has_backlog(&mut self) -> bool {
        false
    }

    fn reap(&mut self, done: &mut Vec<Done>) -> std::io::Result<()> {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        done.append(&mut self.desk.lock().unwrap().done);
        Ok(())
    }

    fn in_flight(&self) -> usize {
        let desk = self.desk.lock().unwrap();
        desk.waiting.len() + desk.done.len()
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A queue over paper, with its driver.
fn on_paper(cache: DiskCache, features: u64) -> (Rig, Paper, tempfile::TempDir) {
    let dir = dir();
    let mut rig = Rig::new(
        &DiskOptions {
            cache,
            ..image(dir.path(), DiskFormat::Raw)
        },
        1,
        features,
    );
    rig.stop();
    let paper = Paper::new();
    let (index, queue) = rig.stopped.pop().unwrap();
    let has_flush = features >> VIRTIO_BLK_F_FLUSH & 1 == 1;
    let shared = Arc::clone(&rig.device.shared);
    let engine = Box::new(paper.clone());
    let flights = Flights::new(
        shared,
        rig.ram.clone(),
        String::new(),
        has_flush,
        engine,
        usize::from(QUEUE_SIZE),
    );
    let kick = rig.drivers[0].kick.try_clone().unwrap();
    let queue = BlockQueue::new(index, queue, kick, Arc::clone(&rig.interrupts) as _, flights).unwrap();
    rig.device.running.push(Worker::spawn("paper", queue).unwrap());
    (rig, paper, dir)
}

/// The fear: an answer before the work is done. Then a flush would not cover what the guest thinks is written.
#[test]
fn nothing_is_answered_before_it_is_done() {
    let (mut rig, paper, _dir) = on_paper(DiskCache::Writeback, ALL_FEATURES);
    rig.drivers[0].request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512)], false);
    rig.drivers[0].request(VIRTIO_BLK_T_FLUSH, 0, &[], false);
    rig.drivers[0].kick();
    paper.wait_for(2);
    assert_eq!(
        paper.desk.lock().unwrap().seen,
        [(Op::Write, false), (Op::Flush, false)]
    );
    assert!(rig.drivers[0].answers().is_empty(), "answered before it was done");
    let before = rig.interrupts.count();
    paper.complete_one();
    assert!(rig.interrupts.wait(before, Instant::now() + WAIT));
    assert_eq!(rig.drivers[0].answers().len(), 1);
    // Stopping waits for the other one.
    let helper = paper.clone();
    let late = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        helper.complete_one();
    });
    rig.stop();
    assert!(
        late.is_finished() || paper.desk.lock().unwrap().waiting.is_empty(),
        "stopped with work in flight"
    );
    late.join().unwrap();
    assert_eq!(
        rig.drivers[0].answers().len(),
        1,
        "what was in flight was answered by the stop"
    );
}

#[test]
fn without_a_cache_to_flush_every_write_is_durable_before_its_answer() {
    let wce_off = |rig: &mut Rig| rig.device.write_config(32, &[0]);
    for (cache, features, off, durable) in [
        (DiskCache::Writeback, ALL_FEATURES, false, false),
        (DiskCache::Writeback, ALL_FEATURES, true, true),
        (DiskCache::Writeback, 0, false, true),
        (DiskCache::Writethrough, ALL_FEATURES, false, true),
        (DiskCache::Direct, ALL_FEATURES, false, false),
    ] {
        let (mut rig, paper, _dir) = on_paper(cache, features);
        if off {
            wce_off(&mut rig);
        }
        let len = rig.disk.block_size().max(512);
        rig.drivers[0].request(VIRTIO_BLK_T_OUT, 0, &[(DATA, len)], false);
        requests::put_range(&rig.ram, DATA, 0, 8, 0);
        rig.drivers[0].request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)], false);
        rig.drivers[0].kick();
        paper.wait_for(2);
        assert_eq!(
            paper.desk.lock().unwrap().seen,
            [(Op::Write, durable), (Op::Discard, durable)],
            "{cache:?} {off}"
        );
        paper.complete_one();
        paper.complete_one();
        rig.stop();
    }
}

#[test]
fn a_write_through_disk_stays_so_whatever_the_guest_says() {
    let dir = dir();
    let options = DiskOptions {
        cache: DiskCache::Writethrough,
        ..image(dir.path(), DiskFormat::Raw)
    };
    let mut rig = Rig::new(&options, 1, ALL_FEATURES);
    rig.device.write_config(32, &[1]);
    assert_eq!(rig.config::<1>(32), [0]);
}

fn clusters(tracker: &crate::disk::WriteTracker) -> Vec<u64> {
    tracker.take().into_iter().flatten().collect()
}

/// The fear: a write that was taken while it was in flight is not seen again.
#[test]
fn a_cluster_taken_during_a_write_is_dirty_again_after_it() {
    let (mut rig, paper, _dir) = on_paper(DiskCache::Writeback, ALL_FEATURES);
    let tracker = Arc::clone(&rig.disk);
    tracker.tracker().start();
    rig.drivers[0].request(VIRTIO_BLK_T_OUT, 128, &[(DATA, 512)], false);
    rig.drivers[0].kick();
    paper.wait_for(1);
    assert_eq!(clusters(tracker.tracker()), [1], "on its way");
    assert!(tracker.tracker().take().is_empty());
    paper.complete_one();
    rig.stop();
    assert_eq!(clusters(tracker.tracker()), [1], "landed");
}

/// The fear: a limit makes a stop wait, or the requests it held are lost.
#[test]
fn a_limited_disk_stops_at_once_and_what_waited_is_done_later() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 2, ALL_FEATURES);
    let limits = DiskLimits {
        operations_per_sec: NonZeroU64::new(1),
        ..Default::default()
    };
    rig.disk.set_limits(limits);
    for n in 0..60u64 {
        rig.ram
            .write_slice(&[n as u8 + 1; 512], GuestAddress(DATA + n * 512))
            .unwrap();
        rig.drivers[n as usize % 2].request(VIRTIO_BLK_T_OUT, n, &[(DATA + n * 512, 512)], false);
    }
    rig.drivers.iter().for_each(Driver::kick);
    let deadline = Instant::now() + WAIT;
    while rig.disk.stats().held_by_limits < Duration::from_millis(20) {
        assert!(Instant::now() < deadline, "nothing waits: {:?}", rig.disk.stats());
        std::thread::sleep(Duration::from_millis(1));
    }
    let began = Instant::now();
    rig.stop();
    assert!(
        began.elapsed() < Duration::from_millis(500),
        "a stop waited for the limit: {:?}",
        began.elapsed()
    );
    let answered = rig.drivers.iter_mut().flat_map(Driver::answers).count();
    assert!(answered < 10, "the limit did not hold: {answered}");
    // Lifted while a queue waits: it notices without a kick.
    rig.start();
    std::thread::sleep(Duration::from_millis(20));
    rig.disk.set_limits(DiskLimits::default());
    let began = Instant::now();
    rig.wait_for_all();
    assert!(began.elapsed() < Duration::from_secs(5));
    let now = contents(&rig.disk);
    assert!((0..60).all(|n| now[n * 512] == n as u8 + 1), "a request was lost");
}

#[test]
fn a_crossing_slows_writes_and_the_time_lost_is_counted() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    rig.disk.slow_writes(NonZeroU64::new(1 << 20));
    let began = Instant::now();
    for n in 0..8u64 {
        rig.drivers[0].request(VIRTIO_BLK_T_OUT, n * 128, &[(DATA, 65536)], false);
    }
    rig.finish();
    let took = began.elapsed();
    // 512 KiB at 1 MiB a second, of which a tenth of a second is there at once and the last is not waited for.
    assert!(took > Duration::from_millis(250), "{took:?}");
    let stats = rig.disk.stats();
    assert!(
        stats.held_by_crossing > Duration::from_millis(200) && stats.held_by_crossing <= took,
        "{stats:?} {took:?}"
    );
    assert_eq!(stats.held_by_limits, Duration::ZERO);
    rig.disk.slow_writes(None);
    assert_eq!(rig.write(0, &[1; 1 << 20]), 0);
    assert_eq!(rig.disk.stats().held_by_crossing, stats.held_by_crossing);
}

#[test]
fn a_machine_told_one_disk_is_not_given_another() {
    let dir = dir();
    let device = |name: &str, size: u64, read_only: bool, queues: u16| {
        let path = dir.path().join(name);
        if !path.exists() {
            Disk::create(&path, DiskFormat::Raw, size).unwrap();
        }
        let disk = Disk::open(&DiskOptions {
            read_only,
            ..DiskOptions::new(&path)
        })
        .unwrap();
        BlockDevice::new("disk0", Arc::new(disk), Some("theirs"), queues).unwrap()
    };
    let state = device("a", 1 << 20, false, 1).save().unwrap();
    let refused = |mut device: BlockDevice| device.restore(&state).unwrap_err().to_string();
    assert!(refused(device("b", 2 << 20, false, 1)).contains("1048576 bytes"));
    assert!(refused(device("c", 1 << 20, true, 1)).contains("read-only"));
    assert!(refused(device("d", 1 << 20, false, 2)).contains("queues"));
    let newer = DeviceState {
        version: 2,
        ..state.clone()
    };
    let said = device("e", 1 << 20, false, 1)
        .restore(&newer)
        .unwrap_err()
        .to_string();
    assert!(said.contains("newer ferry"), "{said}");
    // The image may be of another kind: the guest goes on seeing what it was told.
    let path = dir.path().join("f");
    Disk::create(&path, DiskFormat::Qcow2, 1 << 20).unwrap();
    let disk = Disk::open(&DiskOptions {
        format: Some(DiskFormat::Qcow2),
        ..DiskOptions::new(&path)
    })
    .unwrap();
    let mut there = BlockDevice::new("disk0", Arc::new(disk), Some("ours"), 1).unwrap();
    there.restore(&state).unwrap();
    assert_eq!(there.save().unwrap(), state);
}

/// State written by an earlier program must go on loading.
#[test]
fn an_old_state_loads() {
    let dir = dir();
    let path = dir.path().join("disk");
    Disk::create(&path, DiskFormat::Raw, 1 << 20).unwrap();
    let mut device = BlockDevice::new(
        "disk0",
        Arc::new(Disk::open(&DiskOptions::new(&path)).unwrap()),
        None,
        1,
    )
    .unwrap();
    let golden = include_bytes!("golden-1.msgpack");
    if std::env::var_os("FERRY_WRITE_GOLDEN").is_some() {
        device.write_config(32, &[0]);
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src/virtio/block/tests/golden-1.msgpack"
        );
        std::fs::write(path, device.save().unwrap().body).unwrap();
        return;
    }
    device
        .restore(&DeviceState {
            version: 1,
            body: golden.to_vec(),
        })
        .unwrap();
    let mut writeback = [1];
    device.read_config(32, &mut writeback);
    assert_eq!(writeback, [0]);
}

/// A small file system that fills up. Unmounts when dropped.
struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    fn new(size: &str) -> Option<Self> {
        let dir = dir();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(dir)),
            Ok(output) => {
                skip(&format!("no tmpfs: {}", String::from_utf8_lossy(&output.stderr)));
                None
            }
            Err(error) => {
                skip(&format!("no mount: {error}"));
                None
            }
        }
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_host_disk_that_fills_up_is_an_error_to_the_guest_and_the_machine_lives() {
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let Some(small) = Tmpfs::new("2m") else { return };
        let path = small.0.path().join("disk");
        Disk::create(&path, DiskFormat::Raw, 64 << 20).unwrap();
        let mut rig = Rig::new(
            &DiskOptions {
                engine,
                ..DiskOptions::new(&path)
            },
            1,
            ALL_FEATURES,
        );
        rig.disk.tracker().start();
        let statuses: Vec<u8> = (0..8u64).map(|n| rig.write(n << 19, &[1; 1 << 19])).collect();
        assert_eq!(statuses[0], 0);
        assert_eq!(statuses[7], VIRTIO_BLK_S_IOERR as u8, "{statuses:?}");
        let dirty: u64 = rig
            .disk
            .tracker()
            .take()
            .iter()
            .map(|run| run.end - run.start)
            .sum();
        assert_eq!(dirty, 64, "a write that failed may have changed something");
        assert!(rig.disk.stats().errors > 0);
        assert_eq!(rig.read(0, 4096), (vec![1; 4096], 0));
        assert_eq!(rig.ask(VIRTIO_BLK_T_FLUSH, 0, &[], false).1, 0);
        // Space again: the guest discards, and writes.
        requests::put_range(&rig.ram, DATA, 0, 2048, 0);
        assert_eq!(rig.ask(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)], false).1, 0);
        assert_eq!(rig.write(7 << 19, &[2; 1 << 19]), 0, "space was given back");
        // This file system cannot zero a range and keep its space: the zeroes are written.
        requests::put_range(&rig.ram, DATA, (7 << 19) / 512, 8, 0);
        assert_eq!(rig.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16)], false).1, 0);
        let (seen, _) = rig.read(7 << 19, 8192);
        assert_eq!(
            (&seen[..4096], &seen[4096..]),
            ([0; 4096].as_slice(), [2; 4096].as_slice())
        );
        assert!(!rig.interrupts.needs_reset_seen());
        drop(rig);
    }
}

/// A block device over a file. Detached when dropped.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Option<Self> {
        match std::process::Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
        {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
            }
            Ok(output) => {
                skip(&format!(
                    "no loop device: {}",
                    String::from_utf8_lossy(&output.stderr)
                ));
                None
            }
            Err(error) => {
                skip(&format!("no losetup: {error}"));
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
    }
}

#[test]
fn a_block_device_is_a_disk() {
    let dir = dir();
    let file = dir.path().join("file");
    Disk::create(&file, DiskFormat::Raw, 8 << 20).unwrap();
    let Some(device) = Loop::new(&file) else { return };
    for cache in [DiskCache::Writeback, DiskCache::Direct] {
        let options = DiskOptions {
            cache,
            ..DiskOptions::new(&device.0)
        };
        let mut rig = Rig::new(&options, 1, ALL_FEATURES);
        assert_eq!(rig.disk.size(), 8 << 20);
        assert!(Disk::open(&options).is_err(), "two users of one block device");
        assert_eq!(rig.write(4096, &[3; 65536]), 0);
        requests::put_range(&rig.ram, DATA, 16, 64, 0);
        assert_eq!(rig.ask(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)], false).1, 0);
        requests::put_range(&rig.ram, DATA, 80, 8, 0);
        assert_eq!(rig.ask(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16)], false).1, 0);
        assert_eq!(rig.ask(VIRTIO_BLK_T_FLUSH, 0, &[], false).1, 0);
        let now = contents(&rig.disk);
        assert!(
            now[4096..8192].iter().all(|b| *b == 3) && now[40960..45056].iter().all(|b| *b == 0),
            "{cache:?}"
        );
        let areas: u64 = rig.disk.areas(0..u64::MAX).map(|area| area.unwrap().len).sum();
        assert_eq!(areas, 8 << 20);
    }
}

#[test]
fn a_file_cut_short_behind_our_back_is_an_error_and_no_zeroes() {
    let dir = dir();
    for engine in [EngineKind::Auto, EngineKind::Threads] {
        let mut rig = Rig::new(
            &DiskOptions {
                engine,
                ..image(dir.path(), DiskFormat::Raw)
            },
            1,
            ALL_FEATURES,
        );
        std::fs::OpenOptions::new()
            .write(true)
            .open(rig.disk.path())
            .unwrap()
            .set_len(4096)
            .unwrap();
        assert_eq!(rig.read(0, 4096).1, 0);
        assert_eq!(rig.read(1 << 20, 4096).1, VIRTIO_BLK_S_IOERR as u8);
        assert_eq!(rig.write(1 << 20, &[1; 512]), 0);
        std::fs::OpenOptions::new()
            .write(true)
            .open(rig.disk.path())
            .unwrap()
            .set_len(rig.disk.size())
            .unwrap();
    }
}

#[test]
fn an_image_that_was_handed_over_serves_no_guest() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    rig.stop();
    rig.disk.release_lock().unwrap();
    rig.start();
    assert_eq!(rig.write(0, &[1; 512]), VIRTIO_BLK_S_IOERR as u8);
    assert_eq!(rig.read(0, 512).1, VIRTIO_BLK_S_IOERR as u8);
    rig.stop();
    rig.disk.take_lock().unwrap();
    rig.start();
    assert_eq!(rig.write(0, &[1; 512]), 0);
}

#[test]
fn starting_twice_is_refused_and_stopping_twice_is_harmless() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    let interrupt: Arc<dyn VirtioInterrupt> = Arc::clone(&rig.interrupts) as _;
    let work = Activation {
        ram: rig.ram.clone(),
        features: 0,
        queues: Vec::new(),
        interrupt,
    };
    assert!(rig.device.start(work).unwrap_err().to_string().contains("twice"));
    rig.stop();
    assert!(rig.device.stop().is_empty());
}
