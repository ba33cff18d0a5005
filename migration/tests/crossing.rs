//! Whole crossings between two hosts in one process.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Dice, FakeBlock, MemoryLedger, Stage, Stand, StepClock, options};
use ferry_migration::clock::Clock as _;
use ferry_migration::failure::{Reason, Side, Whereabouts};
use ferry_migration::handover::{Ledger, LedgerId, MachineId, Record, SessionId, Standing};
use ferry_migration::machine::{Observer, Unobserved};
use ferry_migration::options::Handle;
use ferry_migration::outgoing::{World, cross};
use ferry_migration::report::{Event, Report};

#[test]
fn a_machine_that_writes_all_the_time_arrives_as_it_was_when_it_stopped() {
    for (seed, lanes) in [(1, 1), (2, 4), (3, 2)] {
        let mut stage = Stage::new(seed);
        let report = stage.cross(&mut stage.loopback(16), &options(1, lanes));
        assert_eq!(report.outcome.failure, None, "{report:#?}");
        assert_eq!(report.outcome.whereabouts, Whereabouts::There);
        assert_eq!(stage.outgoing.stand, Stand::Departed);
        assert!(stage.witness.runs_there() && !stage.witness.runs_here());
        stage.assert_equal();
        assert_eq!(report.lanes, lanes);
        assert!(report.rounds.len() >= 2, "{report:#?}");
    }
}

#[test]
fn every_policy_gets_an_idle_machine_and_a_busy_one_across() {
    for about in ferry_migration::policy::ALL {
        for per_cent in [0, 2] {
            let mut stage = Stage::new(5);
            stage.guest_works(5, per_cent);
            let mut options = options(1, 2);
            options.limits.policy = about.policy;
            options.limits.link_bytes_per_sec = Some(1_000_000_000);
            options.limits.deadline = Some(Duration::from_secs(60));
            options.limits.on_deadline = ferry_migration::policy::DeadlineAction::PauseAndFinish;
            let report = stage.cross(&mut stage.loopback(16), &options);
            assert_eq!(report.outcome.failure, None, "{}: {report:#?}", about.name);
            stage.assert_equal();
        }
    }
}

/// Asks for the switch when the first round has begun.
struct Impatient<'a>(&'a Handle);

impl Observer for Impatient<'_> {
    fn event(&self, event: &Event) {
        if let Event::Round { .. } = event {
            self.0.switch_now();
        }
    }
}

#[test]
fn a_switch_in_the_middle_of_a_round_sends_nothing_twice() {
    for lanes in [1, 3] {
        let mut stage = Stage::new(9);
        stage.guest_works(9, 0);
        let mut link = stage.loopback(16);
        let report = cross(
            World {
                machine: &mut stage.outgoing,
                link: &mut link,
                ledger: &mut stage.our_ledger,
                clock: &*stage.clock,
                observer: &Impatient(&stage.handle),
                handle: &stage.handle,
            },
            &options(1, lanes),
        );
        assert_eq!(report.outcome.failure, None, "{report:#?}");
        stage.assert_equal();
        let first = &report.rounds[0];
        assert_eq!(
            (first.decision.as_str(), first.reason.as_str()),
            ("switch", "the switch was asked for")
        );
        let sent = first.memory.units() + first.disk.units();
        assert!((1..700).contains(&sent), "it was not in the middle: {first:?}");
        // All that would have crossed anyway; the page that saving the state writes had not been sent yet.
        let units = |report: &Report| (report.memory.units(), report.disk.units());
        let mut patient = Stage::new(9);
        patient.guest_works(9, 0);
        let mut link = patient.loopback(16);
        let (memory, disk) = units(&patient.cross(&mut link, &options(1, lanes)));
        assert_eq!(units(&report), (memory - 1, disk), "{report:#?}");
    }
}

/// A ledger on a busy disk: while it is written, the guest writes all its memory.
struct Busy {
    ledger: MemoryLedger,
    clock: Arc<StepClock>,
    memory: Arc<FakeBlock>,
    takes: Duration,
}

impl Ledger for Busy {
    fn id(&self) -> LedgerId {
        self.ledger.id()
    }

    fn write(&mut self, record: &Record) -> Result<(), Reason> {
        if record.standing == Standing::GivenAway {
            let mut dice = Dice::new(3);
            (0..self.memory.info.units()).for_each(|unit| self.memory.write_unit(unit, &mut dice));
            self.clock.sleep(self.takes);
        }
        self.ledger.write(record)
    }

    fn read(&self, session: SessionId, side: Side) -> Result<Option<Record>, Reason> {
        self.ledger.read(session, side)
    }

    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason> {
        self.ledger.records(machine)
    }
}

#[test]
fn what_is_written_while_the_ledger_takes_its_time_is_copied_while_the_machine_runs() {
    for (takes, live) in [(Duration::from_millis(400), true), (Duration::ZERO, false)] {
        let mut stage = Stage::new(9);
        stage.guest_works(1, 0);
        let mut ledger = Busy {
            ledger: stage.our_ledger.clone(),
            clock: Arc::clone(&stage.clock),
            memory: Arc::clone(&stage.outgoing.blocks[0]),
            takes,
        };
        let mut options = options(1, 2);
        options.limits.policy = "max".parse().unwrap();
        options.limits.link_bytes_per_sec = Some(1_000_000);
        let mut link = stage.loopback(4);
        let world = World {
            machine: &mut stage.outgoing,
            link: &mut link,
            ledger: &mut ledger,
            clock: &*stage.clock,
            observer: &Unobserved,
            handle: &stage.handle,
        };
        let report = cross(world, &options);
        assert_eq!(report.outcome.failure, None);
        stage.assert_equal();
        let last = report.rounds.last().unwrap();
        let copied_late = last.memory.units() > 600;
        assert_eq!(copied_late, !live, "{:?}", report.rounds);
        assert!(last.reason.contains("stopped"), "{last:?}");
    }
}
