//! Which vCPU writes, and slowing only that one. The fears: the wrong one is slowed, or all are; and a count that has little
//! to do with what was written is believed.

use std::time::{Duration, Instant};

use ferry_vmm::kvm::ring::LEAST_ENTRIES;
use ferry_vmm::kvm::{Capabilities, fault_cost};

use crate::dirty::Watch;
use crate::harness::{Guest, config, number, skip, wait_until};
use crate::ring::no_rings;

/// A guest of four vCPUs that all compute, and of which only the first writes.
fn one_writes(dirty_ring: Option<u32>, rate: &str) -> Guest {
    let work =
        "work=spin+allocator memory=32M wws=90 order=random touch=head check=off writers=1 heartbeat=50ms";
    let mut config = config(4, &format!("{work} rate={rate}"));
    config.dirty_ring = dirty_ring;
    let mut guest = Guest::start(&config);
    guest.line(|line| line.contains(r#""t":"ready""#));
    guest
}

/// What the guest says of each vCPU's computing, one second after the other.
fn computed(guest: &mut Guest) -> [f64; 4] {
    let line = guest.line(|line| line.contains(r#""t":"sum""#));
    assert_eq!(number(&line, "damaged"), 0, "{line}");
    let list = line.split_once(r#""spins_by_cpu":["#).unwrap().1;
    let numbers = list.split_once(']').unwrap().0.split(',');
    let numbers: Vec<f64> = numbers.map(|text| text.parse().unwrap()).collect();
    numbers.try_into().unwrap()
}

/// What a count of the machine's grew by on each vCPU while this was done.
fn grown(
    guest: &Guest,
    count: impl Fn(&ferry_vmm::machine::VcpuCost) -> u64,
    during: impl FnOnce(),
) -> Vec<u64> {
    let counts = || -> Vec<u64> { guest.machine.costs().iter().map(&count).collect() };
    let before = counts();
    during();
    counts()
        .iter()
        .zip(before)
        .map(|(now, before)| now - before)
        .collect()
}

fn the_writer_is_found(guest: &Guest, count: impl Fn(&ferry_vmm::machine::VcpuCost) -> u64) {
    let watch = Watch::begin(guest);
    // The first round protects; what it finds may have been written before.
    watch.round(guest, || std::thread::sleep(Duration::from_millis(200)));
    let of_the_first = || count(&guest.machine.costs()[0]);
    for _ in 0..3 {
        let mut counts = Vec::new();
        let work = || {
            let enough = of_the_first() + 1500;
            wait_until("the guest writes", || of_the_first() >= enough);
        };
        let noted = watch.round(guest, || counts = grown(guest, &count, work)).noted() as u64;
        let all: u64 = counts.iter().sum();
        eprintln!("{noted} pages noted; counted of each vCPU: {counts:?}");
        assert!(noted > 500, "the guest wrote too little: {noted}");
        assert!(counts[0] * 10 > all * 8, "{counts:?}");
        assert!(all * 2 > noted && all < noted * 2, "{noted} noted, {counts:?}");
    }
    watch.end();
}

#[test]
fn rings_tell_which_cpu_writes() {
    if no_rings() {
        return;
    }
    // What is in a ring and was not harvested yet is not counted yet: that is little in a small one.
    let guest = one_writes(Some(LEAST_ENTRIES), "4000");
    the_writer_is_found(&guest, |cost| cost.tracked.ring.unwrap().pages);
}

#[test]
fn page_faults_tell_which_cpu_writes() {
    if skip() {
        return;
    }
    let guest = one_writes(None, "4000");
    if guest.machine.costs()[0].tracked.faults.is_none() {
        eprintln!("skipped: this host's KVM does not count page faults");
        return;
    }
    the_writer_is_found(&guest, |cost| cost.tracked.faults.unwrap());
}

/// Otherwise a report would say that what costs the guest most costs nothing, or ever so much.
#[test]
fn what_a_write_fault_costs_is_measured() {
    if skip() {
        return;
    }
    let kvm = ferry_vmm::kvm::open().unwrap();
    let caps = Capabilities::probe(&kvm).unwrap();
    for with_rings in [false, true] {
        if with_rings && caps.dirty_ring_bytes == 0 {
            continue;
        }
        let begun = Instant::now();
        let cost = fault_cost::measure(&kvm, &caps, with_rings).unwrap();
        eprintln!(
            "rings {with_rings}: {cost:?} for a write fault, measured in {:?}",
            begun.elapsed()
        );
        // Some processors note writes without any fault.
        let pml = std::fs::read_to_string("/sys/module/kvm_intel/parameters/pml");
        let needs_none = pml.is_ok_and(|pml| pml.starts_with('Y'));
        let bounds = Duration::from_nanos(100)..Duration::from_millis(5);
        assert!(cost.map_or(needs_none, |cost| bounds.contains(&cost)), "{cost:?}");
    }
}

#[test]
fn a_slowed_cpu_slows_no_other() {
    if skip() {
        return;
    }
    let mut guest = one_writes(None, "1000");
    // The share of the first vCPU in what all computed: as busy as this host is, it is as busy for all four. And it is
    // slowed so much that it has less than each of many others who want to run here.
    let share = |guest: &mut Guest| {
        computed(guest);
        let before = computed(guest);
        computed(guest);
        let after = computed(guest);
        let done: Vec<f64> = after
            .iter()
            .zip(before)
            .map(|(after, before)| after - before)
            .collect();
        eprintln!("{done:?}");
        let others = done[1..].iter().copied().fold(f64::MAX, f64::min);
        done[0] / others
    };
    let free = share(&mut guest);
    let napped: Vec<Duration> = guest.machine.costs().iter().map(|cost| cost.napped).collect();
    assert_eq!(napped, [Duration::ZERO; 4]);
    guest.machine.set_throttle(&[99]);
    let slowed = share(&mut guest);
    assert!(slowed * 2.0 < free, "{slowed} of the others, and {free} before");
    let napped: Vec<Duration> = guest.machine.costs().iter().map(|cost| cost.napped).collect();
    assert!(napped[0] > Duration::from_millis(500), "{napped:?}");
    assert_eq!(napped[1..], [Duration::ZERO; 3]);
    guest.machine.set_throttle(&[]);
    let again = share(&mut guest);
    assert!(
        again > slowed * 2.0,
        "the throttle was not let go: {again} after {slowed}"
    );
}
