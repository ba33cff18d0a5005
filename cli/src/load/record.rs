//! What became of the requests, as numbers. Pure: times come from the caller, counted from the start of the load.

use std::fmt::Write as _;
use std::time::Duration;

use ferry_network::histogram::Histogram;
use serde::{Serialize, Serializer};

use crate::output::table;

/// One request, done.
#[derive(Debug)]
pub struct Outcome {
    /// When it should have been sent. Latency counts from here: a client that was itself held up by a slow answer
    /// and sends late would otherwise hide what its user waited for (coordinated omission).
    pub scheduled: Duration,
    pub finished: Duration,
    pub result: Result<Answer, Failure>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No answer within the time limit.
    TimedOut,
    /// An answer, and it is wrong: the gravest of all.
    Wrong(String),
    /// No connection, a reset, an error status.
    Error(String),
    /// Not sent: too many requests were waiting already.
    Shed,
}

#[derive(Debug, Default)]
pub struct Record {
    latency: Histogram,
    arrivals: u64,
    timed_out: u64,
    wrong: u64,
    errors: u64,
    shed: u64,
    missed_deadline: u64,
    bytes: u64,
    deadline: Option<Duration>,
    last_answer: Duration,
    longest_silence: Duration,
    silence_began: Duration,
    first_failure: Option<String>,
}

/// The numbers of a load or of a part of it.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    pub target: String,
    pub rate_per_sec: f64,
    pub seed: u64,
    #[serde(rename = "duration_ms", serialize_with = "as_ms")]
    pub duration: Duration,
    /// Requests that came due, all of which are answered or failed.
    pub arrivals: u64,
    pub answered: u64,
    pub timed_out: u64,
    pub wrong: u64,
    pub errors: u64,
    pub shed: u64,
    /// Answered after the deadline, or not at all.
    pub missed_deadline: u64,
    #[serde(rename = "deadline_ms", serialize_with = "as_optional_ms")]
    pub deadline: Option<Duration>,
    pub bytes: u64,
    #[serde(rename = "mean_ms", serialize_with = "as_optional_ms")]
    pub mean: Option<Duration>,
    #[serde(rename = "p50_ms", serialize_with = "as_optional_ms")]
    pub p50: Option<Duration>,
    #[serde(rename = "p90_ms", serialize_with = "as_optional_ms")]
    pub p90: Option<Duration>,
    #[serde(rename = "p99_ms", serialize_with = "as_optional_ms")]
    pub p99: Option<Duration>,
    #[serde(rename = "p999_ms", serialize_with = "as_optional_ms")]
    pub p999: Option<Duration>,
    #[serde(rename = "max_ms", serialize_with = "as_optional_ms")]
    pub max: Option<Duration>,
    /// The longest time in which no request was answered.
    #[serde(rename = "longest_silence_ms", serialize_with = "as_ms")]
    pub longest_silence: Duration,
    #[serde(rename = "silence_began_ms", serialize_with = "as_ms")]
    pub silence_began: Duration,
    /// How late this client itself was at worst in sending. If it is not small, its latencies are its own.
    #[serde(rename = "client_late_ms", serialize_with = "as_ms")]
    pub client_late: Duration,
    pub first_failure: Option<String>,
}

fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn as_ms<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(ms(*duration))
}

fn as_optional_ms<S: Serializer>(duration: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    match duration {
        Some(duration) => to.serialize_f64(ms(*duration)),
        None => to.serialize_none(),
    }
}

impl Record {
    pub fn new(deadline: Option<Duration>) -> Self {
        Self {
            deadline,
            ..Self::default()
        }
    }

    /// In the order in which requests finish.
    pub fn add(&mut self, outcome: &Outcome) {
        let Outcome {
            scheduled,
            finished,
            result,
        } = outcome;
        self.arrivals += 1;
        let latency = finished.saturating_sub(*scheduled);
        match result {
            Ok(Answer { bytes }) => {
                self.latency.record(latency);
                self.bytes += bytes;
                self.silence_until(*finished);
                self.last_answer = self.last_answer.max(*finished);
            }
            Err(Failure::TimedOut) => self.timed_out += 1,
            Err(Failure::Shed) => self.shed += 1,
            Err(Failure::Wrong(why)) => {
                // Said even when something harmless failed before it.
                if self.wrong == 0 {
                    self.first_failure = Some(why.clone());
                }
                self.wrong += 1;
            }
            Err(Failure::Error(why)) => {
                self.errors += 1;
                self.first_failure.get_or_insert_with(|| why.clone());
            }
        }
        let in_time = result.is_ok() && self.deadline.is_none_or(|deadline| latency <= deadline);
        if !in_time {
            self.missed_deadline += 1;
        }
    }

    fn silence_until(&mut self, at: Duration) {
        let silence = at.saturating_sub(self.last_answer);
        if silence > self.longest_silence {
            self.longest_silence = silence;
            self.silence_began = self.last_answer;
        }
    }

    pub fn answered(&self) -> u64 {
        self.latency.count()
    }

    /// `ended`: when the last request came due; what is silent after that says nothing.
    pub fn summary(
        &mut self,
        target: &str,
        rate_per_sec: f64,
        seed: u64,
        ended: Duration,
        client_late: Duration,
    ) -> Summary {
        self.silence_until(ended);
        Summary {
            target: target.to_owned(),
            rate_per_sec,
            seed,
            duration: ended,
            arrivals: self.arrivals,
            answered: self.latency.count(),
            timed_out: self.timed_out,
            wrong: self.wrong,
            errors: self.errors,
            shed: self.shed,
            missed_deadline: self.missed_deadline,
            deadline: self.deadline,
            bytes: self.bytes,
            mean: self.latency.mean(),
            p50: self.latency.quantile(0.5),
            p90: self.latency.quantile(0.9),
            p99: self.latency.quantile(0.99),
            p999: self.latency.quantile(0.999),
            max: self.latency.max(),
            longest_silence: self.longest_silence,
            silence_began: self.silence_began,
            client_late,
            first_failure: self.first_failure.clone(),
        }
    }
}

impl Summary {
    pub fn failed(&self) -> u64 {
        self.timed_out + self.wrong + self.errors + self.shed
    }

    /// For people.
    pub fn text(&self) -> String {
        let time = |t: Option<Duration>| t.map_or("-".to_owned(), |t| format!("{:.2} ms", ms(t)));
        let row = |name: &str, value: String| vec![name.to_owned(), value];
        let mut rows = vec![
            row("target", self.target.clone()),
            row(
                "requests",
                format!(
                    "{} in {:.1} s, {} answered",
                    self.arrivals,
                    self.duration.as_secs_f64(),
                    self.answered
                ),
            ),
        ];
        if self.failed() > 0 {
            let mut parts = String::new();
            for (count, name) in [
                (self.wrong, "WRONG"),
                (self.timed_out, "timed out"),
                (self.errors, "errors"),
                (self.shed, "not sent"),
            ] {
                if count > 0 {
                    let separator = if parts.is_empty() { "" } else { ", " };
                    let _ = write!(parts, "{separator}{count} {name}");
                }
            }
            rows.push(row("failed", parts));
        }
        if let Some(deadline) = self.deadline {
            rows.push(row(
                "missed deadline",
                format!("{} of {} ms", self.missed_deadline, ms(deadline)),
            ));
        }
        rows.extend([
            row("latency mean", time(self.mean)),
            row("50 %", time(self.p50)),
            row("90 %", time(self.p90)),
            row("99 %", time(self.p99)),
            row("99.9 %", time(self.p999)),
            row("longest", time(self.max)),
            row(
                "longest silence",
                format!(
                    "{:.1} ms, from {:.2} s on",
                    ms(self.longest_silence),
                    self.silence_began.as_secs_f64()
                ),
            ),
        ]);
        if self.bytes > 0 {
            let rate = self.bytes as f64 / 1e6 / self.duration.as_secs_f64().max(1e-3);
            rows.push(row(
                "received",
                format!("{:.1} MB, {rate:.1} MB/s", self.bytes as f64 / 1e6),
            ));
        }
        if self.client_late > Duration::from_millis(5) {
            rows.push(row(
                "this client",
                format!(
                    "sent up to {:.1} ms late: it is the bottleneck",
                    ms(self.client_late)
                ),
            ));
        }
        if let Some(failure) = &self.first_failure {
            rows.push(row("first failure", failure.clone()));
        }
        table(&rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn outcome(scheduled: u64, finished: u64, result: Result<Answer, Failure>) -> Outcome {
        Outcome {
            scheduled: MS(scheduled),
            finished: MS(finished),
            result,
        }
    }

    #[test]
    fn every_request_is_counted_once_and_deadlines_count_failures_too() {
        let mut record = Record::new(Some(MS(50)));
        let good = Ok(Answer { bytes: 10 });
        for (scheduled, finished, result) in [
            (0, 5, good.clone()),
            (10, 60, good.clone()),
            (20, 71, good.clone()),
            (30, 1030, Err(Failure::TimedOut)),
            (40, 41, Err(Failure::Error("refused".into()))),
            (50, 51, Err(Failure::Wrong("7 = 2 + 2".into()))),
            (60, 60, Err(Failure::Shed)),
        ] {
            record.add(&outcome(scheduled, finished, result));
        }
        let summary = record.summary("x", 1.0, 0, MS(100), Duration::ZERO);
        assert_eq!((summary.arrivals, summary.answered, summary.failed()), (7, 3, 4));
        assert_eq!(summary.missed_deadline, 5);
        assert_eq!(summary.bytes, 30);
        assert_eq!(
            summary.first_failure.as_deref(),
            Some("7 = 2 + 2"),
            "the gravest is said"
        );
        assert_eq!(summary.max, Some(MS(51)));
        let text = summary.text();
        assert!(
            text.contains("1 WRONG, 1 timed out, 1 errors, 1 not sent"),
            "{text}"
        );
    }

    #[test]
    fn silence_is_measured_between_answers_and_up_to_the_end() {
        let mut record = Record::new(None);
        for finished in [5, 10, 15, 300, 305] {
            record.add(&outcome(finished - 5, finished, Ok(Answer { bytes: 0 })));
        }
        let summary = record.summary("x", 1.0, 0, MS(310), Duration::ZERO);
        assert_eq!(
            (summary.longest_silence, summary.silence_began),
            (MS(285), MS(15))
        );
        let mut never = Record::new(None);
        assert_eq!(
            never
                .summary("x", 1.0, 0, MS(700), Duration::ZERO)
                .longest_silence,
            MS(700)
        );
    }
}
