//! The guest's own code writes a journal and answers questions; `ferry load` must read both as the guest meant them.
#![allow(clippy::unwrap_used)] // a test file: failing is its job
#![allow(
    unreachable_pub,
    dead_code,
    reason = "the files are the guest's; this is not where they are used"
)]

#[path = "../../images/builtin/src/content.rs"]
mod content;
#[path = "../../images/builtin/src/goldbach.rs"]
mod goldbach;
#[path = "../../images/builtin/src/journal.rs"]
mod journal;

use std::io::Write as _;
use std::net::UdpSocket;
use std::time::Duration;

use ferry::load::generator::{Load, Plan, Service};

#[test]
fn the_guests_journal_is_whole_to_the_checker_and_a_lost_record_is_found() {
    let head = journal::Super {
        capacity: 40,
        seed: 99,
        starts: 3,
    };
    let mut blocks = vec![[0; journal::BLOCK]; 41];
    head.write(&mut blocks[0]);
    for number in 1..=100 {
        let record = journal::Record {
            number,
            flushed: (number - 1) / 16 * 16,
            time_ns: number * 1000,
            seed: 99,
            starts: 3,
        };
        record.write(&mut blocks[head.block_of(number) as usize]);
    }
    let check = |blocks: &[[u8; journal::BLOCK]]| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&blocks.concat()).unwrap();
        ferry::load::journal::check(file.path(), Some(100)).unwrap()
    };
    let report = check(&blocks);
    assert!(report.is_whole(), "{report:?}");
    assert_eq!((report.last, report.flushed, report.starts), (100, 96, 3));
    blocks[head.block_of(77) as usize].fill(0);
    assert_eq!(check(&blocks).missing_numbers, [77]);
}

#[test]
fn the_guests_calculator_gives_right_answers() {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 256];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            let mut answer = String::new();
            goldbach::answer(&String::from_utf8_lossy(&buffer[..length]), &mut answer);
            socket.send_to(answer.as_bytes(), from).unwrap();
        }
    });
    let load = Load::start(Plan {
        service: Service::CalcUdp(address),
        rate_per_sec: 500.0,
        duration: Some(Duration::from_millis(400)),
        deadline: None,
        timeout: Duration::from_secs(5),
        seed: 1,
    })
    .unwrap();
    while !load.is_over() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let summary = load.finish();
    assert!(summary.answered > 100);
    assert_eq!(summary.failed(), 0, "{summary:?}");
}
