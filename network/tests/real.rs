//! TAP devices, bridges, announcements and probes on the real kernel, in network namespaces of their own.
#![allow(clippy::unwrap_used, clippy::expect_used)] // a test file: failing is its job

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ferry_network::announce::{Announcer, Schedule};
use ferry_network::frames::{Identity, announcement};
use ferry_network::namespace::Namespace;
use ferry_network::probe::{Probe, ProbeTarget};
use ferry_network::{Tap, TapConfig, TapError};

const GUEST: [u8; 6] = [0x52, 0x54, 0x00, 0x00, 0x00, 0x05];

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
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("the ip command runs");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn ip_shows(name: &str) -> bool {
    let output = Command::new("ip")
        .args(["link", "show", name])
        .output()
        .expect("the ip command runs");
    output.status.success()
}

fn config(name: Option<&str>, bridge: Option<&str>, queue_pairs: u16) -> TapConfig {
    TapConfig {
        name: name.map(str::to_owned),
        bridge: bridge.map(str::to_owned),
        queue_pairs,
        guest_mac: GUEST,
    }
}

#[allow(unsafe_code)] // AF_PACKET has no safe wrapper among the dependencies; this is test equipment.
mod packet {
    use std::fs::File;
    use std::io;
    use std::os::fd::{AsRawFd, FromRawFd};

    /// A socket that sees every frame of one interface.
    pub(crate) fn listen(interface: &str) -> File {
        let name = std::ffi::CString::new(interface).unwrap();
        // SAFETY: plain system calls; the name and the address live through them and results are checked.
        unsafe {
            let protocol = (libc::ETH_P_ALL as u16).to_be();
            let fd = libc::socket(
                libc::AF_PACKET,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
                i32::from(protocol),
            );
            assert!(fd >= 0, "AF_PACKET: {}", io::Error::last_os_error());
            let file = File::from_raw_fd(fd);
            let mut address: libc::sockaddr_ll = std::mem::zeroed();
            address.sll_family = libc::AF_PACKET as u16;
            address.sll_protocol = protocol;
            address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
            let bound = libc::bind(
                file.as_raw_fd(),
                (&raw const address).cast(),
                size_of::<libc::sockaddr_ll>() as u32,
            );
            assert_eq!(bound, 0, "bind: {}", io::Error::last_os_error());
            file
        }
    }
}

/// Frames until `done` says so or the time is over.
fn frames_until(mut from: &std::fs::File, limit: Duration, mut done: impl FnMut(&[u8]) -> bool) -> bool {
    let end = Instant::now() + limit;
    let mut frame = [0u8; 2048];
    while Instant::now() < end {
        match from.read(&mut frame) {
            Ok(n) if done(&frame[..n]) => return true,
            Ok(_) => {}
            Err(_) => std::thread::sleep(Duration::from_micros(200)),
        }
    }
    false
}

#[test]
fn a_tap_on_a_bridge_appears_and_leaves_nothing_behind() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            ip("link add br0 type bridge");
            let one = Tap::open(&config(None, Some("br0"), 1)).unwrap();
            let two = Tap::open(&config(None, Some("br0"), 4)).unwrap();
            assert_ne!(one.name(), two.name(), "names are unique");
            assert_eq!(two.queue_pairs(), 4);
            assert_eq!(two.queue_files().unwrap().len(), 4);
            assert_eq!(
                one.mac().unwrap()[0],
                0xfe,
                "the bridge must not take our address"
            );
            assert!(!one.is_up().unwrap());
            one.join().unwrap();
            assert!(one.is_up().unwrap());
            one.leave().unwrap();
            assert!(!one.is_up().unwrap());
            one.set_mtu(9000).unwrap();
            assert_eq!(one.mtu().unwrap(), 9000);

            let (one_name, two_name) = (one.name().to_owned(), two.name().to_owned());
            let held = one.queue_files().unwrap();
            drop(one);
            assert!(ip_shows(&one_name), "the device still holds its queues");
            drop(held);
            drop(two);
            assert!(
                !ip_shows(&one_name) && !ip_shows(&two_name),
                "the TAPs vanish with their files"
            );
        })
        .unwrap();
}

/// Re-run as a child process that makes a TAP and waits to be killed.
#[test]
fn child_that_holds_a_tap() {
    if std::env::var_os("FERRY_TEST_HOLD_TAP").is_none() {
        return;
    }
    let tap = Tap::open(&config(None, Some("br0"), 2)).unwrap();
    println!("TAP {} held", tap.name());
    std::io::stdout().flush().unwrap();
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn the_tap_of_a_killed_process_is_gone() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            ip("link add br0 type bridge");
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child_that_holds_a_tap", "--nocapture"])
                .env("FERRY_TEST_HOLD_TAP", "1")
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
            let name = lines
                .map_while(Result::ok)
                .find_map(|line| {
                    let words: Vec<&str> = line.split_whitespace().collect();
                    words
                        .iter()
                        .position(|w| *w == "TAP")
                        .map(|at| words[at + 1].to_owned())
                })
                .expect("the child says which TAP it made");
            assert!(ip_shows(&name));
            child.kill().unwrap(); // SIGKILL
            child.wait().unwrap();
            let end = Instant::now() + Duration::from_secs(5);
            while ip_shows(&name) && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(!ip_shows(&name), "{name} was left behind");
        })
        .unwrap();
}

#[test]
fn a_tap_of_the_user_is_taken_as_it_is_and_stays() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            ip("tuntap add dev mine mode tap");
            ip("tuntap add dev many mode tap multi_queue");
            for (name, pairs) in [("mine", 1), ("many", 1), ("many", 3)] {
                drop(Tap::open(&config(Some(name), None, pairs)).unwrap());
                assert!(ip_shows(name), "{name} is the user's and stays");
            }
            drop(Tap::open(&config(Some("made"), None, 1)).unwrap());
            assert!(!ip_shows("made"), "made by us and gone");
        })
        .unwrap();
}

#[test]
fn what_cannot_be_opened_is_said_in_one_sentence() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            ip("link add br0 type bridge");
            ip("link add dummy0 type veth peer name dummy1");
            ip("tuntap add dev single mode tap");
            let error = |c| Tap::open(&c).unwrap_err();
            assert!(matches!(
                error(config(None, Some("br9"), 1)),
                TapError::NoBridge(_)
            ));
            assert!(matches!(
                error(config(None, Some("dummy0"), 1)),
                TapError::NoBridge(_)
            ));
            assert!(matches!(
                error(config(Some("single"), Some("br0"), 1)),
                TapError::NameTaken(_)
            ));
            assert!(matches!(
                error(config(Some("single"), None, 2)),
                TapError::NotATap(_)
            ));
            assert!(matches!(
                error(config(Some("dummy0"), None, 1)),
                TapError::NotATap(_)
            ));
            assert!(matches!(
                error(config(None, Some("br0"), 0)),
                TapError::QueuePairs(0)
            ));
            assert!(matches!(
                error(config(None, Some("br0"), 500)),
                TapError::QueuePairs(500)
            ));
            let held = Tap::open(&config(Some("single"), None, 1)).unwrap();
            let second = error(config(Some("single"), None, 1));
            assert!(matches!(second, TapError::InUse(_)), "{second}");
            drop(held);
            assert!(!error(config(Some("a/b"), None, 1)).to_string().contains('\n'));
        })
        .unwrap();
}

/// The peer of a bridge port hears every frame of the announcement, several rounds of it, and soon.
#[test]
fn a_peer_on_the_bridge_hears_the_announcement() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            ip("link add br0 type bridge");
            ip("link add port type veth peer name peer");
            ip("link set port master br0");
            for name in ["br0", "port", "peer"] {
                ip(&format!("link set {name} up"));
            }
            let tap = Tap::open(&config(None, Some("br0"), 1)).unwrap();
            let identity = Identity {
                mac: GUEST,
                ipv4: vec![Ipv4Addr::new(192, 0, 2, 7)],
                ipv6: vec!["2001:db8::7".parse().unwrap()],
                ipv6_router: false,
            };
            let expected = announcement(&identity);
            let listener = packet::listen("peer");
            let began = Instant::now();
            tap.join().unwrap();
            let schedule = Schedule {
                rounds: 4,
                ..Schedule::default()
            };
            let announcer = Announcer::start(tap.sender().unwrap(), &identity, schedule);
            assert_eq!(announcer.first_round().rounds, 1);

            let mut seen = vec![0u32; expected.len()];
            let mut first = None;
            let all = frames_until(&listener, Duration::from_secs(5), |frame| {
                if let Some(at) = expected.iter().position(|e| e == frame) {
                    seen[at] += 1;
                    first.get_or_insert_with(|| began.elapsed());
                }
                seen.iter().all(|count| *count >= 3)
            });
            assert!(all, "frames seen: {seen:?} of {} kinds", expected.len());
            println!(
                "first announcement heard {:?} after the TAP went up",
                first.unwrap()
            );

            // The kernel delays news of a carrier by up to a second, and joining must not wait for that.
            tap.leave().unwrap();
            let began = Instant::now();
            tap.join().unwrap();
            tap.sender().unwrap().send(&expected[1]).unwrap();
            let heard = frames_until(&listener, Duration::from_secs(2), |frame| frame == expected[1]);
            assert!(
                heard && began.elapsed() < Duration::from_millis(500),
                "{heard} {:?}",
                began.elapsed()
            );
            println!("heard {:?} after the TAP was up again", began.elapsed());

            let announced = announcer.finish();
            assert_eq!(announced.rounds, 4);
            assert_eq!(announced.frames + announced.failures, 4 * expected.len() as u64);
            let fdb = Command::new("bridge").args(["fdb", "show", "br", "br0"]).output();
            if let Ok(fdb) = fdb {
                let text = String::from_utf8_lossy(&fdb.stdout).into_owned();
                let here = format!("52:54:00:00:00:05 dev {}", tap.name());
                assert!(
                    text.contains(&here),
                    "the bridge has not learnt the guest's port:\n{text}"
                );
            }
        })
        .unwrap();
}

/// A TAP that is down cannot announce: the report says so and nothing fails.
#[test]
fn an_announcement_through_a_tap_that_is_down_is_reported() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            let tap = Tap::open(&config(None, None, 1)).unwrap();
            let schedule = Schedule {
                rounds: 2,
                ..Schedule::default()
            };
            let identity = Identity {
                mac: GUEST,
                ..Identity::default()
            };
            let announced = Announcer::start(tap.sender().unwrap(), &identity, schedule).finish();
            assert_eq!(
                (announced.rounds, announced.frames, announced.failures),
                (2, 0, 2)
            );
            assert!(announced.first_failure.unwrap().contains(tap.name()));
        })
        .unwrap();
}

#[test]
fn queued_frames_can_be_thrown_away() {
    let Some(namespace) = namespace() else { return };
    namespace
        .run(|| {
            let tap = Tap::open(&config(Some("t0"), None, 1)).unwrap();
            ip("addr add 192.0.2.1/24 dev t0");
            tap.join().unwrap();
            ip("neigh add 192.0.2.2 lladdr 52:54:00:00:00:05 dev t0");
            tap.discard_queued();
            let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
            for _ in 0..7 {
                socket.send_to(b"stale", "192.0.2.2:9").unwrap();
            }
            assert!(tap.discard_queued() >= 7);
            assert_eq!(tap.discard_queued(), 0);
        })
        .unwrap();
}

fn probe(target: &str) -> Probe {
    let target: ProbeTarget = target.parse().unwrap();
    Probe::start(target, Duration::from_millis(5)).unwrap()
}

fn wait_for_answers(probe: &Probe, more: u64) {
    let wanted = probe.answered() + more;
    let end = Instant::now() + Duration::from_secs(10);
    while probe.answered() < wanted {
        assert!(Instant::now() < end, "the probe gets no answers");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The way back from a service is cut for a known time; every kind of probe must bracket it.
#[test]
fn every_probe_brackets_a_real_outage() {
    let Some(service) = namespace() else { return };
    let Some(client) = namespace() else { return };
    client
        .run(|| {
            ip("link add c0 type veth peer name s0");
            ip(&format!("link set s0 netns {}", service.path().display()));
            ip("addr add 192.0.2.1/24 dev c0");
            ip("link set c0 up");
        })
        .unwrap();
    let (tcp, udp) = service
        .run(|| {
            ip("addr add 192.0.2.2/24 dev s0");
            ip("link set s0 up");
            let tcp = TcpListener::bind("192.0.2.2:80").unwrap();
            let udp = UdpSocket::bind("192.0.2.2:7").unwrap();
            (tcp, udp)
        })
        .unwrap();
    std::thread::spawn(move || {
        for stream in tcp.incoming().flatten() {
            std::thread::spawn(move || {
                let mut stream = stream;
                let mut request = [0u8; 512];
                if matches!(stream.read(&mut request), Ok(n) if n > 0) {
                    let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n");
                }
            });
        }
    });
    std::thread::spawn(move || {
        let mut buffer = [0u8; 2048];
        while let Ok((n, from)) = udp.recv_from(&mut buffer) {
            let _ = udp.send_to(&buffer[..n], from);
        }
    });

    // A new veth takes up to a second to carry anything.
    client
        .run(|| TcpStream::connect_timeout(&"192.0.2.2:80".parse().unwrap(), Duration::from_secs(10)))
        .unwrap()
        .unwrap();
    let probes = client
        .run(|| {
            [
                "tcp:192.0.2.2:80",
                "udp:192.0.2.2:7",
                "icmp:192.0.2.2",
                "http://192.0.2.2/",
            ]
            .map(probe)
        })
        .unwrap();
    for probe in &probes {
        wait_for_answers(probe, 40);
    }
    let before = Instant::now();
    service.run(|| ip("route add blackhole 192.0.2.1/32")).unwrap();
    let down = Instant::now();
    std::thread::sleep(Duration::from_millis(150));
    let up_again = Instant::now();
    service.run(|| ip("route del blackhole 192.0.2.1/32")).unwrap();
    for probe in &probes {
        wait_for_answers(probe, 40);
    }
    let back = Instant::now();
    for probe in probes {
        let report = probe.finish().unwrap();
        let outage = report.outage.expect("the outage was seen");
        assert!(outage.at_least <= back - before, "{report:?}");
        assert!(outage.at_most.expect("it ended") >= up_again - down, "{report:?}");
        assert!(report.longest_silence >= up_again - down, "{report:?}");
        assert!(report.longest_silence <= back - before, "{report:?}");
        assert!(outage.lost >= 10, "{report:?}");
        assert_eq!(report.sent, report.answered + report.lost);
    }
}

#[test]
fn a_probe_of_a_service_that_is_not_there_says_why() {
    let Some(namespace) = namespace() else { return };
    let report = namespace
        .run(|| {
            let probe = probe("tcp:127.0.0.1:1");
            std::thread::sleep(Duration::from_millis(60));
            probe.finish().unwrap()
        })
        .unwrap();
    assert_eq!(report.answered, 0);
    assert!(report.sent >= 5);
    assert!(report.first_failure.unwrap().contains("refused"));
    assert_eq!(report.outage.unwrap().at_most, None);
}
