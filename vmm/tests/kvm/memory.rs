//! Guest memory: the guest notices damage, and every changed page is in KVM's log or the monitor's bitmap.

use std::time::Duration;

use ferry_vmm::config::{MachineConfig, MemoryBacking};
use vm_memory::{Bytes, GuestAddress};

use crate::dirty::Watch;
use crate::harness::{Guest, config, number, skip};

/// The first range of memory that the guest says holds its evidence.
fn evidence(hello: &str) -> (u64, u64) {
    let numbers: Vec<u64> = hello
        .split_once("\"evidence\":")
        .unwrap()
        .1
        .split("\"0x")
        .skip(1)
        .map(|text| u64::from_str_radix(text.split('"').next().unwrap(), 16).unwrap())
        .collect();
    (numbers[0], numbers[1])
}

#[test]
fn the_guest_reports_damage_that_is_done_from_outside() {
    if skip() {
        return;
    }
    let mut guest = Guest::start(&config(2, "work=allocator memory=16M rate=100 heartbeat=20ms"));
    let hello = guest.line(|line| line.contains(r#""t":"hello""#));
    guest.line(|line| line.contains(r#""t":"ready""#));
    let (start, end) = evidence(&hello);
    for at in (start..end).step_by(256 << 10) {
        guest
            .machine
            .ram()
            .write_slice(&[0x5a; 64], GuestAddress(at + 512))
            .unwrap();
    }
    let damage = guest.line(|line| line.contains(r#""t":"damage""#));
    assert!(damage.contains("5a5a5a5a"), "{damage}");
}

#[test]
fn every_page_that_changes_is_logged_and_quiet_pages_are_not() {
    if skip() {
        return;
    }
    for backing in [MemoryBacking::Anonymous, MemoryBacking::Memfd] {
        let config = MachineConfig {
            memory_backing: backing,
            ..config(
                2,
                "work=allocator memory=16M wws=25 rate=3000 order=random heartbeat=20ms",
            )
        };
        let mut guest = Guest::start(&config);
        guest.line(|line| line.contains(r#""t":"ready""#));
        let watch = Watch::begin(&guest);
        assert!(
            guest
                .machine
                .pulse()
                .unwrap_err()
                .to_string()
                .contains("crossing")
        );
        for _ in 0..3 {
            let seen = watch.round(&guest, || std::thread::sleep(Duration::from_millis(200)));
            let changed = seen.changed.len();
            assert!(changed > 10, "the guest did nothing: {changed} pages changed");
            assert!(
                seen.noted() < 10 * changed + 200,
                "{} pages noted, {changed} changed",
                seen.noted()
            );
        }
        watch.end();
        guest.beat();
        guest.machine.pulse().unwrap();
        guest.beat();
    }
}

#[test]
fn a_throttled_guest_does_less_and_still_pauses_at_once() {
    if skip() {
        return;
    }
    let mut guest = Guest::start(&config(2, "work=spin heartbeat=100ms"));
    let spins = |guest: &mut Guest| number(&guest.line(|line| line.contains(r#""t":"sum""#)), "spins");
    spins(&mut guest);
    let first = spins(&mut guest);
    let free = spins(&mut guest) - first;
    // So much that it shows on a host that is too busy to run a free guest for more than a part of the time.
    guest.machine.set_throttle(&[99, 99]);
    spins(&mut guest);
    let first = spins(&mut guest);
    let slow = spins(&mut guest) - first;
    assert!(slow * 2 < free, "99 % throttled: {slow} instead of {free}");
    // A nap takes 990 ms; who comes at any time and waits for its end waits for half of that.
    let mut pauses: Vec<Duration> = Vec::new();
    for _ in 0..9 {
        pauses.push(guest.machine.pause().unwrap());
        guest.machine.resume().unwrap();
        std::thread::sleep(Duration::from_millis(30));
    }
    pauses.sort();
    assert!(
        pauses[4] < Duration::from_millis(200),
        "a napping CPU kept us waiting: {pauses:?}"
    );
    guest.machine.pulse().unwrap();
    guest.machine.set_throttle(&[]);
    spins(&mut guest);
    let first = spins(&mut guest);
    let again = spins(&mut guest) - first;
    assert!(
        again > slow * 2,
        "the throttle was not let go: {again} after {slow}"
    );
}

/// Bytes that this process has in memory, without what belongs to guests.
fn own_memory() -> u64 {
    let field = |name: &str| {
        let text = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        let line = text
            .lines()
            .find(|line| line.starts_with(name))
            .unwrap()
            .to_owned();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    };
    field("Rss:")
}

#[test]
fn a_machine_costs_little_beside_the_guests_memory() {
    if skip() {
        return;
    }
    // In a process of its own, because other tests of this binary have memory too.
    if std::env::var_os("FERRY_MEASURE_OVERHEAD").is_none() {
        let me = std::env::current_exe().unwrap();
        let name = "memory::a_machine_costs_little_beside_the_guests_memory";
        let output = std::process::Command::new(me)
            .args([name, "--exact", "--nocapture"])
            .env("FERRY_MEASURE_OVERHEAD", "1")
            .output()
            .unwrap();
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
        return;
    }
    let mut guest = Guest::start(&MachineConfig {
        prepopulate: true,
        ..config(2, "work=idle heartbeat=20ms")
    });
    for _ in 0..5 {
        guest.beat();
    }
    let overhead = own_memory() - (128 << 20);
    eprintln!("resident beside guest memory: {} KiB", overhead >> 10);
    assert!(overhead < 40 << 20, "{} KiB", overhead >> 10);
}
