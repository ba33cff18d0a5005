//! Stock Linux guests under genuine KVM, in outer machines: what Ferry is for, with a kernel that nobody adapted to it.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ferry_tests::host::ferry_binary;
use ferry_tests::nested::{self, Job, Outcome};

fn full() -> bool {
    std::env::var_os("FERRY_NESTED_FULL").is_some()
}

/// An emulated host on a busy machine is slow: time-outs only end what hangs.
const PATIENCE: Duration = Duration::from_secs(420);

fn skip() -> bool {
    if !full() {
        eprintln!("skipped: only in the full set, FERRY_NESTED_FULL=1");
        return true;
    }
    let Some(why) = nested::missing() else {
        return false;
    };
    assert!(
        std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
        "this test must run here, but {why}"
    );
    eprintln!("skipped: {why}");
    true
}

/// A job with `ferry`, the guest's program, and the tools that check its disk.
fn job(work: &tempfile::TempDir, script: &str) -> Job {
    let ferry = work.path().join("ferry");
    let status = Command::new("strip")
        .arg("-s")
        .arg("-o")
        .arg(&ferry)
        .arg(ferry_binary())
        .status();
    assert!(status.unwrap().success());
    let mut job = Job::new(script).timeout(PATIENCE).file(ferry, "ferry");
    for (name, text) in [
        ("guest.sh", include_str!("nested/guest.sh")),
        ("host.sh", include_str!("nested/host.sh")),
    ] {
        let path = work.path().join(name);
        std::fs::write(&path, text).unwrap();
        job = job.file(path, name);
    }
    let mut tool = PathBuf::from("/usr/sbin/e2fsck");
    if !tool.exists() {
        tool = "/sbin/e2fsck".into();
    }
    let libraries = Command::new("ldd").arg(&tool).output().unwrap().stdout;
    for path in String::from_utf8(libraries).unwrap().split_whitespace() {
        let name = path.rsplit('/').next().unwrap();
        // The C library is in the outer machine already.
        if path.starts_with('/') && !name.starts_with("libc.") && !name.starts_with("ld-linux") {
            job = job.file(path, name);
        }
    }
    job.file(tool, "e2fsck")
}

fn said(outcome: &Outcome) {
    for line in outcome.console.lines().filter(|line| !line.starts_with('[')) {
        println!("{line}");
    }
}

#[test]
fn an_outer_machine_offers_kvm() {
    if let Some(why) = nested::missing() {
        assert!(
            std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
            "this test must run here, but {why}"
        );
        eprintln!("skipped: {why}");
        return;
    }
    let outcome = nested::run(Job::new("ls -l /dev/kvm > /out/there").timeout(PATIENCE));
    let there = outcome.unwrap().success().unwrap().text("there").unwrap();
    assert!(there.contains("/dev/kvm"), "{there}");
}

#[test]
fn a_stock_kernel_finds_every_device_works_through_pulses_and_hears_its_power_button() {
    if skip() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let outcome = nested::run(job(&work, include_str!("nested/one_host.sh")))
        .unwrap()
        .success()
        .unwrap();
    said(&outcome);
    let serial = outcome.text("serial").unwrap();
    for wanted in [
        "GUEST-READY",
        "clock=kvm-clock",
        "PCI 0x1af4 0x1042",
        "VIRTIO virtio_blk",
        "VIRTIO virtio_net",
        "VIRTIO virtio_rng",
        "VIRTIO virtio_balloon",
        "VIRTIO virtio_console",
        "RNG virtio_rng",
        "CONSOLE hvc0",
        "/dev/vda on /mnt type ext4 (rw",
    ] {
        assert!(serial.contains(wanted), "no {wanted:?} in:\n{serial}");
    }
    assert!(
        !serial.contains("i8042"),
        "the keyboard controller was probed:\n{serial}"
    );
}

#[test]
fn a_stock_server_moves_to_another_host_and_back_and_its_connection_is_kept() {
    if skip() {
        return;
    }
    let work = tempfile::tempdir().unwrap();
    let (a, b) = nested::cable(work.path());
    let there = nested::start(job(&work, include_str!("nested/two_hosts_b.sh")).cable(b)).unwrap();
    let here = nested::start(job(&work, include_str!("nested/two_hosts_a.sh")).cable(a)).unwrap();
    let here = here.wait().unwrap();
    let there = there.wait().unwrap();
    said(&here);
    said(&there);
    here.success().unwrap();
    there.success().unwrap();
}
