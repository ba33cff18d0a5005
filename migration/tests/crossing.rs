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
