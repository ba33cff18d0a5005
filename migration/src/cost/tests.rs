//! The cost functions against the golden vectors, measured curves and service levels as people write them.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

/// A Mbit/s as CALM counts, in bytes per second.
const MBIT: f64 = 1_048_576.0 / 8.0;

fn paper() -> Queue {
    Queue {
        requests_per_sec: 20.0,
        response_bytes: 8.0 * MBIT,
        deadline: Duration::from_secs(1),
    }
}

fn golden() -> serde_json::Value {
    serde_json::from_str(include_str!("../../testdata/calm-golden.json")).unwrap()
}

#[test]
fn f_is_the_papers_f_with_the_clamp() {
    for (bandwidth, late) in golden()["F"].as_object().unwrap() {
        let residual: f64 = bandwidth.parse().unwrap();
        let expected = late.as_f64().unwrap();
        let got = paper().late(residual * MBIT);
        assert!(
            (got - expected).abs() <= 1e-9 * expected,
            "F({bandwidth}) is {got} and not {expected}"
        );
    }
}

#[test]
fn what_is_not_a_number_is_all_late() {
    assert_eq!(paper().late(f64::NAN), 1.0);
    assert_eq!(paper().late(f64::NEG_INFINITY), 1.0);
    assert_eq!(paper().late(f64::INFINITY), 0.0);
    let table = Table::new(&[(10.0, 0.5)]).unwrap();
    assert_eq!(table.late(f64::NAN), 1.0);
}

#[test]
fn the_cheapest_bandwidth_is_the_dirtying_rate_and_the_increment() {
    let cost = Cost::queue(paper());
    for dirty in [0.0, 20.0, 60.0] {
        let (bandwidth, price) = cost.cheapest(256.0 * MBIT, dirty * MBIT, 0.0, 1.0).unwrap();
        assert!(
            (bandwidth / MBIT - (dirty + 8.0)).abs() < 1e-3,
            "{}",
            bandwidth / MBIT
        );
        let expected = paper().late((256.0 - dirty - 8.0) * MBIT) / (8.0 * MBIT);
        assert!((price / expected - 1.0).abs() < 1e-6);
    }
    assert_eq!(cost.cheapest(256.0 * MBIT, 256.0 * MBIT, 0.0, 1.0), None);
    assert_eq!(cost.cheapest(f64::NAN, 0.0, 0.0, 1.0), None);
}

#[test]
fn a_price_of_time_makes_it_hurry() {
    let cost = Cost::queue(paper());
    let at = |price| cost.cheapest(512.0 * MBIT, 0.0, price, 1.0).unwrap().0 / MBIT;
    assert!((at(0.0) - 8.0).abs() < 0.01 && at(1e-6) > 200.0 && at(1e-2) > at(1e-6));
    // First-order condition of the paper's F: F(B - b) * ((b - d) deadline / size - 1) = price.
    let b = at(1e-3);
    let left = paper().late((512.0 - b) * MBIT) * (b / 8.0 - 1.0);
    assert!((left / 1e-3 - 1.0).abs() < 1e-3, "{left}");
}

#[test]
fn a_measured_curve_is_made_monotone() {
    let table = Table::new(&[(200.0, 0.1), (100.0, 0.6), (150.0, 0.8), (300.0, 0.0)]).unwrap();
    assert!((table.late(100.0) - 0.7).abs() < 1e-12 && (table.late(150.0) - 0.7).abs() < 1e-12);
    assert!((table.late(175.0) - 0.4).abs() < 1e-12);
    assert_eq!(table.late(0.0), 1.0);
    assert_eq!(table.late(1e9), 0.0);
    assert!(Table::new(&[]).is_err() && Table::new(&[(1.0, 1.5)]).is_err());
}

#[test]
fn a_curve_is_fitted_from_measured_points() {
    let points: Vec<(f64, f64)> = (160..260)
        .step_by(8)
        .map(|b| (f64::from(b) * MBIT, paper().late(f64::from(b) * MBIT)))
        .collect();
    let fitted = fit_queue(&points, 20.0).unwrap();
    assert!((fitted.response_bytes / paper().response_bytes - 1.0).abs() < 1e-6);
    assert!((fitted.deadline.as_secs_f64() - 1.0).abs() < 1e-6);
    assert_eq!(fit_queue(&points[..1], 20.0), None);
    assert_eq!(fit_queue(&[(1.0, 0.5), (1.0, 0.5)], 20.0), None);
}

#[test]
fn several_services_are_summed_by_weight() {
    let cost = parse_sla("rate=20/s,size=1MB,deadline=1s;rate=20/s,size=1MB,deadline=1s,weight=3").unwrap();
    assert_eq!(cost.down(), 4.0);
    assert_eq!(cost.at(0.0), 4.0);
    assert_eq!(cost.services[0].share, 0.5);
    let one = parse_sla("rate=20/s,size=1MB,deadline=1s").unwrap();
    assert!((cost.at(50e6) - 4.0 * one.at(25e6)).abs() < 1e-12);
}

#[test]
fn more_requests_need_more_bandwidth() {
    let cost = Cost::queue(paper());
    assert!(cost.at_load(200.0 * MBIT, 0.5) < cost.at(200.0 * MBIT));
    assert_eq!(cost.at_load(200.0 * MBIT, 1.5), 1.0);
}

#[test]
fn rates_sizes_and_times_as_people_write_them() {
    assert_eq!(parse_rate("256Mbit").unwrap(), 32_000_000);
    assert_eq!(parse_rate("256Mibit/s").unwrap(), 33_554_432);
    assert_eq!(parse_rate("1Gbit/s").unwrap(), 125_000_000);
    assert_eq!(parse_rate("1.5gbps").unwrap(), 187_500_000);
    assert_eq!(parse_rate("32MB/s").unwrap(), 32_000_000);
    assert_eq!(parse_rate("32MiB/s").unwrap(), 33_554_432);
    assert_eq!(parse_size("1MB").unwrap(), 1_000_000);
    assert_eq!(parse_size("125kB").unwrap(), 125_000);
    assert_eq!(parse_size("4096").unwrap(), 4096);
    assert_eq!(parse_memory("512M").unwrap(), 512 << 20);
    assert_eq!(parse_memory("4GiB").unwrap(), 4 << 30);
    assert_eq!(parse_duration("300ms").unwrap(), Duration::from_millis(300));
    assert_eq!(parse_duration("2min").unwrap(), Duration::from_secs(120));
    for wrong in [
        "",
        "fast",
        "12",
        "12 parsecs",
        "-3Mbit",
        "0Mbit",
        "1e9999Gbit",
        "Mbit",
    ] {
        assert!(parse_rate(wrong).is_err(), "{wrong}");
    }
    for wrong in ["", "ms", "-1s", "1 fortnight", "1e400s"] {
        assert!(parse_duration(wrong).is_err(), "{wrong}");
    }
    let sentence = parse_sla("rate=20/s,size=1MB").unwrap_err().to_string();
    assert!(sentence.contains("does not say the deadline"), "{sentence}");
    for wrong in [
        "",
        "rate=0,size=1MB,deadline=1s",
        "rate=20,size=0,deadline=1s",
        "rate=20,size=1,deadline=1s,x=1",
        "rate",
    ] {
        assert!(parse_sla(wrong).is_err(), "{wrong}");
    }
}

proptest! {
    #[test]
    fn parsing_never_panics(text in "\\PC*") {
        let _ = (parse_rate(&text), parse_size(&text), parse_memory(&text), parse_duration(&text), parse_sla(&text));
    }

    #[test]
    fn less_bandwidth_never_costs_less(
        points in proptest::collection::vec((0.0f64..1e9, 0.0f64..1.0), 1..20), a in 0.0f64..1e9, b in 0.0f64..1e9,
    ) {
        let table = Table::new(&points).unwrap();
        prop_assert!(table.late(a.min(b)) >= table.late(a.max(b)) - 1e-12);
    }
}
