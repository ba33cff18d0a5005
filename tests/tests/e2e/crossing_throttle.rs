//! A machine that writes faster than its link is slowed to get across: the CPUs that write, and not the others.

use std::time::Duration;

use ferry_tests::crossing::{Receiver, migrate, pair};
use ferry_tests::host::PATIENCE;
use serde_json::Value;

fn time(value: &Value) -> Duration {
    Duration::new(
        value["secs"].as_u64().unwrap(),
        value["nanos"].as_u64().unwrap() as u32,
    )
}

/// One CPU of two writes up to 100 MB/s over 16 MB, and 8 MB/s may leave: what is left never fits into a second's
/// standstill unless that CPU is slowed. The other one only checks pages.
#[test]
fn only_the_cpu_that_writes_is_slowed_and_the_promised_downtime_is_kept() {
    let Some((here, there, mut guest)) = pair(
        "work=allocator memory=16M wws=100 rate=24000 touch=head catch-up=4ms writers=1 random=100 check=2000",
        &["--memory", "128M", "--cpus", "2"],
    ) else {
        return;
    };
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let asked = Duration::from_secs(1);
    let words = [
        "--policy",
        "calm-live",
        "--throttle",
        "99",
        "--link",
        "8MB",
        "--downtime",
        "1s",
        "--deadline",
        "50s",
        "--compress",
        "off",
        "--report",
        "report.json",
    ];
    let ran = migrate(&here, "m", &receiver.address, &words).success();
    let report: Value = serde_json::from_slice(&std::fs::read(here.file("report.json")).unwrap()).unwrap();
    let impact = &report["impact"];
    let napped: Vec<Duration> = impact["vcpus"]
        .as_array()
        .unwrap()
        .iter()
        .map(|vcpu| time(&vcpu["throttled"]))
        .collect();
    let (least, most) = (napped.iter().min().unwrap(), napped.iter().max().unwrap());
    assert_eq!(napped.len(), 2, "{impact}");
    assert!(
        *most > Duration::from_millis(200),
        "nobody was slowed: {impact} {ran:?}"
    );
    assert!(*least * 10 < *most, "the other one, too: {impact} {ran:?}");
    assert!(
        time(&report["downtime"]["total"]) <= asked,
        "{}",
        report["downtime"]
    );
    assert!(time(&report["total"]) < PATIENCE);
    guest.then(serial);
    guest.swept();
}
