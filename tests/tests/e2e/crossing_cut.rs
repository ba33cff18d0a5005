//! The link is cut at every message, in both directions: afterwards exactly one machine runs, or both stand still and
//! say so and `ferry resolve` settles it by the other side's word; nothing is damaged, and the next try works.

use ferry_tests::crossing::{Evidence, Receiver, migrate, pair, runs_at, start, state_at};
use ferry_tests::host::{Host, Ran, skip_without_kvm};
use ferry_tests::proxy::Proxy;
use ferry_tests::relay::{Act, Point, Relay};

const WORK: &str = "work=allocator memory=4M rate=500";
const ONCE: [&str; 5] = ["--reconnect", "0s", "--compress", "off", "--verify"];

/// Every message of a crossing of such a machine, in order.
fn messages() -> Vec<Point> {
    let (here, there) = (Host::new(), Host::new());
    let mut guest = start(&here, "m", WORK, &["--memory", "64M"]);
    guest.wait_for_line("ready");
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let relay = Relay::new(receiver.port());
    migrate(&here, "m", &relay.address, &ONCE).success();
    guest.then(serial);
    guest.beats_on(2);
    relay.messages()
}

/// Two hosts and a machine that is at the first.
struct Pair<'a> {
    from: &'a Host,
    to: &'a Host,
    guest: Evidence,
    tries: usize,
}

impl Pair<'_> {
    /// It left: what is left of it there goes by itself.
    fn moved(&mut self, serial: std::path::PathBuf) {
        let from = self.from;
        from.wait_until("nothing is left where it was", || from.entry("m").is_none());
        self.guest.then(serial);
        (self.from, self.to) = (self.to, self.from);
    }

    #[track_caller]
    fn cross_cut_at(&mut self, point: &Point, act: Act) {
        let (from, to) = (self.from, self.to);
        self.tries += 1;
        let serial = to.file(&format!("serial{}", self.tries));
        let receiver = Receiver::start(to, &serial, &["--reconnect", "1s"]);
        let relay = Relay::at(receiver.port(), point.clone(), act, true);
        let ran = migrate(from, "m", &relay.address, &ONCE);
        let word = format!("{act:?} {point:?}: {ran:?} {}", receiver.said());
        let (here_runs, there_runs) = (runs_at(from, "m"), runs_at(to, "m"));
        assert!(!(here_runs && there_runs), "it runs twice: {word}");
        if ran.code == 0 {
            assert!(there_runs, "{word}");
            std::mem::forget(receiver);
            self.moved(serial);
        } else if ran.stderr.contains("ferry resolve") {
            self.settle(&ran, receiver, serial);
        } else {
            assert!(here_runs && ran.stderr.contains("the machine is here"), "{word}");
            // It ends by itself when nobody comes back, and leaves nothing.
            if receiver.said().lines().count() > 1 || relay.messages().len() > 5 {
                let (code, said) = receiver.end();
                assert_eq!(code, 1, "{said}");
            }
            to.wait_until("nothing is left there", || to.remains().is_empty());
        }
        self.guest.beats_on(2);
    }

    /// Nobody knows: it stands still here, whatever is asked of it, until the other side is asked.
    #[track_caller]
    fn settle(&mut self, ran: &Ran, receiver: Receiver, serial: std::path::PathBuf) {
        let (from, to) = (self.from, self.to);
        assert_eq!(state_at(from, "m").as_deref(), Some("paused"), "{ran:?}");
        let refused = from.ferry(["resume", "m"]);
        assert!(
            refused.code == 1 && refused.stderr.contains("ferry resolve"),
            "{refused:?}"
        );
        // Where it went, nobody answers any more.
        let unknown = from.ferry(["resolve", "m"]);
        assert!(
            unknown.code == 1 && unknown.stderr.contains("nobody knows where m is"),
            "{unknown:?}"
        );
        assert_eq!(state_at(from, "m").as_deref(), Some("paused"));
        if runs_at(to, "m") {
            // The process that took it answers; the user's word does not count against it.
            let found = from.ferry(["resolve", "m", "--here", "--ask", &receiver.address]);
            assert!(
                found.code == 1 && found.stderr.contains("m is at the other side, whatever you say"),
                "{found:?}"
            );
            std::mem::forget(receiver);
            self.moved(serial);
        } else {
            // It gave the machine up; any receiver there knows that.
            assert_eq!(receiver.end().0, 1);
            let other = Receiver::start(to, &to.file("nothing"), &[]);
            let found = from.ferry(["resolve", "m", "--ask", &other.address]).success();
            assert!(found.stdout.contains("m is running here"), "{found:?}");
        }
    }
}

#[test]
fn a_cut_at_any_message_leaves_exactly_one_machine_and_the_next_try_works() {
    if skip_without_kvm() {
        return;
    }
    let all = std::env::var_os("FERRY_CUTS").is_some();
    let points = messages();
    let has = |name: &str| points.iter().any(|point| point.message == name);
    assert!(
        has("Hello") && has("Verify") && has("Go") && has("Finish"),
        "{points:?}"
    );
    let (here, there) = (Host::new(), Host::new());
    let guest = start(&here, "m", WORK, &["--memory", "64M"]);
    guest.wait_for_line("ready");
    let mut pair = Pair {
        from: &here,
        to: &there,
        guest,
        tries: 0,
    };
    for point in &points {
        pair.cross_cut_at(point, Act::CutBefore);
        // "After" one message is mostly "before" the next.
        if all || ["Load", "Loaded", "Go", "Awake", "Finish"].contains(&point.message.as_str()) {
            pair.cross_cut_at(point, Act::CutAfter);
        }
    }
    pair.guest.swept();
}

#[test]
fn a_broken_link_that_comes_back_carries_the_crossing_to_its_end() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let (mut from, mut to) = (&here, &there);
    let mut guest = start(&here, "m", WORK, &["--memory", "64M"]);
    guest.wait_for_line("ready");
    let mut number = 0;
    let mut cross = |cut: &dyn Fn(u16) -> (String, Box<dyn Fn() -> bool>)| {
        number += 1;
        let serial = to.file(&format!("serial{number}"));
        let receiver = Receiver::start(to, &serial, &[]);
        let (address, was_cut) = cut(receiver.port());
        let ran = migrate(from, "m", &address, &["--compress", "off", "--verify"]).success();
        assert!(was_cut(), "nothing was cut: {ran:?}");
        guest.then(serial);
        guest.swept();
        std::mem::forget(receiver);
        from.wait_until("nothing is left where it was", || from.entry("m").is_none());
        (from, to) = (to, from);
        ran
    };
    // In the middle of the data.
    for point in [500_000, 2_000_000] {
        let ran = cross(&|port| {
            let proxy = Proxy::cut_after(port, point, false);
            (proxy.address.clone(), Box::new(move || proxy.was_cut()))
        });
        assert!(ran.stderr.contains("connecting again"), "{ran:?}");
    }
    // In the switch, and at the hand over.
    for name in ["Prepared", "Load", "Loaded", "Go", "Awake"] {
        for act in [Act::CutBefore, Act::CutAfter] {
            if act == Act::CutAfter && name != "Go" {
                continue;
            }
            cross(&|port| {
                let relay = Relay::at(port, Point::first(name), act, false);
                (relay.address.clone(), Box::new(move || relay.reached()))
            });
        }
    }
}

/// The link is cut when it runs there and nobody has heard that here; then it is sent back.
#[test]
fn a_machine_comes_back_to_the_host_that_never_heard_that_it_had_left() {
    let Some((here, there, mut guest)) = pair(WORK, &["--memory", "64M"]) else {
        return;
    };
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let relay = Relay::at(receiver.port(), Point::first("Awake"), Act::CutBefore, true);
    let ran = migrate(&here, "m", &relay.address, &ONCE);
    assert!(ran.code == 1 && ran.stderr.contains("ferry resolve"), "{ran:?}");
    assert_eq!(state_at(&here, "m").as_deref(), Some("paused"));
    let copy = here.entry("m").unwrap().pid;
    guest.then(serial);
    guest.beats_on(2);
    // A question changes nothing: the doubt stays.
    let serial = here.file("back.serial");
    let back = Receiver::start(&here, &serial, &[]);
    let asked = migrate(&there, "m", &back.address, &["--dry-run"]).success();
    assert!(asked.stdout.contains("would take m"), "{asked:?}");
    assert_eq!(here.entry("m").unwrap().pid, copy);
    assert!(
        here.ferry(["resolve"])
            .success()
            .stdout
            .contains("nobody confirmed")
    );
    // It comes; the copy that stood still here has made room for it and is never set going again.
    migrate(&there, "m", &back.address, &["--verify"]).success();
    guest.then(serial);
    assert!(runs_at(&here, "m"));
    assert_ne!(here.entry("m").unwrap().pid, copy);
    guest.swept();
    let known = here.ferry(["resolve"]).success().stdout;
    assert!(!known.contains("nobody confirmed"), "{known}");
    // And it leaves again.
    there.wait_until("nothing is left there", || there.entry("m").is_none());
    let serial = there.file("again.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    migrate(&here, "m", &receiver.address, &[]).success();
    guest.then(serial);
    guest.swept();
}

/// The same, and it has been at a third host in between.
#[test]
fn a_machine_comes_back_to_a_host_in_doubt_by_way_of_a_third_one() {
    let Some((here, there, mut guest)) = pair(WORK, &["--memory", "64M"]) else {
        return;
    };
    let third = Host::new();
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    let relay = Relay::at(receiver.port(), Point::first("Awake"), Act::CutBefore, true);
    let ran = migrate(&here, "m", &relay.address, &ONCE);
    assert!(ran.code == 1 && ran.stderr.contains("ferry resolve"), "{ran:?}");
    let copy = here.entry("m").unwrap().pid;
    guest.then(serial);
    guest.beats_on(2);
    let serial = third.file("third.serial");
    let on = Receiver::start(&third, &serial, &[]);
    migrate(&there, "m", &on.address, &["--verify"]).success();
    guest.then(serial);
    guest.beats_on(2);
    assert_eq!(here.entry("m").unwrap().pid, copy);
    let serial = here.file("back.serial");
    let back = Receiver::start(&here, &serial, &[]);
    migrate(&third, "m", &back.address, &["--verify"]).success();
    guest.then(serial);
    assert!(runs_at(&here, "m"));
    assert_ne!(here.entry("m").unwrap().pid, copy);
    guest.swept();
    let known = here.ferry(["resolve"]).success().stdout;
    assert!(!known.contains("nobody confirmed"), "{known}");
}
