//! Booting the built-in guest, and how it ends.

use std::time::Duration;

use ferry_vmm::lifecycle::State;

use crate::harness::{Guest, config, number, skip};

#[test]
fn the_guest_boots_and_beats_on_1_2_and_4_cpus() {
    if skip() {
        return;
    }
    for cpus in [1, 2, 4] {
        let begun = std::time::Instant::now();
        let mut guest = Guest::start(&config(cpus, "work=idle heartbeat=20ms"));
        let first = guest.beat();
        eprintln!("{cpus} CPUs: first heartbeat after {:?}", begun.elapsed());
        for _ in 0..5 {
            guest.beat();
        }
        assert_eq!(guest.beat(), first + 6, "a heartbeat was lost");
    }
}

/// A host that is busy keeps vCPUs waiting, here for most of a second each: a guest must not begin without them.
#[test]
fn the_guest_waits_for_cpus_that_come_late() {
    if skip() {
        return;
    }
    // A machine that is fast enough has them before their first wait.
    for _ in 0..3 {
        let mut guest = Guest::create(&config(4, "work=idle heartbeat=20ms"));
        guest.machine.set_throttle(&[0, 99, 99, 99]);
        guest.machine.start().unwrap();
        let hello = guest.line(|line| line.contains(r#""t":"hello""#));
        assert_eq!(number(&hello, "cpus"), 4, "{hello}");
    }
}

#[test]
fn pause_stops_every_cpu_quickly_and_resume_goes_on() {
    if skip() {
        return;
    }
    for work in ["idle", "spin"] {
        let mut guest = Guest::start(&config(4, &format!("work={work} heartbeat=20ms")));
        guest.beat();
        let mut pauses: Vec<Duration> = Vec::new();
        for _ in 0..50 {
            pauses.push(guest.machine.pause().unwrap());
            assert_eq!(guest.machine.state(), State::Paused);
            guest.machine.resume().unwrap();
            guest.beat();
        }
        pauses.sort();
        let (median, worst) = (pauses[pauses.len() / 2], pauses[pauses.len() - 1]);
        eprintln!("pausing 4 CPUs ({work}): median {median:?}, worst {worst:?}");
        // A vCPU that missed the signal is sent another one after 100 ms.
        assert!(median < Duration::from_millis(100), "median {median:?}");
        guest.machine.pause().unwrap();
        guest.is_silent();
        assert!(
            guest
                .machine
                .pause()
                .unwrap_err()
                .to_string()
                .contains("it is paused")
        );
    }
}
