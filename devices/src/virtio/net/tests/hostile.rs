//! Guests and hosts that break the rules: nothing panics, nothing outside guest memory is touched.

use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Driver, uninterrupted, wait_until};
use super::sockets::{CONTROL, MERGEABLE, Setup, frame, setup};
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::HEADER_BYTES;

#[test]
fn frames_of_impossible_lengths_are_dropped_and_the_next_passes() {
    let Setup {
        device,
        hosts,
        mut driver,
        ..
    } = setup(1, MERGEABLE);
    driver.give_buffers(0, 100, 2048);
    let impossible = [0usize, 1, 5, 11, 12, 25, 70_000, 66_000];
    for len in impossible {
        hosts[0].send(&vec![0x55; len]).unwrap();
    }
    hosts[0].send(&frame(64, 1)).unwrap();
    assert_eq!(
        driver.wait_for_frame(0)[HEADER_BYTES..],
        frame(64, 1)[HEADER_BYTES..]
    );
    let handle = device.handle();
    assert_eq!(handle.stats().totals.received_dropped, impossible.len() as u64);

    for len in impossible {
        driver.send(1, &vec![0x55; len], &[]);
    }
    driver.send(1, &frame(64, 2), &[]);
    driver.wait_until_used(1, impossible.len() + 1);
    let mut buffer = vec![0; 100_000];
    let len = uninterrupted(|| hosts[0].recv(&mut buffer)).unwrap();
    assert_eq!(buffer[..len], frame(64, 2));
    assert_eq!(handle.stats().totals.sent_dropped, impossible.len() as u64);
    assert_eq!(driver.interrupts.needs_reset.load(Ordering::SeqCst), 0);
}

/// What each kind of broken ring does: the device asks for a reset, once, and gives its queues back.
#[test]
fn broken_rings_need_a_reset() {
    type Damage = fn(&mut Driver, usize);
    let outside: Damage = |driver, queue| {
        driver.offer(queue, &[(0xffff_ffff_ffff_fff0, 64, queue == 0)]);
    };
    let past_the_end: Damage = |driver, queue| {
        driver.offer(queue, &[(super::driver::RAM_BYTES as u64 - 10, 64, queue == 0)]);
    };
    let jumping_index: Damage = |driver, queue| {
        let at = driver.rings[queue].avail_ring() + 2;
        driver.ram.write_obj(9_999u16, GuestAddress(at)).unwrap();
    };
    let no_buffer: Damage = |driver, queue| {
        // A receive chain with nothing writable; a chain whose head is no descriptor.
        if queue == 0 {
            driver.offer(queue, &[(0x40_0000, 64, false)]);
        } else {
            let at = driver.rings[queue].avail_ring();
            driver.ram.write_obj(60_000u16, GuestAddress(at + 4)).unwrap();
            driver.ram.write_obj(1u16, GuestAddress(at + 2)).unwrap();
        }
    };
    for (name, damage) in [
        ("outside", outside),
        ("past the end", past_the_end),
        ("index", jumping_index),
        ("no buffer", no_buffer),
    ] {
        for queue in [0, 1] {
            let Setup {
                mut device,
                hosts,
                mut driver,
                ..
            } = setup(1, MERGEABLE);
            damage(&mut driver, queue);
            driver.kick(queue);
            hosts[0].send(&frame(64, 1)).unwrap();
            wait_until(name, || driver.interrupts.needs_reset.load(Ordering::SeqCst) == 1);
            driver.kick(queue);
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(
                driver.interrupts.needs_reset.load(Ordering::SeqCst),
                1,
                "{name} {queue}"
            );
            assert_eq!(device.stop().len(), 3, "{name} {queue}");
            device.reset();

            // A new driver works.
            let mut fresh = Driver::new(&device.queue_sizes(), MERGEABLE);
            let queues = fresh.queues();
            fresh.start(&mut device, queues);
            fresh.give_buffers(0, 4, 2048);
            hosts[0].send(&frame(64, 9)).unwrap();
            wait_until("the new driver's frame", || fresh.received(0).is_some());
        }
    }
}

/// A loop of descriptors is as long as the queue, no longer.
#[test]
fn a_chain_that_loops_ends() {
    for queue in [0, 1] {
        let Setup {
            mut device,
            hosts,
            driver,
            ..
        } = setup(1, MERGEABLE);
        let table = driver.rings[queue].table();
        let flags: u16 = if queue == 0 { 3 } else { 1 };
        driver.ram.write_obj(0x40_0000u64, GuestAddress(table)).unwrap();
        driver.ram.write_obj(8u32, GuestAddress(table + 8)).unwrap();
        driver.ram.write_obj(flags, GuestAddress(table + 12)).unwrap();
        driver.ram.write_obj(0u16, GuestAddress(table + 14)).unwrap();
        let avail = driver.rings[queue].avail_ring();
        driver.ram.write_obj(1u16, GuestAddress(avail + 2)).unwrap();
        driver.kick(queue);
        hosts[0].send(&frame(64, 1)).unwrap();
        wait_until("an end", || {
            driver.used_index(queue) > 0 || driver.interrupts.needs_reset.load(Ordering::SeqCst) > 0
        });
        device.stop();
    }
}

/// Small numbers hit structures; large ones miss them.
fn word() -> impl Strategy<Value = u16> {
    prop_oneof![0u16..8, any::<u16>()]
}

fn descriptor() -> impl Strategy<Value = [u8; 16]> {
    let address = prop_oneof![
        0u64..0x100_0000,
        Just(0x40_0000u64),
        Just(super::driver::RAM_BYTES as u64 - 8),
        any::<u64>()
    ];
    let len = prop_oneof![0u32..64, 1000u32..3000, Just(70_000u32), any::<u32>()];
    (address, len, 0u16..8, word()).prop_map(|(address, len, flags, next)| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    /// Rings full of garbage in all three queues, with traffic from the host meanwhile.
    #[test]
    fn garbage_in_the_rings_does_no_harm(
        tables in proptest::collection::vec(proptest::collection::vec(descriptor(), 16), 3),
        heads in proptest::collection::vec(proptest::collection::vec(word(), 16), 3),
        counts in proptest::collection::vec(prop_oneof![0u16..17, word()], 3),
        event_idx in any::<bool>(),
        mergeable in any::<bool>(),
    ) {
        let features = CONTROL & !(1 << 22)
            | if event_idx { 1 << 29 } else { 0 }
            | if mergeable { MERGEABLE } else { 0 };
        let Setup { mut device, hosts, driver, .. } = setup(1, features);
        hosts[0].set_nonblocking(true).unwrap();
        for queue in 0..3usize {
            let ring = &driver.rings[queue];
            for (index, descriptor) in tables[queue].iter().enumerate() {
                driver.ram.write_slice(descriptor, GuestAddress(ring.table() + 16 * index as u64)).unwrap();
            }
            for (index, head) in heads[queue].iter().enumerate() {
                driver.ram.write_obj(*head, GuestAddress(ring.avail_ring() + 4 + 2 * index as u64)).unwrap();
            }
            driver.ram.store(counts[queue], GuestAddress(ring.avail_ring() + 2), Ordering::SeqCst).unwrap();
            driver.kick(queue);
        }
        for len in [64usize, 1500, 9_000] {
            let _ = hosts[0].send(&frame(len, 1));
        }
        std::thread::sleep(Duration::from_millis(3));
        // A thread that had died would not give its queues back.
        prop_assert_eq!(device.stop().len(), 3);
    }
}
