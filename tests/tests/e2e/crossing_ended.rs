//! Processes are killed, crossings cancelled, deadlines pass and links stall, each at every phase: exactly one machine is
//! left or none, and whoever is left says so.

use std::time::{Duration, Instant};

use ferry_tests::crossing::{Evidence, Receiver, begin, migrate, pair, runs_at, signal, state_at};
use ferry_tests::host::{Host, PATIENCE, finish, skip_without_kvm};
use ferry_tests::relay::{Act, Point, Relay};
use rustix::process::Signal;

const WORK: &str = "work=allocator memory=4M rate=500";
const ONCE: [&str; 4] = ["--reconnect", "0s", "--compress", "off"];

/// One message in each phase: before copying, while copying, in the switch (twice), at the hand over, after it.
const PHASES: [&str; 6] = ["Offer", "RoundEnd", "StatePart", "Loaded", "Go", "Awake"];

fn machine() -> Option<(Host, Host, Evidence)> {
    pair(WORK, &["--memory", "64M"])
}

#[test]
fn a_receiver_that_is_killed_at_any_phase_leaves_the_machine_here_or_a_doubt_that_is_settled() {
    let Some((here, there, guest)) = machine() else {
        return;
    };
    for phase in PHASES {
        let serial = there.file(&format!("killed-{phase}"));
        let mut receiver = Receiver::start(&there, &serial, &[]);
        // That it runs there must not be heard here, or nothing would be in doubt.
        let act = if phase == "Awake" {
            Act::CutBefore
        } else {
            Act::Hold
        };
        let relay = Relay::at(receiver.port(), Point::first(phase), act, false);
        let crossing = begin(&here, "m", &relay.address, &ONCE);
        relay.wait_reached();
        receiver.kill();
        relay.go_on();
        let ran = finish(crossing, PATIENCE);
        assert_eq!(ran.code, 1, "{phase}: {ran:?}");
        assert!(!runs_at(&there, "m"), "{phase}");
        if ran.stderr.contains("ferry resolve") {
            assert!(["Loaded", "Go", "Awake"].contains(&phase), "{phase}: {ran:?}");
            assert_eq!(state_at(&here, "m").as_deref(), Some("paused"));
            // A new process there answers from the ledger.
            let other = Receiver::start(&there, &there.file("other"), &[]);
            let settled = here.ferry(["resolve", "m", "--ask", &other.address]).success();
            if phase == "Awake" {
                // It ran there and died there: it must not run here as well.
                assert!(settled.stdout.contains("m is at the other side"), "{settled:?}");
                here.wait_until("it is gone here", || here.entry("m").is_none());
                return;
            }
            assert!(settled.stdout.contains("m is running here"), "{settled:?}");
        } else {
            assert!(ran.stderr.contains("the machine is here"), "{phase}: {ran:?}");
        }
        guest.beats_on(2);
        guest.swept();
    }
    panic!("the last phase ends with the machine's death");
}

#[test]
fn an_outgoing_process_that_is_killed_at_any_phase_leaves_no_second_machine() {
    if skip_without_kvm() {
        return;
    }
    for phase in PHASES {
        let Some((here, there, mut guest)) = machine() else {
            return;
        };
        let serial = there.file("there.serial");
        let receiver = Receiver::start(&there, &serial, &["--reconnect", "1s"]);
        let relay = Relay::at(receiver.port(), Point::first(phase), Act::Hold, false);
        let crossing = begin(&here, "m", &relay.address, &ONCE);
        relay.wait_reached();
        signal(here.entry("m").unwrap().pid.unwrap(), Signal::KILL);
        let ran = finish(crossing, PATIENCE);
        assert!(
            ran.code == 1 && ran.stderr.contains("ferry list"),
            "{phase}: {ran:?}"
        );
        relay.go_on();
        if phase == "Go" || phase == "Awake" {
            // The go-ahead was out: it arrives, and the machine is there.
            there.wait_until("it runs there", || runs_at(&there, "m"));
            guest.then(serial);
            guest.swept();
            let records = here.ferry(["resolve"]).success().stdout;
            let line = records
                .lines()
                .find(|line| line.contains("nobody confirmed"))
                .unwrap();
            let session = line.split([' ', ':']).nth(1).unwrap();
            // The process is gone, the ledger is not: it is settled by its number.
            let other = Receiver::start(&there, &there.file("other"), &["--name", "other"]);
            let settled = here
                .ferry(["resolve", session, "--ask", &other.address])
                .success();
            assert!(settled.stdout.contains("at the other side"), "{settled:?}");
            let records = here.ferry(["resolve"]).success().stdout;
            assert!(!records.contains("nobody confirmed"), "{records}");
        } else if phase == "Offer" {
            // Nothing had begun there: it waits for the next one.
            there.wait_until("nothing is left", || there.remains().is_empty());
        } else {
            let (code, said) = receiver.end();
            assert_eq!(code, 1, "{phase}: {said}");
            assert!(there.remains().is_empty(), "{phase}");
        }
        here.wait_until("it is listed as dead", || {
            state_at(&here, "m").as_deref() == Some("dead")
        });
    }
}

#[test]
fn a_crossing_is_cancelled_at_any_phase_up_to_the_hand_over() {
    let Some((here, there, mut guest)) = machine() else {
        return;
    };
    let mut last = None;
    for (number, phase) in PHASES.into_iter().enumerate() {
        let serial = there.file(&format!("cancelled-{phase}"));
        let receiver = Receiver::start(&there, &serial, &[]);
        let relay = Relay::at(receiver.port(), Point::first(phase), Act::Hold, false);
        let crossing = begin(&here, "m", &relay.address, &["--compress", "off"]);
        relay.wait_reached();
        // While it crosses, it does not cross a second time.
        let second = migrate(&here, "m", &receiver.address, &[]);
        assert!(
            second.code == 1 && second.stderr.contains("crossing already"),
            "{second:?}"
        );
        // By the command, and by Ctrl-C in the first one.
        match number % 2 {
            0 => drop(here.ferry(["migrate", "--cancel", "m"]).success()),
            _ => signal(crossing.id(), Signal::INT),
        }
        if phase == "Go" || phase == "Awake" {
            std::thread::sleep(Duration::from_millis(100));
            relay.go_on();
            // Too late: it is there, and says so.
            let ran = finish(crossing, PATIENCE).success();
            assert!(ran.stdout.contains("m is at "), "{phase}: {ran:?}");
            guest.then(serial);
            guest.swept();
            if phase == "Go" {
                // Back, for the next one.
                std::mem::forget(receiver);
                let serial = here.file("back");
                let back = Receiver::start(&here, &serial, &[]);
                here.wait_until("it is gone here", || here.entry("m").is_none());
                migrate(&there, "m", &back.address, &[]).success();
                guest.then(serial);
                std::mem::forget(back);
                there.wait_until("it is gone there", || there.entry("m").is_none());
            } else {
                last = Some(receiver);
            }
            continue;
        }
        let ran = match number % 2 {
            0 => {
                relay.go_on();
                finish(crossing, PATIENCE)
            }
            // Nobody says when a signal has been noticed; but it ends the crossing without a word from the other side.
            _ => {
                let ran = finish(crossing, PATIENCE);
                relay.go_on();
                ran
            }
        };
        assert!(
            ran.code == 1 && ran.stderr.contains("was cancelled; the machine is here"),
            "{phase}: {ran:?}"
        );
        let (code, said) = receiver.end();
        assert!(
            code == 1 && said.contains("the machine is at the other side"),
            "{phase}: {said}"
        );
        assert!(there.remains().is_empty());
        guest.beats_on(2);
    }
    guest.swept();
    drop(last);
}

/// The command still asks the machine's service when Ctrl-C comes: there is nothing left to cancel, and nobody would know
/// where the machine is if the command just ended.
#[test]
fn ctrl_c_after_the_hand_over_does_not_cut_off_the_last_line() {
    let Some((here, there, mut guest)) = machine() else {
        return;
    };
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let service = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("tcp:{}", service.local_addr().unwrap());
    let words = ["--probe", &target, "--probe-for", "3s"];
    let crossing = begin(&here, "m", &receiver.address, &words);
    here.wait_until("its process is gone", || here.entry("m").is_none());
    signal(crossing.id(), Signal::INT);
    let ran = finish(crossing, PATIENCE).success();
    assert!(
        ran.stdout.contains("m is at ") && ran.stderr.contains("cancelling"),
        "{ran:?}"
    );
    guest.then(serial);
    guest.beats_on(2);
}

#[test]
fn a_deadline_does_what_was_asked_and_counts_from_the_beginning() {
    let Some((here, there, mut guest)) = pair("work=allocator memory=32M rate=4000", &["--memory", "128M"])
    else {
        return;
    };
    // It writes twice as much as may be copied: it never converges.
    let never = ["--bandwidth", "8MB", "--compress", "off", "--downtime", "1ms"];
    let cross = |more: &[&str], receiver: &Receiver| {
        let begun = Instant::now();
        let ran = migrate(&here, "m", &receiver.address, &[&never[..], more].concat());
        (ran, begun.elapsed())
    };
    let serial = there.file("late");
    let receiver = Receiver::start(&there, &serial, &[]);
    let (ran, took) = cross(&["--deadline", "2s"], &receiver);
    assert!(
        ran.code == 1
            && ran.stderr.contains("the deadline of 2")
            && ran.stderr.contains("the machine is here"),
        "{ran:?}"
    );
    assert!(took >= Duration::from_secs(2), "{took:?}");
    assert_eq!(receiver.end().0, 1);
    // A receiver that does not answer: the deadline has begun all the same, and ends the wait.
    let receiver = Receiver::start(&there, &serial, &[]);
    let relay = Relay::at(receiver.port(), Point::first("Offer"), Act::Hold, false);
    let begun = Instant::now();
    let ran = migrate(
        &here,
        "m",
        &relay.address,
        &["--deadline", "1s", "--stall", "50s"],
    );
    assert!(
        ran.code == 1 && ran.stderr.contains("the deadline of 1"),
        "{ran:?}"
    );
    assert!(begun.elapsed() < Duration::from_secs(30));
    drop((relay, receiver));
    guest.beats_on(2);
    // Goes on: it would never end, so it is cancelled.
    let receiver = Receiver::start(&there, &serial, &[]);
    let words = [&never[..], &["--deadline", "1s", "--on-deadline", "continue"]].concat();
    let mut crossing = begin(&here, "m", &receiver.address, &words);
    std::thread::sleep(Duration::from_secs(3));
    assert!(crossing.try_wait().unwrap().is_none(), "it ended at the deadline");
    signal(crossing.id(), Signal::TERM);
    let ran = finish(crossing, PATIENCE);
    assert!(
        ran.stderr.contains("was cancelled; the machine is here"),
        "{ran:?}"
    );
    assert_eq!(receiver.end().0, 1);
    // Pauses and copies the rest.
    let receiver = Receiver::start(&there, &serial, &[]);
    let (ran, took) = cross(&["--deadline", "1s", "--on-deadline", "pause"], &receiver);
    ran.success();
    assert!(took >= Duration::from_secs(1), "{took:?}");
    guest.then(serial);
    guest.swept();
}

#[test]
fn each_policy_does_what_it_says_on_a_link_that_is_too_slow() {
    let Some((here, there, mut guest)) = pair(
        "work=allocator memory=16M wws=90 rate=6000",
        &["--memory", "128M"],
    ) else {
        return;
    };
    for policy in ["max", "qemu", "cloud-hypervisor"] {
        let receiver = Receiver::start(&there, &there.file(policy), &[]);
        let relay = Relay::slow(receiver.port(), 4_000_000);
        let words = ["--policy", policy, "--compress", "off", "--deadline", "6s"];
        let ran = migrate(&here, "m", &relay.address, &words);
        // These never give up by themselves; the deadline ends them.
        assert!(
            ran.code == 1 && ran.stderr.contains("the deadline of 6"),
            "{policy}: {ran:?}"
        );
        guest.beats_on(2);
        assert_eq!(receiver.end().0, 1);
    }
    // This one ends by itself: it counts its rounds.
    let serial = there.file("xen");
    let receiver = Receiver::start(&there, &serial, &[]);
    let relay = Relay::slow(receiver.port(), 20_000_000);
    migrate(
        &here,
        "m",
        &relay.address,
        &["--policy", "xen-code", "--compress", "off"],
    )
    .success();
    guest.then(serial);
    guest.swept();
}

#[test]
fn a_link_that_stalls_is_given_up_in_time_and_one_that_comes_back_goes_on() {
    let Some((here, there, mut guest)) = machine() else {
        return;
    };
    for phase in ["Offer", "RoundEnd", "Loaded"] {
        let receiver = Receiver::start(&there, &there.file("stalled"), &["--reconnect", "1s"]);
        let relay = Relay::at(receiver.port(), Point::first(phase), Act::Stall, false);
        let begun = Instant::now();
        let words = ["--stall", "2s", "--reconnect", "1s", "--compress", "off"];
        let ran = migrate(&here, "m", &relay.address, &words);
        assert!(
            ran.code == 1 && ran.stderr.contains("the machine is here"),
            "{phase}: {ran:?}"
        );
        assert!(begun.elapsed() < Duration::from_secs(40), "{phase}: {ran:?}");
        guest.beats_on(2);
        drop((relay, receiver));
    }
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let relay = Relay::at(receiver.port(), Point::first("RoundEnd"), Act::Stall, false);
    let crossing = begin(
        &here,
        "m",
        &relay.address,
        &["--stall", "2s", "--compress", "off", "--verify"],
    );
    relay.wait_reached();
    std::thread::sleep(Duration::from_secs(4));
    relay.go_on();
    finish(crossing, PATIENCE).success();
    guest.then(serial);
    guest.swept();
}
