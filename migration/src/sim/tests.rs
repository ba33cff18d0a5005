//! The simulator against the papers' numbers, and our policy against all others.

use std::time::Duration;

use super::link::{Change, Sharing};
use super::pages::{Outcome, Scenario};
use super::paper::{self, MBIT, PAGE_WRITE_RATE};
use super::trace::{Trace, Writing};
use crate::cost::{Cost, Queue};
use crate::policy::{ALL, Limits, Policy};

fn brief(o: &Outcome) -> String {
    format!(
        "{}: cost {:.4}, total {:.2} s, downtime {:.3} s, {}",
        o.policy, o.cost, o.total_s, o.downtime_s, o.stop_reason
    )
}

fn within(got: f64, expected: f64, part: f64, what: &str) {
    assert!(
        (got - expected).abs() <= part * expected,
        "{what}: {got} is not within {part} of {expected}"
    );
}

/// Memory, link and service divided by 32: the same seconds and the same costs, sooner.
fn small(trace: &Trace, mbit: f64, sharing: Sharing) -> Scenario {
    scaled(trace, mbit, sharing, 32.0)
}

fn scaled(trace: &Trace, mbit: f64, sharing: Sharing, scale: f64) -> Scenario {
    let limits = Limits {
        cost: Cost::queue(Queue {
            response_bytes: 8.0 * MBIT / scale,
            ..paper::service()
        }),
        ..Limits::default()
    };
    let mut trace = trace.clone();
    trace.device_pages /= scale as u64;
    let mut scenario = Scenario::new(trace, (512 << 20) / scale as u64, mbit * MBIT / scale, limits);
    scenario.link.sharing = sharing;
    scenario.at_most = Duration::from_secs(400);
    scenario
}

/// The others may know the true page write rate in advance; ours has to find out.
fn run_all(scenario: &Scenario) -> (Outcome, Vec<Outcome>) {
    let mut told = scenario.clone();
    if let Writing::Classes { classes, .. } = &told.trace.writing {
        let whole: f64 = classes.iter().map(|c| c.part).sum();
        let writes: f64 = classes.iter().map(|c| c.part * c.rate).sum();
        told.limits.page_write_rate_per_sec = Some(writes / whole);
    }
    let half = Policy::Fixed {
        bandwidth_bytes_per_sec: (scenario.link.bytes_per_sec / 2.0) as u64,
    };
    let others = ALL
        .iter()
        .map(|about| match about.policy {
            Policy::Fixed { .. } => half,
            policy => policy,
        })
        .filter(|policy| *policy != Policy::CalmLive)
        .map(|policy| told.with_policy(policy).run())
        .collect();
    (scenario.with_policy(Policy::CalmLive).run(), others)
}

#[test]
fn the_reference_column_is_met_within_two_percent() {
    let run = |policy, link| paper::scenario(Trace::reference(), 512, link, policy, 1).run();
    let fixed = Policy::CalmFixed {
        bandwidth_bytes_per_sec: None,
    };
    for (policy, link, cost, total, downtime) in [
        (Policy::CalmAdaptive, 256.0, 12.03, 55.6, 11.940),
        (fixed, 256.0, 12.41, 31.4, 12.232),
        (Policy::XenBasic, 256.0, 49.35, 68.6, f64::NAN),
        (Policy::XenBasic, 512.0, f64::NAN, 68.75, f64::NAN),
        (Policy::CalmAdaptive, 512.0, f64::NAN, 70.8, 0.0078),
        (fixed, 512.0, f64::NAN, 20.8, f64::NAN),
    ] {
        let outcome = run(policy, link);
        for (got, expected, what) in [
            (outcome.cost, cost, "cost"),
            (outcome.total_s, total, "total"),
            (outcome.downtime_s, downtime, "downtime"),
        ] {
            if expected.is_finite() {
                within(
                    got,
                    expected,
                    0.02,
                    &format!("{} at {link} Mbit/s: {what}", policy.name()),
                );
            }
        }
        assert!(outcome.crossed);
    }
}

#[test]
fn calm_live_costs_at_most_0_6_in_at_most_60_s_where_the_service_goes_first() {
    for seed in 1..=3 {
        let mut scenario = paper::scenario(Trace::reference(), 512, 256.0, Policy::CalmLive, seed);
        scenario.limits.page_write_rate_per_sec = None;
        scenario.link.sharing = Sharing::ServiceFirst { reaction_secs: 0.001 };
        let outcome = scenario.run();
        assert!(
            outcome.crossed && outcome.cost <= 0.6 && outcome.total_s <= 60.0,
            "{}",
            brief(&outcome)
        );
    }
}

/// On a link that is shared by reservation 0.6 in 60 s cannot be reached: sending every page once in 60 s costs 2.1
/// at the least. The closed loop reaches what a cold-first one can.
#[test]
fn calm_live_costs_a_seventeenth_of_calm_adaptive_on_a_reserved_link() {
    let mut scenario = paper::scenario(Trace::reference(), 512, 256.0, Policy::CalmLive, 1);
    scenario.limits.page_write_rate_per_sec = None;
    let outcome = scenario.run();
    assert!(
        outcome.cost <= 12.03 / 17.0 && outcome.total_s <= 125.0,
        "{}",
        brief(&outcome)
    );
}

/// Worse means: late requests, downtime and the price of time added up are more than 2 % above the best of all
/// other policies that crossed. The others are told the true page write rate in advance.
fn worse(names: &[&str], links: &[f64], scale: f64) -> Vec<String> {
    let mut worse = Vec::new();
    for sharing in [Sharing::Reserved, Sharing::ServiceFirst { reaction_secs: 0.001 }] {
        for name in names {
            for mbit in links {
                let trace = Trace::named(name).unwrap();
                let (live, others) = run_all(&scaled(&trace, *mbit, sharing, scale));
                let best = others
                    .iter()
                    .filter(|o| o.crossed)
                    .min_by(|a, b| a.cost_with_time.total_cmp(&b.cost_with_time))
                    .unwrap();
                if !live.crossed || live.cost_with_time > best.cost_with_time * 1.02 {
                    worse.push(format!(
                        "{name} at {mbit} Mbit/s, {sharing:?}: {:.4} against {:.4} of {}",
                        live.cost_with_time, best.cost_with_time, best.policy
                    ));
                }
            }
        }
    }
    worse
}

#[test]
fn calm_live_is_never_worse_than_the_best_of_the_others() {
    let names = [
        "ref",
        "fig3",
        "uniform",
        "uniform:0",
        "uniform:0.005",
        "uniform:0.5",
        "idle",
        "zipf",
        "zipf:40000",
        "phases",
        "bursts",
        "gc",
        "above",
    ];
    let worse = worse(&names, &[180.0, 200.0, 256.0, 512.0, 1024.0], 32.0);
    assert!(worse.is_empty(), "{}", worse.join("\n"));
}

/// Chance is smaller and jumps show better in a guest of full size.
#[test]
fn calm_live_is_never_worse_at_full_size_where_writing_changes() {
    let worse = worse(&["phases", "bursts", "gc"], &[256.0], 1.0);
    assert!(worse.is_empty(), "{}", worse.join("\n"));
}

#[test]
fn a_seed_repeats_to_the_byte() {
    let trace = Trace::named("bursts").unwrap();
    let text = |policy, seed| {
        let mut scenario = small(&trace, 256.0, Sharing::Reserved).with_policy(policy);
        scenario.seed = seed;
        scenario.limits.page_write_rate_per_sec = Some(PAGE_WRITE_RATE);
        let outcome = scenario.run();
        let timeline = serde_json::to_string(&(&outcome.timeline, &outcome.decisions)).unwrap();
        format!("{}{timeline}", serde_json::to_string(&outcome).unwrap())
    };
    for about in ALL.iter().skip(1) {
        assert_eq!(text(about.policy, 7), text(about.policy, 7), "{}", about.name);
        assert_ne!(text(about.policy, 7), text(about.policy, 8), "{}", about.name);
    }
}

/// Requests come half of the time at 0.4 times and half of the time at 1.2 times the rate.
#[test]
fn a_changing_request_rate_is_used_most_bytes_cross_in_the_lulls() {
    let mut scenario = small(&Trace::reference(), 256.0, Sharing::Reserved);
    scenario.link.load = vec![
        Change {
            at_secs: 0.0,
            factor: 1.5,
        },
        Change {
            at_secs: 10.0,
            factor: 0.5,
        },
    ];
    scenario.link.load_period_secs = Some(20.0);
    let live = scenario.run();
    let (mut lulls, mut all) = (0.0, 0.0);
    for pair in live.timeline.windows(2) {
        let bytes = pair[1].bandwidth_bytes_per_sec * (pair[1].secs - pair[0].secs);
        all += bytes;
        if pair[0].secs % 20.0 < 10.0 {
            lulls += bytes;
        }
    }
    assert!(lulls > 0.7 * all, "{lulls} of {all} in lulls");
    // The same policy that does not look at the requests pays more.
    let blind = scenario.with_policy(Policy::CalmAdaptive).run();
    assert!(
        live.cost_with_time < blind.cost_with_time,
        "{} {}",
        brief(&live),
        brief(&blind)
    );
}

#[test]
fn a_link_that_is_lost_for_a_while_delays_and_harms_nothing() {
    let mut scenario = small(&Trace::reference(), 512.0, Sharing::Reserved);
    let whole = scenario.run();
    scenario.link.capacity = vec![
        Change {
            at_secs: 3.0,
            factor: 0.0,
        },
        Change {
            at_secs: 8.0,
            factor: 1.0,
        },
    ];
    let cut = scenario.run();
    assert!(
        cut.crossed && cut.total_s > whole.total_s + 4.0 && cut.total_s < whole.total_s + 8.0,
        "{}",
        brief(&cut)
    );
}

#[test]
fn a_guest_above_the_link_is_throttled_only_if_that_is_allowed() {
    let trace = Trace::uniform(2.0);
    let mut scenario = small(&trace, 256.0, Sharing::Reserved);
    scenario.limits.cost = Cost::unknown();
    scenario.limits.downtime_is_contract = true;
    scenario.limits.downtime = Duration::from_secs(2);
    let refused = scenario.run();
    assert!(!refused.crossed, "{}", brief(&refused));
    scenario.limits.most_throttle_percent = 99;
    let throttled = scenario.run();
    assert!(
        throttled.crossed && throttled.downtime_s <= 2.0,
        "{}",
        brief(&throttled)
    );
}

#[test]
fn a_downtime_contract_holds() {
    for name in ["ref", "zipf", "bursts", "gc"] {
        let mut scenario = small(&Trace::named(name).unwrap(), 256.0, Sharing::Reserved);
        scenario.limits.downtime_is_contract = true;
        scenario.limits.downtime = Duration::from_millis(200);
        scenario.switch_fixed = Duration::from_millis(20);
        let outcome = scenario.run();
        assert!(
            outcome.crossed && outcome.downtime_s <= 0.201,
            "{name}: {}",
            brief(&outcome)
        );
    }
}

/// Request by request: what the model charges a service that goes first, and what it gives the crossing.
#[test]
fn going_first_costs_what_the_queue_says_and_leaves_what_it_says() {
    let (reaction, link) = (0.005, 200.0 * MBIT);
    let queue = paper::service();
    let mut rng = super::Rng::new(11);
    let (mut now, mut free_at) = (0.0f64, 0.0f64);
    let (mut late, mut crossing, count) = (0u32, 0.0, 10_000_000);
    for _ in 0..count {
        now += rng.wait(queue.requests_per_sec);
        let size = queue.response_bytes * rng.wait(1.0);
        if now > free_at {
            // The crossing has the link from shortly after it fell silent, and lets go of it too late.
            crossing += (now - free_at - reaction).max(0.0) + reaction;
            free_at = now + reaction;
        }
        free_at += size / link;
        late += u32::from(free_at - now > queue.deadline.as_secs_f64());
    }
    let measured = f64::from(late) / f64::from(count);
    let charged = Cost::queue(queue).at_first_place(link, 1.0, reaction);
    within(measured, charged, 0.05, "late requests");
    let mut shared = super::link::Link::new(link);
    shared.sharing = Sharing::ServiceFirst {
        reaction_secs: reaction,
    };
    let offered = queue.requests_per_sec * queue.response_bytes;
    let given = shared.idle_share(link, offered, queue.requests_per_sec);
    // The model does not count what the crossing gets while it lets go: it gives rather too little.
    let got = crossing / now;
    assert!(got > given * 0.99 && got < given * 1.2, "{got} against {given}");
}

/// A cap hid what the link carries: `max` went on until nothing was left, and `calm-live` never switched.
#[test]
fn a_policy_that_is_capped_and_told_nothing_of_the_link_still_finds_its_moment() {
    for policy in [Policy::Max, Policy::CalmLive] {
        let mut scenario = small(&Trace::reference(), 1024.0, Sharing::Reserved);
        scenario.limits.policy = policy;
        scenario.limits.link_bytes_per_sec = None;
        scenario.limits.most_bandwidth_bytes_per_sec = Some((scenario.link.bytes_per_sec / 2.0) as u64);
        scenario.limits.deadline = Some(Duration::from_secs(60));
        for outcome in [scenario.run(), scenario.cross().outcome] {
            assert!(outcome.crossed, "{}", brief(&outcome));
            if policy == Policy::Max {
                assert!(
                    outcome.rounds <= 5,
                    "{} rounds, {}",
                    outcome.rounds,
                    brief(&outcome)
                );
            }
        }
    }
}
