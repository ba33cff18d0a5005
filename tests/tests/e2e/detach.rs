//! A detached machine lives on its own, and its start is not believed but seen.

use std::fs;

use ferry_tests::host::{Host, skip_without_kvm};
use rustix::process::{Pid, getpgid, getsid};

#[test]
fn a_detached_machine_runs_when_the_command_returns_and_belongs_to_no_terminal() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let ran = host
        .ferry(["run", "d", "--detach", "--cmdline", "heartbeat=20ms"])
        .success();
    assert!(
        ran.stdout.starts_with("d runs (process ") && ran.stdout.lines().count() == 1,
        "{ran:?}"
    );
    assert_eq!(ran.stderr, "");
    let pid = host.entry("d").unwrap().pid.unwrap();
    assert!(ran.stdout.contains(&pid.to_string()));
    let process = Pid::from_raw(pid as i32);
    assert_eq!(
        (getsid(process).unwrap(), getpgid(process).unwrap()),
        (process.unwrap(), process.unwrap())
    );
    for fd in 0..3 {
        assert_eq!(
            fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap().to_str(),
            Some("/dev/null")
        );
    }
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/cwd")).unwrap().to_str(),
        Some("/")
    );
    host.wait_until("the serial log has heartbeats", || {
        host.ferry(["logs", "d", "--serial"])
            .success()
            .stdout
            .matches("beat")
            .count()
            > 3
    });
    assert!(host.ferry(["logs", "d"]).success().stdout.contains("INFO"));
    host.ferry(["stop", "d"]).success();
    assert!(host.remains().is_empty());
    host.wait_until("its process is gone", || {
        !fs::exists(format!("/proc/{pid}")).unwrap()
    });
}

#[test]
fn a_detached_machine_that_fails_later_says_why_in_its_log() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    host.ferry(["run", "d", "--detach", "--cmdline", "fault=triple after=100ms"])
        .success();
    host.wait_until("it has failed", || {
        host.ferry(["list", "--all"]).stdout.contains("triple fault")
    });
    assert!(
        host.ferry(["logs", "d"])
            .success()
            .stdout
            .contains("triple fault")
    );
}

#[test]
fn logs_follow_until_the_end_and_come_as_json_on_demand() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    host.ferry([
        "run",
        "d",
        "--detach",
        "--log-json",
        "--cmdline",
        "run=1s heartbeat=20ms",
    ])
    .success();
    let log = host.ferry(["logs", "d"]).success().stdout;
    assert!(!log.is_empty());
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(
            line["level"].is_string() && line["timestamp"].is_string(),
            "{line}"
        );
    }
    let serial = host.ferry(["logs", "d", "--serial", "--follow"]).success().stdout;
    assert!(
        serial.starts_with(r#"{"t":"hello""#) && serial.contains(r#""how":"poweroff""#),
        "{serial}"
    );
}
