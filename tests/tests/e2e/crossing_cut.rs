//! The link breaks and comes back, the receiver is killed, the crossing is cancelled: nothing is damaged and the next
//! try works.

use std::time::{Duration, Instant};

use ferry_tests::crossing::{Receiver, begin, migrate, start};
use ferry_tests::host::{Host, PATIENCE, finish, skip_without_kvm};
use ferry_tests::proxy::Proxy;

const WORK: &str = "work=allocator memory=4M rate=500";

#[test]
fn a_broken_link_that_comes_back_carries_the_crossing_to_its_end() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let (mut from, mut to) = (&here, &there);
    let mut guest = start(&here, "m", WORK, &["--memory", "64M"]);
    guest.wait_for_line("ready");
    for (number, point) in [5000, 500_000, 2_000_000, 4_000_000].into_iter().enumerate() {
        let serial = to.file(&format!("serial{number}"));
        let receiver = Receiver::start(to, &serial, &[]);
        let proxy = Proxy::cut_after(receiver.port(), point, false);
        let ran = migrate(from, "m", &proxy.address, &["--compress", "off", "--verify"]);
        assert!(proxy.was_cut(), "nothing was cut at {point}");
        let ran = ran.success();
        assert!(ran.stderr.contains("connecting again"), "{ran:?}");
        guest.then(serial);
        guest.swept();
        std::mem::forget(receiver);
        (from, to) = (to, from);
    }
}

#[test]
fn a_killed_receiver_costs_nothing_and_a_cancelled_crossing_leaves_the_machine() {
    if skip_without_kvm() {
        return;
    }
    let (here, there) = (Host::new(), Host::new());
    let mut guest = start(
        &here,
        "m",
        "work=allocator memory=32M rate=1000",
        &["--memory", "128M"],
    );
    guest.wait_for_line("ready");
    let slow = ["--bandwidth", "8MB", "--compress", "off", "--reconnect", "0s"];
    for (number, wait) in [50, 300, 700].into_iter().enumerate() {
        let serial = there.file(&format!("killed{number}"));
        let mut receiver = Receiver::start(&there, &serial, &[]);
        let crossing = begin(&here, "m", &receiver.address, &slow);
        std::thread::sleep(Duration::from_millis(wait));
        // While it crosses, it cannot cross a second time.
        if number == 1 {
            let second = migrate(&here, "m", &receiver.address, &[]);
            assert!(
                second.code == 1 && second.stderr.contains("crossing already"),
                "{second:?}"
            );
        }
        receiver.kill();
        let ran = finish(crossing, PATIENCE);
        assert!(
            ran.code == 1 && ran.stderr.contains("the machine is here"),
            "{ran:?}"
        );
        guest.beats_on(2);
    }
    for (number, wait) in [100, 600].into_iter().enumerate() {
        let serial = there.file(&format!("cancelled{number}"));
        let receiver = Receiver::start(&there, &serial, &[]);
        let crossing = begin(&here, "m", &receiver.address, &slow);
        std::thread::sleep(Duration::from_millis(wait));
        let begun = Instant::now();
        here.ferry(["migrate", "--cancel", "m"]).success();
        let ran = finish(crossing, PATIENCE);
        assert!(
            ran.code == 1 && ran.stderr.contains("the machine is here"),
            "{ran:?}"
        );
        assert!(begun.elapsed() < Duration::from_secs(5), "{ran:?}");
        let (code, said) = receiver.end();
        assert!(
            code == 1 && said.contains("the machine is at the other side"),
            "{said}"
        );
        guest.beats_on(2);
    }
    let serial = there.file("there.serial");
    let receiver = Receiver::start(&there, &serial, &[]);
    migrate(&here, "m", &receiver.address, &[]).success();
    guest.then(serial);
    guest.swept();
}
