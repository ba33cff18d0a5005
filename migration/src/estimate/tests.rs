use super::*;
use crate::cost::parse_sla;
use crate::policy::{ALL, Policy};

const MB: f64 = 1e6;

fn known(writes: &[(u64, u64)]) -> Known {
    Known {
        total_bytes: 1_000_000_000,
        empty_bytes: 0,
        wire_ratio: 1.0,
        writes: WriteCurve::new(
            writes
                .iter()
                .map(|(ms, mb)| (Duration::from_millis(*ms), mb * 1_000_000))
                .collect(),
        ),
        link_bytes_per_sec: [90.0 * MB, 100.0 * MB, 110.0 * MB],
        copy_bytes_per_sec: f64::INFINITY,
        round_trip: Duration::ZERO,
        prepare: Duration::ZERO,
        switch_fixed: Duration::from_millis(50),
        verify: Duration::ZERO,
        service: None,
    }
}

fn max() -> Limits {
    Limits {
        policy: Policy::Max,
        ..Limits::default()
    }
}

#[test]
fn a_machine_that_writes_nothing_takes_its_size() {
    let e = estimate(&known(&[]), &max());
    assert!((e.total_secs.expected - 10.05).abs() < 1e-3, "{e:?}");
    assert!((e.downtime_secs.expected - 0.05).abs() < 1e-6);
    assert!((e.wire_bytes.expected - 1e9).abs() < 1e4);
    assert!(e.total_secs.low < 10.0 && e.total_secs.high > 11.0 && e.converges == [true; 3]);
    let promise = e.promise().unwrap();
    assert_eq!(promise.downtime.as_millis(), 50);
}

/// Comparing both sides takes its time in the switch; the policy does not count it against the downtime.
#[test]
fn verification_lengthens_the_switch_and_nothing_else() {
    let plain = estimate(&known(&[(1000, 10)]), &max());
    let mut verified = known(&[(1000, 10)]);
    verified.verify = Duration::from_secs(2);
    let verified = estimate(&verified, &max());
    let more = verified.downtime_secs.expected - plain.downtime_secs.expected;
    assert!((more - 2.0).abs() < 1e-9, "{verified:?}");
    assert_eq!(
        (verified.wire_bytes, verified.converges),
        (plain.wire_bytes, plain.converges)
    );
}

#[test]
fn what_is_written_meanwhile_is_carried_again() {
    // 10 MB/s of different pages. A page is written on average in half of the first 10 s: some 50 MB again.
    let e = estimate(&known(&[(1000, 10), (10_000, 100)]), &max());
    let again = e.wire_bytes.expected - 1e9;
    assert!((35.0 * MB..70.0 * MB).contains(&again), "{e:?}");
    assert!((10.4..10.8).contains(&e.total_secs.expected), "{e:?}");
    assert!(e.downtime_secs.expected < 0.3 && e.converges[1], "{e:?}");
}

#[test]
fn what_is_written_faster_than_the_link_does_not_converge_and_says_so() {
    let e = estimate(&known(&[(100, 20), (1000, 200), (10_000, 900)]), &max());
    assert_eq!(e.converges, [false; 3]);
    assert!(
        !e.crosses && e.promise().is_none() && !e.reason.is_empty(),
        "{e:?}"
    );
    // The same with all of it in the switch.
    let patient = Limits {
        downtime: Duration::from_secs(60),
        ..max()
    };
    let e = estimate(&known(&[(100, 20), (1000, 200), (10_000, 900)]), &patient);
    assert!(e.crosses && e.downtime_secs.expected > 0.3, "{e:?}");
}

/// A play is for a person who waits: every policy comes to an end, soon, with numbers that are numbers.
#[test]
fn every_policy_is_played_to_an_end() {
    for writes in [
        &[][..],
        &[(100, 2), (1000, 15)],
        &[(100, 30), (300, 60), (1000, 64)],
        &[(100, 30), (300, 90), (1000, 300)],
    ] {
        for about in ALL {
            let policy = match about.policy {
                Policy::Fixed { .. } => Policy::Fixed {
                    bandwidth_bytes_per_sec: 50_000_000,
                },
                policy => policy,
            };
            let limits = Limits {
                policy,
                link_bytes_per_sec: Some(100_000_000),
                cost: parse_sla("rate=20/s,size=1MB,deadline=1s").unwrap(),
                ..Limits::default()
            };
            let e = estimate(&known(writes), &limits);
            assert!(e.total_secs.expected.is_finite(), "{policy}: {e:?}");
            let cost = e.cost.unwrap();
            assert!(
                cost.expected.is_finite() && cost.expected >= 0.0,
                "{policy}: {e:?}"
            );
            assert!(!e.reason.is_empty());
            if e.crosses {
                assert!(e.wire_bytes.expected > 0.9e9, "{policy}: {e:?}");
            }
        }
    }
}

#[test]
fn numbers_that_are_none_do_not_become_ours() {
    let mut bad = known(&[(1000, 10)]);
    bad.link_bytes_per_sec = [f64::NAN, 0.0, f64::INFINITY];
    bad.wire_ratio = f64::NAN;
    bad.copy_bytes_per_sec = f64::NAN;
    let e = estimate(&bad, &max());
    assert!(!e.total_secs.expected.is_nan() && !e.downtime_secs.high.is_nan());
}

/// Played on from the middle, the end is where it was from the start.
#[test]
fn the_promise_in_the_middle_agrees_with_the_one_before() {
    let known = known(&[(100, 4), (1000, 25)]);
    let limits = max();
    let before = estimate(&known, &limits);
    // The first pass, half way through.
    let half = known.total_bytes / 2;
    let mut history = History {
        elapsed: Duration::from_secs(5),
        total_bytes: known.total_bytes,
        link_bytes_per_sec: Some(100.0 * MB),
        switch_fixed: known.switch_fixed,
        ..History::default()
    };
    // 25 MB/s are written: after t seconds t/10 of the memory is sent, and was watched for t/2 on average.
    let mut before_it = 0.0;
    for tenth in 1..=10 {
        let t = f64::from(tenth) * 0.5;
        let so_far = 25.0 * MB * t * t / 20.0;
        history.samples.push(crate::policy::Sample {
            time: Duration::from_millis(500),
            copied_bytes: half / 10,
            wire_bytes: half / 10,
            dirtied_bytes: (so_far - before_it) as u64,
            ..Default::default()
        });
        before_it = so_far;
    }
    history.remaining_bytes = half + before_it as u64;
    history.round.planned_bytes = known.total_bytes;
    history.round.copied_bytes = half;
    history.round.time = Duration::from_secs(5);
    let so_far = SoFar {
        wire_bytes: half,
        ..SoFar::default()
    };
    let now = from_here(&history, &limits, so_far).unwrap();
    let expected = before.total_secs.expected;
    assert!(
        (now.total.as_secs_f64() - expected).abs() < 0.15 * expected,
        "{now:?} {before:?}"
    );
    let wire = before.wire_bytes.expected;
    assert!(
        (now.wire_bytes as f64 - wire).abs() < 0.15 * wire,
        "{now:?} {before:?}"
    );
    history.link_bytes_per_sec = None;
    assert_eq!(from_here(&history, &limits, so_far), None);
}
