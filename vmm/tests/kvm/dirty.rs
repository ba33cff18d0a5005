//! With the log on, whatever changes in guest memory is in KVM's dirty log or in the monitor's bitmap, whichever device
//! was at work. The fear: a device writes into memory around both, and a crossing leaves the page behind.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ferry_devices::disk::{Disk, DiskFormat};
use ferry_devices::ram::take_dirty;
use ferry_vmm::config::{MachineConfig, SerialTarget};
use ferry_vmm::crossing::DirtyLog;
use ferry_vmm::lifecycle::StopReason;
use ferry_vmm::machine::Wiring;
use ferry_vmm::size::ByteSize;
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::harness::{Guest, config, number, skip, wait_until};
use crate::net::{fetch, on_a_network};

const PAGE: usize = 4096;
const MEMORY: u64 = 64 << 20;
const ROUNDS: usize = 4;
const ROUND: Duration = Duration::from_millis(250);

/// A machine's one dirty log, switched on.
pub(crate) struct Watch {
    log: Box<dyn DirtyLog>,
    bytes: usize,
}

/// One round: the pages that changed, and who noted which.
pub(crate) struct Seen {
    pub(crate) changed: Vec<usize>,
    by_kvm: Vec<u64>,
    by_monitor: Vec<u64>,
}

fn has(words: &[u64], page: usize) -> bool {
    words[page / 64] >> (page % 64) & 1 == 1
}

impl Seen {
    pub(crate) fn noted(&self) -> usize {
        let words = self.by_kvm.iter().zip(&self.by_monitor);
        words.map(|(a, b)| (a | b).count_ones() as usize).sum()
    }

    /// Pages that changed and that only the monitor's bitmap knows of.
    fn by_devices_alone(&self) -> usize {
        let alone = |page: &&usize| has(&self.by_monitor, **page) && !has(&self.by_kvm, **page);
        self.changed.iter().filter(alone).count()
    }

    /// Pages that the devices wrote, changed or not.
    fn by_devices(&self) -> usize {
        self.by_monitor
            .iter()
            .map(|word| word.count_ones() as usize)
            .sum()
    }
}

impl Watch {
    pub(crate) fn begin(guest: &Guest) -> Watch {
        let mut logs = guest.machine.dirty_logs().unwrap();
        assert_eq!(logs.len(), 1, "memory below 3 GiB is one region");
        let log = logs.remove(0);
        log.start().unwrap();
        let bytes = guest.machine.config().memory.0 as usize;
        Watch { log, bytes }
    }

    pub(crate) fn end(self) {
        self.log.stop();
    }

    /// Lets the guest run while `during` runs, and compares copies of its memory before and after. A page that changed
    /// and that nobody noted fails the test. The guest runs again afterwards.
    pub(crate) fn round(&self, guest: &Guest, during: impl FnOnce()) -> Seen {
        let words = (self.bytes / PAGE).div_ceil(64);
        let read = || {
            let mut memory = vec![0u8; self.bytes];
            let ram = guest.machine.ram();
            ram.read_slice(&mut memory, GuestAddress(0)).unwrap();
            memory
        };
        guest.machine.pause().unwrap();
        // What was noted until now is taken, and the pages protected anew.
        self.log.survey(&mut vec![0; words]).unwrap();
        self.log.clear(0, &vec![u64::MAX; words]).unwrap();
        take_dirty(guest.machine.ram());
        let before = read();
        guest.machine.resume().unwrap();
        during();
        guest.machine.pause().unwrap();
        let after = read();
        let mut by_kvm = vec![0u64; words];
        self.log.survey(&mut by_kvm).unwrap();
        let by_monitor = take_dirty(guest.machine.ram()).remove(0).1;
        guest.machine.resume().unwrap();
        let pages = before.chunks(PAGE).zip(after.chunks(PAGE)).enumerate();
        let changed: Vec<usize> = pages
            .filter(|(_, (before, after))| before != after)
            .map(|(page, _)| page)
            .collect();
        let seen = Seen {
            changed,
            by_kvm,
            by_monitor,
        };
        let nobody = |page: &usize| !has(&seen.by_kvm, *page) && !has(&seen.by_monitor, *page);
        let lost: Vec<usize> = seen.changed.iter().copied().filter(nobody).collect();
        assert!(lost.is_empty(), "pages {lost:?} changed and nobody noted it");
        seen
    }
}

/// Since the monitor's bitmap was taken last.
fn devices_wrote(guest: &Guest) -> bool {
    guest.machine.ram().iter().any(|region| {
        let bitmap = region.bitmap();
        (0..region.len() as usize / PAGE).any(|page| bitmap.dirty_at(page * PAGE))
    })
}

fn sum(guest: &mut Guest, key: &str) -> u64 {
    number(&guest.line(|line| line.contains(r#""t":"sum""#)), key)
}

/// Rounds under load: in each, something changed in memory that the device alone wrote, and the guest's own count of
/// the device's work went on.
fn all_is_noted(name: &str, guest: &mut Guest, counter: &str, mut during: impl FnMut(&Guest, usize)) {
    let begun = loop {
        match sum(guest, counter) {
            0 => {}
            count => break count,
        }
    };
    let watch = Watch::begin(guest);
    let (mut changed, mut devices, mut alone) = (0, 0, 0);
    for round in 0..ROUNDS {
        let seen = watch.round(guest, || {
            during(guest, round);
            wait_until("the device writes", || devices_wrote(guest));
        });
        changed += seen.changed.len();
        devices += seen.by_devices();
        alone += seen.by_devices_alone();
    }
    watch.end();
    eprintln!(
        "{name}: {changed} pages changed, devices wrote {devices}, {alone} of them changed and were in no log of KVM"
    );
    assert!(
        alone > 0,
        "{name}: KVM's log would have been enough, so this test says nothing"
    );
    sum(guest, counter);
    let done = sum(guest, counter);
    assert!(done > begun, "{name}: the guest stopped at {done} {counter}");
    guest.machine.stop(StopReason::Requested).unwrap();
}

fn small(cpus: u32, cmdline: &str) -> MachineConfig {
    MachineConfig {
        memory: ByteSize(MEMORY),
        ..config(cpus, cmdline)
    }
}

/// Both workloads write; what is read back comes into memory by the device alone.
fn disk(name: &str, format: DiskFormat, options: &str) {
    disk_tracked(name, format, options, None);
}

fn disk_tracked(name: &str, format: DiskFormat, options: &str, dirty_ring: Option<u32>) {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    Disk::create(&path, format, 32 << 20).unwrap();
    let mut config = small(
        2,
        "work=disk+database journal=2M rows=4096 updates=20000 records=2000 heartbeat=50ms",
    );
    config.dirty_ring = dirty_ring;
    let place: &Path = &path;
    config.disks = vec![format!("{}{options}", place.display()).parse().unwrap()];
    let mut guest = Guest::start(&config);
    all_is_noted(name, &mut guest, "records_checked", |_, _| {
        std::thread::sleep(ROUND)
    });
}

#[test]
fn of_a_raw_disk_by_io_uring() {
    disk("raw disk, io_uring", DiskFormat::Raw, ",engine=io-uring");
}

#[test]
fn of_a_raw_disk_by_io_uring_around_the_page_cache() {
    disk(
        "raw disk, direct io_uring",
        DiskFormat::Raw,
        ",engine=io-uring,cache=direct",
    );
}

#[test]
fn of_a_raw_disk_beside_dirty_rings() {
    disk_tracked(
        "raw disk, rings",
        DiskFormat::Raw,
        ",engine=io-uring,cache=direct",
        Some(1024),
    );
}

#[test]
fn of_a_raw_disk_by_threads() {
    disk("raw disk, threads", DiskFormat::Raw, ",engine=threads");
}

#[test]
fn of_a_qcow2_disk() {
    disk("qcow2 disk", DiskFormat::Qcow2, ",format=auto");
}

/// Ends the fetching also when the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn of_a_network_device() {
    if skip() {
        return;
    }
    let config = small(2, "work=web+calc ip=10.9.0.2/24 body=200K heartbeat=50ms");
    on_a_network(config, |guest| {
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _over = Over(&over);
            // Two who fetch pages, again and again, until the guest has gone.
            for _ in 0..2 {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        if fetch().is_err() {
                            std::thread::sleep(Duration::from_millis(10));
                        }
                    }
                });
            }
            all_is_noted("network", guest, "requests", |_, _| std::thread::sleep(ROUND));
        });
    });
}

#[test]
fn of_an_entropy_device() {
    if skip() {
        return;
    }
    let mut config = small(1, "work=entropy pieces=2000 heartbeat=50ms");
    config.rng = true;
    let mut guest = Guest::start(&config);
    all_is_noted("entropy", &mut guest, "entropy_bytes", |_, _| {
        std::thread::sleep(ROUND)
    });
}

#[test]
fn of_a_console() {
    if skip() {
        return;
    }
    let mut config = small(1, "work=console pieces=500 heartbeat=50ms");
    config.console = Some(SerialTarget::Null);
    let wiring = Wiring::default();
    let machine = ferry_vmm::machine::Machine::create(&config, &wiring).unwrap();
    let mut guest = Guest::over(machine, &wiring);
    guest.machine.start().unwrap();
    let talk = |_: &Guest, round: usize| {
        let begun = std::time::Instant::now();
        while begun.elapsed() < ROUND {
            // Not waited for: a console that is full refuses, and the guest reads on.
            wiring.console.push(&[b'a' + round as u8; 300]);
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    talk(&guest, 0);
    all_is_noted("console", &mut guest, "console_out", talk);
}

#[test]
fn of_a_balloon() {
    if skip() {
        return;
    }
    let mut config = small(2, "work=balloon stock=16M churn=8000 heartbeat=50ms");
    config.balloon = true;
    let mut guest = Guest::start(&config);
    all_is_noted("balloon", &mut guest, "stock_checked", |guest, round| {
        let balloon = guest.machine.balloon().unwrap();
        balloon.set_target_bytes([4 << 20, 1 << 20, 8 << 20, 0][round % 4]);
        balloon.request_stats();
        std::thread::sleep(ROUND);
        wait_until("the guest tells of its memory", || balloon.stats().is_some());
        assert!(balloon.stats().unwrap().total_bytes > Some(MEMORY / 2));
    });
}
