//! Pausing stops a guest where it is; resuming continues it, and it never learns.

use std::time::Duration;

use ferry_tests::host::{Host, skip_without_kvm};

#[test]
fn pause_stops_the_heartbeats_and_resume_continues_them_without_a_gap() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run(
        "p",
        [
            "--cpus",
            "4",
            "--cmdline",
            "work=allocator+spin memory=16M rate=max heartbeat=20ms",
        ],
    );
    guest.line("ready");
    let mut last = guest.beat();
    for _ in 0..5 {
        assert!(
            host.ferry(["pause", "p"])
                .success()
                .stdout
                .contains("p is paused")
        );
        // Asked for twice it is not a mistake.
        host.ferry(["pause", "p"]).success();
        assert!(host.ferry(["list"]).success().stdout.contains("paused"));
        // What was on its way comes, and then nothing for many heartbeats.
        let silent = (0..5).any(|_| {
            let lines = guest.lines_within(Duration::from_millis(300));
            for line in lines.iter().filter(|line| line["t"] == "beat") {
                last += 1;
                assert_eq!(line["seq"], last);
            }
            lines.is_empty()
        });
        assert!(silent, "a paused guest speaks on");
        host.ferry(["resume", "p"]).success();
        for _ in 0..3 {
            last += 1;
            assert_eq!(guest.beat(), last);
        }
    }
    assert_eq!(guest.line("sum")["damaged"], 0);
}

#[test]
fn a_paused_machine_cannot_hear_its_power_button_and_says_so() {
    if skip_without_kvm() {
        return;
    }
    let host = Host::new();
    let mut guest = host.run("p", [""; 0]);
    guest.beat();
    host.ferry(["pause", "p"]).success();
    let stop = host.ferry(["stop", "p", "--timeout", "1s"]);
    assert_eq!(stop.code, 1);
    assert!(stop.stderr.contains("resume it first, or kill it"), "{stop:?}");
    host.ferry(["kill", "p"]).success();
    assert_eq!(guest.end().code, 0);
}
