//! The fear: a link that breaks, or a side that dies, at any message whatever. Afterwards at most one side runs,
//! what arrived is what was sent, no dirty bit is lost, and a second try succeeds.
//!
//! Every message of a crossing is tried, before, in the middle and after, on both kinds of connection, with and
//! without reconnect, and with either side killed at it. FERRY_SEEDS says how many guests are tried (default 2).
#![allow(clippy::unwrap_used)] // a test's own helpers

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::{MACHINE, Stage, Stand, options};
use ferry_migration::failure::Whereabouts;
use ferry_migration::handover::{Ledger, Standing};
use ferry_migration::options::Options;
use ferry_migration::report::Report;
use ferry_migration::transport::faulty::{Cut, Faulty, OnCut, When};

fn seeds() -> u64 {
    std::env::var("FERRY_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(2)
}

/// What happens at the cut beside the link breaking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Disaster {
    /// The link comes back.
    Glitch,
    /// The link stays broken.
    Severed,
    /// The incoming process is killed and started again.
    IncomingKilled,
    /// The outgoing process is killed.
    OutgoingKilled,
}

fn small(seed: u64) -> Stage {
    use common::FakeBlock;
    use ferry_migration::block::BlockKind;
    let blocks = vec![
        FakeBlock::new(0, BlockKind::Memory, 600),
        FakeBlock::new(1, BlockKind::Memory, 9),
        FakeBlock::new(7, BlockKind::Disk, 5),
    ];
    let mut stage = Stage::with_blocks(seed, blocks);
    stage.guest_works(seed, 3);
    stage
}

fn patient(session: u8, lanes: u16) -> Options {
    let mut options = options(session, lanes);
    options.verify = session.is_multiple_of(2);
    options.reconnect_for = Duration::from_secs(20);
    options.doubt_for = Duration::from_secs(20);
    options
}

fn try_one(seed: u64, lanes: u16, cut: Cut, disaster: Disaster) -> (Stage, Report) {
    let mut stage = small(seed);
    let (witness, host) = (Arc::clone(&stage.witness), Arc::clone(&stage.host));
    let (built, ledger, clock) = (
        Arc::clone(&stage.built),
        stage.their_ledger.clone(),
        Arc::clone(&stage.clock),
    );
    let on_cut: OnCut = match disaster {
        Disaster::Glitch | Disaster::Severed => Arc::new(|| {}),
        Disaster::IncomingKilled => Arc::new(move || {
            witness.there.store(false, Ordering::Release);
            *host.lock().unwrap() = common::new_host(&built, &witness, &ledger, &clock);
        }),
        Disaster::OutgoingKilled => Arc::new(move || {
            witness.outgoing_dead.store(true, Ordering::Release);
            witness.here.store(false, Ordering::Release);
        }),
    };
    let mends = matches!(disaster, Disaster::Glitch | Disaster::IncomingKilled);
    let mut link = Faulty::new(stage.loopback(8), vec![cut], mends, on_cut);
    let report = stage.cross(&mut link, &patient(1 + lanes as u8, lanes));
    drop(link);
    (stage, report)
}

/// How many messages the same crossing has when nothing goes wrong.
fn messages(seed: u64, lanes: u16) -> u64 {
    let mut stage = small(seed);
    let mut link = Faulty::new(stage.loopback(8), Vec::new(), true, Arc::new(|| {}));
    let report = stage.cross(&mut link, &patient(1 + lanes as u8, lanes));
    assert_eq!(report.outcome.failure, None, "{report:#?}");
    stage.assert_equal();
    link.count()
}

fn check(stage: &mut Stage, report: &Report, disaster: Disaster, lanes: u16) {
    let standing = |ledger: &common::MemoryLedger| {
        ledger
            .records(MACHINE)
            .unwrap()
            .first()
            .map(|record| record.standing)
    };
    let (ours, theirs) = (standing(&stage.our_ledger), standing(&stage.their_ledger));
    let (here, there) = (stage.witness.runs_here(), stage.witness.runs_there());
    assert!(!(here && there));
    // Who runs may run, by the book.
    if there {
        assert_eq!(theirs, Some(Standing::Taken));
        stage.assert_equal();
    }
    if here {
        assert!(
            !matches!(ours, Some(Standing::GivenAway | Standing::Gone)),
            "runs here with {ours:?}"
        );
        assert_ne!(theirs, Some(Standing::Taken));
    }
    if disaster == Disaster::OutgoingKilled {
        return;
    }
    // What the report says is so.
    match report.outcome.whereabouts {
        Whereabouts::There => {
            assert_eq!(stage.outgoing.stand, Stand::Departed);
            assert_eq!(theirs, Some(Standing::Taken));
            assert!(there || disaster == Disaster::IncomingKilled);
        }
        Whereabouts::Here => {
            assert_eq!(stage.outgoing.stand, Stand::Running, "{:#?}", report.outcome);
            assert!(here && !stage.outgoing.released && stage.outgoing.throttled == 0);
            assert!(stage.outgoing.blocks.iter().all(|block| !block.is_tracking()));
            second_try(stage, lanes);
        }
        Whereabouts::Ended => unreachable!("nobody ended it"),
        Whereabouts::Unknown => {
            assert_eq!(stage.outgoing.stand, Stand::Stranded);
            assert_eq!(ours, Some(Standing::GivenAway));
            assert!(!here);
        }
    }
    // Only a link that stays away leaves doubt.
    if matches!(disaster, Disaster::Glitch | Disaster::IncomingKilled) {
        assert_ne!(
            report.outcome.whereabouts,
            Whereabouts::Unknown,
            "{:#?}",
            report.outcome
        );
    }
    if disaster == Disaster::Glitch {
        assert_eq!(
            report.outcome.whereabouts,
            Whereabouts::There,
            "{:#?}",
            report.outcome
        );
        assert!(there);
    }
}

/// The machine is here again: it can cross, and is complete.
fn second_try(stage: &mut Stage, lanes: u16) {
    stage.restart_host();
    stage.guest_works(99, 3);
    let report = stage.cross(&mut stage.loopback(8), &patient(101, lanes));
    assert_eq!(report.outcome.failure, None, "second try: {report:#?}");
    assert!(stage.witness.runs_there());
    stage.assert_equal();
}

fn sweep(lanes: u16, disaster: Disaster) {
    let (mut tried, mut there, mut here, mut doubt) = (0, 0, 0, 0);
    for seed in 1..=seeds() {
        for at in 0..messages(seed, lanes) {
            for when in [When::Before, When::Middle, When::After] {
                let cut = Cut { at, when };
                let (mut stage, report) = try_one(seed, lanes, cut, disaster);
                let said = format!("seed {seed}, {lanes} lanes, {disaster:?} at {cut:?}");
                let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                    check(&mut stage, &report, disaster, lanes);
                }));
                assert!(outcome.is_ok(), "{said}");
                tried += 1;
                match report.outcome.whereabouts {
                    Whereabouts::There => there += 1,
                    Whereabouts::Here => here += 1,
                    Whereabouts::Ended => unreachable!("nobody ended it"),
                    Whereabouts::Unknown => doubt += 1,
                }
            }
        }
    }
    println!("{disaster:?}, {lanes} lanes: {tried} cuts, {there} there, {here} here, {doubt} in doubt");
    assert!(tried > 50);
}

#[test]
fn a_link_that_comes_back_with_one_lane() {
    sweep(1, Disaster::Glitch);
}

#[test]
fn a_link_that_comes_back_with_four_lanes() {
    sweep(4, Disaster::Glitch);
}

#[test]
fn a_link_that_stays_broken_with_one_lane() {
    sweep(1, Disaster::Severed);
}

#[test]
fn a_link_that_stays_broken_with_four_lanes() {
    sweep(4, Disaster::Severed);
}

#[test]
fn the_incoming_side_is_killed_with_one_lane() {
    sweep(1, Disaster::IncomingKilled);
}

#[test]
fn the_incoming_side_is_killed_with_four_lanes() {
    sweep(4, Disaster::IncomingKilled);
}

#[test]
fn the_outgoing_side_is_killed_with_one_lane() {
    sweep(1, Disaster::OutgoingKilled);
}

#[test]
fn the_outgoing_side_is_killed_with_four_lanes() {
    sweep(4, Disaster::OutgoingKilled);
}

/// Two cuts in one crossing, at random places.
#[test]
fn a_link_that_breaks_again_and_again() {
    for seed in 1..=seeds() * 40 {
        let mut dice = common::Dice::new(seed);
        let mut stage = small(seed);
        let mut cuts = Vec::new();
        for _ in 0..1 + dice.below(5) {
            let when = [When::Before, When::Middle, When::After][dice.below(3) as usize];
            cuts.push(Cut {
                at: 2 + dice.below(60),
                when,
            });
        }
        let lanes = 1 + dice.below(4) as u16;
        let mut link = Faulty::new(stage.loopback(8), cuts.clone(), true, Arc::new(|| {}));
        let report = stage.cross(&mut link, &patient(lanes as u8, lanes));
        assert_eq!(report.outcome.failure, None, "seed {seed}, {cuts:?}: {report:#?}");
        stage.assert_equal();
    }
}
