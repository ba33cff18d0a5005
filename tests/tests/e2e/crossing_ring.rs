//! Machines whose writes are tracked by dirty rings cross, fail to cross, pulse and are rehearsed; and each side tracks in
//! its own way.

use ferry_tests::crossing::{Evidence, Receiver, begin, migrate, runs_at, start};
use ferry_tests::host::{Host, PATIENCE, finish, skip_without_kvm};
use ferry_tests::relay::{Act, Point, Relay};
use ferry_vmm::kvm::ring::LEAST_ENTRIES;

const WORK: &str = "work=allocator+gc memory=16M heap=8M rate=3000 order=random";

/// True when this host cannot do it and the test may say so.
fn no_rings() -> bool {
    if skip_without_kvm() {
        return true;
    }
    let kvm = ferry_vmm::kvm::open().unwrap();
    let none = ferry_vmm::kvm::Capabilities::probe(&kvm)
        .unwrap()
        .dirty_ring_bytes
        == 0;
    if none {
        eprintln!("skipped: this host's KVM has no dirty ring");
    }
    none
}

fn ring_of(host: &Host) -> Option<u64> {
    let info = host.ferry(["info", "m", "--json"]).success().stdout;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    info["config"]["dirty_ring"].as_u64()
}

/// One crossing, after which the guest is whole. The receiver is the machine's process then and ends with it.
fn cross(guest: &mut Evidence, from: &Host, to: &Host, serial: &str, more: &[&str]) {
    cross_with(guest, from, to, serial, more, &[]);
}

fn cross_with(
    guest: &mut Evidence,
    from: &Host,
    to: &Host,
    serial: &str,
    receive: &[&str],
    migrate_with: &[&str],
) {
    let serial = to.file(serial);
    let receiver = Receiver::start(to, &serial, receive);
    guest.then(serial);
    migrate(
        from,
        "m",
        &receiver.address,
        &[&["--verify"], migrate_with].concat(),
    )
    .success();
    guest.beats_on(5);
    assert!(runs_at(to, "m"), "{}", receiver.said());
    guest.swept();
    std::mem::forget(receiver);
}

#[test]
fn a_machine_crosses_by_rings_and_by_the_log_as_each_side_likes() {
    if no_rings() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let ringed = ["--memory", "128M", "--cpus", "4", "--dirty-ring=256"];
    let mut guest = start(&here, "m", WORK, &ringed);
    guest.wait_for_line("ready");
    // From rings of 256 entries to larger ones, from those to the log, and back.
    cross(&mut guest, &here, &there, "one", &["--dirty-ring"]);
    assert_eq!(ring_of(&there), Some(65_536));
    there.ferry(["pulse", "m", "--count", "3"]).success();
    cross(&mut guest, &there, &here, "two", &[]);
    assert_eq!(ring_of(&here), None);
    cross(&mut guest, &here, &there, "three", &["--dirty-ring=1024"]);
    assert_eq!(ring_of(&there), Some(1024));
    cross(&mut guest, &there, &here, "four", &[]);
    here.ferry(["kill", "m"]).success();
    guest.sound();
}

/// The smallest rings, full all the time: every survey and the switch meet vCPUs that are at emptying them.
#[test]
fn a_machine_whose_rings_are_always_full_crosses_whole() {
    if no_rings() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let least = format!("--dirty-ring={LEAST_ENTRIES}");
    let work = "work=allocator memory=32M wws=90 rate=max order=random touch=head";
    let words = ["--memory", "64M", "--cpus", "4", &least];
    let mut guest = start(&here, "m", work, &words);
    guest.wait_for_line("ready");
    // It writes faster than this, and many rings full between two surveys. Signals of the throttle meet the emptying, too.
    let slowly = ["--bandwidth", "40MB", "--compress", "off", "--policy", "qemu"];
    let in_the_end = ["--throttle", "80", "--deadline", "6s", "--on-deadline", "pause"];
    let words = [&slowly[..], &in_the_end, &["--report", "report.json"]].concat();
    let (mut from, mut to) = (&here, &there);
    let mut entries = 0;
    for serial in ["one", "two"] {
        cross_with(&mut guest, from, to, serial, &[&least], &words);
        let report = std::fs::read(from.file("report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
        eprintln!("{}", report["impact"]);
        let vcpus = report["impact"]["vcpus"].as_array().unwrap();
        let counts = vcpus
            .iter()
            .map(|vcpu| vcpu["write_fault_count"].as_u64().unwrap());
        entries += counts.sum::<u64>();
        from.wait_until("its process is gone", || from.entry("m").is_none());
        (from, to) = (to, from);
    }
    // More than all of them hold, however little of this host the guest got.
    assert!(entries > 4 * u64::from(LEAST_ENTRIES), "the rings were not full");
    from.ferry(["kill", "m"]).success();
    guest.sound();
}

#[test]
fn after_a_failed_crossing_by_rings_the_next_one_is_complete() {
    if no_rings() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let mut guest = start(
        &here,
        "m",
        WORK,
        &["--memory", "128M", "--cpus", "2", "--dirty-ring=512"],
    );
    guest.wait_for_line("ready");
    for message in ["RoundEnd", "Loaded"] {
        let receiver = Receiver::start(&there, &there.file("never"), &["--reconnect", "0s"]);
        let relay = Relay::at(receiver.port(), Point::first(message), Act::CutBefore, true);
        let failed = finish(
            begin(&here, "m", &relay.address, &["--reconnect", "0s"]),
            PATIENCE,
        );
        assert_eq!(failed.code, 1, "{message}: {failed:?}");
        guest.beats_on(5);
        assert!(runs_at(&here, "m"), "{message}");
    }
    // The tracking is off again: a machine on a crossing refuses this.
    here.ferry(["pulse", "m"]).success();
    cross(&mut guest, &here, &there, "there", &["--dirty-ring"]);
    there.ferry(["kill", "m"]).success();
}

#[test]
fn a_ring_that_cannot_be_is_refused_in_a_sentence() {
    let host = Host::new();
    for command in [&["run", "m"][..], &["receive", "unix:in"]] {
        let words = command.iter().copied().chain(["--dirty-ring=5000"]);
        let refused = host.ferry(words);
        assert!(
            refused.code != 0 && refused.stderr.contains("power of two"),
            "{refused:?}"
        );
    }
}
