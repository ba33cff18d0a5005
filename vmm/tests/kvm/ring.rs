//! Tracking by dirty rings instead of the log. The fears: a page changes and no ring has it, or a full ring loses what
//! did not fit; and a machine that was paused, pulsed or tracked before is tracked worse the next time.

use std::time::Duration;

use ferry_vmm::config::{MachineConfig, MemoryBacking};
use ferry_vmm::kvm::ring::{LEAST_ENTRIES, RingUse};

use crate::dirty::Watch;
use crate::harness::{Guest, config, number, skip, wait_until};

/// True when this host cannot do it and the test may say so.
pub(crate) fn no_rings() -> bool {
    if skip() {
        return true;
    }
    let caps = ferry_vmm::kvm::Capabilities::probe(&ferry_vmm::kvm::open().unwrap()).unwrap();
    if caps.dirty_ring_bytes == 0 {
        eprintln!("skipped: this host's KVM has no dirty ring");
    }
    caps.dirty_ring_bytes == 0
}

fn ringed(entries: u32, cpus: u32, cmdline: &str) -> MachineConfig {
    MachineConfig {
        dirty_ring: Some(entries),
        ..config(cpus, cmdline)
    }
}

fn sweeps(guest: &mut Guest) -> u64 {
    number(&guest.line(|line| line.contains(r#""t":"sum""#)), "sweeps")
}

/// Everything the guest keeps is checked twice from now on, and whole.
fn swept(guest: &mut Guest) {
    let before = sweeps(guest);
    while sweeps(guest) < before + 2 {}
}

#[test]
fn every_page_that_changes_is_in_a_ring_and_quiet_pages_are_not() {
    if no_rings() {
        return;
    }
    for (backing, entries) in [
        (MemoryBacking::Anonymous, 65_536),
        (MemoryBacking::Memfd, LEAST_ENTRIES),
    ] {
        let config = MachineConfig {
            memory_backing: backing,
            ..ringed(
                entries,
                2,
                "work=allocator memory=16M wws=25 rate=3000 order=random heartbeat=20ms",
            )
        };
        let mut guest = Guest::start(&config);
        guest.line(|line| line.contains(r#""t":"ready""#));
        // Again after it was switched off, and after a pulse: a new VM with new rings.
        for time in 0..3 {
            let watch = Watch::begin(&guest);
            let refused = guest.machine.pulse().unwrap_err().to_string();
            assert!(refused.contains("crossing"), "{refused}");
            for _ in 0..2 {
                let seen = watch.round(&guest, || std::thread::sleep(Duration::from_millis(200)));
                let changed = seen.changed.len();
                assert!(changed > 10, "the guest did nothing: {changed} pages changed");
                assert!(
                    seen.noted() < 10 * changed + 200,
                    "time {time}: {} pages noted, {changed} changed",
                    seen.noted()
                );
            }
            watch.end();
            guest.beat();
            if time > 0 {
                guest.machine.pulse().unwrap();
            }
            guest.beat();
        }
        swept(&mut guest);
    }
}

#[test]
fn full_rings_of_four_cpus_lose_nothing() {
    if no_rings() {
        return;
    }
    let mut guest = Guest::start(&ringed(
        LEAST_ENTRIES,
        4,
        "work=allocator memory=32M wws=90 rate=max order=random touch=head heartbeat=20ms",
    ));
    guest.line(|line| line.contains(r#""t":"ready""#));
    let watch = Watch::begin(&guest);
    for _ in 0..3 {
        // Nobody surveys meanwhile: only the full rings empty themselves.
        let seen = watch.round(&guest, || {
            let full = || {
                guest
                    .machine
                    .costs()
                    .into_iter()
                    .map(|cost| cost.tracked.ring.unwrap().full)
            };
            let before: Vec<u64> = full().collect();
            wait_until("each ring is full again and again", || {
                full().zip(&before).all(|(now, before)| now >= before + 8)
            });
        });
        assert!(
            seen.changed.len() > 4 * LEAST_ENTRIES as usize,
            "the guest wrote too little"
        );
    }
    // Signals that stop the CPUs meet threads that are at emptying a ring.
    for _ in 0..20 {
        watch.round(&guest, || std::thread::sleep(Duration::from_millis(15)));
    }
    watch.end();
    let costs = guest.machine.costs();
    eprintln!("{costs:?}");
    assert_eq!(costs.len(), 4);
    for cost in costs {
        let RingUse { pages, full, waited } = cost.tracked.ring.unwrap();
        assert!(
            full > 0 && pages > u64::from(LEAST_ENTRIES) && waited > Duration::ZERO,
            "a ring was never full"
        );
    }
    swept(&mut guest);
}
