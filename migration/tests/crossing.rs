//! Whole crossings between two hosts in one process.

mod common;

use common::{Stage, Stand, options};
use ferry_migration::failure::Whereabouts;

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
