//! How much a machine writes, as it was watched, and what kinds of memory would write like that.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How many different bytes the machine writes in a window, from windows of different lengths: it rises with
/// the length, ever slower, because what is written often is written again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct WriteCurve {
    /// (length of the window, bytes written in it), ascending.
    points: Vec<(Duration, u64)>,
}

/// Bytes that are written about equally often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Class {
    pub bytes: f64,
    pub writes_per_sec: f64,
}

/// The rates that the memory is made of, in writes per second to each of its pages.
const RATES: [f64; 9] = [0.01, 0.05, 0.2, 0.7, 2.5, 8.0, 25.0, 80.0, 400.0];
/// Each sweep improves every class once; no curve needed more to settle.
const SWEEPS: usize = 600;

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

    pub fn points(&self) -> &[(Duration, u64)] {
        &self.points
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

    /// Classes of memory, together at most `most_bytes`, that write like this curve: bytes of a class that is written
    /// with rate r show up in a window of T with the chance 1 - exp(-rT). Least squares of the relative errors, one
    /// class after the other, none below zero.
    pub fn classes(&self, most_bytes: f64) -> Vec<Class> {
        let mut bytes = [0.0f64; RATES.len()];
        let seen = |rate: f64, length: &Duration| -(-rate * length.as_secs_f64()).exp_m1();
        for _ in 0..SWEEPS {
            // The least written first: where one window alone was watched, longer ones are thought to show more.
            for at in 0..RATES.len() {
                let (mut up, mut down) = (0.0, 0.0);
                for (length, measured) in &self.points {
                    let measured = *measured as f64;
                    let weight = 1.0 / measured.max(4096.0).powi(2);
                    let modelled: f64 = bytes.iter().zip(RATES).map(|(b, r)| b * seen(r, length)).sum();
                    let here = RATES.get(at).map_or(0.0, |rate| seen(*rate, length));
                    up += weight * here * (measured - modelled);
                    down += weight * here * here;
                }
                if let Some(class) = bytes.get_mut(at)
                    && down > 0.0
                {
                    *class = (*class + up / down).max(0.0);
                }
            }
        }
        fit_into(&mut bytes, most_bytes.max(0.0));
        let found = bytes.into_iter().zip(RATES);
        found
            .filter(|(bytes, _)| *bytes >= 1.0)
            .map(|(bytes, writes_per_sec)| Class {
                bytes,
                writes_per_sec,
            })
            .collect()
    }
}

/// Where the classes have more bytes than there are, the coldest become fewer bytes that are written more often: in a
/// short window that shows as much.
fn fit_into(bytes: &mut [f64; RATES.len()], most: f64) {
    for at in 0..RATES.len() {
        let over = bytes.iter().sum::<f64>() - most;
        if over <= 0.0 {
            return;
        }
        let (Some(rate), Some(class)) = (RATES.get(at), bytes.get_mut(at)) else {
            return;
        };
        let Some(next) = RATES.get(at + 1) else {
            *class = (*class - over).max(0.0);
            return;
        };
        // Moving x leaves x * rate / next.
        let moved = (over / (1.0 - rate / next)).min(*class);
        *class -= moved;
        if let Some(hotter) = bytes.get_mut(at + 1) {
            *hotter += moved * rate / next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    /// The classes write as the machine did, also in windows that nobody watched.
    #[test]
    fn classes_write_like_the_curve_that_they_were_made_from() {
        let real = |secs: f64| {
            let class = |bytes: f64, rate: f64| bytes * (1.0 - (-rate * secs).exp());
            class(64e6, 12.0) + class(20e6, 300.0) + class(900e6, 0.02)
        };
        let points = [0.03, 0.1, 0.3, 1.0].map(|secs| (Duration::from_secs_f64(secs), real(secs) as u64));
        let classes = WriteCurve::new(points.to_vec()).classes(1e9);
        assert!(classes.iter().map(|class| class.bytes).sum::<f64>() <= 1e9 + 1.0);
        for secs in [0.05, 0.2, 0.7, 3.0] {
            let made: f64 = classes
                .iter()
                .map(|class| class.bytes * (1.0 - (-class.writes_per_sec * secs).exp()))
                .sum();
            let error = (made - real(secs)).abs() / real(secs);
            assert!(error < 0.2, "{secs} s: {made} for {}", real(secs));
        }
        assert_eq!(WriteCurve::default().classes(1e9), []);
    }

    /// More writing than there is memory: all of it is written, and no more.
    #[test]
    fn classes_have_no_more_bytes_than_there_are() {
        let curve = WriteCurve::new(vec![(Duration::from_secs(1), 90_000_000)]);
        let whole: f64 = curve.classes(100e6).iter().map(|class| class.bytes).sum();
        assert!(whole <= 100e6 + 1.0, "{whole}");
    }
}
