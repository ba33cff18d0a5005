//! Loads against servers of our own whose faults are known.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::calc_service;
use super::generator::{Load, Plan, Service};
use super::record::Summary;

fn plan(service: Service, rate_per_sec: f64, duration_ms: u64) -> Plan {
    Plan {
        service,
        rate_per_sec,
        duration: Some(Duration::from_millis(duration_ms)),
        deadline: Some(Duration::from_millis(100)),
        timeout: Duration::from_secs(2),
        seed: 3,
    }
}

fn run(plan: Plan) -> Summary {
    let load = Load::start(plan).unwrap();
    while !load.is_over() {
        std::thread::sleep(Duration::from_millis(5));
    }
    load.finish()
}

struct Web {
    connections: AtomicU64,
    requests: AtomicU64,
    /// No answer goes out in this time after the start.
    stall: Mutex<Option<(Instant, Instant)>>,
    body: fn(u64) -> Vec<u8>,
    close_each: bool,
}

fn serve_web(web: Web) -> (Arc<Web>, Service) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap())
        .parse()
        .unwrap();
    let web = Arc::new(web);
    let shared = Arc::clone(&web);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let web = Arc::clone(&shared);
            web.connections.fetch_add(1, Ordering::Relaxed);
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while matches!(stream.read(&mut buffer), Ok(n) if n > 0) {
                    let stall = *web.stall.lock().unwrap();
                    if let Some((from, to)) = stall
                        && (from..to).contains(&Instant::now())
                    {
                        std::thread::sleep(to - Instant::now());
                    }
                    let body = (web.body)(web.requests.fetch_add(1, Ordering::Relaxed));
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
                    if stream.write_all(&[head.as_bytes(), &body].concat()).is_err() || web.close_each {
                        return;
                    }
                }
            });
        }
    });
    let service = Service::Http {
        url,
        keep_alive: true,
        same: true,
    };
    (web, service)
}

fn page(_: u64) -> Vec<u8> {
    vec![b'x'; 10_000]
}

fn web() -> Web {
    Web {
        connections: AtomicU64::new(0),
        requests: AtomicU64::new(0),
        stall: Mutex::new(None),
        body: page,
        close_each: false,
    }
}

#[test]
fn every_request_that_comes_due_is_sent_and_answered() {
    let (web, service) = serve_web(web());
    let summary = run(plan(service, 400.0, 1_000));
    assert_eq!(summary.arrivals, web.requests.load(Ordering::Relaxed));
    assert_eq!(
        (summary.answered, summary.failed()),
        (summary.arrivals, 0),
        "{summary:?}"
    );
    assert!((300..500).contains(&summary.arrivals), "{}", summary.arrivals);
    assert_eq!(summary.bytes, summary.answered * 10_000);
    assert!(
        web.connections.load(Ordering::Relaxed) < summary.arrivals / 2,
        "kept connections"
    );
}

#[test]
fn a_new_connection_for_each_request_and_servers_that_close_are_no_failures() {
    let (web, service) = serve_web(web());
    let Service::Http { url, .. } = service else {
        unreachable!()
    };
    let service = Service::Http {
        url,
        keep_alive: false,
        same: true,
    };
    let summary = run(plan(service, 200.0, 500));
    assert_eq!(summary.failed(), 0, "{summary:?}");
    assert_eq!(web.connections.load(Ordering::Relaxed), summary.arrivals);

    let (_, service) = serve_web(Web {
        close_each: true,
        ..self::web()
    });
    let summary = run(plan(service, 200.0, 500));
    assert_eq!(summary.failed(), 0, "{summary:?}");
}

/// A client that waits for its answer before it asks again would see one slow request in the pause.
#[test]
fn a_pause_is_felt_by_every_request_that_falls_into_it() {
    const PAUSE: Duration = Duration::from_millis(400);
    let (web, service) = serve_web(web());
    let began = Instant::now();
    let from = began + Duration::from_millis(300);
    *web.stall.lock().unwrap() = Some((from, from + PAUSE));
    let summary = run(plan(service, 300.0, 1_000));
    assert_eq!(summary.failed(), 0, "{summary:?}");
    assert!(
        summary.longest_silence >= PAUSE - Duration::from_millis(20),
        "{summary:?}"
    );
    assert!(
        summary.longest_silence < PAUSE + Duration::from_millis(150),
        "{summary:?}"
    );
    // 300 a second for the 300 ms of the pause that are more than the deadline of 100 ms.
    assert!((45..140).contains(&summary.missed_deadline), "{summary:?}");
    assert!(summary.max.unwrap() >= PAUSE - Duration::from_millis(20));
    let p50 = summary.p50.unwrap();
    assert!(
        p50 < Duration::from_millis(50),
        "most were answered at once: {p50:?}"
    );
}

#[test]
fn wrong_silent_and_absent_servers_are_told_apart() {
    let (_, service) = serve_web(Web {
        body: |n| vec![if n == 40 { b'y' } else { b'x' }; 1_000],
        ..web()
    });
    let summary = run(plan(service, 200.0, 500));
    assert_eq!((summary.wrong, summary.failed()), (1, 1), "{summary:?}");
    assert!(summary.first_failure.unwrap().contains("differs"));

    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut quiet = plan(
        Service::Http {
            url: format!("http://{}/", silent.local_addr().unwrap())
                .parse()
                .unwrap(),
            keep_alive: true,
            same: false,
        },
        100.0,
        200,
    );
    quiet.timeout = Duration::from_millis(100);
    let summary = run(quiet);
    assert_eq!(summary.timed_out, summary.arrivals);
    assert_eq!(summary.missed_deadline, summary.arrivals);
    assert_eq!(summary.longest_silence, Duration::from_millis(200));

    let gone = silent.local_addr().unwrap();
    drop(silent);
    let summary = run(plan(calc_service(&format!("tcp:{gone}"), 2).unwrap(), 100.0, 200));
    assert_eq!(summary.errors, summary.arrivals);
    assert!(summary.first_failure.unwrap().contains("refused"));
}

/// The answer of a calculator that is right, for tests that need small numbers of them.
fn split(line: &str) -> String {
    let mut words = line.split_whitespace();
    let (sequence, number): (u64, u64) = (
        words.next().unwrap().parse().unwrap(),
        words.next().unwrap().parse().unwrap(),
    );
    let prime = |n: u64| n > 1 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d));
    let p = (2..number).find(|p| prime(*p) && prime(number - p)).unwrap();
    format!("{sequence} {number} = {p} + {}\n", number - p)
}

#[test]
fn a_calculator_over_udp_that_loses_repeats_and_errs() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address: SocketAddr = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        let mut seen = HashSet::new();
        for count in 0u64.. {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else {
                return;
            };
            let line = String::from_utf8_lossy(&buffer[..length]).into_owned();
            assert!(seen.insert(line.clone()), "every question is asked once");
            let answer = match count {
                10 => continue,
                20 => split(&line).replace(" + ", " + 1"),
                _ => split(&line),
            };
            socket.send_to(answer.as_bytes(), from).unwrap();
            if count == 30 {
                socket.send_to(answer.as_bytes(), from).unwrap();
            }
        }
    });
    let mut plan = plan(calc_service(&format!("udp:{address}"), 0).unwrap(), 300.0, 500);
    plan.timeout = Duration::from_millis(300);
    let summary = run(plan);
    assert_eq!(
        (summary.timed_out, summary.wrong, summary.errors),
        (1, 1, 0),
        "{summary:?}"
    );
    assert_eq!(summary.answered, summary.arrivals - 2);
}

#[test]
fn a_calculator_over_tcp_is_asked_over_few_connections() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&connections);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            counted.fetch_add(1, Ordering::Relaxed);
            std::thread::spawn(move || {
                let mut writer = stream.try_clone().unwrap();
                for line in std::io::BufRead::lines(std::io::BufReader::new(stream)).map_while(Result::ok) {
                    let _ = writer.write_all(split(&line).as_bytes());
                }
            });
        }
    });
    let summary = run(plan(
        calc_service(&format!("tcp:{address}"), 3).unwrap(),
        400.0,
        500,
    ));
    assert_eq!(summary.failed(), 0, "{summary:?}");
    assert!(summary.arrivals > 100);
    assert_eq!(connections.load(Ordering::Relaxed), 3);
}

#[test]
fn what_cannot_be_asked_is_refused() {
    assert!(calc_service("127.0.0.1:7", 1).is_err());
    assert!(calc_service("udp:nowhere", 1).is_err());
    let (_, service) = serve_web(web());
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(Load::start(plan(service.clone(), rate, 100)).is_err());
    }
}
