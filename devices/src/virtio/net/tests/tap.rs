//! The device on real TAP devices, in network namespaces of their own.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ferry_network::namespace::Namespace;
use ferry_network::{Tap, TapConfig};
use virtio_bindings::virtio_net::*;

use super::driver::{Driver, uninterrupted, wait_until};
use super::sockets::{CONTROL, MAC, MERGEABLE};
use crate::virtio::device::VirtioDevice;
use crate::virtio::net::{HEADER_BYTES, Net, NetDeviceConfig, NetLimits, TapBackend};

const CHECKSUM: u64 = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM;
const USO: u64 =
    1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6 | 1 << VIRTIO_NET_F_HOST_USO | CHECKSUM;

/// None, with the reason printed, where this user may not make a network namespace.
fn namespace() -> Option<Namespace> {
    match Namespace::create() {
        Ok(namespace) => Some(namespace),
        Err(error) => {
            assert!(
                std::env::var_os("FERRY_TESTS_MUST_RUN").is_none(),
                "network namespaces must work here: {error}"
            );
            eprintln!("skipped: no network namespace can be made ({error}); run as root");
            None
        }
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A guest at 192.0.2.2 behind a TAP whose host side is 192.0.2.1.
struct Setup {
    tap: Tap,
    device: Net,
    driver: Driver,
}

fn setup(pairs: u16, features: u64) -> Setup {
    let tap = Tap::open(&TapConfig {
        name: Some("t0".into()),
        bridge: None,
        queue_pairs: pairs,
        guest_mac: MAC,
    })
    .unwrap();
    ip("addr add 192.0.2.1/24 dev t0");
    ip("neigh add 192.0.2.2 lladdr 52:54:00:00:00:05 dev t0");
    tap.join().unwrap();
    let backend = TapBackend::new(tap.queue_files().unwrap()).unwrap();
    let config = NetDeviceConfig {
        name: "net0".into(),
        mac: MAC,
        mtu: None,
        limits: NetLimits::default(),
    };
    let mut device = Net::new(config, Box::new(backend)).unwrap();
    assert_eq!(
        features & !device.offered_features(),
        0,
        "the device offers what the test takes"
    );
    let driver = Driver::new(&device.queue_sizes(), features);
    let queues = driver.queues();
    driver.start(&mut device, queues);
    Setup { tap, device, driver }
}

fn sum(bytes: &[u8], start: u32) -> u16 {
    let mut sum = start;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The sum over the pseudo header of a UDP datagram.
fn pseudo(packet: &[u8], udp_len: usize) -> u32 {
    u32::from(sum(&packet[12..20], 17 + udp_len as u32))
}

/// An Ethernet frame with a UDP datagram from the guest; its checksum is left to the host if `partial`.
fn udp_frame(host_mac: [u8; 6], to_port: u16, payload: &[u8], partial: bool) -> Vec<u8> {
    let udp_len = 8 + payload.len();
    let mut packet = vec![0x45, 0];
    packet.extend(((20 + udp_len) as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 2, 192, 0, 2, 1]);
    let header_sum = !sum(&packet, 0);
    packet[10..12].copy_from_slice(&header_sum.to_be_bytes());
    packet.extend(4000u16.to_be_bytes());
    packet.extend(to_port.to_be_bytes());
    packet.extend((udp_len as u16).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    let start = pseudo(&packet, udp_len);
    let check = if partial {
        start as u16
    } else {
        !sum(&packet[20..], start)
    };
    packet[26..28].copy_from_slice(&check.to_be_bytes());
    let mut frame = host_mac.to_vec();
    frame.extend(MAC);
    frame.extend([8, 0]);
    frame.extend(packet);
    frame
}

/// The next UDP datagram for the guest: header, port, payload, and whether its checksum is right as it stands.
fn next_udp(driver: &mut Driver, queue: usize) -> (Vec<u8>, u16, Vec<u8>, bool) {
    loop {
        let mut frame = driver.wait_for_frame(queue);
        driver.give_buffers(queue, 1, 2048);
        let packet = frame.split_off(HEADER_BYTES).split_off(14);
        if packet[0] == 0x45 && packet[9] == 17 {
            let port = u16::from_be_bytes([packet[22], packet[23]]);
            let good = sum(&packet[20..], pseudo(&packet, packet.len() - 20)) == 0xffff;
            return (frame, port, packet[28..].to_vec(), good);
        }
    }
}

fn datagram(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 + seed * 7) as u8).collect()
}

#[test]
fn datagrams_pass_between_guest_and_host() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            let Setup {
                tap,
                device,
                mut driver,
            } = setup(1, MERGEABLE);
            driver.give_buffers(0, 128, 2048);
            let socket = UdpSocket::bind("192.0.2.1:5000").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let mac = tap.mac().unwrap();
            for i in 0..200 {
                let payload = datagram(i, 1 + i * 7);
                socket.send_to(&payload, "192.0.2.2:4000").unwrap();
                let (header, port, got, good) = next_udp(&mut driver, 0);
                assert_eq!((port, got), (4000, payload.clone()));
                assert!(good, "a guest without checksum offload gets whole checksums");
                assert_eq!(header[0], 0);

                let mut out = vec![0; HEADER_BYTES];
                out.extend(udp_frame(mac, 5000, &payload, false));
                driver.send(1, &out, &[HEADER_BYTES, 14]);
                let mut buffer = [0; 2000];
                let len = uninterrupted(|| socket.recv(&mut buffer)).unwrap();
                assert_eq!(buffer[..len], payload);
                driver.wait_until_used(1, 1);
            }
            let totals = device.handle().stats().totals;
            assert!(totals.received_packets >= 200);
            assert_eq!((totals.sent_packets, totals.sent_dropped), (200, 0));
        })
        .unwrap();
}

#[test]
fn checksums_are_left_to_the_other_side_where_it_can_do_them() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            let Setup {
                tap,
                mut driver,
                device: _device,
            } = setup(1, MERGEABLE | CHECKSUM);
            driver.give_buffers(0, 64, 2048);
            let socket = UdpSocket::bind("192.0.2.1:5000").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let payload = datagram(3, 777);
            socket.send_to(&payload, "192.0.2.2:4000").unwrap();
            let (header, _, got, good) = next_udp(&mut driver, 0);
            assert_eq!(got, payload);
            assert!(!good, "the host spared itself the checksum");
            assert_eq!(header[0], 1, "VIRTIO_NET_HDR_F_NEEDS_CSUM");
            assert_eq!(&header[6..10], &[34, 0, 6, 0], "where it starts, where it goes");

            // And the other way: the guest leaves it to the host.
            let mut out = vec![1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
            out.extend(udp_frame(tap.mac().unwrap(), 5000, &payload, true));
            driver.send(1, &out, &[]);
            let mut buffer = [0; 2000];
            let len = uninterrupted(|| socket.recv(&mut buffer)).unwrap();
            assert_eq!(buffer[..len], payload);
        })
        .unwrap();
}

/// One large frame instead of many: the header that says how to cut it must come through whole in both directions.
#[test]
fn segmentation_is_left_to_the_other_side_where_it_can_do_it() {
    const SIZE: usize = 1400;
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            let Setup {
                tap,
                mut driver,
                device,
            } = setup(1, MERGEABLE | USO);
            driver.give_buffers(0, 128, 2048);
            let socket = UdpSocket::bind("192.0.2.1:5000").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();

            let payload = datagram(5, SIZE * 40 + 100);
            let mut out = vec![1, 5, 42, 0, 0, 0, 34, 0, 6, 0, 0, 0];
            out[4..6].copy_from_slice(&(SIZE as u16).to_le_bytes());
            out.extend(udp_frame(tap.mac().unwrap(), 5000, &payload, true));
            driver.send(1, &out, &[HEADER_BYTES + 42, 4096, 4096, 10_000]);
            for part in payload.chunks(SIZE) {
                let mut buffer = [0; 3000];
                let len = uninterrupted(|| socket.recv(&mut buffer)).unwrap();
                assert_eq!(&buffer[..len], part);
            }

            // UDP_SEGMENT: the host's stack makes one frame of it and the guest takes it as it is.
            let size = (SIZE as libc::c_int).to_ne_bytes();
            set_segment_size(&socket, &size);
            let payload = datagram(6, SIZE * 40 + 100);
            socket.send_to(&payload, "192.0.2.2:4000").unwrap();
            let (header, _, got, _) = next_udp(&mut driver, 0);
            assert_eq!(got.len(), payload.len(), "one frame");
            assert_eq!(got, payload);
            assert_eq!((header[0] & 1, header[1]), (1, 5), "VIRTIO_NET_HDR_GSO_UDP_L4");
            assert_eq!(u16::from_le_bytes([header[4], header[5]]), SIZE as u16);
            assert_eq!(device.handle().stats().totals.sent_dropped, 0);

            // A guest that takes it back gets small frames with whole headers.
            drop(device);
            drop(tap);
            let Setup {
                tap: _tap,
                mut driver,
                device: _device,
            } = setup(1, MERGEABLE);
            driver.give_buffers(0, 128, 2048);
            socket.send_to(&payload, "192.0.2.2:4000").unwrap();
            for part in payload.chunks(SIZE) {
                let (header, _, got, good) = next_udp(&mut driver, 0);
                assert_eq!(got, part);
                assert!(good && header[1] == 0);
            }
        })
        .unwrap();
}

#[allow(unsafe_code)] // the standard library has no call for this socket option
fn set_segment_size(socket: &UdpSocket, size: &[u8; 4]) {
    use std::os::fd::AsRawFd;
    // SAFETY: the option takes an int, which lives through the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            size.as_ptr().cast(),
            4,
        )
    };
    assert_eq!(result, 0);
}

#[test]
fn an_interface_that_is_removed_takes_the_link_down_and_the_machine_lives() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            for queue_was_read in [true, false] {
                let Setup {
                    tap: _tap,
                    mut device,
                    mut driver,
                } = setup(2, MERGEABLE | CONTROL);
                if queue_was_read {
                    driver.give_buffers(0, 8, 2048);
                }
                ip("link del t0");
                if !queue_was_read {
                    let mut out = vec![0; HEADER_BYTES];
                    out.extend(udp_frame(MAC, 1, b"x", false));
                    driver.send(1, &out, &[]);
                    driver.wait_until_used(1, 1);
                }
                wait_until("link down", || !device.handle().link_is_up());
                wait_until("the guest is told", || {
                    driver.interrupts.config.load(Ordering::SeqCst) == 1
                });
                for _ in 0..20 {
                    driver.send(1, &[0; 60], &[]);
                }
                driver.wait_until_used(1, 20);
                // Pause and resume still work, and so does a crossing's save.
                let queues = device.stop();
                assert_eq!(queues.len(), 5);
                device.save().unwrap();
                driver.start(&mut device, queues);
                driver.send(1, &[0; 60], &[]);
                driver.wait_until_used(1, 1);
                assert_eq!(driver.interrupts.needs_reset.load(Ordering::SeqCst), 0);
            }
        })
        .unwrap();
}

/// Frames only go to queues that the driver reads: those of the first pair, until it asks for more.
#[test]
fn received_frames_spread_over_as_many_pairs_as_the_driver_wants() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            let Setup {
                tap: _tap,
                device: _device,
                mut driver,
            } = setup(4, MERGEABLE | CONTROL);
            let receive_queues = [0, 2, 4, 6];
            for queue in receive_queues {
                driver.give_buffers(queue, 250, 2048);
            }
            let sockets: Vec<UdpSocket> = (0..64).map(|_| UdpSocket::bind("192.0.2.1:0").unwrap()).collect();
            let round = |driver: &mut Driver| {
                let before = receive_queues.map(|queue| driver.used_index(queue));
                for socket in &sockets {
                    socket.send_to(b"hello", "192.0.2.2:4000").unwrap();
                }
                let total = |driver: &Driver| {
                    let now = receive_queues.map(|queue| driver.used_index(queue));
                    std::array::from_fn::<u16, 4, _>(|i| now[i] - before[i])
                };
                wait_until("all frames", || total(driver).iter().sum::<u16>() >= 64);
                total(driver)
            };
            assert_eq!(round(&mut driver)[1..], [0, 0, 0], "one pair");
            assert_eq!(driver.command(8, &[4, 0, 4, 0]), 0);
            let spread = round(&mut driver);
            assert!(
                spread.iter().filter(|n| **n > 0).count() >= 3,
                "four pairs: {spread:?}"
            );
            assert_eq!(driver.command(8, &[4, 0, 1, 0]), 0);
            assert_eq!(round(&mut driver)[1..], [0, 0, 0], "one pair again");
            assert_eq!(
                driver.interrupts.config.load(Ordering::SeqCst),
                0,
                "no link trouble"
            );
        })
        .unwrap();
}
