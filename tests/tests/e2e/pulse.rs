//! A pulse is a migration without a network: everything but the memory is made anew, and the guest must not notice.

use ferry_tests::host::{Host, skip_without_kvm};
use serde_json::Value;

/// FERRY_PULSES asks for more.
fn pulses() -> u32 {
    std::env::var("FERRY_PULSES")
        .ok()
        .map_or(60, |text| text.parse().expect("FERRY_PULSES is a number"))
}

#[test]
fn a_working_guest_does_not_notice_pulses() {
    if skip_without_kvm() {
        return;
    }
    for cpus in ["1", "4"] {
        let host = Host::new();
        let work = "work=allocator+gc+spin memory=32M heap=16M rate=max heartbeat=10ms";
        let mut guest = host.run("p", ["--cpus", cpus, "--cmdline", work]);
        guest.line("ready");
        let before = guest.line("sum");
        let count = pulses().to_string();
        let report = host
            .ferry(["pulse", "p", "--count", &count, "--json"])
            .success()
            .stdout;
        let report: Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["pulses"], pulses());
        eprintln!("{cpus} CPUs: {report}");
        // Beats since then come without a gap, and a whole sweep after the last pulse finds all evidence sound.
        let after = guest.line("sum");
        let sweeps = |sum: &Value| sum["sweeps"].as_u64().unwrap();
        let last = guest.line_where("sum", |sum| sweeps(sum) >= sweeps(&after) + 2);
        assert_eq!(last["damaged"], 0);
        assert!(last["writes"].as_u64() > before["writes"].as_u64());
        let mut beat = guest.beat();
        for _ in 0..20 {
            beat += 1;
            assert_eq!(guest.beat(), beat);
        }
    }
}

#[test]
fn a_paused_machine_stays_paused_through_a_pulse() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("p", ["--cmdline", "heartbeat=20ms"]);
    guest.beat();
    host.ferry(["pause", "p"]).success();
    host.ferry(["pulse", "p", "--count", "3"]).success();
    assert!(host.ferry(["list"]).success().stdout.contains("paused"));
    host.ferry(["resume", "p"]).success();
    let first = guest.beat();
    assert_eq!(guest.beat(), first + 1);
}
