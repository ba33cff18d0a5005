//! A balloon: memory given and taken back by command, and a crossing that leaves out what the guest does not use.

use ferry_tests::crossing::{Receiver, migrate, start};
use ferry_tests::host::{Host, skip_without_kvm};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn balloon(host: &Host, more: &[&str]) -> Value {
    let words = ["balloon", "m", "--json"].iter().chain(more);
    serde_json::from_str(&host.ferry(words).success().stdout).unwrap()
}

#[test]
fn a_guest_gives_memory_takes_it_back_and_tells_of_it() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let guest = start(
        &host,
        "m",
        "work=balloon stock=32M churn=2000",
        &["--memory", "96M", "--balloon"],
    );
    let before = balloon(&host, &[]);
    assert_eq!(before["target_bytes"], 0);
    let free = |info: &Value| info["guest"]["free_bytes"].as_u64().unwrap();
    assert_eq!(free(&before), 32 * MIB, "{before}");
    for target in [16 * MIB, 4 * MIB, 0] {
        balloon(&host, &["--target", &target.to_string()]);
        host.wait_until("the guest has followed", || {
            let info = balloon(&host, &[]);
            info["actual_bytes"] == target && free(&info) == 32 * MIB - target
        });
    }
    let text = host.ferry(["balloon", "m"]).success().stdout;
    assert!(
        text.contains("given by the guest") && text.contains("free in the guest"),
        "{text}"
    );
    let refused = host.ferry(["balloon", "m", "--target", "1G"]);
    assert!(
        refused.code != 0 && refused.stderr.contains("has 96M of memory"),
        "{refused:?}"
    );
    host.ferry(["kill", "m"]).success();
    guest.sound();
    start(&host, "bare", "work=idle", &[]);
    let refused = host.ferry(["balloon", "bare"]);
    assert!(refused.stderr.contains("--balloon"), "{refused:?}");
    host.ferry(["kill", "bare"]).success();
}

/// The guest's stock is noise, all of it free; half of it is written again before the crossing ends. The comparison of
/// both memories and the guest's own look at every page it wrote since both fail if one page too many is left out.
#[test]
fn free_memory_does_not_travel_and_nothing_is_missed() {
    if skip_without_kvm() {
        return;
    }
    let mut wire = Vec::new();
    for with in [
        &["--memory", "128M", "--cpus", "2", "--balloon"][..],
        &["--memory", "128M", "--cpus", "2"],
    ] {
        let (here, there) = (Host::new(), Host::new());
        // Without a balloon, evidence pages of the same size stand for memory that is in use.
        let work = if with.contains(&"--balloon") {
            "work=balloon+allocator memory=8M stock=48M churn=3000 rate=500"
        } else {
            "work=allocator memory=56M rate=500"
        };
        let mut guest = start(&here, "m", work, with);
        guest.wait_for_line("ready");
        if with.contains(&"--balloon") {
            // All of the stock has content now; from here on little of it is written.
            guest.wait_for("the stock was written", |line| {
                line["stock_checked"].as_u64() > Some(0)
            });
        }
        let serial = there.file("there.serial");
        let receiver = Receiver::start(&there, &serial, &[]);
        guest.then(serial);
        migrate(
            &here,
            "m",
            &receiver.address,
            &["--verify", "--report", "report.json"],
        )
        .success();
        let report = std::fs::read(here.file("report.json")).unwrap();
        let report: Value = serde_json::from_slice(&report).unwrap();
        wire.push(report["wire_bytes"].as_u64().unwrap());
        guest.swept();
        there.ferry(["kill", "m"]).success();
        guest.sound();
        std::mem::forget(receiver);
    }
    eprintln!("bytes on the wire with free memory named and without: {wire:?}");
    assert!(wire[0] + 16 * MIB < wire[1], "{wire:?}");
}
