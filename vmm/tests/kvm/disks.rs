//! A guest that works on a real disk image through virtio-blk over PCI.

use ferry_vmm::config::DiskConfig;
use ferry_vmm::lifecycle::StopReason;

use crate::harness::{Guest, config, skip};

fn guest_on(path: &std::path::Path) -> Guest {
    let disk: DiskConfig = path.display().to_string().parse().unwrap();
    let mut config = config(2, "work=disk journal=4M heartbeat=50ms");
    config.disks.push(disk);
    Guest::start(&config)
}

fn is_journal(line: &str) -> bool {
    line.contains(r#""t":"journal""#)
}

#[test]
fn a_journal_is_written_and_found_again_by_the_next_machine() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    for _ in 0..2 {
        let mut guest = guest_on(&path);
        let found = guest.line(is_journal);
        eprintln!("{found}");
        let sum = guest.line(|line| line.contains(r#""t":"sum""#));
        let sum = if sum.contains("\"seq\":1,") {
            guest.line(|line| line.contains(r#""t":"sum""#))
        } else {
            sum
        };
        eprintln!("{sum}");
        // In the middle of its work, and twice: pausing drains the disk.
        for _ in 0..10 {
            guest.machine.pause().unwrap();
            guest.machine.resume().unwrap();
            guest.beat();
        }
        guest.machine.stop(StopReason::Requested).unwrap();
    }
}
