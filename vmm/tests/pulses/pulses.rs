//! Save, rebuild and restore in place, again and again, while the guest works and keeps evidence.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferry_vmm::lifecycle::State;
use ferry_vmm::machine::{Machine, Wiring};

use crate::harness::{Guest, config, number, skip};

/// One test at a time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pulses() -> u32 {
    std::env::var("FERRY_PULSES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(30)
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn many_pulses_leave_the_guest_and_its_evidence_whole() {
    let _turn = turn();
    if skip() {
        return;
    }
    for (cpus, work) in [
        (1, "idle"),
        (2, "work=allocator memory=32M rate=fast order=random"),
        (4, "spin"),
        (2, "gc"),
    ] {
        let work = if work.starts_with("work=") {
            work.to_owned()
        } else {
            format!("work={work}")
        };
        let mut guest = Guest::start(&config(cpus, &format!("{work} heartbeat=10ms")));
        let first = guest.line(|line| line.contains(r#""t":"beat""#));
        guest.machine.pulse().unwrap();
        let files = open_files();
        let mut times: Vec<Duration> = Vec::new();
        for _ in 0..pulses() {
            times.push(guest.machine.pulse().unwrap());
            guest.beat();
        }
        assert_eq!(guest.machine.state(), State::Running);
        assert!(
            open_files() <= files + 8,
            "files leak: {files} before, {} after",
            open_files()
        );
        let beats = guest.beats();
        let last = guest.line(|line| line.contains(r#""t":"beat""#));
        assert_eq!(
            number(&last, "seq"),
            number(&first, "seq") + beats + 1,
            "a heartbeat was lost or doubled"
        );
        times.sort();
        eprintln!(
            "{cpus} CPUs, {work}: median pulse {:?}, worst {:?}",
            times[times.len() / 2],
            times[times.len() - 1]
        );
    }
}

#[test]
fn a_saved_machine_goes_on_in_another_one_with_its_memory_copied() {
    let _turn = turn();
    use vm_memory::{Bytes, GuestAddress};
    if skip() {
        return;
    }
    let mut guest = Guest::start(&config(2, "work=allocator memory=16M rate=2000 heartbeat=20ms"));
    guest.beat();
    let before = guest.beat();
    guest.machine.pause().unwrap();
    let records = ferry_devices::records::encode(&guest.machine.save().unwrap()).unwrap();

    let wiring = Wiring::default();
    let other = Machine::prepare(guest.machine.config(), guest.machine.description(), &wiring).unwrap();
    let mut page = vec![0u8; 1 << 20];
    for at in (0..128 << 20).step_by(1 << 20) {
        guest
            .machine
            .ram()
            .read_slice(&mut page, GuestAddress(at))
            .unwrap();
        other.ram().write_slice(&page, GuestAddress(at)).unwrap();
    }
    other
        .restore(ferry_devices::records::decode(&records).unwrap())
        .unwrap();
    assert_eq!(other.state(), State::Paused);
    let mut moved = Guest::over(other, &wiring);
    moved.machine.resume().unwrap();
    assert!(moved.beat() > before, "the guest began anew");
    moved.line(|line| line.contains(r#""t":"sum""#));
    // The old one has not moved, and can go on too: a failed crossing does that.
    guest.machine.resume().unwrap();
    guest.beat();
}

#[test]
fn a_machine_refuses_what_its_state_does_not_allow() {
    let _turn = turn();
    if skip() {
        return;
    }
    let mut guest = Guest::start(&config(1, "work=idle heartbeat=20ms"));
    guest.beat();
    assert!(
        guest
            .machine
            .save()
            .unwrap_err()
            .to_string()
            .contains("only a paused machine")
    );
    guest.machine.pause().unwrap();
    let records = guest.machine.save().unwrap();
    assert!(
        guest
            .machine
            .restore(records.clone())
            .unwrap_err()
            .to_string()
            .contains("restored into")
    );
    // A record too many, and one too few.
    let prepare = || {
        Machine::prepare(
            guest.machine.config(),
            guest.machine.description(),
            &Wiring::default(),
        )
        .unwrap()
    };
    let mut strange = records.clone();
    strange[0].name = "warp-drive".into();
    let error = prepare().restore(strange).unwrap_err().to_string();
    assert!(error.contains("clock"), "{error}");
    let mut more = records.clone();
    more.push(ferry_devices::state::Record {
        name: "warp-drive".into(),
        ..records[0].clone()
    });
    let broken = prepare();
    let error = broken.restore(more).unwrap_err().to_string();
    assert!(error.contains("warp-drive"), "{error}");
    assert!(
        matches!(broken.state(), State::Failed { .. }),
        "{}",
        broken.state()
    );
    let mut cut = records;
    cut[1].body.truncate(100);
    assert!(prepare().restore(cut).is_err());
}

#[test]
fn a_pulse_keeps_the_clock_right_and_the_disk_whole() {
    let _turn = turn();
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(16 << 20).unwrap();
    let mut config = config(2, "work=disk journal=4M heartbeat=20ms");
    config.disks.push(path.display().to_string().parse().unwrap());
    config.rng = true;
    config.balloon = true;
    config.console = Some(ferry_vmm::config::SerialTarget::Null);
    let mut guest = Guest::start(&config);
    let first = guest.line(|line| line.contains(r#""t":"sum""#));
    let begun = std::time::Instant::now();
    for _ in 0..pulses() {
        guest.machine.pulse().unwrap();
        guest.beat();
    }
    // A pulse that takes longer than a heartbeat leaves lines unread: the time of an old one says nothing.
    guest.catch_up();
    let last = guest.line(|line| line.contains(r#""t":"sum""#));
    assert!(
        number(&last, "acked") > number(&first, "acked"),
        "the journal stands still: {last}"
    );
    assert_eq!(number(&last, "io_errors"), 0, "{last}");
    // The guest's clock has gone on with ours while it stood still.
    let guest_time = Duration::from_nanos(number(&last, "ns") - number(&first, "ns"));
    let here = begun.elapsed();
    let off = here.abs_diff(guest_time);
    assert!(
        off < Duration::from_millis(1200),
        "{guest_time:?} in the guest, {here:?} here"
    );
}
