//! Everything that does not need a TAP: the other end is a socket that carries datagrams.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::*;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Driver, RAM_BYTES, wait_until};
use crate::ram::{PAGE_SIZE, take_dirty};
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{HEADER_BYTES, Net, NetBackend, NetDeviceConfig, NetLimits, Offloads};

pub(super) const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 5];
pub(super) const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
pub(super) const CONTROL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << VIRTIO_NET_F_MQ;
const LARGE: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

pub(super) struct Sockets {
    ours: Vec<OwnedFd>,
    told: std::sync::Arc<Mutex<Vec<String>>>,
}

impl NetBackend for Sockets {
    fn files(&self) -> &[OwnedFd] {
        &self.ours
    }
    fn knows_uso(&self) -> bool {
        false
    }
    fn set_offloads(&self, guest_accepts: Offloads) -> io::Result<()> {
        self.told.lock().unwrap().push(format!("{guest_accepts:?}"));
        Ok(())
    }
    fn set_active_pairs(&self, pairs: usize) -> io::Result<()> {
        self.told.lock().unwrap().push(format!("pairs {pairs}"));
        Ok(())
    }
}

pub(super) struct Setup {
    pub(super) device: Net,
    pub(super) hosts: Vec<UnixDatagram>,
    pub(super) driver: Driver,
    told: std::sync::Arc<Mutex<Vec<String>>>,
}

fn config(limits: NetLimits) -> NetDeviceConfig {
    NetDeviceConfig {
        name: "net0".into(),
        mac: MAC,
        mtu: Some(1500),
        limits,
    }
}

fn device(pairs: usize, limits: NetLimits) -> (Net, Vec<UnixDatagram>, std::sync::Arc<Mutex<Vec<String>>>) {
    let mut hosts = Vec::new();
    let mut ours = Vec::new();
    for _ in 0..pairs {
        let (host, our) = UnixDatagram::pair().unwrap();
        our.set_nonblocking(true).unwrap();
        host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        hosts.push(host);
        ours.push(our.into());
    }
    let told = std::sync::Arc::default();
    let backend = Sockets {
        ours,
        told: std::sync::Arc::clone(&told),
    };
    (Net::new(config(limits), Box::new(backend)).unwrap(), hosts, told)
}

pub(super) fn setup(pairs: usize, features: u64) -> Setup {
    let (mut device, hosts, told) = device(pairs, NetLimits::default());
    let driver = Driver::new(&device.queue_sizes(), features);
    let queues = driver.queues();
    driver.start(&mut device, queues);
    Setup {
        device,
        hosts,
        driver,
        told,
    }
}

/// A header of zeroes and a recognisable frame.
pub(super) fn frame(len: usize, seed: u32) -> Vec<u8> {
    let body = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 13) as u8);
    [0; HEADER_BYTES].into_iter().chain(body).collect()
}

/// What a guest reads has the number of buffers in its header.
fn body(frame: &[u8]) -> &[u8] {
    &frame[HEADER_BYTES..]
}

fn host_receives(host: &UnixDatagram) -> Vec<u8> {
    let mut buffer = vec![0; 100_000];
    let len = host.recv(&mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

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
    // The socket is empty when the frame was taken.
    std::thread::sleep(Duration::from_millis(100));
    let queues = device.stop();
    let state = device.save().unwrap();
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
    let passed = driver.used_index(1);
    assert!(passed < 200, "the host was not busy");
    let queues = device.stop();
    let (_, send_queue) = queues.iter().find(|(index, _)| *index == 1).unwrap();
    assert_eq!(send_queue.next_avail(), passed, "what was not sent is put back");
    driver.start(&mut device, queues);
    for i in 0..200 {
        assert_eq!(host_receives(&hosts[0]), frame(9_000, i));
    }
    driver.wait_until_used(1, 200);
}

#[test]
fn several_pairs_and_the_control_queue_where_the_driver_expects_it() {
    let Setup {
        device,
        hosts,
        mut driver,
        told,
    } = setup(3, MERGEABLE | CONTROL);
    for queue in [0, 2, 4] {
        driver.give_buffers(queue, 8, 2048);
    }
    hosts[1].send(&frame(99, 1)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(
        driver.received(2).is_none(),
        "only one pair works until the driver says so"
    );
    assert_eq!(driver.command(6, &[4, 0, 3, 0]), 0);
    assert_eq!(body(&driver.wait_for_frame(2)), body(&frame(99, 1)));
    for (pair, host) in hosts.iter().enumerate() {
        driver.send(2 * pair + 1, &frame(80, pair as u32), &[]);
        assert_eq!(host_receives(host), frame(80, pair as u32));
    }
    assert_eq!(driver.command(6, &[4, 0, 4, 0]), 1, "more pairs than there are");
    assert_eq!(driver.command(6, &[4, 0, 0, 0]), 1);
    assert_eq!(driver.command(6, &[4, 0, 1, 0]), 0);
    assert_eq!(device.handle().stats().totals.sent_dropped, 0);
    let told = told.lock().unwrap();
    assert_eq!(told.last().unwrap(), "pairs 1");
    assert!(told.contains(&"pairs 3".to_owned()));
    drop(told);

    // A driver that does not know of several pairs has its control queue third.
    let Setup {
        device, mut driver, ..
    } = setup(3, CONTROL & !(1 << VIRTIO_NET_F_MQ));
    assert_eq!(driver.command(2, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    assert_eq!(device.handle().mac(), [2, 0, 0, 0, 0, 9]);
}

#[test]
fn commands_do_what_they_say_and_a_reset_forgets_them() {
    let Setup {
        mut device,
        mut driver,
        told,
        ..
    } = setup(2, MERGEABLE | CONTROL);
    assert_eq!(driver.command(4, &[0, 0, 1]), 0, "promiscuous");
    assert_eq!(driver.command(4, &[1, 1, 2, 0, 0, 0, 0, 9]), 0);
    let mut mac = [0; 6];
    device.read_config(0, &mut mac);
    assert_eq!(mac, [2, 0, 0, 0, 0, 9]);
    assert_eq!(
        driver.command(4, &[5, 0, 3, 0, 0, 0, 0, 0, 0, 0]),
        1,
        "not an offload"
    );
    assert_eq!(driver.command(4, &[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    assert!(
        told.lock()
            .unwrap()
            .last()
            .unwrap()
            .contains("checksum: true, tso4: false")
    );
    assert_eq!(driver.command(4, &[9, 9, 9]), 1);

    let queues = device.stop();
    assert_eq!(queues.len(), 5, "every queue comes back");
    let with_mac = device.save().unwrap();
    device.reset();
    assert_ne!(device.save().unwrap(), with_mac);
    assert_eq!(device.handle().mac(), MAC);
}

#[test]
fn an_announcement_is_asked_for_once_and_ends_when_the_guest_says_so() {
    let status = |device: &Net| {
        let mut status = [0; 2];
        device.read_config(6, &mut status);
        u16::from_le_bytes(status)
    };
    let Setup {
        mut device,
        mut driver,
        ..
    } = setup(1, CONTROL);
    assert_eq!(status(&device), 1, "link up");
    assert!(device.handle().announce());
    assert_eq!(status(&device), 3);
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 1);
    assert_eq!(driver.command(2, &[3, 0]), 0);
    assert_eq!(status(&device), 1);

    // Asked for while the machine is not running yet, as after a crossing: the guest hears of it when it starts.
    let queues = device.stop();
    let state = device.save().unwrap();
    let (mut there, _hosts, _) = self::device(1, NetLimits::default());
    there.restore(&state).unwrap();
    assert!(there.handle().announce());
    driver.start(&mut there, queues);
    assert_eq!(status(&there), 3);
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 2);

    // A driver without the feature is not bothered.
    let Setup { device, driver, .. } = setup(1, MERGEABLE);
    assert!(!device.handle().announce());
    assert_eq!(status(&device), 1);
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 0);
}

#[test]
fn the_link_goes_down_and_up() {
    let Setup {
        device,
        hosts,
        mut driver,
        ..
    } = setup(1, MERGEABLE);
    driver.give_buffers(0, 8, 2048);
    let handle = device.handle();
    handle.set_link(false);
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 1);
    hosts[0].send(&frame(64, 1)).unwrap();
    driver.send(1, &frame(64, 2), &[]);
    driver.wait_until_used(1, 1);
    assert_eq!(handle.stats().totals.sent_dropped, 1);
    std::thread::sleep(Duration::from_millis(50));
    assert!(
        driver.received(0).is_none(),
        "nothing comes through a cable that is out"
    );
    handle.set_link(true);
    assert_eq!(body(&driver.wait_for_frame(0)), body(&frame(64, 1)));
    driver.send(1, &frame(64, 3), &[]);
    assert_eq!(host_receives(&hosts[0]), frame(64, 3));
}

#[test]
fn a_host_interface_that_disappears_takes_the_link_down_and_no_more() {
    let Setup {
        mut device,
        hosts,
        mut driver,
        ..
    } = setup(1, MERGEABLE | CONTROL);
    driver.give_buffers(0, 8, 2048);
    drop(hosts);
    driver.send(1, &frame(64, 1), &[]);
    driver.wait_until_used(1, 1);
    wait_until("link down", || !device.handle().link_is_up());
    let mut status = [0; 2];
    device.read_config(6, &mut status);
    assert_eq!(status, [0, 0]);
    wait_until("the guest is told", || {
        driver.interrupts.config.load(Ordering::SeqCst) == 1
    });
    for i in 0..100 {
        driver.send(1, &frame(64, i), &[]);
    }
    driver.wait_until_used(1, 100);
    assert_eq!(driver.interrupts.config.load(Ordering::SeqCst), 1, "told once");
    assert_eq!(driver.command(2, &[0, 0, 1]), 0, "the rest of the device works");
    assert_eq!(driver.interrupts.needs_reset.load(Ordering::SeqCst), 0);
    assert_eq!(device.stop().len(), 3);
}

fn limited(bytes: u64, packets: u64) -> NetLimits {
    NetLimits {
        bandwidth_bytes_per_sec: std::num::NonZeroU64::new(bytes),
        packets_per_sec: std::num::NonZeroU64::new(packets),
    }
}

#[test]
fn limits_hold_in_both_directions_and_can_be_lifted_while_frames_wait() {
    let (mut device, hosts, _) = device(1, limited(0, 200));
    let mut driver = Driver::new(&device.queue_sizes(), MERGEABLE);
    let queues = driver.queues();
    driver.start(&mut device, queues);
    driver.give_buffers(0, 200, 2048);
    let began = Instant::now();
    for i in 0..100 {
        driver.send(1, &frame(1000, i), &[]);
    }
    let host = hosts[0].try_clone().unwrap();
    let feeder = std::thread::spawn(move || {
        for i in 0..100 {
            host.send(&frame(500, i)).unwrap();
        }
    });
    for i in 0..100 {
        assert_eq!(host_receives(&hosts[0]), frame(1000, i));
        assert_eq!(body(&driver.wait_for_frame(0)), body(&frame(500, i)));
    }
    feeder.join().unwrap();
    let took = began.elapsed();
    // A tenth of a second's worth passes at once: (100 - 20) / 200 per second.
    assert!(
        took >= Duration::from_millis(390),
        "{took:?} for 100 frames at 200 a second"
    );
    assert!(
        took < Duration::from_millis(2_000),
        "{took:?} is far slower than the limit"
    );

    device.handle().set_limits(limited(2_000, 0));
    for i in 0..50 {
        driver.send(1, &frame(1000, i), &[]);
    }
    let began = Instant::now();
    for i in 0..2 {
        assert_eq!(host_receives(&hosts[0]), frame(1000, i));
    }
    device.handle().set_limits(NetLimits::default());
    for i in 2..50 {
        assert_eq!(host_receives(&hosts[0]), frame(1000, i));
    }
    assert!(began.elapsed() < Duration::from_secs(5), "25 s by the old limit");
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

#[test]
fn what_the_guest_claims_is_learnt_and_travels() {
    let Setup {
        mut device,
        hosts,
        mut driver,
        ..
    } = setup(1, 0);
    let mut arp = vec![0u8; HEADER_BYTES];
    arp.extend([0xff; 6]);
    arp.extend(MAC);
    arp.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend(MAC);
    arp.extend([192, 0, 2, 7]);
    arp.extend([0; 10]);
    for pieces in [&[][..], &[5, 9, 1, 20], &[HEADER_BYTES + 14]] {
        driver.send(1, &arp, pieces);
        host_receives(&hosts[0]);
    }
    driver.wait_until_used(1, 3);
    assert_eq!(
        device.handle().neighbours().ipv4,
        [std::net::Ipv4Addr::new(192, 0, 2, 7)]
    );
    device.stop();
    let (mut there, _hosts, _) = self::device(1, NetLimits::default());
    there.restore(&device.save().unwrap()).unwrap();
    assert_eq!(there.handle().neighbours(), device.handle().neighbours());
}

#[test]
fn a_state_that_does_not_fit_is_refused_in_a_sentence() {
    let (mut one, ..) = device(1, NetLimits::default());
    let (two, ..) = device(2, NetLimits::default());
    let error = one.restore(&two.save().unwrap()).unwrap_err().to_string();
    assert!(error.contains("2 queue pairs and has 1 here"), "{error}");
    let mut newer = one.save().unwrap();
    newer.version = 99;
    assert!(one.restore(&newer).is_err());
    let mut garbage = one.save().unwrap();
    garbage.body.truncate(5);
    assert!(one.restore(&garbage).is_err());
}

#[test]
fn odd_accesses_to_the_configuration_are_harmless() {
    let (mut device, ..) = device(2, NetLimits::default());
    let mut all = [0xaa; 20];
    device.read_config(0, &mut all);
    assert_eq!(&all[..6], &MAC);
    assert_eq!(&all[6..], &[1, 0, 2, 0, 0xdc, 5, 0, 0, 0, 0, 0, 0, 0, 0]);
    for offset in [3, 11, 12, 4096, u64::MAX - 1, u64::MAX] {
        let mut data = [0xaa; 9];
        device.read_config(offset, &mut data);
        device.write_config(offset, &data);
    }
    let mut mac = [0; 6];
    device.read_config(0, &mut mac);
    assert_eq!(mac, MAC);
}
