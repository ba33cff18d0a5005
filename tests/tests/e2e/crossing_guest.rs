//! What the guest or its user does while it crosses: pausing, resuming, ending. Nobody can set a machine going here in the
//! switch, a paused machine arrives paused, and one that ends is not carried away.

use ferry_tests::crossing::{Receiver, begin, migrate, pair, runs_at, start, state_at};
use ferry_tests::host::{Host, PATIENCE, finish, skip_without_kvm};
use ferry_tests::relay::{Act, Point, Relay};
use ferry_tests::schema::violations;

const WORK: &str = "work=allocator memory=4M rate=500";

#[test]
fn nobody_sets_a_machine_going_in_its_switch() {
    let Some((here, there, mut guest)) = pair(WORK, &["--memory", "64M"]) else {
        return;
    };
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    // Everything has been copied: an instruction more here, and the two would part.
    let relay = Relay::at(receiver.port(), Point::first("Loaded"), Act::Hold, false);
    let crossing = begin(&here, "m", &relay.address, &["--compress", "off"]);
    relay.wait_reached();
    for verb in ["resume", "pause", "pulse"] {
        let refused = here.ferry([verb, "m"]);
        assert!(
            refused.code == 1 && refused.stderr.contains("crossing"),
            "{verb}: {refused:?}"
        );
        assert_eq!(state_at(&here, "m").as_deref(), Some("paused"), "{verb}");
    }
    relay.go_on();
    finish(crossing, PATIENCE).success();
    guest.then(serial);
    guest.swept();
}

#[test]
fn a_machine_that_is_killed_while_it_crosses_does_not_go_on_at_the_other_side() {
    if skip_without_kvm() {
        return;
    }
    for phase in ["RoundEnd", "Loaded"] {
        let (here, there) = (Host::new(), Host::new());
        let guest = start(&here, "m", WORK, &["--memory", "64M"]);
        guest.wait_for_line("ready");
        let receiver = Receiver::start(&there, &there.file("there.serial"), &[]);
        let relay = Relay::at(receiver.port(), Point::first(phase), Act::Hold, false);
        let crossing = begin(&here, "m", &relay.address, &["--compress", "off"]);
        relay.wait_reached();
        here.ferry(["kill", "m"]).success();
        relay.go_on();
        let ran = finish(crossing, PATIENCE);
        assert_eq!(ran.code, 1, "{phase}: {ran:?}");
        assert_eq!(receiver.end().0, 1, "{phase}");
        assert!(there.remains().is_empty() && here.remains().is_empty(), "{phase}");
    }
}

#[test]
fn a_machine_that_its_user_pauses_while_it_crosses_stays_paused_here() {
    let Some((here, there, mut guest)) = pair(WORK, &["--memory", "64M"]) else {
        return;
    };
    let receiver = Receiver::start(&there, &there.file("paused"), &[]);
    let relay = Relay::at(receiver.port(), Point::first("RoundEnd"), Act::Hold, false);
    let crossing = begin(&here, "m", &relay.address, &["--compress", "off"]);
    relay.wait_reached();
    here.ferry(["pause", "m"]).success();
    relay.go_on();
    let ran = finish(crossing, PATIENCE);
    assert!(
        ran.code == 1
            && ran
                .stderr
                .contains("was paused while it crossed; the machine is here"),
        "{ran:?}"
    );
    assert_eq!(state_at(&here, "m").as_deref(), Some("paused"));
    assert_eq!(receiver.end().0, 1);

    // Paused before: it arrives paused, and goes on there when it is told to.
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let before = guest.sound();
    migrate(&here, "m", &receiver.address, &["--verify"]).success();
    guest.then(serial);
    assert_eq!(state_at(&there, "m").as_deref(), Some("paused"));
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(guest.sound(), before, "it ran there");
    there.ferry(["resume", "m"]).success();
    guest.swept();
}

#[test]
fn a_paused_machine_that_is_resumed_while_it_crosses_runs_here() {
    let Some((here, there, guest)) = pair(WORK, &["--memory", "64M"]) else {
        return;
    };
    here.ferry(["pause", "m"]).success();
    let receiver = Receiver::start(&there, &there.file("there.serial"), &[]);
    let relay = Relay::at(receiver.port(), Point::first("RoundEnd"), Act::Hold, false);
    let crossing = begin(&here, "m", &relay.address, &["--compress", "off"]);
    relay.wait_reached();
    let resumed = here.ferry(["resume", "m"]);
    relay.go_on();
    let ran = finish(crossing, PATIENCE);
    // A machine that writes nothing has one round only, and that may be the switch already.
    if resumed.code == 0 {
        assert!(
            ran.code == 1 && ran.stderr.contains("was resumed while it crossed"),
            "{ran:?}"
        );
        assert!(runs_at(&here, "m"));
        guest.beats_on(2);
    } else {
        assert!(resumed.stderr.contains("crossing"), "{resumed:?}");
        ran.success();
        assert_eq!(state_at(&there, "m").as_deref(), Some("paused"));
    }
}

#[test]
fn a_guest_that_ends_while_it_crosses_is_ended_here_and_is_nowhere_else() {
    if skip_without_kvm() {
        return;
    }
    for (end, said) in [
        ("poweroff", "powered off"),
        ("reset", "asked for a reset"),
        ("work work=idle fault=triple after=1ms", "triple fault"),
    ] {
        let (here, there) = (Host::new(), Host::new());
        let work = "work=allocator memory=32M rate=4000";
        start(&here, "m", work, &["--memory", "128M"]);
        let receiver = Receiver::start(&there, &there.file("there.serial"), &[]);
        let relay = Relay::at(receiver.port(), Point::first("Prepared"), Act::Hold, false);
        let mut words = vec!["--bandwidth", "8MB", "--compress", "off", "--downtime", "1ms"];
        words.extend(["--report", "report.json"]);
        let crossing = begin(&here, "m", &relay.address, &words);
        // Its memory takes seconds from here on.
        relay.wait_reached();
        relay.go_on();
        here.type_line("m", end);
        let ran = finish(crossing, PATIENCE);
        assert!(
            ran.code == 1
                && ran.stderr.contains("the machine ended while it crossed")
                && ran.stderr.contains(said)
                && ran.stderr.contains("the machine has ended here and runs nowhere")
                && !ran.stderr.contains("the machine is here"),
            "{end}: {ran:?}"
        );
        let report = std::fs::read_to_string(here.file("report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["outcome"]["whereabouts"], "ended", "{end}");
        let schema = include_str!("../../../docs/report.schema.json");
        assert_eq!(
            violations(&serde_json::from_str(schema).unwrap(), &report),
            [""; 0]
        );
        let shown = here.ferry(["report", "report.json"]).success().stdout;
        assert!(shown.contains("has ended here and runs nowhere"), "{shown}");
        let (code, what) = receiver.end();
        assert!(
            code == 1
                && what.contains("ended while it crossed")
                && what.contains("ended at the other side and runs nowhere")
                && !what.contains("the machine is at"),
            "{end}: {what}"
        );
        assert!(there.remains().is_empty());
        here.wait_until("its process ends", || {
            here.entry("m").is_none_or(|entry| entry.pid.is_none())
        });
    }
}
