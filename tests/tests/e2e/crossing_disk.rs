//! Disks that cannot be read, written or filled, that may only be read, that both hosts share or know already.

use std::path::{Path, PathBuf};
use std::process::Command;

use ferry_tests::crossing::{Evidence, Receiver, begin, migrate, signal, start};
use ferry_tests::host::{Host, PATIENCE, finish, skip_without_kvm};
use ferry_tests::relay::{Act, Point, Relay};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

/// Bytes that neither compress nor repeat.
fn noise(path: &Path, bytes: u64) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let content: Vec<u8> = (0..bytes / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();
    std::fs::write(path, content).unwrap();
}

fn images(host: &Host) -> PathBuf {
    let dir = host.file("images");
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir)
        .unwrap()
        .map(|item| item.unwrap().file_name().into_string().unwrap())
        .collect()
}

/// A small file system of its own, gone with the test.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, size: &str) -> Option<Small> {
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "ferry-test"])
            .arg(&at)
            .status();
        mounted.is_ok_and(|status| status.success()).then_some(Small(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn machine(host: &Host, work: &str, disk: &str) -> Evidence {
    start(host, "m", work, &["--memory", "64M", "--disk", disk])
}

#[test]
fn a_disk_that_fills_up_there_is_the_first_thing_said_and_leaves_nothing() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let dir = images(&there);
    let Some(small) = Small::mount(dir.clone(), "6M") else {
        assert!(std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(), "needs root");
        eprintln!("skipped: mounting a small file system needs root");
        return;
    };
    let image = here.file("disk.img");
    noise(&image, 16 * MIB);
    let mut guest = machine(
        &here,
        "work=allocator memory=4M rate=200",
        &format!("path={}", image.display()),
    );
    let serial = there.file("full");
    for lanes in ["1", "4"] {
        for format in ["raw", "qcow2"] {
            let receiver = Receiver::start(
                &there,
                &serial,
                &["--dir", dir.to_str().unwrap(), "--format", format],
            );
            let ran = migrate(&here, "m", &receiver.address, &["--lanes", lanes]);
            assert_eq!(ran.code, 1, "{ran:?}");
            let first = ran.stderr.lines().find(|line| !line.starts_with("round"));
            let first = first.unwrap_or_default();
            assert!(
                first.starts_with("ferry: there is no room left for the disk image")
                    && first.contains("the machine is here; make room on the other host"),
                "{ran:?}"
            );
            let (code, said) = receiver.end();
            assert!(code == 1 && said.contains("no room left"), "{said}");
            assert!(names(&dir).is_empty(), "{:?}", names(&dir));
            assert!(there.remains().is_empty());
            guest.beats_on(2);
        }
    }
    drop(small);
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &["--dir", dir.to_str().unwrap()]);
    migrate(&here, "m", &receiver.address, &["--verify"]).success();
    guest.then(serial);
    guest.swept();
}

#[test]
fn a_disk_that_cannot_be_read_here_is_said_and_the_machine_stays() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let image = here.file("disk.img");
    noise(&image, 8 * MIB);
    let guest = machine(
        &here,
        "work=allocator memory=4M rate=200",
        &format!("path={}", image.display()),
    );
    // The end of it goes away under the machine.
    let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
    file.set_len(2 * MIB).unwrap();
    let dir = images(&there);
    let receiver = Receiver::start(&there, &there.file("bad"), &["--dir", dir.to_str().unwrap()]);
    let ran = migrate(&here, "m", &receiver.address, &["--verify"]);
    let last = ran.stderr.lines().last().unwrap_or_default();
    assert!(
        ran.code == 1 && last.contains(image.to_str().unwrap()) && last.contains("the machine is here"),
        "{ran:?}"
    );
    assert_eq!(receiver.end().0, 1);
    assert!(names(&dir).is_empty() && there.remains().is_empty());
    guest.beats_on(2);
}

#[test]
fn a_disk_that_may_only_be_read_crosses_and_may_only_be_read_there() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let image = here.file("disk.img");
    noise(&image, 4 * MIB);
    let mut guest = machine(
        &here,
        "work=allocator memory=4M rate=200",
        &format!("path={},readonly", image.display()),
    );
    let (mut from, mut to) = (&here, &there);
    for (number, format) in ["raw", "qcow2", "raw"].into_iter().enumerate() {
        let dir = images(to);
        let serial = to.file(&format!("serial{number}"));
        let words = ["--dir", dir.to_str().unwrap(), "--format", format];
        let receiver = Receiver::start(to, &serial, &words);
        migrate(from, "m", &receiver.address, &["--verify"]).success();
        guest.then(serial);
        guest.beats_on(2);
        std::mem::forget(receiver);
        from.wait_until("it is gone", || from.entry("m").is_none());
        let _ = std::fs::remove_file(from.file("images/disk.img"));
        (from, to) = (to, from);
    }
    let there = from.file("images/disk.img");
    assert_eq!(std::fs::read(&there).unwrap(), std::fs::read(&image).unwrap());
    assert_eq!(names(&from.file("images")), ["disk.img"]);
    let info = from.ferry(["info", "--json", "m"]);
    assert!(info.stdout.contains("readonly"), "{info:?}");
    guest.swept();
}

#[test]
fn what_a_killed_receiver_left_is_not_in_the_way_of_the_next_try() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let image = here.file("disk.img");
    noise(&image, 4 * MIB);
    let mut guest = machine(
        &here,
        "work=allocator+disk memory=4M rate=200 journal=2M journal=new",
        &format!("path={}", image.display()),
    );
    let dir = images(&there);
    let words = ["--dir", dir.to_str().unwrap()];
    let mut receiver = Receiver::start(&there, &there.file("killed"), &words);
    let relay = Relay::at(receiver.port(), Point::first("RoundEnd"), Act::Hold, false);
    let crossing = begin(&here, "m", &relay.address, &["--reconnect", "0s"]);
    relay.wait_reached();
    receiver.kill();
    relay.go_on();
    let ran = finish(crossing, PATIENCE);
    assert!(ran.stderr.contains("the machine is here"), "{ran:?}");
    assert!(!names(&dir).is_empty(), "a killed process cleans nothing up");
    guest.beats_on(2);
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &words);
    migrate(&here, "m", &receiver.address, &["--verify"]).success();
    guest.then(serial);
    guest.swept();
    assert_eq!(names(&dir), ["disk.img"]);
}

#[test]
fn an_image_that_both_hosts_have_travels_as_names() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let (image, base) = (here.file("disk.img"), there.file("base.img"));
    noise(&image, 16 * MIB);
    std::fs::copy(&image, &base).unwrap();
    let mut guest = machine(
        &here,
        "work=allocator memory=2M rate=200",
        &format!("path={}", image.display()),
    );
    let dir = images(&there);
    let serial = there.file("there.serial");
    let words = ["--dir", dir.to_str().unwrap(), "--base", base.to_str().unwrap()];
    let receiver = Receiver::start(&there, &serial, &words);
    migrate(
        &here,
        "m",
        &receiver.address,
        &["--verify", "--report", "report.json"],
    )
    .success();
    guest.then(serial);
    guest.swept();
    let text = std::fs::read(here.file("report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert_eq!(report["disk"]["known"], 16 * MIB / 65536, "{}", report["disk"]);
    assert!(
        report["disk"]["wire_bytes"].as_u64().unwrap() < MIB,
        "{}",
        report["disk"]
    );
    assert_eq!(
        std::fs::read(dir.join("disk.img")).unwrap(),
        std::fs::read(&base).unwrap()
    );
}

#[test]
fn a_shared_image_changes_hands_with_the_machine_and_comes_back_when_it_stays() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let image = here.file("disk.img");
    std::fs::File::create(&image).unwrap().set_len(16 * MIB).unwrap();
    let mut guest = machine(
        &here,
        "work=allocator+disk+database memory=4M rate=500 journal=4M rows=1024",
        &format!("path={}", image.display()),
    );
    guest.wait_for_line("database");
    let (mut from, mut to) = (&here, &there);
    let shared = ["--shared-storage", "--verify", "--compress", "off"];
    for number in 0..2 {
        // Cut when the other side has loaded everything, and nothing was handed over: the image is here again, even
        // while the other side still waits.
        let receiver = Receiver::start(to, &to.file("cut"), &["--reconnect", "20s"]);
        let relay = Relay::at(receiver.port(), Point::first("Loaded"), Act::CutBefore, true);
        let words = [&shared[..], &["--reconnect", "0s"]].concat();
        let ran = migrate(from, "m", &relay.address, &words);
        assert!(
            ran.code == 1 && ran.stderr.contains("the machine is here") && !ran.stderr.contains("set going"),
            "{ran:?}"
        );
        guest.beats_on(10);
        drop(receiver);
        let serial = to.file(&format!("serial{number}"));
        let receiver = Receiver::start(to, &serial, &[]);
        migrate(from, "m", &receiver.address, &shared).success();
        guest.then(serial);
        guest.beats_on(10);
        guest.swept();
        std::mem::forget(receiver);
        from.wait_until("it is gone", || from.entry("m").is_none());
        (from, to) = (to, from);
    }
    from.ferry(["kill", "m"]).success();
    guest.sound();
    from.ferry(["load", "journal", image.to_str().unwrap()]).success();
}

#[test]
fn a_receiver_of_several_machines_takes_one_after_the_other_with_keys_from_its_own_folder() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    there
        .ferry(["keys", "--dir", "keys", "127.0.0.1", "alpha.lan"])
        .success();
    let keys = there.file("keys/alpha.lan");
    // Relative paths, and no --once.
    let mut command = there.command(["receive", "tcp://127.0.0.1:0", "--tls", "keys/127.0.0.1"]);
    let mut child = command.spawn().unwrap();
    let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).unwrap();
    let address = line
        .trim()
        .strip_prefix("waiting for machines at ")
        .unwrap()
        .to_owned();
    for name in ["a", "b", "c"] {
        let guest = start(
            &here,
            name,
            "work=allocator memory=2M rate=100",
            &["--memory", "64M"],
        );
        guest.beats_on(2);
        let words = ["--tls", keys.to_str().unwrap(), "--stall", "5s"];
        let ran = migrate(&here, name, &address, &words).success();
        // The process that has a machine takes no connection away from the one that waits for the next.
        assert!(!ran.stderr.contains("connecting again"), "{ran:?}");
        here.wait_until("it is gone", || here.entry(name).is_none());
    }
    let list = there.ferry(["list"]).success().stdout;
    assert_eq!(
        list.lines().filter(|line| line.contains("running")).count(),
        3,
        "{list}"
    );
    for name in ["a", "b", "c"] {
        there.ferry(["kill", name]).success();
    }
    signal(child.id(), Signal::KILL);
    let _ = child.wait();
    // The process that waited for the next one ends, too.
    let port = address.trim_start_matches("tcp://");
    there.wait_until("nobody listens any more", || {
        std::net::TcpListener::bind(port).is_ok()
    });
}
