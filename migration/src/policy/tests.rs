//! The policies against golden vectors and decision tables, and within their bounds whatever the history is.

use std::time::Duration;

use proptest::prelude::*;

use super::plan::{Problem, expected_clean, time_to_clean};
use super::*;
use crate::cost::Queue;

const MBIT: f64 = 1_048_576.0 / 8.0;
/// Pages per second in a Mbit/s.
const PPM: f64 = 32.0;
const LAM: f64 = 0.054_456_185_796_058_855;

fn golden() -> serde_json::Value {
    serde_json::from_str(include_str!("../../testdata/calm-golden.json")).unwrap()
}

fn queue() -> Queue {
    Queue {
        requests_per_sec: 20.0,
        response_bytes: 8.0 * MBIT,
        deadline: Duration::from_secs(1),
    }
}

fn late(pages: f64) -> f64 {
    queue().late(pages * 4096.0)
}

fn problem(pages: f64, link_mbit: f64) -> Problem<'static> {
    Problem {
        pages,
        link: link_mbit * PPM,
        lam: LAM,
        cost: &late,
        down: 1.0,
    }
}

fn near(got: f64, expected: f64, what: &str) {
    let close = (got - expected).abs() <= 1e-9 * expected.abs().max(1e-30);
    assert!(close, "{what}: {got} and not {expected}");
}

#[test]
fn clean_pages_and_times_are_the_golden_ones() {
    let number = |v: &serde_json::Value, key: &str| v[key].as_f64().unwrap();
    for v in golden()["e_clean"].as_array().unwrap() {
        let got = expected_clean(number(v, "N1"), number(v, "t"), number(v, "Bm") * PPM, LAM);
        near(got, number(v, "v"), "clean pages");
    }
    for v in golden()["t_move"].as_array().unwrap() {
        let got = time_to_clean(number(v, "N1"), number(v, "N2"), number(v, "Bm") * PPM, LAM);
        match v["v"].as_f64() {
            Some(expected) => near(got, expected, "time"),
            None => assert_eq!(got, f64::INFINITY, "a target above the ceiling is never reached"),
        }
    }
    assert_eq!(time_to_clean(5.0, 5.0, 100.0, LAM), 0.0);
}

#[test]
fn the_steps_are_the_golden_ones_and_a_tie_stops() {
    let problem = problem(133_233.0, 256.0);
    for v in golden()["best_step_B256"].as_array().unwrap() {
        let i = v["i"].as_f64().unwrap();
        let (cost, bandwidth) = problem.step(i, &[LAM * i + 256.0]);
        near(cost, v["C"].as_f64().unwrap(), "cost of a step");
        near(bandwidth / PPM, v["b"].as_f64().unwrap(), "bandwidth of a step");
    }
    let stop = golden()["one_over_B256"].as_f64().unwrap();
    near(1.0 / problem.link, stop, "cost of stopping");
    assert!(problem.stops_at(stop) && problem.stops_at(f64::NAN) && problem.stops_at(f64::INFINITY));
    assert!(!problem.stops_at(stop * 0.999));
    // The first step that is not worth it, and all after it.
    assert!(!problem.stops_at(problem.step(35_419.0, &[LAM * 35_419.0 + 256.0]).0));
    assert!(problem.stops_at(problem.step(35_420.0, &[LAM * 35_420.0 + 256.0]).0));
}

#[test]
fn the_plans_are_the_golden_ones() {
    for (name, pages, link) in [
        ("256@256", 67_697.0, 256.0),
        ("512@256", 133_233.0, 256.0),
        ("512@512", 133_233.0, 512.0),
    ] {
        let problem = problem(pages, link);
        let (plan, g) = (problem.adaptive(256.0), &golden()["adaptive"][name]);
        let number = |key: &str| g[key].as_f64().unwrap();
        assert_eq!(plan.clean, number("N"));
        // Sums over up to 133,233 steps: the last digits depend on the order of adding.
        let near = |got: f64, expected: f64| {
            assert!(
                (got - expected).abs() <= 1e-8 * expected.max(1e-9),
                "{got} {expected}"
            )
        };
        near(plan.copy_secs, number("t_pre"));
        near(plan.copy_cost, number("cost_pre"));
        near(plan.down_secs, number("down"));
        near(plan.cost, number("cost"));

        let g = &golden()["fixed"][name];
        let number = |key: &str| g[key].as_f64().unwrap();
        let bandwidth = number("Bm") * PPM;
        let plan = problem.fixed_at(bandwidth, problem.best_clean(bandwidth));
        near(plan.clean, number("N"));
        near(plan.copy_secs, number("t_pre"));
        near(plan.down_secs, number("down"));
        near(plan.cost, number("cost"));
        // And no bandwidth of the paper's grid is better than the one found.
        let best = problem.best_fixed(None);
        assert!(
            (best.bandwidth / PPM - number("Bm")).abs() < 0.03,
            "{}",
            best.bandwidth / PPM
        );
    }
}

#[test]
fn figure_4_has_its_best_bandwidth_at_227_9() {
    let g = &golden()["fixed_fig4_N_eq_M_minus_256"];
    let best = problem(133_233.0, 512.0).best_fixed(Some(132_977.0));
    assert!(
        (best.bandwidth / PPM - g["Bm"].as_f64().unwrap()).abs() < 0.051,
        "{}",
        best.bandwidth / PPM
    );
    assert!((best.cost / g["cost"].as_f64().unwrap() - 1.0).abs() < 1e-4);
}

#[test]
fn below_193_5_mbit_nothing_is_copied_before_the_switch() {
    let copies = |mbit: f64| problem(133_233.0, mbit).adaptive(256.0).clean > 0.0;
    assert!(!copies(193.4) && copies(193.6));
    let decision = |mbit: f64| {
        let mut limits = limits(Policy::CalmAdaptive);
        limits.link_bytes_per_sec = Some((mbit * MBIT) as u64);
        limits.page_write_rate_per_sec = Some(LAM);
        decide(&start(512 << 20), &limits).0.action
    };
    assert_eq!(decision(193.0), Action::Switch);
    assert_eq!(decision(194.0), Action::GoOn);
}

fn limits(policy: Policy) -> Limits {
    Limits {
        policy,
        link_bytes_per_sec: Some((512.0 * MBIT) as u64),
        cost: Cost::queue(queue()),
        ..Limits::default()
    }
}

fn start(bytes: u64) -> History {
    History {
        between_rounds: true,
        total_bytes: bytes,
        remaining_bytes: bytes,
        ..History::default()
    }
}

/// A history of finished rounds: (copied pages, dirty pages, seconds).
fn after(rounds: &[(u64, u64, f64)]) -> History {
    let mut history = start(100_000 * 4096);
    let mut at = Duration::ZERO;
    for (copied, dirty, secs) in rounds {
        let time = Duration::from_secs_f64(*secs);
        at += time;
        history.rounds.push(Round {
            time,
            planned_bytes: copied * 4096,
            copied_bytes: copied * 4096,
            wire_bytes: copied * 4096,
            dirty_bytes: dirty * 4096,
            bandwidth_bytes_per_sec: UNLIMITED,
        });
        history.samples.push(Sample {
            at,
            time,
            copied_bytes: copied * 4096,
            wire_bytes: copied * 4096,
            dirtied_bytes: dirty * 4096,
            remaining_bytes: dirty * 4096,
            bandwidth_bytes_per_sec: UNLIMITED,
            ..Sample::default()
        });
        history.remaining_bytes = dirty * 4096;
    }
    history.elapsed = at;
    history
}

fn action(policy: Policy, rounds: &[(u64, u64, f64)]) -> Action {
    decide(&after(rounds), &limits(policy)).0.action
}

#[test]
fn xen_basic_adds_50_mbit_and_stops_at_256_kib_or_at_the_link() {
    let bandwidth = |rounds: &[(u64, u64, f64)]| {
        decide(&after(rounds), &limits(Policy::XenBasic))
            .0
            .bandwidth_bytes_per_sec as f64
            / MBIT
    };
    assert_eq!(bandwidth(&[]), 100.0);
    // 3,200 pages in a second are 100 Mbit/s.
    assert!((bandwidth(&[(100_000, 3200, 1.0)]) - 150.0).abs() < 1e-4);
    // It may fall below the first round's.
    assert!((bandwidth(&[(100_000, 320, 1.0)]) - 60.0).abs() < 1e-4);
    assert_eq!(action(Policy::XenBasic, &[(100_000, 64, 1.0)]), Action::GoOn);
    assert_eq!(action(Policy::XenBasic, &[(100_000, 63, 1.0)]), Action::Switch);
    // 462 + 50 Mbit/s are the link; more is beyond.
    assert_eq!(action(Policy::XenBasic, &[(100_000, 14_780, 1.0)]), Action::GoOn);
    assert_eq!(
        action(Policy::XenBasic, &[(100_000, 14_790, 1.0)]),
        Action::Switch
    );
}

#[test]
fn xen_code_only_gets_faster_and_stops_for_each_of_its_four_reasons() {
    let decision = |rounds: &[(u64, u64, f64)]| decide(&after(rounds), &limits(Policy::XenCode));
    let mbit = |rounds: &[(u64, u64, f64)]| decision(rounds).0.bandwidth_bytes_per_sec as f64 / MBIT;
    assert_eq!(mbit(&[]), 100.0);
    assert_eq!(mbit(&[(100_000, 3000, 1.0)]), 100.0);
    assert!((mbit(&[(100_000, 6400, 1.0)]) - 250.0).abs() < 1e-4);
    assert!((mbit(&[(100_000, 6400, 1.0), (6400, 320, 1.0)]) - 250.0).abs() < 1e-4);
    assert!((mbit(&[(100_000, 16_000, 1.0)]) - 500.0).abs() < 1e-4);
    let reason = |rounds: &[(u64, u64, f64)]| decision(rounds).1;
    let grow = [(10_000, 20_000, 1.0), (20_000, 20_000, 1.0)];
    assert!(matches!(reason(&grow), Reason::RoundsGrow { .. }));
    assert!(matches!(
        reason(&[(1000, 900, 1.0); 29]),
        Reason::RoundsUsedUp { .. }
    ));
    assert!(matches!(
        reason(&[(1000, 900, 1.0); 28]),
        Reason::AboveDirtyRate { .. }
    ));
    assert!(matches!(
        reason(&[(100_000, 900, 1.0), (49, 900, 1.0)]),
        Reason::LittleLeft { .. }
    ));
    assert!(matches!(
        reason(&[(100_000, 90_000, 90.0); 4]),
        Reason::SentTooMuch { .. }
    ));
}

#[test]
fn qemu_stops_when_the_rest_fits_into_the_downtime() {
    // 10,000 pages a second and 300 ms: 3,000 pages.
    assert_eq!(action(Policy::Qemu, &[(10_000, 3001, 1.0)]), Action::GoOn);
    assert_eq!(action(Policy::Qemu, &[(10_000, 3000, 1.0)]), Action::Switch);
    assert_eq!(action(Policy::Qemu, &[(10_000, 0, 1.0)]), Action::Switch);
    assert_eq!(action(Policy::Qemu, &[]), Action::GoOn);
    // Within a round it looks again only when little of it is left.
    let mut history = after(&[(10_000, 9000, 1.0)]);
    history.between_rounds = false;
    history.round = Round {
        planned_bytes: 9000 * 4096,
        copied_bytes: 5000 * 4096,
        ..Round::default()
    };
    assert!(!decide(&history, &limits(Policy::Qemu)).0.fresh);
    history.round.copied_bytes = 6500 * 4096;
    assert!(decide(&history, &limits(Policy::Qemu)).0.fresh);
    // A short slice that the sockets' buffers swallowed says nothing about the link, nor do pages of zeroes.
    for (millis, pages, wire_bytes) in [(2, 200, 200 * 4096), (100, 50_000, 50_000 * 8)] {
        let mut history = after(&[(10_000, 20_000, 1.0)]);
        history.samples.push(Sample {
            time: Duration::from_millis(millis),
            copied_bytes: pages * 4096,
            wire_bytes,
            ..Sample::default()
        });
        assert_eq!(decide(&history, &limits(Policy::Qemu)).0.action, Action::GoOn);
    }
}

#[test]
fn qemu_throttles_in_its_steps_and_only_as_far_as_allowed() {
    let percent = |count: usize, most: u8| {
        let mut limits = limits(Policy::Qemu);
        limits.most_throttle_percent = most;
        decide(&after(&vec![(10_000, 9000, 1.0); count]), &limits)
            .0
            .throttle
            .percent
    };
    let seen: Vec<u8> = [1, 2, 3, 4, 6, 40].iter().map(|n| percent(*n, 99)).collect();
    assert_eq!(seen, [0, 20, 20, 30, 40, 99]);
    assert_eq!(percent(40, 0), 0);
    assert_eq!(percent(40, 35), 35);
}

#[test]
fn cloud_hypervisor_compares_the_next_round_with_the_last_bandwidth() {
    assert_eq!(
        action(Policy::CloudHypervisor, &[(10_000, 3001, 1.0)]),
        Action::GoOn
    );
    assert_eq!(
        action(Policy::CloudHypervisor, &[(10_000, 3000, 1.0)]),
        Action::Switch
    );
    // 6,000 pages a second leave room for only 1,800.
    assert_eq!(
        action(Policy::CloudHypervisor, &[(6000, 3000, 1.0)]),
        Action::GoOn
    );
}

#[test]
fn virtualbox_votes_as_its_table_says() {
    let vote = |counts: &[u64], secs: f64| {
        let rounds: Vec<_> = counts.iter().map(|c| (1000, *c, secs)).collect();
        action(Policy::VirtualBox, &rounds)
    };
    // Fewer than four passes: the short average is full of "never".
    assert_eq!(vote(&[10, 10, 10], 0.1), Action::GoOn);
    // The long average divides by 64 from the start, so four equal passes are above it: not steady.
    assert_eq!(vote(&[100; 4], 0.1), Action::GoOn);
    // Falling counts are steady once the short average is below the long one.
    assert_eq!(vote(&[9000, 60, 10, 10, 10], 0.1), Action::Switch);
    assert_eq!(vote(&[90_000, 9000, 300, 300, 300, 300], 0.1), Action::GoOn);
    // Few pages by the long average alone.
    assert_eq!(vote(&[15_000, 200, 200, 200, 200], 0.1), Action::Switch);
    // After eleven passes it is time that counts: 300 pages at 10,000 pages a second are 30 ms.
    let mut counts = vec![30_000; 2];
    counts.extend([300; 10]);
    assert_eq!(vote(&counts, 0.1), Action::Switch);
    // At 100 pages a second they are 3 s.
    assert_eq!(vote(&counts, 10.0), Action::GoOn);
    // A sudden rise is not steady.
    counts.push(3000);
    assert_eq!(vote(&counts, 0.1), Action::GoOn);
    // The ring forgets after 64 passes.
    let mut counts = vec![1_000_000; 10];
    counts.extend([300; 64]);
    assert_eq!(vote(&counts, 0.1), Action::Switch);
}

#[test]
fn the_deadline_ends_every_policy_as_the_user_chose() {
    for about in ALL {
        let mut limits = limits(about.policy);
        limits.deadline = Some(Duration::from_secs(5));
        let mut history = after(&[(10_000, 9000, 1.0)]);
        history.elapsed = Duration::from_secs(5);
        assert_eq!(
            decide(&history, &limits).0.action,
            Action::GiveUp,
            "{}",
            about.name
        );
        limits.on_deadline = DeadlineAction::PauseAndFinish;
        assert_eq!(
            decide(&history, &limits).0.action,
            Action::Switch,
            "{}",
            about.name
        );
        limits.on_deadline = DeadlineAction::GoOn;
        assert!(
            !matches!(decide(&history, &limits).1, Reason::Deadline { .. }),
            "{}",
            about.name
        );
    }
}

#[test]
fn a_name_is_a_policy_and_a_policy_is_its_name() {
    for about in ALL {
        let text = match about.policy {
            Policy::Fixed { .. } => "fixed:200Mbit".to_string(),
            _ => about.name.to_string(),
        };
        let policy: Policy = text.parse().unwrap();
        assert_eq!(policy.name(), about.name);
        assert_eq!(policy.to_string().parse::<Policy>().unwrap(), policy);
        let json = serde_json::to_string(&policy).unwrap();
        assert_eq!(serde_json::from_str::<Policy>(&json).unwrap(), policy);
    }
    for wrong in ["", "calm", "fixed", "qemu:200Mbit", "fixed:fast"] {
        assert!(wrong.parse::<Policy>().is_err(), "{wrong}");
    }
}

/// A history of slices of 100 ms: (bytes copied, bytes remaining).
fn slices(list: &[(u64, u64)]) -> History {
    let mut history = start(1 << 30);
    for (copied, remaining) in list {
        history.elapsed += Duration::from_millis(100);
        history.samples.push(Sample {
            at: history.elapsed,
            time: Duration::from_millis(100),
            copied_bytes: *copied,
            wire_bytes: *copied,
            remaining_bytes: *remaining,
            ..Sample::default()
        });
        history.remaining_bytes = *remaining;
    }
    history
}

#[test]
fn a_stall_is_time_without_progress_but_not_a_slower_link() {
    use super::stall::{stalled, stuck};
    let falling: Vec<_> = (0..60).map(|i| (1 << 20, (200 - i) << 20)).collect();
    assert_eq!(stalled(&slices(&falling)), Duration::ZERO);
    assert_eq!(
        stalled(&slices(&[(1 << 20, 100 << 20); 60])),
        Duration::from_secs(6)
    );
    // The link drops to a quarter: more stays dirty, which is not a stall until that has lasted.
    let mut dropped = vec![(1 << 20, 100 << 20); 60];
    dropped.extend([(1 << 18, 150 << 20); 5]);
    assert_eq!(stalled(&slices(&dropped)), Duration::from_millis(500));
    // Up and down around the same least: the average of the younger half is better by chance.
    let waves = |n: u64| {
        60 + if n < 30 {
            40 * (n % 10) / 10
        } else {
            20 * (n % 10) / 10
        }
    };
    let waving: Vec<_> = (0..60).map(|n| (1 << 20, waves(n) << 20)).collect();
    assert_eq!(stalled(&slices(&waving)), Duration::ZERO);
    assert_eq!(stuck(&slices(&waving)), Duration::from_secs(6));
    assert_eq!(stuck(&slices(&falling)), Duration::ZERO);
    // A throttle just set has to show what it does first.
    let mut history = slices(&[(1 << 20, 100 << 20); 60]);
    history.samples[59].throttle_percent = 20;
    assert!(stalled(&history) < Duration::from_secs(1));
}

#[test]
fn a_contract_that_cannot_hold_is_throttled_for_and_then_given_up() {
    let mut limits = limits(Policy::CalmLive);
    limits.link_bytes_per_sec = Some(10_000 * 4096);
    limits.cost = Cost::unknown();
    limits.downtime_is_contract = true;
    limits.most_throttle_percent = 60;
    let mut history = slices(&[(1 << 22, 200_000_000); 200]);
    history
        .samples
        .iter_mut()
        .for_each(|s| s.dirtied_bytes = 20_000_000);
    history.groups = vec![Group {
        bytes: 400_000_000,
        dirty_bytes: 200_000_000,
        writes_per_sec: 1.0,
    }];
    history.vcpus = vec![
        VcpuWrites {
            vcpu: 0,
            bytes_per_sec: 1e6,
            throttle_percent: 0,
        },
        VcpuWrites {
            vcpu: 1,
            bytes_per_sec: 2e8,
            throttle_percent: 0,
        },
    ];
    let (decision, reason) = decide(&history, &limits);
    assert!(matches!(reason, Reason::Throttle { .. }), "{reason}");
    assert_eq!(decision.action, Action::GoOn);
    assert!(
        decision.throttle.of(0) == 0 && decision.throttle.of(1) >= 50,
        "{decision:?}"
    );
    assert!(decision.throttle.percent <= 60 && decision.throttle.percent >= 50);
    history.throttle_percent = 60;
    history.samples.iter_mut().for_each(|s| s.throttle_percent = 60);
    let (decision, reason) = decide(&history, &limits);
    assert_eq!(decision.action, Action::GiveUp, "{reason}");
    // Without a contract the same machine is switched: waiting brings nothing.
    limits.downtime_is_contract = false;
    assert_eq!(decide(&history, &limits).0.action, Action::Switch);
}

#[test]
fn the_deadline_makes_calm_live_hurry() {
    let mut limits = limits(Policy::CalmLive);
    let calm = decide(&start(512 << 20), &limits).0.bandwidth_bytes_per_sec;
    limits.deadline = Some(Duration::from_secs(10));
    let (decision, reason) = decide(&start(512 << 20), &limits);
    assert!(
        decision.bandwidth_bytes_per_sec > calm && matches!(reason, Reason::Hurry { .. }),
        "{reason}"
    );
}

#[test]
fn fewer_requests_make_it_faster() {
    let limits = limits(Policy::CalmLive);
    let at = |requests: f64| {
        let mut history = start(512 << 20);
        history.service = Some(ServiceUse {
            bytes_per_sec: requests * 8.0 * MBIT,
            requests_per_sec: Some(requests),
            goes_first: None,
        });
        decide(&history, &limits).0.bandwidth_bytes_per_sec
    };
    assert!(at(5.0) > at(20.0) && at(20.0) > at(40.0));
}

fn any_history() -> impl Strategy<Value = History> {
    let any_f = prop_oneof![Just(0.0), Just(f64::NAN), Just(f64::INFINITY), -1e9..1e12f64];
    let round =
        (0u64..u64::MAX, 0u64..1 << 40, 0u64..1 << 40, 0u64..100_000).prop_map(|(a, b, c, ms)| Round {
            time: Duration::from_millis(ms),
            planned_bytes: a,
            copied_bytes: b,
            wire_bytes: b / 2,
            dirty_bytes: c,
            bandwidth_bytes_per_sec: a,
        });
    let sample =
        (0u64..10_000, 0u64..1 << 32, 0u64..1 << 32, 0u64..1 << 40).prop_map(|(ms, a, b, c)| Sample {
            at: Duration::from_millis(ms),
            time: Duration::from_millis(ms),
            copied_bytes: a,
            wire_bytes: a / 2,
            dirtied_bytes: b,
            remaining_bytes: c,
            bandwidth_bytes_per_sec: a,
            paced: ms % 2 == 0,
            throttle_percent: (ms % 3) as u8,
            service_bytes_per_sec: a as f64,
        });
    let group =
        (0u64..1 << 40, 0u64..1 << 40, any_f.clone()).prop_map(|(bytes, dirty_bytes, writes_per_sec)| {
            Group {
                bytes,
                dirty_bytes,
                writes_per_sec,
            }
        });
    (
        (
            any::<bool>(),
            0u64..1 << 40,
            0u64..1 << 41,
            0u64..1_000_000,
            0u8..=255,
        ),
        proptest::collection::vec(round, 0..70),
        proptest::collection::vec(sample, 0..20),
        proptest::collection::vec(group, 0..8),
        (
            proptest::option::of(any_f.clone()),
            proptest::option::of((any_f.clone(), proptest::option::of(any_f.clone()))),
            any_f,
        ),
    )
        .prop_map(
            |((between, total, remaining, ms, throttle), rounds, samples, groups, (link, service, disk))| {
                History {
                    elapsed: Duration::from_millis(ms),
                    between_rounds: between,
                    total_bytes: total,
                    remaining_bytes: remaining,
                    round: rounds.last().copied().unwrap_or_default(),
                    rounds,
                    samples,
                    groups,
                    link_bytes_per_sec: link,
                    carried_bytes_per_sec: Some(disk),
                    service: service.map(|(bytes_per_sec, requests_per_sec)| ServiceUse {
                        bytes_per_sec,
                        requests_per_sec,
                        goes_first: throttle
                            .is_multiple_of(2)
                            .then_some(Duration::from_millis(u64::from(throttle))),
                    }),
                    switch_fixed: Duration::from_millis(u64::from(throttle)),
                    waited: Duration::from_millis(ms / 2),
                    throttle_percent: throttle,
                    vcpus: Vec::new(),
                    disk_remaining_bytes: remaining / 2,
                    disk_dirty_bytes_per_sec: disk,
                }
            },
        )
}

proptest! {
    /// Whatever was measured, and however absurd, a decision stays in its bounds and says why.
    #[test]
    fn no_policy_leaves_its_bounds(
        history in any_history(),
        which in 0..ALL.len(),
        link in proptest::option::of(1u64..1 << 40),
        (least, most) in (0u64..1 << 34, proptest::option::of(1u64..1 << 36)),
        (contract, throttle, sla) in (any::<bool>(), 0u8..=99, any::<bool>()),
        deadline in proptest::option::of(1u64..2_000_000),
    ) {
        let limits = Limits {
            policy: ALL[which].policy,
            link_bytes_per_sec: link,
            least_bandwidth_bytes_per_sec: least,
            most_bandwidth_bytes_per_sec: most,
            downtime_is_contract: contract,
            most_throttle_percent: throttle,
            cost: if sla { Cost::queue(queue()) } else { Cost::unknown() },
            deadline: deadline.map(Duration::from_millis),
            on_deadline: DeadlineAction::GoOn,
            ..Limits::default()
        };
        let (decision, reason) = decide(&history, &limits);
        let top = most.unwrap_or(UNLIMITED).min(link.unwrap_or(UNLIMITED));
        prop_assert!(decision.bandwidth_bytes_per_sec <= top);
        prop_assert!(decision.bandwidth_bytes_per_sec >= least.max(LEAST_BANDWIDTH_BYTES_PER_SEC).min(top));
        prop_assert!(decision.throttle.percent <= throttle);
        prop_assert!(decision.throttle.vcpus.iter().all(|v| v.percent <= throttle));
        prop_assert!(decision.ask_again > Duration::ZERO && decision.ask_again <= Duration::from_secs(1));
        let sentence = reason.to_string();
        prop_assert!(!sentence.is_empty() && !sentence.contains("NaN"), "{}", sentence);
        prop_assert!(serde_json::to_string(&(&history.rounds, &decision, &reason)).is_ok());
    }
}

/// A link that seemed slow in its first moments stayed slow for calm-live, which never went faster than it had seen.
#[test]
fn a_link_that_was_underestimated_is_found_out() {
    let mut limits = limits(Policy::CalmLive);
    limits.link_bytes_per_sec = None;
    limits.cost = Cost::unknown();
    let mut history = slices(&[(1 << 20, 200_000_000); 20]);
    history.link_bytes_per_sec = Some(1e6);
    for _ in 0..40 {
        let decision = decide(&history, &limits).0;
        let rate = (decision.bandwidth_bytes_per_sec as f64).min(1e8);
        if decision.bandwidth_bytes_per_sec as f64 > 1e8 {
            history.saw_link(rate);
        } else {
            history.saw_under_limit(rate, &decision);
        }
    }
    assert!(limits.link(&history) > Some(0.9e8), "{:?}", limits.link(&history));
}

/// A switch that takes longer than the downtime by itself was said to be within its limit.
#[test]
fn a_switch_with_nothing_left_that_takes_too_long_says_why_it_is_made() {
    let mut limits = limits(Policy::Max);
    limits.downtime = Duration::from_millis(300);
    let mut history = slices(&[(1 << 20, 0); 3]);
    history.between_rounds = true;
    history.rounds = vec![Round::default()];
    history.remaining_bytes = 0;
    for (takes_ms, said) in [(400, "nothing is left to copy"), (100, "within the limit")] {
        history.switch_fixed = Duration::from_millis(takes_ms);
        let (decision, reason) = decide(&history, &limits);
        assert_eq!(decision.action, Action::Switch);
        assert!(reason.to_string().contains(said), "{reason}");
    }
}
