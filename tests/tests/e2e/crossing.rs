//! A machine crosses, with all that it has, and the guest's own evidence is whole on both sides.

use ferry_tests::crossing::{Receiver, migrate, pair, runs_at, start};
use ferry_tests::host::{Host, skip_without_kvm};
use serde_json::Value;

/// The report's parts add up, and it says what was asked for.
fn check_report(host: &Host) {
    let report: Value = serde_json::from_slice(&std::fs::read(host.file("report.json")).unwrap()).unwrap();
    let nanoseconds =
        |part: &Value| part["secs"].as_u64().unwrap() * 1_000_000_000 + part["nanos"].as_u64().unwrap();
    let downtime = &report["downtime"];
    let parts = [
        "pause",
        "save_state",
        "last_survey",
        "last_clusters",
        "last_pages",
        "verify",
        "send_state",
        "load",
        "resume",
    ];
    let sum: u64 = parts.iter().map(|part| nanoseconds(&downtime[part])).sum();
    assert_eq!(sum, nanoseconds(&downtime["total"]), "{downtime}");
    assert!(sum > 0);
    assert_eq!(report["outcome"]["whereabouts"], "there");
    assert_eq!(report["checks"]["compared"], true);
    assert!(report["wire_bytes"].as_u64().unwrap() > 0);
    let bytes: u64 = report["rounds"]
        .as_array()
        .unwrap()
        .iter()
        .map(|round| round["wire_bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(bytes, report["wire_bytes"]);
}

#[test]
fn a_working_guest_crosses_there_and_back_and_does_not_notice() {
    let Some((here, there, mut guest)) = pair(
        "work=allocator+gc memory=16M heap=8M rate=2000",
        &["--memory", "128M", "--cpus", "2"],
    ) else {
        return;
    };
    for (from, to, serial) in [(&here, &there, "there.serial"), (&there, &here, "back.serial")] {
        let serial = to.file(serial);
        let receiver = Receiver::start(to, &serial, &[]);
        guest.then(serial);
        let ran = migrate(
            from,
            "m",
            &receiver.address,
            &["--verify", "--report", "report.json"],
        )
        .success();
        assert!(
            ran.stdout
                .starts_with(&format!("m is at {} now", receiver.address)),
            "{ran:?}"
        );
        check_report(from);
        guest.beats_on(5);
        assert!(runs_at(to, "m"), "{}", receiver.said());
        from.wait_until("nothing is left where it was", || from.entry("m").is_none());
        guest.swept();
        // The receiver is the machine's process now and ends with it.
        std::mem::forget(receiver);
    }
    here.ferry(["kill", "m"]).success();
    guest.sound();
    for host in [&here, &there] {
        let settled = host.ferry(["resolve"]).success().stdout;
        eprintln!("{settled}");
    }
}

/// FERRY_CROSSINGS asks for more.
fn crossings() -> usize {
    std::env::var("FERRY_CROSSINGS")
        .ok()
        .map_or(6, |text| text.parse().expect("FERRY_CROSSINGS is a number"))
}

#[test]
fn a_disk_crosses_with_its_machine_again_and_again_and_stays_sparse() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    for host in [&here, &there] {
        std::fs::create_dir(host.file("images")).unwrap();
    }
    let image = here.file("images/disk.img");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let disk = format!("path={}", image.display());
    let mut guest = start(
        &here,
        "m",
        "work=allocator+gc+disk+database memory=8M heap=4M rate=1000 journal=4M rows=2048",
        &["--memory", "128M", "--disk", &disk],
    );
    guest.wait_for_line("ready");
    guest.wait_for_line("database");
    let (mut from, mut to) = (&here, &there);
    let mut descriptors = Vec::new();
    for number in 0..crossings() {
        let serial = to.file(&format!("serial{number}"));
        // To qcow2 and back to raw.
        let format = ["qcow2", "raw"][number % 2];
        let dir = to.file("images");
        let receiver = Receiver::start(to, &serial, &["--dir", dir.to_str().unwrap(), "--format", format]);
        migrate(from, "m", &receiver.address, &["--verify"]).success();
        guest.then(serial);
        guest.beats_on(10);
        assert!(runs_at(to, "m"), "{}", receiver.said());
        from.wait_until("its process is gone", || from.entry("m").is_none());
        // What is left there is not ours any more; the next crossing back makes it anew.
        std::fs::remove_file(from.file("images/disk.img")).unwrap();
        let open = std::fs::read_dir(format!("/proc/{}/fd", receiver.pid())).unwrap();
        descriptors.push(open.count());
        std::mem::forget(receiver);
        (from, to) = (to, from);
    }
    guest.swept();
    let after_first = descriptors.iter().skip(2).step_by(2);
    for open in after_first {
        assert!(*open <= descriptors[0] + 2, "descriptors grow: {descriptors:?}");
    }
    from.ferry(["kill", "m"]).success();
    guest.sound();
    if crossings().is_multiple_of(2) {
        let image = from.file("images/disk.img");
        let journal = from.ferry(["load", "journal", image.to_str().unwrap()]);
        journal.success();
        let held = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&image).unwrap()) * 512;
        assert!(held < 24 << 20, "holes did not stay holes: {held} bytes are held");
    }
}
