//! Each failure ends well: the machine is where the report says, it says why in words, and a second try works.
#![allow(clippy::unwrap_used)] // a test's own helpers

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{MACHINE, Stage, Stand, options};
use ferry_migration::block::BlockKind;
use ferry_migration::failure::{Cause, Failure, Phase, Reason, Side, Whereabouts};
use ferry_migration::handover::{Ledger, LedgerId, Standing};
use ferry_migration::machine::Observer;
use ferry_migration::options::{Handle, Options};
use ferry_migration::outgoing::{World, cross};
use ferry_migration::pages::encode::{Compression, PageCounts};
use ferry_migration::policy::DeadlineAction;
use ferry_migration::report::{Event, Report};
use ferry_migration::resolve::{Resolved, resolve};
use ferry_migration::transport::faulty::{Cut, Faulty, When};

/// It failed, the machine runs here as if nothing had happened, and a second try works.
fn fails_and_crosses_after(stage: &mut Stage, first: &Options) -> Failure {
    let report = stage.cross(&mut stage.loopback(4), first);
    stays_and_crosses_after(stage, &report)
}

fn stays_and_crosses_after(stage: &mut Stage, report: &Report) -> Failure {
    let failure = report.outcome.failure.clone().unwrap();
    assert_eq!(report.outcome.whereabouts, Whereabouts::Here, "{failure}");
    assert_eq!(stage.outgoing.stand, Stand::Running, "{failure}");
    assert!(stage.witness.runs_here() && !stage.witness.runs_there());
    assert!(!stage.outgoing.released && stage.outgoing.throttled == 0);
    assert!(stage.outgoing.blocks.iter().all(|block| !block.is_tracking()));
    let sentence = failure.to_string();
    assert!(sentence.contains("the machine is here"), "{sentence}");
    stage.restart_host();
    stage.outgoing.unfit_after = u64::MAX;
    *stage.built.refuse.lock().unwrap() = None;
    stage.built.start_fails.store(false, Ordering::Release);
    stage.built.room.store(0, Ordering::Release);
    stage.handle = Handle::new();
    stage.guest_works(55, 3);
    let report = stage.cross(&mut stage.loopback(4), &options(200, 2));
    assert_eq!(report.outcome.failure, None, "second try after: {sentence}");
    stage.assert_equal();
    failure
}

#[test]
fn a_refusal_there_is_heard_here_in_its_own_words() {
    for cause in [Cause::Incompatible, Cause::NoMemory, Cause::NotAllowed] {
        let mut stage = Stage::new(1);
        *stage.built.refuse.lock().unwrap() = Some(Reason::new(cause, "this host has no AVX-512"));
        let failure = fails_and_crosses_after(&mut stage, &options(1, 2));
        assert_eq!((failure.cause, failure.side), (cause, Side::Incoming));
        assert!(failure.to_string().contains("no AVX-512"), "{failure}");
    }
}

#[test]
fn a_disk_that_fills_up_there_in_the_middle() {
    let mut stage = Stage::new(2);
    stage.built.room.store(200_000, Ordering::Release);
    let failure = fails_and_crosses_after(&mut stage, &options(1, 2));
    assert_eq!(failure.cause, Cause::NoSpace, "{failure}");
}

#[test]
fn a_disk_that_cannot_be_read_here() {
    let mut stage = Stage::new(3);
    stage.outgoing.blocks[2].broken.store(true, Ordering::Release);
    let report = stage.cross(&mut stage.loopback(4), &options(1, 2));
    stage.outgoing.blocks[2].broken.store(false, Ordering::Release);
    let failure = stays_and_crosses_after(&mut stage, &report);
    assert_eq!((failure.cause, failure.side), (Cause::Data, Side::Outgoing));
}

#[test]
fn a_guest_that_powers_off_while_it_crosses() {
    let mut stage = Stage::new(4);
    stage.outgoing.unfit_after = 1;
    let failure = fails_and_crosses_after(&mut stage, &options(1, 2));
    assert!(failure.message.contains("powered off"), "{failure}");
}

#[test]
fn a_machine_that_does_not_start_there_starts_here_again() {
    let mut stage = Stage::new(5);
    stage.built.start_fails.store(true, Ordering::Release);
    let failure = fails_and_crosses_after(&mut stage, &options(1, 2));
    assert_eq!((failure.cause, failure.phase), (Cause::Declined, Phase::HandOver));
    assert!(failure.message.contains("the vCPU would not start"), "{failure}");
}

#[test]
fn a_ledger_that_cannot_be_written_here_keeps_the_machine_here() {
    let mut stage = Stage::new(6);
    stage.our_ledger.fails.store(true, Ordering::Release);
    let report = stage.cross(&mut stage.loopback(4), &options(1, 2));
    stage.our_ledger.fails.store(false, Ordering::Release);
    let failure = stays_and_crosses_after(&mut stage, &report);
    assert_eq!((failure.cause, failure.phase), (Cause::Ledger, Phase::CopyLive));
}

#[test]
fn a_ledger_that_cannot_be_written_there_leaves_doubt_and_no_runner() {
    let mut stage = Stage::new(7);
    *stage.built.ledger_breaks.lock().unwrap() = Some(Arc::clone(&stage.their_ledger.fails));
    let mut options = options(1, 2);
    options.doubt_for = Duration::from_secs(3);
    let report = stage.cross(&mut stage.loopback(4), &options);
    assert_eq!(
        report.outcome.whereabouts,
        Whereabouts::Unknown,
        "{:?}",
        report.outcome
    );
    assert_eq!(stage.outgoing.stand, Stand::Stranded);
    assert!(!stage.witness.runs_here() && !stage.witness.runs_there());
    assert!(
        report.outcome.sentence().contains("ferry resolve"),
        "{}",
        report.outcome.sentence()
    );
    // And when it can be written again, it is settled.
    stage.their_ledger.fails.store(false, Ordering::Release);
    let record = stage.our_ledger.records(MACHINE).unwrap().remove(0);
    match resolve(
        &record,
        &mut stage.loopback(4),
        &mut stage.our_ledger,
        &*stage.clock,
        SECOND,
    )
    .unwrap()
    {
        Resolved::Here(permit, evidence) => {
            assert_eq!(permit.session(), record.session);
            assert_eq!(evidence.theirs, Some((Standing::Declined, LedgerId([2; 16]))));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(
        stage.our_ledger.records(MACHINE).unwrap()[0].standing,
        Standing::Kept
    );
}

const SECOND: Duration = Duration::from_secs(1);

/// A crossing whose last answer is lost for good; returns the stage in doubt.
fn in_doubt(seed: u64) -> Stage {
    let count = {
        let mut stage = Stage::new(seed);
        let mut link = Faulty::new(stage.loopback(4), Vec::new(), true, Arc::new(|| {}));
        stage.cross(&mut link, &options(1, 2));
        link.count()
    };
    let mut stage = Stage::new(seed);
    // The last message is Finish, the one before it is the answer to the go-ahead.
    let cut = Cut {
        at: count - 2,
        when: When::Before,
    };
    let mut link = Faulty::new(stage.loopback(4), vec![cut], false, Arc::new(|| {}));
    let mut options = options(1, 2);
    options.doubt_for = SECOND;
    let report = stage.cross(&mut link, &options);
    assert_eq!(
        report.outcome.whereabouts,
        Whereabouts::Unknown,
        "{:?}",
        report.outcome
    );
    assert!(stage.witness.runs_there());
    stage
}

#[test]
fn resolve_finds_the_machine_there() {
    let mut stage = in_doubt(8);
    let record = stage.our_ledger.records(MACHINE).unwrap().remove(0);
    assert_eq!(record.standing, Standing::GivenAway);
    let resolved = resolve(
        &record,
        &mut stage.loopback(4),
        &mut stage.our_ledger,
        &*stage.clock,
        SECOND,
    );
    assert!(matches!(resolved, Ok(Resolved::There(_))), "{resolved:?}");
    let record = stage.our_ledger.records(MACHINE).unwrap().remove(0);
    assert_eq!(record.standing, Standing::Gone);
    // What is settled stays settled.
    assert!(
        resolve(
            &record,
            &mut stage.loopback(4),
            &mut stage.our_ledger,
            &*stage.clock,
            SECOND
        )
        .is_err()
    );
    // And the old copy cannot be given away again.
    let report = stage.cross(&mut stage.loopback(4), &options(3, 2));
    assert_eq!(report.outcome.failure.unwrap().cause, Cause::Busy);
}

#[test]
fn a_new_ledger_there_proves_nothing() {
    let mut stage = in_doubt(9);
    stage.their_ledger = common::MemoryLedger::new(77, &stage.witness, false);
    stage.restart_host();
    let record = stage.our_ledger.records(MACHINE).unwrap().remove(0);
    let resolved = resolve(
        &record,
        &mut stage.loopback(4),
        &mut stage.our_ledger,
        &*stage.clock,
        SECOND,
    );
    match resolved.unwrap() {
        Resolved::Unknown(evidence) => assert!(evidence.message.contains("another ledger")),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        stage.our_ledger.records(MACHINE).unwrap()[0].standing,
        Standing::GivenAway
    );
}

/// Cancels at the n-th event.
struct CancelAt<'a> {
    handle: &'a Handle,
    left: AtomicU64,
    seen: Mutex<Vec<String>>,
}

impl Observer for CancelAt<'_> {
    fn event(&self, event: &Event) {
        self.seen
            .lock()
            .unwrap()
            .push(format!("{event:?}").chars().take(30).collect());
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.handle.cancel();
        }
    }
}

#[test]
fn cancel_at_every_event_of_a_crossing() {
    let (mut here, mut there) = (0, 0);
    for at in 1..200 {
        let mut stage = Stage::new(10);
        let observer = CancelAt {
            handle: &Handle::new(),
            left: AtomicU64::new(at),
            seen: Mutex::default(),
        };
        let mut link = stage.loopback(4);
        let report = cross(
            World {
                machine: &mut stage.outgoing,
                link: &mut link,
                ledger: &mut stage.our_ledger,
                clock: &*stage.clock,
                observer: &observer,
                handle: observer.handle,
            },
            &options(1, 2),
        );
        drop(link);
        match report.outcome.whereabouts {
            Whereabouts::Here => {
                let failure = stays_and_crosses_after(&mut stage, &report);
                assert_eq!(failure.cause, Cause::Cancelled, "{failure}");
                here += 1;
            }
            Whereabouts::There => {
                assert!(stage.witness.runs_there());
                there += 1;
            }
            Whereabouts::Unknown => panic!("cancelled into doubt"),
            Whereabouts::Ended => panic!("nobody ended it"),
        }
        if u64::try_from(observer.seen.lock().unwrap().len()).unwrap() < at {
            break;
        }
    }
    // Every phase up to the hand over could be cancelled; after it nothing could.
    assert!(here >= 8, "{here} cancelled");
    assert!((1..=4).contains(&there), "{there} crossed");
}

#[test]
fn a_deadline_does_what_was_asked() {
    for (action, crosses) in [
        (DeadlineAction::Cancel, false),
        (DeadlineAction::PauseAndFinish, true),
        (DeadlineAction::GoOn, true),
    ] {
        let mut stage = Stage::new(11);
        let mut options = options(1, 2);
        options.limits.deadline = Some(Duration::from_micros(20));
        options.limits.on_deadline = action;
        options.limits.downtime = Duration::from_millis(1);
        let report = stage.cross(&mut stage.loopback(4), &options);
        assert_eq!(
            report.outcome.failure.is_none(),
            crosses,
            "{action:?}: {:?}",
            report.outcome
        );
        if crosses {
            stage.assert_equal();
        } else {
            let failure = stays_and_crosses_after(&mut stage, &report);
            assert_eq!(failure.cause, Cause::Deadline, "{failure}");
        }
    }
}

#[test]
fn what_the_other_side_has_from_before_crosses_by_name() {
    let mut stage = Stage::new(12);
    let disk = stage
        .outgoing
        .blocks
        .iter()
        .find(|b| b.info.kind == BlockKind::Disk)
        .unwrap();
    stage
        .built
        .libraries
        .lock()
        .unwrap()
        .insert(disk.info.id.0, disk.bytes());
    let report = stage.cross(&mut stage.loopback(4), &options(1, 2));
    assert_eq!(report.outcome.failure, None, "{report:#?}");
    stage.assert_equal();
    // The guest wrote to a few clusters since; the others did not travel.
    assert!(report.disk.known > 5, "{:?}", report.disk);
    let sinks = stage.built.sinks.lock().unwrap();
    assert_eq!(
        sinks[2].taken_from_library.load(Ordering::Acquire),
        report.disk.known
    );
}

fn sum(rounds: &[ferry_migration::report::Round]) -> (PageCounts, PageCounts) {
    let mut both = (PageCounts::default(), PageCounts::default());
    rounds.iter().for_each(|round| {
        both.0.add(&round.memory);
        both.1.add(&round.disk);
    });
    both
}

#[test]
fn the_report_adds_up() {
    for seed in 20..40 {
        let mut stage = Stage::new(seed);
        let mut options = options(1, 3);
        options.verify = seed % 2 == 0;
        options.compression = [Compression::Auto, Compression::Off, Compression::Always][seed as usize % 3];
        let report = stage.cross(&mut stage.loopback(4), &options);
        assert_eq!(report.outcome.failure, None);
        let parts = report.downtime.parts();
        assert_eq!(
            parts.iter().map(|(_, part)| *part).sum::<Duration>(),
            report.downtime.total
        );
        assert!(report.downtime.total <= report.total);
        assert_eq!(sum(&report.rounds), (report.memory, report.disk));
        let wire: u64 = report.rounds.iter().map(|round| round.wire_bytes).sum();
        assert_eq!(wire, report.wire_bytes);
        assert_eq!(wire, report.memory.wire_bytes + report.disk.wire_bytes);
        // Every page of memory crossed at least once.
        assert!(report.memory.units() >= 740, "{:?}", report.memory);
        assert_eq!(report.checks.compared, options.verify.then_some(true));
        let text = serde_json::to_string(&report).unwrap();
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
