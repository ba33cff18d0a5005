//! What is told to the device and what it tells: commands, link, limits, announcements, its state.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::*;

use super::driver::{Driver, wait_until};
use super::sockets::{CONTROL, MAC, MERGEABLE, Setup, body, device, frame, host_receives, setup};
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{HEADER_BYTES, Net, NetLimits};

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
