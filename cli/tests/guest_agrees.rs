//! The guest's own code writes a journal and a database and answers questions; `ferry load` must read both as the guest meant them.
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
#[path = "../../images/builtin/src/table.rs"]
mod table;

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

const ROWS: u64 = 500;
const LOG_BLOCKS: u64 = 8;
const SEED: u64 = 99;
const BASE: usize = 64;

/// A disk whose second half has a database: all rows, and the updates of some blocks of its log, which the table may have already.
struct Disk {
    blocks: Vec<[u8; journal::BLOCK]>,
    versions: Vec<u32>,
}

impl Disk {
    fn new() -> Disk {
        let mut disk = Disk {
            blocks: vec![[0; journal::BLOCK]; 2 * BASE],
            versions: vec![1; ROWS as usize],
        };
        let header = table::Header {
            rows: ROWS,
            log_blocks: LOG_BLOCKS,
            epoch: 4,
            committed: 1000,
            seed: SEED,
        };
        header.write(&mut disk.blocks[BASE]);
        (0..ROWS as u32).for_each(|id| disk.save(id, 1));
        disk
    }

    fn save(&mut self, id: u32, version: u32) {
        let at = id as usize;
        let block = &mut self.blocks[BASE + 1 + LOG_BLOCKS as usize + at / table::ROWS_PER_BLOCK];
        let place = at % table::ROWS_PER_BLOCK * 256;
        for (word, to) in table::row(id, version, SEED)
            .iter()
            .zip(block[place..].chunks_exact_mut(8))
        {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// The next block of the log.
    fn log(&mut self, sequence: u64, epoch: u64, rows: impl Iterator<Item = u32>) {
        let updates: Vec<_> = rows
            .map(|row| {
                self.versions[row as usize] += 1;
                (row, self.versions[row as usize])
            })
            .collect();
        let head = table::LogHead {
            epoch,
            sequence,
            committed: 1000 + sequence * updates.len() as u64,
        };
        head.write(&updates, &mut self.blocks[BASE + sequence as usize]);
    }

    fn busy() -> Disk {
        let mut disk = Disk::new();
        // What an earlier epoch left, and what this one wrote.
        disk.log(6, 3, 0..0);
        (1..=5).for_each(|sequence| disk.log(sequence, 4, (0..100).map(|row| row * 3 + sequence as u32)));
        disk
    }

    fn check(&self, committed: u64) -> ferry::load::database::DatabaseReport {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&self.blocks.concat()).unwrap();
        ferry::load::database::check(file.path(), Some(committed)).unwrap()
    }
}

#[test]
fn the_guests_database_is_whole_to_the_checker_before_and_while_its_table_is_saved() {
    let mut disk = Disk::busy();
    let report = disk.check(1500);
    assert!(report.is_whole(), "{report:?}");
    assert_eq!(
        (report.log_blocks, report.committed, report.rows),
        (5, 1500, ROWS)
    );
    // Half of the table is saved; the header still names the old epoch.
    for id in 0..ROWS as u32 / 2 {
        disk.save(id, disk.versions[id as usize]);
    }
    assert!(disk.check(1500).is_whole());
    // A block that was being written when the machine died.
    disk.blocks[BASE + 6] = [0x5a; journal::BLOCK];
    assert!(disk.check(1500).is_whole());
}

#[test]
fn a_damaged_database_is_found_whatever_was_damaged() {
    let damaged = |what: &str, harm: &dyn Fn(&mut Disk)| {
        let mut disk = Disk::busy();
        harm(&mut disk);
        let report = disk.check(1500);
        assert!(!report.is_whole(), "{what}: {report:?}");
        report
    };
    // Any byte of any sound block of the log.
    for sequence in 1..=5 {
        for byte in (0..journal::BLOCK).step_by(97).chain([journal::BLOCK - 1]) {
            damaged("a byte of the log", &|disk| {
                disk.blocks[BASE + sequence][byte] ^= 0x10
            });
        }
    }
    // A hole: the blocks after it were acknowledged as well.
    let report = damaged("a hole", &|disk| disk.blocks[BASE + 3].fill(0));
    assert_eq!((report.beyond_a_hole, report.committed), (2, 1200));
    // The end of the log is lost: only what the guest said tells.
    damaged("the end", &|disk| disk.blocks[BASE + 5].fill(0));
    // A byte of a row, and a row that is another one's.
    let report = damaged("a row", &|disk| {
        disk.blocks[BASE + 1 + LOG_BLOCKS as usize][300] ^= 1
    });
    assert_eq!(report.damaged_rows, [1]);
    damaged("a stray row", &|disk| {
        let table = BASE + 1 + LOG_BLOCKS as usize;
        disk.blocks[table + 1] = disk.blocks[table];
    });
    // A write of the table that was lost although the log began anew after it.
    let report = damaged("an old row", &|disk| {
        let before = disk.versions[3];
        disk.versions[3] = 7;
        disk.log(1, 4, (0..100).map(|row| row * 3 + 3));
        disk.versions[3] = before;
    });
    assert!(report.outdated >= 1, "{report:?}");
    // An update of a row that there is not, in a block that is sound.
    damaged("a row outside", &|disk| {
        let head = table::LogHead {
            epoch: 4,
            sequence: 6,
            committed: 1501,
        };
        head.write(&[(ROWS as u32, 2)], &mut disk.blocks[BASE + 6]);
    });
}

#[test]
fn a_header_that_lies_ends_in_a_sentence() {
    let mut disk = Disk::new();
    for (rows, log_blocks) in [(u64::MAX, 8), (ROWS, u64::MAX), (ROWS, 1 << 40)] {
        let header = table::Header {
            rows,
            log_blocks,
            epoch: 4,
            committed: 0,
            seed: SEED,
        };
        header.write(&mut disk.blocks[BASE]);
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&disk.blocks.concat()).unwrap();
        let error = ferry::load::database::check(file.path(), None).unwrap_err();
        assert!(error.to_string().contains("could not read block"), "{error}");
    }
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
