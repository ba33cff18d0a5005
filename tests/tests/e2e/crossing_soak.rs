//! One machine under all loads at once crosses back and forth, again and again: no evidence is damaged, and the processes
//! that run it do not grow.

use ferry_tests::crossing::{Receiver, migrate, runs_at, start};
use ferry_tests::host::{Host, skip_without_kvm};

/// FERRY_CROSSINGS asks for more.
fn crossings() -> usize {
    std::env::var("FERRY_CROSSINGS")
        .ok()
        .map_or(4, |text| text.parse().expect("FERRY_CROSSINGS is a number"))
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_machine_under_all_loads_crosses_back_and_forth_and_nothing_grows() {
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
        &["--memory", "128M", "--cpus", "2", "--disk", &disk],
    );
    for line in ["ready", "database"] {
        guest.wait_for_line(line);
    }
    let (mut from, mut to) = (&here, &there);
    let mut seen: Vec<(u64, usize, usize)> = Vec::new();
    for number in 0..crossings() {
        let serial = to.file(&format!("serial{number}"));
        let dir = to.file("images");
        let receiver = Receiver::start(to, &serial, &["--dir", dir.to_str().unwrap()]);
        migrate(from, "m", &receiver.address, &["--verify"]).success();
        guest.then(serial);
        guest.beats_on(5);
        assert!(runs_at(to, "m"), "{}", receiver.said());
        from.wait_until("its process is gone", || from.entry("m").is_none());
        std::fs::remove_file(from.file("images/disk.img")).unwrap();
        assert!(from.remains().is_empty(), "{:?}", from.remains());
        let count = |what: &str| {
            let folder = std::fs::read_dir(format!("/proc/{}/{what}", receiver.pid()));
            folder.unwrap().count()
        };
        seen.push((resident_kib(receiver.pid()), count("fd"), count("task")));
        std::mem::forget(receiver);
        (from, to) = (to, from);
    }
    guest.swept();
    eprintln!("resident KiB, descriptors and threads after each crossing: {seen:?}");
    // Every crossing makes a new process: what it inherited with the machine must not pile up.
    let (first, last) = (seen[0], seen[seen.len() - 1]);
    assert!(last.0 <= first.0 + first.0 / 4 + 16_384, "memory grows: {seen:?}");
    assert!(last.1 <= first.1 + 2, "descriptors grow: {seen:?}");
    assert!(last.2 <= first.2 + 2, "threads grow: {seen:?}");
    from.ferry(["kill", "m"]).success();
    guest.sound();
    let image = from.file("images/disk.img");
    from.ferry(["load", "journal", image.to_str().unwrap()]).success();
}
