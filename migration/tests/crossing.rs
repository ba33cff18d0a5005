//! Whole crossings between two hosts in one process.

mod common;

use common::{Stage, Stand, options};
use ferry_migration::failure::Whereabouts;
use ferry_migration::machine::Observer;
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
            options.limits.deadline = Some(std::time::Duration::from_secs(60));
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
