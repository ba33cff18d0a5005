//! Frames in both directions: whole, once, in order, whatever buffers there are and whenever the machine stops.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::time::Duration;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Driver, RAM_BYTES, wait_until};
use super::sockets::{
    CONTROL, LARGE, MERGEABLE, Setup, Sockets, body, config, device, frame, host_receives, setup,
};
use crate::ram::{PAGE_SIZE, take_dirty};
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{HEADER_BYTES, Net, NetLimits};

#[test]
fn frames_pass_in_both_directions_unchanged() {
    let Setup {
        device,
        hosts,
        mut driver,
        ..
    } = setup(1, MERGEABLE);
    driver.give_buffers(0, 200, 2048);
    for i in 0..600u32 {
        let len = 14 + (i as usize * 37) % 1500;
        let sent = frame(len, i);
        hosts[0].send(&sent).unwrap();
        let got = driver.wait_for_frame(0);
        assert_eq!(body(&got), body(&sent), "frame {i} into the guest");
        driver.give_buffers(0, 1, 2048);

        let answer = frame(len, i + 1_000_000);
        driver.send(1, &answer, &[HEADER_BYTES, 7, 100][..i as usize % 4]);
        assert_eq!(host_receives(&hosts[0]), answer, "frame {i} out of the guest");
        driver.wait_until_used(1, 1);
    }
    let stats = device.handle().stats();
    assert_eq!(
        (stats.totals.received_packets, stats.totals.sent_packets),
        (600, 600)
    );
    assert_eq!(stats.totals.received_bytes, stats.totals.sent_bytes);
    assert!(driver.interrupts.queues[0].load(Ordering::SeqCst) > 0);
}

#[test]
fn a_large_frame_fills_many_buffers_that_appear_at_once() {
    for features in [
        MERGEABLE,
        MERGEABLE | LARGE,
        MERGEABLE | 1 << VIRTIO_RING_F_EVENT_IDX,
    ] {
        let Setup {
            device: _device,
            hosts,
            mut driver,
            ..
        } = setup(1, features);
        for (round, len) in [60_000usize, 1_500, 65_549, 14, 30_000, 1_521, 1_522]
            .into_iter()
            .enumerate()
        {
            // Odd sizes, and first buffers that cannot even hold the header.
            let needed = (len + HEADER_BYTES - 10).div_ceil(1_537);
            driver.give_buffers(0, 2, 5);
            driver.give_buffers(0, needed, 1_537);
            let sent = frame(len, round as u32);
            hosts[0].send(&sent).unwrap();
            assert_eq!(body(&driver.only_frame(0)), body(&sent));
        }
    }
}

#[test]
fn without_mergeable_buffers_a_frame_fits_one_chain_or_is_dropped() {
    let Setup {
        device,
        hosts,
        mut driver,
        ..
    } = setup(1, 0);
    driver.give_buffers(0, 4, 1600);
    let (small, large) = (frame(1500, 1), frame(1700, 2));
    hosts[0].send(&large).unwrap();
    hosts[0].send(&small).unwrap();
    let got = driver.wait_for_frame(0);
    assert_eq!(body(&got), body(&small));
    assert_eq!(&got[10..12], &[1, 0], "virtio 1 wants one buffer counted");
    assert_eq!(device.handle().stats().totals.received_dropped, 1);
}

/// CPU time that the threads of this name have used so far.
fn thread_time(name: &str) -> Duration {
    let mut ticks = 0u64;
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let stat = std::fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        if let Some((head, tail)) = stat.rsplit_once(')')
            && head.ends_with(name)
        {
            ticks += tail
                .split_whitespace()
                .skip(11)
                .take(2)
                .map(|t| t.parse::<u64>().unwrap())
                .sum::<u64>();
        }
    }
    Duration::from_millis(ticks * 10)
}

#[test]
fn a_guest_without_buffers_is_waited_for_and_loses_nothing() {
    let (mut device, hosts, _) = {
        let mut config = config(NetLimits::default());
        config.name = "hungry".into();
        let (host, our) = UnixDatagram::pair().unwrap();
        our.set_nonblocking(true).unwrap();
        let backend = Sockets {
            ours: vec![our.into()],
            told: std::sync::Arc::default(),
        };
        (Net::new(config, Box::new(backend)).unwrap(), vec![host], ())
    };
    let mut driver = Driver::new(&device.queue_sizes(), MERGEABLE);
    let queues = driver.queues();
    driver.start(&mut device, queues);
    for i in 0..10 {
        hosts[0].send(&frame(100, i)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    let before = thread_time("hungry-0");
    std::thread::sleep(Duration::from_millis(400));
    let used = thread_time("hungry-0") - before;
    assert!(used < Duration::from_millis(100), "a busy loop used {used:?}");
    for i in 0..10 {
        driver.give_buffers(0, 1, 2048);
        assert_eq!(body(&driver.wait_for_frame(0)), body(&frame(100, i)));
    }
}

/// The frame was taken from the host and there is room for only a part of it: it must cross with the machine.
#[test]
fn a_frame_that_waits_for_room_survives_save_and_restore() {
    let Setup {
        mut device,
        hosts,
        mut driver,
        ..
    } = setup(1, MERGEABLE);
    driver.give_buffers(0, 2, 1000);
    let large = frame(9_000, 42);
    hosts[0].send(&large).unwrap();
    // Until the frame was taken, and is a part of the state.
    let (mut queues, mut state) = (device.stop(), device.save().unwrap());
    wait_until("the frame is taken", || {
        if state.body.len() > large.len() {
            return true;
        }
        driver.start(&mut device, std::mem::take(&mut queues));
        std::thread::sleep(Duration::from_millis(5));
        (queues, state) = (device.stop(), device.save().unwrap());
        false
    });
    let (_, receive_queue) = queues.iter().find(|(index, _)| *index == 0).unwrap();
    assert_eq!(receive_queue.next_avail(), 0, "unused buffers are put back");
    drop(device);
    drop(hosts);

    let (mut device, hosts, _) = self::device(1, NetLimits::default());
    device.restore(&state).unwrap();
    assert_eq!(device.save().unwrap(), state, "saved again, it is the same");
    driver.start(&mut device, queues);
    driver.give_buffers(0, 10, 1000);
    assert_eq!(body(&driver.wait_for_frame(0)), body(&large));
    // And what comes after it goes on in order.
    hosts[0].send(&frame(64, 1)).unwrap();
    assert_eq!(body(&driver.wait_for_frame(0)), body(&frame(64, 1)));
}

#[test]
fn a_frame_larger_than_all_buffers_does_not_block_the_next() {
    let (mut device, hosts, _) = device(1, NetLimits::default());
    let sizes = vec![4, 4, 4];
    let mut driver = Driver::new(&sizes, MERGEABLE);
    let queues = driver.queues();
    driver.start(&mut device, queues);
    driver.give_buffers(0, 4, 1000);
    hosts[0].send(&frame(9_000, 1)).unwrap();
    hosts[0].send(&frame(900, 2)).unwrap();
    assert_eq!(body(&driver.wait_for_frame(0)), body(&frame(900, 2)));
    assert_eq!(device.handle().stats().totals.received_dropped, 1);
}

#[test]
fn pausing_in_the_middle_of_traffic_loses_and_repeats_nothing() {
    let Setup {
        mut device,
        hosts,
        mut driver,
        ..
    } = setup(1, MERGEABLE | LARGE | 1 << VIRTIO_RING_F_EVENT_IDX);
    driver.give_buffers(0, 128, 2048);
    let sender = {
        let host = hosts[0].try_clone().unwrap();
        std::thread::spawn(move || {
            for i in 0..2000u32 {
                // The main thread makes the socket non-blocking, for both.
                while host.send(&frame(200, i)).is_err() {
                    std::thread::yield_now();
                }
            }
        })
    };
    let mut sent_by_guest = 0u32;
    let mut got_by_host = 0u32;
    hosts[0].set_nonblocking(true).unwrap();
    for i in 0..2000u32 {
        let got = driver.wait_for_frame(0);
        assert_eq!(body(&got), body(&frame(200, i)), "frame {i}");
        driver.give_buffers(0, 1, 2048);
        if i % 4 == 0 {
            driver.send(1, &frame(60, 7_000 + sent_by_guest), &[HEADER_BYTES]);
            sent_by_guest += 1;
        }
        if i % 50 == 25 {
            let queues = device.stop();
            let state = device.save().unwrap();
            device.restore(&state).unwrap();
            driver.start(&mut device, queues);
        }
        let mut buffer = [0u8; 200];
        while let Ok(len) = hosts[0].recv(&mut buffer) {
            assert_eq!(&buffer[..len], frame(60, 7_000 + got_by_host));
            got_by_host += 1;
        }
    }
    sender.join().unwrap();
    hosts[0].set_nonblocking(false).unwrap();
    while got_by_host < sent_by_guest {
        assert_eq!(host_receives(&hosts[0]), frame(60, 7_000 + got_by_host));
        got_by_host += 1;
    }
}

/// The socket takes some 200 KB and then no more until it is read.
#[test]
fn a_host_that_is_busy_gets_every_frame_later_and_once() {
    let Setup {
        mut device,
        hosts,
        mut driver,
        ..
    } = setup(1, MERGEABLE);
    for i in 0..200 {
        driver.send(1, &frame(9_000, i), &[]);
    }
    wait_until("the first frames", || driver.used_index(1) > 0);
    std::thread::sleep(Duration::from_millis(50));
    let queues = device.stop();
    let passed = driver.used_index(1);
    assert!(passed < 200, "the host was not busy");
    let (_, send_queue) = queues.iter().find(|(index, _)| *index == 1).unwrap();
    assert_eq!(send_queue.next_avail(), passed, "what was not sent is put back");
    driver.start(&mut device, queues);
    for i in 0..200 {
        assert_eq!(host_receives(&hosts[0]), frame(9_000, i));
    }
    driver.wait_until_used(1, 200);
}

#[test]
fn a_driver_that_wants_no_interrupts_gets_none() {
    // By the flag.
    let Setup {
        device: _device,
        mut driver,
        ..
    } = setup(1, MERGEABLE);
    let flags = GuestAddress(driver.rings[1].avail_ring());
    driver.ram.write_obj(1u16, flags).unwrap();
    for i in 0..50 {
        driver.send(1, &frame(64, i), &[]);
        driver.wait_until_used(1, 1);
    }
    assert_eq!(driver.interrupts.queues[1].load(Ordering::SeqCst), 0);

    // By the event index: only when buffer number 40 has been used.
    let Setup {
        device: _device,
        mut driver,
        ..
    } = setup(1, MERGEABLE | 1 << VIRTIO_RING_F_EVENT_IDX);
    let event = driver.rings[1].avail_ring() + 4 + 2 * u64::from(driver.rings[1].size);
    driver.ram.write_obj(39u16, GuestAddress(event)).unwrap();
    for i in 0..60 {
        driver.send(1, &frame(64, i), &[]);
        driver.wait_until_used(1, 1);
    }
    wait_until("one interrupt", || {
        driver.interrupts.queues[1].load(Ordering::SeqCst) == 1
    });
}

/// KVM does not see what the monitor writes: every page that differs must be in the bitmap.
#[test]
fn every_page_that_the_device_writes_is_marked() {
    let Setup {
        device: _device,
        hosts,
        mut driver,
        ..
    } = setup(1, MERGEABLE | LARGE | CONTROL);
    driver.give_buffers(0, 200, 1999);
    // What the driver itself wrote is not the device's.
    let copy = |driver: &Driver| {
        let mut all = vec![0u8; RAM_BYTES];
        driver.ram.read_slice(&mut all, GuestAddress(0)).unwrap();
        all
    };
    std::thread::sleep(Duration::from_millis(50));
    take_dirty(&driver.ram);
    let before = copy(&driver);
    for (i, len) in [60_000usize, 100, 1500, 9_000, 14, 2_500]
        .into_iter()
        .cycle()
        .take(30)
        .enumerate()
    {
        hosts[0].send(&frame(len, i as u32)).unwrap();
        driver.wait_for_frame(0);
        if i == 3 {
            break;
        }
    }
    let after = copy(&driver);
    let dirty: Vec<(GuestAddress, Vec<u64>)> = take_dirty(&driver.ram);
    let marked = |page: usize| dirty[0].1[page / 64] & (1 << (page % 64)) != 0;
    let mut changed = 0;
    for page in 0..RAM_BYTES / PAGE_SIZE as usize {
        let range = page * PAGE_SIZE as usize..(page + 1) * PAGE_SIZE as usize;
        if before[range.clone()] != after[range] {
            changed += 1;
            assert!(marked(page), "page {page:#x} changed and is not marked");
        }
    }
    assert!(changed > 15, "the test moved data: {changed} pages");
}
