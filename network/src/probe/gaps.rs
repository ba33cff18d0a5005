//! From a row of attempts, answered or not, to the outage that a client saw. Pure: times come from the caller.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::histogram::Histogram;

/// The longest run of attempts without an answer. The service was away for at least the time between the first and
/// the last of them, and at most for the time between the good ones on either side: with period dt, (n-1)dt and
/// (n+1)dt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outage {
    pub lost: u64,
    pub began: Duration,
    pub at_least: Duration,
    /// None: it had not ended when the probe did.
    pub at_most: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GapReport {
    pub target: String,
    pub period: Duration,
    pub sent: u64,
    pub answered: u64,
    pub lost: u64,
    /// The longest time without the arrival of an answer. Requests that a pause delays but does not lose show here
    /// and in the latency, not as an outage.
    pub longest_silence: Duration,
    /// When the silence began, counted from the start of the probe.
    pub silence_began: Duration,
    pub outage: Option<Outage>,
    pub latency_median: Option<Duration>,
    pub latency_99: Option<Duration>,
    pub latency_max: Option<Duration>,
    /// What the first failed attempt said.
    pub first_failure: Option<String>,
}

/// All times are counted from the start of the probe.
#[derive(Debug, Default)]
pub struct GapTracker {
    sent: u64,
    answered: u64,
    lost: u64,
    latency: Histogram,
    last_arrival: Duration,
    longest_silence: Duration,
    silence_began: Duration,
    previous_good: Duration,
    run: Option<Run>,
    longest_run: Option<Outage>,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    lost: u64,
    first: Duration,
    last: Duration,
}

impl GapTracker {
    /// An answer came in, for whichever attempt. Call it in the order of arrival.
    pub fn arrived(&mut self, at: Duration, latency: Duration) {
        self.silence_until(at);
        self.last_arrival = at.max(self.last_arrival);
        self.latency.record(latency);
    }

    fn silence_until(&mut self, at: Duration) {
        let silence = at.saturating_sub(self.last_arrival);
        if silence > self.longest_silence {
            self.longest_silence = silence;
            self.silence_began = self.last_arrival;
        }
    }

    /// The verdict on the next attempt, in the order of sending.
    pub fn settled(&mut self, sent_at: Duration, answered: bool) {
        self.sent += 1;
        if answered {
            self.answered += 1;
            self.end_run(Some(sent_at));
            self.previous_good = sent_at;
        } else {
            self.lost += 1;
            let run = self.run.get_or_insert(Run {
                lost: 0,
                first: sent_at,
                last: sent_at,
            });
            run.lost += 1;
            run.last = sent_at;
        }
    }

    fn end_run(&mut self, next_good: Option<Duration>) {
        let Some(run) = self.run.take() else { return };
        let outage = Outage {
            lost: run.lost,
            began: run.first,
            at_least: run.last.saturating_sub(run.first),
            at_most: next_good.map(|good| good.saturating_sub(self.previous_good)),
        };
        if self
            .longest_run
            .is_none_or(|longest| (outage.at_least, outage.lost) > (longest.at_least, longest.lost))
        {
            self.longest_run = Some(outage);
        }
    }

    /// `ended`: when the last attempt was sent.
    pub fn report(
        mut self,
        target: String,
        period: Duration,
        ended: Duration,
        first_failure: Option<String>,
    ) -> GapReport {
        self.silence_until(ended);
        self.end_run(None);
        GapReport {
            target,
            period,
            sent: self.sent,
            answered: self.answered,
            lost: self.lost,
            longest_silence: self.longest_silence,
            silence_began: self.silence_began,
            outage: self.longest_run,
            latency_median: self.latency.quantile(0.5),
            latency_99: self.latency.quantile(0.99),
            latency_max: self.latency.max(),
            first_failure,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    /// Attempts every 10 ms, each answered after 1 ms unless it falls into the outage.
    fn probe(outage: std::ops::Range<u64>, total: u64) -> GapReport {
        let mut gaps = GapTracker::default();
        for sent in (0..total).step_by(10) {
            let answered = !outage.contains(&sent);
            if answered {
                gaps.arrived(MS(sent + 1), MS(1));
            }
            gaps.settled(MS(sent), answered);
        }
        gaps.report("test".into(), MS(10), MS(total), None)
    }

    #[test]
    fn the_bracket_holds_the_true_outage_wherever_it_begins() {
        for start in 100..120 {
            for length in 1..60 {
                let report = probe(start..start + length, 400);
                let Some(outage) = report.outage else {
                    assert!(length < 10, "an outage of {length} ms was not seen");
                    continue;
                };
                assert!(outage.at_least < MS(length), "{outage:?} for {length}");
                assert!(outage.at_most.unwrap() >= MS(length), "{outage:?} for {length}");
                assert_eq!(outage.at_most.unwrap() - outage.at_least, MS(20));
                assert!(report.longest_silence >= MS(length));
                assert!(report.longest_silence <= MS(length + 20));
            }
        }
    }

    #[test]
    fn an_outage_that_did_not_end_has_no_upper_bound() {
        let outage = probe(100..1000, 300).outage.unwrap();
        assert_eq!((outage.lost, outage.at_most), (20, None));
        assert_eq!(outage.at_least, MS(190));
        assert_eq!(probe(0..1000, 300).longest_silence, MS(300));
    }

    #[test]
    fn the_longest_of_several_outages_is_reported() {
        let mut gaps = GapTracker::default();
        for sent in (0..1000).step_by(10) {
            let lost = (100..150).contains(&sent) || (300..420).contains(&sent) || (600..620).contains(&sent);
            gaps.settled(MS(sent), !lost);
        }
        let report = gaps.report("test".into(), MS(10), MS(1000), None);
        let outage = report.outage.unwrap();
        assert_eq!((outage.began, outage.lost), (MS(300), 12));
        assert_eq!((report.sent, report.lost), (100, 19));
    }

    #[test]
    fn answers_that_are_late_but_not_lost_are_silence_and_no_outage() {
        let mut gaps = GapTracker::default();
        for sent in (0..100).step_by(10) {
            gaps.arrived(MS(sent), MS(0));
            gaps.settled(MS(sent), true);
        }
        for sent in (100..160).step_by(10) {
            gaps.arrived(MS(160), MS(160 - sent));
            gaps.settled(MS(sent), true);
        }
        let report = gaps.report("test".into(), MS(10), MS(160), None);
        assert_eq!(report.outage, None);
        assert_eq!((report.longest_silence, report.silence_began), (MS(70), MS(90)));
        assert_eq!(report.latency_max, Some(MS(60)));
    }
}
