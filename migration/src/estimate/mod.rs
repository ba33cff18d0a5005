//! What a crossing will take, before it begins: time, bytes and downtime, each with a range.
//!
//! The machine was watched for a while: how much it writes in windows of different lengths. From that curve and
//! the link the rounds are played through in whole numbers of bytes; no guest is simulated, nothing is random.

pub mod lmdt;
pub mod order;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::cost::Cost;
use crate::report::Promise;

/// How many different bytes the machine writes in a window, from windows of different lengths: it rises with
/// the length, ever slower, because what is written often is written again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WriteCurve {
    /// (length of the window, bytes written in it), ascending.
    points: Vec<(Duration, u64)>,
}

impl WriteCurve {
    /// Points in any order; where a longer window shows less than a shorter one, the most before it counts.
    pub fn new(mut points: Vec<(Duration, u64)>) -> Self {
        points.retain(|(length, _)| !length.is_zero());
        points.sort();
        let mut most = 0;
        for point in &mut points {
            most = most.max(point.1);
            point.1 = most;
        }
        WriteCurve { points }
    }

    /// Different bytes written in a window of this length: linear between the points, and beyond the last with
    /// the slope of the last stretch.
    pub fn bytes(&self, secs: f64) -> f64 {
        let mut before = (0.0, 0.0);
        let mut slope = 0.0;
        for (length, bytes) in &self.points {
            let at = (length.as_secs_f64(), *bytes as f64);
            if at.0 > before.0 {
                slope = (at.1 - before.1) / (at.0 - before.0);
            }
            if secs <= at.0 {
                return before.1 + slope * (secs - before.0);
            }
            before = at;
        }
        before.1 + slope * (secs - before.0)
    }
}

/// What is known before the crossing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Known {
    /// What has to cross at least once, and what of it is zero or empty and costs next to nothing.
    pub total_bytes: u64,
    pub empty_bytes: u64,
    /// Wire bytes per byte of the rest: what compression is expected to do; 1 if nobody knows.
    pub wire_ratio: f64,
    pub writes: WriteCurve,
    /// The least, the expected and the most that the link gives the crossing.
    pub bandwidth_bytes_per_sec: [f64; 3],
    /// Pausing, device state, verifying, resuming.
    pub switch_fixed: Duration,
    /// The downtime at which the crossing will switch.
    pub downtime: Duration,
    pub most_rounds: u32,
    pub cost: Cost,
    /// The whole link, for what the service keeps while the crossing uses its bandwidth.
    pub link_bytes_per_sec: f64,
    /// Whether the service's packets go first: then the copying costs it nothing that counts.
    pub service_goes_first: bool,
}

/// A number with the range it is expected in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Range {
    pub low: f64,
    pub expected: f64,
    pub high: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    pub total_secs: Range,
    pub downtime_secs: Range,
    pub wire_bytes: Range,
    pub rounds: Range,
    /// Seconds of outage, if the service level is known.
    pub cost: Option<Range>,
    /// Whether the downtime asked for is reached at the least, the expected and the most bandwidth.
    pub converges: [bool; 3],
}

impl Estimate {
    /// What is said before the move: the expected numbers.
    pub fn promise(&self) -> Promise {
        let secs = |s: f64| Duration::try_from_secs_f64(s).unwrap_or(Duration::MAX);
        Promise {
            total: secs(self.total_secs.expected),
            downtime: secs(self.downtime_secs.expected),
            wire_bytes: self.wire_bytes.expected as u64,
        }
    }
}

/// One play of the rounds.
struct Play {
    total_secs: f64,
    downtime_secs: f64,
    wire_bytes: f64,
    rounds: f64,
    cost: f64,
    converges: bool,
}

/// How much more and less than the watched writing is thought possible.
const WRITING_VARIES: f64 = 0.25;

/// Plays the crossing with the least, the expected and the most favourable numbers.
pub fn estimate(known: &Known) -> Estimate {
    let [slow, usual, fast] = known.bandwidth_bytes_per_sec;
    let bad = play(known, slow.min(usual), 1.0 + WRITING_VARIES);
    let expected = play(known, usual, 1.0);
    let good = play(known, fast.max(usual), 1.0 - WRITING_VARIES);
    let range = |pick: fn(&Play) -> f64| {
        let values = [pick(&bad), pick(&expected), pick(&good)];
        Range {
            low: values.iter().copied().fold(f64::INFINITY, f64::min),
            expected: values[1],
            high: values.iter().copied().fold(0.0, f64::max),
        }
    };
    Estimate {
        total_secs: range(|p| p.total_secs),
        downtime_secs: range(|p| p.downtime_secs),
        wire_bytes: range(|p| p.wire_bytes),
        rounds: range(|p| p.rounds),
        cost: known.cost.is_known().then(|| range(|p| p.cost)),
        converges: [bad.converges, expected.converges, good.converges],
    }
}

fn play(known: &Known, bandwidth: f64, writing: f64) -> Play {
    let bandwidth = if bandwidth.is_finite() {
        bandwidth.max(1.0)
    } else {
        1.0
    };
    let ratio = if known.wire_ratio.is_finite() {
        known.wire_ratio.max(1e-3)
    } else {
        1.0
    };
    let late = if known.service_goes_first {
        0.0
    } else {
        known.cost.at(known.link_bytes_per_sec - bandwidth)
    };
    let fixed = known.switch_fixed.as_secs_f64();
    let room = (known.downtime.as_secs_f64() - fixed).max(0.0);
    let total = known.total_bytes as f64;
    // An empty page is a few bytes on the wire; 1/256 is generous.
    let empty = (known.empty_bytes as f64).min(total);
    let mut wire = (total - empty) * ratio + empty / 256.0;
    let (mut secs, mut sent, mut rounds) = (0.0, 0.0, 0.0);
    let mut best = f64::INFINITY;
    let mut idle_rounds = 0;
    loop {
        let time = wire / bandwidth;
        secs += time;
        sent += wire;
        rounds += 1.0;
        wire = (known.writes.bytes(time) * writing).min(total) * ratio;
        let rest = wire / bandwidth;
        // Rounds that bring nothing any more end the play, as they end the crossing.
        idle_rounds = if rest < best * 0.98 { 0 } else { idle_rounds + 1 };
        best = best.min(rest);
        let converges = rest <= room;
        if converges || idle_rounds >= 3 || rounds >= f64::from(known.most_rounds.max(1)) {
            let downtime = fixed + rest;
            return Play {
                total_secs: secs + downtime,
                downtime_secs: downtime,
                wire_bytes: sent + wire,
                rounds: rounds + 1.0,
                cost: secs * late + downtime * known.cost.down(),
                converges,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            bandwidth_bytes_per_sec: [90.0 * MB, 100.0 * MB, 110.0 * MB],
            switch_fixed: Duration::from_millis(50),
            downtime: Duration::from_millis(300),
            most_rounds: 30,
            cost: Cost::unknown(),
            link_bytes_per_sec: 125.0 * MB,
            service_goes_first: false,
        }
    }

    #[test]
    fn a_machine_that_writes_nothing_takes_its_size() {
        let e = estimate(&known(&[]));
        assert!((e.total_secs.expected - 10.05).abs() < 1e-9);
        assert!((e.downtime_secs.expected - 0.05).abs() < 1e-9);
        assert_eq!(e.wire_bytes.expected, 1e9);
        assert!(e.total_secs.low < 10.0 && e.total_secs.high > 11.0 && e.converges == [true; 3]);
    }

    #[test]
    fn rounds_add_up_as_the_curve_says() {
        // 10 MB/s of different pages: 100 MB after the first round of 10 s, then 10 MB in 1 s.
        let e = estimate(&known(&[(1000, 10), (10_000, 100)]));
        assert!((e.wire_bytes.expected - 1.11e9).abs() < 1e3, "{e:?}");
        assert!((e.downtime_secs.expected - 0.15).abs() < 1e-6);
        assert!((e.total_secs.expected - 11.15).abs() < 1e-6);
    }

    #[test]
    fn what_is_written_faster_than_the_link_does_not_converge_and_says_so() {
        let e = estimate(&known(&[(100, 20), (1000, 200), (10_000, 900)]));
        assert_eq!(e.converges, [false; 3]);
        assert!(e.downtime_secs.expected > 0.3);
    }

    #[test]
    fn a_saturating_curve_is_read_between_its_points_and_never_falls() {
        let curve = WriteCurve::new(vec![
            (Duration::from_secs(4), 30),
            (Duration::from_secs(1), 10),
            (Duration::from_secs(2), 8),
        ]);
        assert_eq!(curve.bytes(0.5), 5.0);
        assert_eq!(curve.bytes(2.0), 10.0);
        assert_eq!(curve.bytes(3.0), 20.0);
        assert_eq!(curve.bytes(6.0), 50.0);
        assert_eq!(WriteCurve::default().bytes(5.0), 0.0);
    }

    #[test]
    fn numbers_that_are_none_do_not_become_ours() {
        let mut bad = known(&[(1000, 10)]);
        bad.bandwidth_bytes_per_sec = [f64::NAN, 0.0, f64::INFINITY];
        bad.wire_ratio = f64::NAN;
        let e = estimate(&bad);
        assert!(!e.total_secs.expected.is_nan() && !e.downtime_secs.high.is_nan());
    }
}
