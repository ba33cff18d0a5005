//! Stock Linux guests under genuine KVM, in outer machines: what Ferry is for, with a kernel that nobody adapted to it.

mod boot_log;

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferry_tests::host::ferry_binary;
use ferry_tests::nested::{self, Job, Outcome};

/// An emulated host on a busy machine is slow: time-outs only end what hangs.
const PATIENCE: Duration = Duration::from_secs(900);

/// Emulated hosts take whole processors: one test with them at a time.
static TURN: Mutex<()> = Mutex::new(());

/// None, with the reason printed, where there are no outer machines. Where tests must run, that is a failure.
fn turn() -> Option<MutexGuard<'static, ()>> {
    let Some(why) = nested::missing() else {
        return Some(TURN.lock().unwrap_or_else(PoisonError::into_inner));
    };
    assert!(
        std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
        "this test must run here, but {why}"
    );
    eprintln!("skipped: {why}");
    None
}

fn full() -> bool {
    std::env::var_os("FERRY_NESTED_FULL").is_some()
}

/// A small number in every run, a large one in the full set.
fn times(always: u32, in_full: u32) -> u32 {
    if full() { in_full } else { always }
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

/// A serial port's text, without a complaint that has no excuse.
fn sound(outcome: &Outcome, name: &str) -> String {
    let serial = outcome.text(name).unwrap();
    let complaints = boot_log::complaints(&serial);
    assert!(
        complaints.is_empty(),
        "the guest's kernel complains in {name}:\n{}",
        complaints.join("\n")
    );
    serial
}

fn has(text: &str, all: &[&str]) {
    for wanted in all {
        assert!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
}

/// What /proc/cpuinfo in the guest calls flags.
fn flags(serial: &str) -> Vec<&str> {
    let line = serial.lines().find(|line| line.starts_with("CPU flags"));
    line.expect("the guest says its CPU's flags")
        .split_whitespace()
        .skip(3)
        .collect()
}

/// The guest's uptime at each of its lines.
fn uptimes(serial: &str) -> Vec<f64> {
    let up = |line: &str| line.strip_prefix("ALIVE ")?.split(' ').nth(2)?.parse().ok();
    serial.lines().filter_map(up).collect()
}

/// A crossing's report: the parts of the downtime make its total, and all was compared if that was asked for.
fn adds_up(outcome: &Outcome, name: &str, compared: bool) {
    let report: serde_json::Value = serde_json::from_str(&outcome.text(name).unwrap()).unwrap();
    let seconds = |part: &str| {
        let duration = &report["downtime"][part];
        let (whole, nanos) = (duration["secs"].as_f64(), duration["nanos"].as_f64());
        whole.unwrap_or_else(|| panic!("{name} has no {part}")) + nanos.unwrap() / 1e9
    };
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
    let (sum, total) = (parts.map(seconds).iter().sum::<f64>(), seconds("total"));
    assert!(
        total > 0.0 && (sum - total).abs() < 0.001,
        "the parts of the downtime in {name} are {sum} s, the whole {total} s"
    );
    let checked = report["checks"]["compared"].as_bool();
    assert_eq!(checked, compared.then_some(true), "{name}");
}

#[test]
fn a_stock_kernel_finds_every_device_works_through_pulses_and_hears_its_power_button() {
    let Some(_turn) = turn() else {
        return;
    };
    let work = tempfile::tempdir().unwrap();
    let script = format!("PULSES={}\n{}", times(6, 60), include_str!("nested/one_host.sh"));
    let outcome = nested::run(job(&work, &script)).unwrap().success().unwrap();
    said(&outcome);
    let (one, two) = (sound(&outcome, "serial-1"), sound(&outcome, "serial-2"));
    for (serial, cpus) in [(&one, "cpus=1"), (&two, "cpus=2")] {
        has(
            serial,
            &[
                "GUEST-READY",
                cpus,
                "clock=kvm-clock",
                "PCI 0x1af4 0x1042",
                "VIRTIO virtio_blk",
                "VIRTIO virtio_net",
                "VIRTIO virtio_rng",
                "VIRTIO virtio_balloon",
                "VIRTIO virtio_console",
                "RNG virtio_rng",
                "/dev/vda on /mnt type ext4 (rw",
                "ferry: the log is read",
                "GUEST-BUTTON",
                "reboot: Power down",
            ],
        );
    }
    sound(&outcome, "login");
    // All that the first kernel said came through the virtio console.
    let log = outcome.text("boot-log").unwrap();
    has(
        &log,
        &[
            "Linux version",
            "i8042: PNP: No PS/2 controller found",
            "ACPI: button: Power Button [PWRF]",
            "ferry: the log is read",
        ],
    );
    assert!(
        !log.contains("Probing ports"),
        "the keyboard controller was probed:\n{log}"
    );
    // The first guest sees its host's processor, the second what the template x86-64-v2 allows.
    let (all, few) = (flags(&one), flags(&two));
    for flag in ["aes", "bmi1", "bmi2", "fsgsbase", "movbe", "sse4a"] {
        assert!(
            all.contains(&flag) && !few.contains(&flag),
            "{flag}:\n{all:?}\n{few:?}"
        );
    }
    for flag in [
        "cx16",
        "lahf_lm",
        "popcnt",
        "ssse3",
        "sse4_1",
        "sse4_2",
        "hypervisor",
        "x2apic",
    ] {
        assert!(
            all.contains(&flag) && few.contains(&flag),
            "{flag}:\n{all:?}\n{few:?}"
        );
    }
    for flag in ["avx", "xsave", "svm"] {
        assert!(!few.contains(&flag), "{flag}:\n{few:?}");
    }
}

#[test]
fn a_stock_server_moves_to_another_host_and_back_and_its_connection_is_kept() {
    let Some(_turn) = turn() else {
        return;
    };
    let work = tempfile::tempdir().unwrap();
    let (a, b) = nested::cable(work.path());
    let trips = times(1, 5);
    let with = |script| format!("TRIPS={trips}\n{script}");
    let there = nested::start(job(&work, &with(include_str!("nested/two_hosts_b.sh"))).cable(b)).unwrap();
    let here = nested::start(job(&work, &with(include_str!("nested/two_hosts_a.sh"))).cable(a)).unwrap();
    let here = here.wait().unwrap();
    let there = there.wait().unwrap();
    said(&here);
    said(&there);
    let (here, there) = (here.success().unwrap(), there.success().unwrap());
    for trip in 1..=trips {
        adds_up(&here, &format!("there-{trip}.json"), trip == 1);
        adds_up(&there, &format!("back-{trip}.json"), false);
    }
    // What the guest said, host after host.
    let mut story = Vec::new();
    for trip in 1..=trips {
        story.push(sound(&here, &format!("serial-{trip}-1")));
        story.push(sound(&there, &format!("serial-{trip}-2")));
    }
    story.push(sound(&here, "serial-last"));
    has(
        &story[0],
        &["cpus=2", "clock=kvm-clock", "ferry: the log is read"],
    );
    has(story.last().unwrap(), &["GUEST-BUTTON", "reboot: Power down"]);
    // Two kernels and two clocks, and the guest's own never went back.
    let times: Vec<f64> = story.iter().flat_map(|serial| uptimes(serial)).collect();
    assert!(times.len() > 3 && times.is_sorted(), "{times:?}");
    assert!(
        story.iter().all(|serial| !uptimes(serial).is_empty()),
        "on one of its hosts the guest was not heard"
    );
}

#[test]
fn a_host_that_dies_and_a_cable_that_is_out_cost_a_stock_server_nothing() {
    if !full() {
        eprintln!("skipped: in the full set only, FERRY_NESTED_FULL=1");
        return;
    }
    let Some(_turn) = turn() else {
        return;
    };
    let work = tempfile::tempdir().unwrap();
    let (a, b) = nested::cable(work.path());
    let (_, b_again) = nested::cable(work.path());
    let dies = nested::start(job(&work, include_str!("nested/two_hosts_fail_dies.sh")).cable(b)).unwrap();
    let here = nested::start(job(&work, include_str!("nested/two_hosts_fail_a.sh")).cable(a)).unwrap();
    dies.wait().unwrap().success().unwrap();
    let there = nested::start(job(&work, include_str!("nested/two_hosts_fail_b.sh")).cable(b_again)).unwrap();
    let here = here.wait().unwrap();
    said(&here);
    let here = here.success().unwrap();
    let there = there.wait().unwrap().success().unwrap();
    said(&there);
    sound(&here, "serial-1");
    has(
        &sound(&there, "serial-2"),
        &["GUEST-BUTTON", "reboot: Power down"],
    );
}
