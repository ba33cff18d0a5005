//! The engine's real code in the simulator: nothing is lost, it repeats, and the page-level model foretells it.

use super::super::disk::Disk;
use super::super::link::{Change, Sharing};
use super::super::paper;
use super::super::trace::Trace;
use super::*;
use crate::cost::{Cost, Queue};
use crate::policy::{ALL, DeadlineAction, Policy};

/// The reference trace at an eighth of its size: the same seconds and costs.
fn scenario(policy: Policy, sharing: Sharing) -> Scenario {
    let mut trace = Trace::reference();
    trace.device_pages /= 8;
    let mut scenario = paper::scenario(trace, 64, 32.0, policy, 1);
    scenario.limits.cost = Cost::queue(Queue {
        response_bytes: paper::MBIT,
        ..paper::service()
    });
    scenario.link.sharing = sharing;
    scenario
}

/// Nothing is lost, whatever the policy, and what a policy decides by itself comes out as the page-level model says. The
/// systems' policies cost no more here than there: the model takes the dirty log when a round begins, as they do, and the
/// engine just before it sends.
#[test]
fn the_engine_carries_the_reference_guest_with_every_policy_and_the_model_foretells_it() {
    let half = Policy::Fixed {
        bandwidth_bytes_per_sec: 2_000_000,
    };
    for policy in ALL.iter().skip(1).map(|about| about.policy).chain([half]) {
        let mut scenario = scenario(policy, Sharing::Reserved);
        scenario.limits.page_write_rate_per_sec = Some(paper::PAGE_WRITE_RATE);
        let (model, crossed) = (scenario.run(), scenario.cross());
        assert_eq!(crossed.report.outcome.failure, None, "{policy}");
        assert!(crossed.outcome.crossed, "{policy}");
        assert_eq!(
            (crossed.pages_differ, crossed.clusters_differ),
            (0, 0),
            "{policy}"
        );
        let allowed = match policy {
            Policy::Fixed { .. } | Policy::Max => 0.99..1.01,
            Policy::CalmFixed { .. } | Policy::CalmAdaptive => 0.99..1.01,
            Policy::CalmLive => 0.95..1.05,
            _ => 0.9..1.0,
        };
        agrees(&crossed.outcome, &model, &allowed, "ref");
    }
}

/// Ours looks closer than the engine can: the model counts writes ten times a second, the engine takes its logs over once,
/// because each time costs the guest write faults.
#[test]
fn calm_live_costs_in_the_engine_what_the_model_foretells() {
    let first = Sharing::ServiceFirst { reaction_secs: 0.001 };
    for (name, sharing) in [
        ("ref", first),
        ("zipf", first),
        ("gc", Sharing::Reserved),
        ("phases", first),
    ] {
        let mut scenario = scenario(Policy::CalmLive, sharing);
        scenario.trace = Trace {
            device_pages: scenario.trace.device_pages,
            ..Trace::named(name).unwrap()
        };
        let crossed = scenario.cross();
        assert_eq!(crossed.pages_differ, 0);
        agrees(&crossed.outcome, &scenario.run(), &(0.85..1.15), name);
    }
}

fn agrees(engine: &Outcome, model: &Outcome, allowed: &std::ops::Range<f64>, trace: &str) {
    let ratio = engine.cost_with_time / model.cost_with_time;
    assert!(
        allowed.contains(&ratio),
        "{} on {trace}: engine {:.3} in {:.1} s, model {:.3} in {:.1} s",
        engine.policy,
        engine.cost,
        engine.total_s,
        model.cost,
        model.total_s
    );
}

#[test]
fn the_engine_in_the_simulator_repeats_to_the_byte() {
    let run = || {
        let crossed = scenario(Policy::CalmLive, Sharing::Reserved).cross();
        let rounds = serde_json::to_string(&crossed.report.rounds).unwrap();
        (rounds, serde_json::to_string(&crossed.outcome).unwrap())
    };
    assert_eq!(run(), run());
}

#[test]
fn a_lost_connection_is_mended_and_nothing_is_lost() {
    let mut scenario = scenario(Policy::CalmLive, Sharing::Reserved);
    scenario.link.capacity = vec![
        Change {
            at_secs: 6.0,
            factor: 0.0,
        },
        Change {
            at_secs: 9.0,
            factor: 1.0,
        },
    ];
    let crossed = scenario.cross();
    assert_eq!(crossed.report.outcome.failure, None);
    assert!(crossed.outcome.crossed && crossed.report.reconnects >= 1);
    assert_eq!(crossed.pages_differ, 0);
}

/// 8 MiB of memory and a disk, over 4 MB/s.
fn with_disk(policy: Policy, disk: &str) -> Scenario {
    let mut scenario = scenario(policy, Sharing::Reserved);
    scenario.trace.device_pages = 0;
    scenario.memory_bytes = 8 << 20;
    scenario.disks = vec![Disk::parse(disk).unwrap()];
    scenario.limits.cost = Cost::unknown();
    scenario.at_most = Duration::from_secs(120);
    scenario
}

fn is_whole(crossed: &Crossed) {
    assert_eq!(crossed.report.outcome.failure, None);
    assert!(crossed.outcome.crossed);
    assert_eq!((crossed.pages_differ, crossed.clusters_differ), (0, 0));
}

/// The disk's half that was never written does not travel, nor do zeroes; all the rest does once.
#[test]
fn holes_do_not_cross_and_zeroes_are_no_data() {
    let crossed = with_disk(Policy::Qemu, "32M,allocated=50%,zero=25%,hot=0%").cross();
    is_whole(&crossed);
    let disk = crossed.report.disk;
    assert_eq!((disk.zero, disk.raw, disk.units()), (64, 192, 256));
    let data = 192 * 65_536;
    assert!(
        (data..data + data / 500).contains(&disk.wire_bytes),
        "{}",
        disk.wire_bytes
    );
    assert_eq!(crossed.outcome.disk_bytes, disk.wire_bytes);
}

/// Memory and disk in one crossing: the guest writes both and discards, and both sides hold the same afterwards. What was
/// sent and then discarded is a hole there, too.
#[test]
fn a_disk_that_is_written_and_discarded_arrives_whole() {
    for policy in [Policy::Qemu, Policy::CalmLive, Policy::CalmAdaptive] {
        let scenario = with_disk(
            policy,
            "32M,allocated=50%,zero=10%,rate=400kB/s,hot=5%,discard=200kB/s",
        );
        let crossed = scenario.cross();
        is_whole(&crossed);
        let disk = crossed.report.disk;
        // 256 clusters once, of them 24 zero; some again; some discarded after they were sent.
        assert!(disk.zero > 24 && disk.raw > 200, "{policy}: {disk:?}");
        let again = scenario.cross();
        assert_eq!(crossed.outcome, again.outcome, "{policy}");
    }
}

/// 6 MB/s are written and 4 MB/s leave. Who only copies never ends; who promised a downtime gives up and says why, or keeps
/// it by throttling where that is allowed.
#[test]
fn a_disk_that_is_written_faster_than_the_link_ends_as_the_policy_says() {
    let disk = "32M,allocated=100%,hot=0%,rate=6MB/s";
    let never = with_disk(Policy::Qemu, disk).cross();
    assert!(!never.outcome.crossed);
    assert_eq!(never.outcome.stop_reason, "not done in 120 s");
    let mut scenario = with_disk(Policy::CalmLive, disk);
    scenario.limits.downtime_is_contract = true;
    scenario.limits.downtime = Duration::from_secs(1);
    let refused = scenario.cross();
    assert!(!refused.outcome.crossed);
    let why = &refused.outcome.stop_reason;
    assert!(
        why.contains("Mbit/s") && refused.outcome.downtime_s == 0.0,
        "{why}"
    );
    scenario.limits.most_throttle_percent = 95;
    scenario.at_most = Duration::from_secs(400);
    let throttled = scenario.cross();
    is_whole(&throttled);
    assert!(throttled.report.impact.throttled > Duration::from_secs(1));
    assert!(
        throttled.outcome.downtime_s <= 1.0,
        "{}",
        throttled.outcome.downtime_s
    );
}

#[test]
fn writes_to_a_disk_can_be_held_back() {
    let scenario = with_disk(Policy::CalmLive, "1G,allocated=100%,hot=0%,rate=8MB/s");
    let mut world = World::new(&scenario, Arc::new(Handle::new()));
    let mut written = |most: Option<u64>| {
        let Some(disk) = world.blocks.get_mut(1) else {
            return 0.0;
        };
        disk.write_at_most(most);
        let before = disk.writes();
        world.pass(20.0, 0.0);
        (world.blocks.get(1).unwrap().writes() - before) as f64 * 65_536.0 / 20.0
    };
    let (free, held, freed) = (written(None), written(Some(2_000_000)), written(None));
    assert!(
        (7.2e6..8.8e6).contains(&free) && (7.2e6..8.8e6).contains(&freed),
        "{free} {freed}"
    );
    assert!((1.5e6..2.5e6).contains(&held), "{held}");
    assert!(
        (world.held_back_secs - 15.0).abs() < 0.1,
        "{}",
        world.held_back_secs
    );
}

/// The connection is lost for half a second, at thirty moments from the first frame to the last word.
#[test]
fn wherever_the_connection_is_cut_memory_and_disk_arrive_whole() {
    let disk = "16M,allocated=50%,zero=10%,rate=200kB/s,discard=100kB/s";
    let mut scenario = with_disk(Policy::CalmLive, disk);
    scenario.switch_fixed = Duration::from_millis(20);
    let uncut = scenario.cross();
    is_whole(&uncut);
    let mut reconnects = 0;
    for number in 1..=30 {
        let at_secs = uncut.outcome.total_s * f64::from(number) / 30.5;
        scenario.link.capacity = vec![
            Change { at_secs, factor: 0.0 },
            Change {
                at_secs: at_secs + 0.5,
                factor: 1.0,
            },
        ];
        let crossed = scenario.cross();
        is_whole(&crossed);
        reconnects += crossed.report.reconnects;
    }
    assert!(reconnects >= 30, "{reconnects}");
}

/// A deadline that stops the machine in the middle of a round, with a third of the data across.
#[test]
fn a_deadline_in_the_middle_of_a_round_sends_nothing_twice() {
    let mut scenario = with_disk(Policy::Max, "16M,allocated=100%,hot=0%");
    scenario.limits.deadline = Some(Duration::from_secs(2));
    scenario.limits.on_deadline = DeadlineAction::PauseAndFinish;
    let crossed = scenario.cross();
    is_whole(&crossed);
    let Report {
        memory, disk, rounds, ..
    } = &crossed.report;
    assert_eq!((memory.units(), disk.units()), (2048, 256));
    let first = rounds.first().unwrap();
    assert!(
        first.decision == "switch" && first.reason.contains("deadline"),
        "{first:?}"
    );
    assert!((1..256).contains(&first.disk.units()), "{first:?}");
}

/// Who says what the link carries gets a promise before anything is sent.
#[test]
fn over_a_link_that_is_known_the_promise_comes_before_the_first_byte() {
    let mut scenario = with_disk(Policy::Max, "16M,allocated=100%,hot=0%");
    scenario.limits.link_bytes_per_sec = None;
    let unknown = scenario.cross().report;
    scenario.limits.link_bytes_per_sec = Some(4_000_000);
    let known = scenario.cross().report;
    let at = |report: &Report| report.promise.unwrap().at;
    assert_eq!(at(&known), known.prepare);
    // Otherwise the first slice measures it.
    assert!(at(&unknown) > unknown.prepare);
}
