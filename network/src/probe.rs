//! Asks a service at a fixed period from outside and tells how long it did not answer.

mod asker;
mod gaps;
mod target;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use gaps::{GapReport, GapTracker, Outage};
pub use target::{HttpUrl, ProbeTarget, TargetError};

use asker::Asker;

pub const DEFAULT_PERIOD: Duration = Duration::from_millis(10);
/// An answer that comes later than this counts as none. Shorter than TCP's first retransmission, after a second: an
/// attempt that was lost and sent again by the kernel must not hide the outage.
const ANSWER_LIMIT: Duration = Duration::from_millis(900);
/// Attempts under way at once; with more the probe would become a load.
const MAX_OPEN: usize = 1024;

/// A probe in a background thread, in the network namespace of the thread that started it.
#[derive(Debug)]
pub struct Probe {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    thread: Option<JoinHandle<GapReport>>,
}

impl Probe {
    pub fn start(target: ProbeTarget, period: Duration) -> io::Result<Probe> {
        let asker = Asker::open(&target)?;
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicU64::new(0));
        let run = Run {
            period: period.max(Duration::from_micros(100)),
            asker,
            stop: Arc::clone(&stop),
            answered: Arc::clone(&answered),
            began: Instant::now(),
            open: VecDeque::new(),
            gaps: GapTracker::default(),
            first_failure: None,
        };
        let thread = std::thread::Builder::new()
            .name("probe".into())
            .spawn(move || run.until_stopped(target.to_string()))?;
        Ok(Probe {
            stop,
            answered,
            thread: Some(thread),
        })
    }

    /// Answers so far. A crossing can wait for the first one before it starts.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Sends nothing more, waits a little for answers that are still under way, and reports.
    pub fn finish(mut self) -> Option<GapReport> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().and_then(|thread| thread.join().ok())
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// One attempt whose verdict is not out.
struct Attempt {
    number: u64,
    sent: Duration,
    verdict: Option<bool>,
}

struct Run {
    period: Duration,
    asker: Asker,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    began: Instant,
    open: VecDeque<Attempt>,
    gaps: GapTracker,
    first_failure: Option<String>,
}

impl Run {
    /// Attempts start at fixed times, whether or not earlier ones were answered: a probe that waits for its answer
    /// asks once during an outage and does not see how long it was.
    fn until_stopped(mut self, target: String) -> GapReport {
        let mut next = Duration::ZERO;
        let mut number = 0;
        let mut last_sent = Duration::ZERO;
        loop {
            let now = self.began.elapsed();
            let stopping = self.stop.load(Ordering::Relaxed);
            if stopping && self.open.is_empty() {
                break;
            }
            if !stopping && now >= next {
                self.ask(number, now);
                last_sent = now;
                number += 1;
                next += self.period;
                // The machine that probes was itself away: do not send a burst for the lost time.
                if next < now {
                    next = now + self.period;
                }
            }
            let wake = if stopping {
                now + Duration::from_millis(5)
            } else {
                next
            };
            self.asker.wait(wake.saturating_sub(self.began.elapsed()));
            self.collect();
        }
        self.gaps
            .report(target, self.period, last_sent, self.first_failure)
    }

    fn ask(&mut self, number: u64, now: Duration) {
        let mut attempt = Attempt {
            number,
            sent: now,
            verdict: None,
        };
        if self.open.len() >= MAX_OPEN {
            attempt.verdict = Some(false);
        } else if let Err(error) = self.asker.ask(number) {
            attempt.verdict = Some(false);
            self.first_failure.get_or_insert_with(|| error.to_string());
        }
        self.open.push_back(attempt);
    }

    fn collect(&mut self) {
        let now = self.began.elapsed();
        for (number, verdict) in self.asker.verdicts() {
            let Some(first) = self.open.front().map(|a| a.number) else {
                continue;
            };
            let Some(attempt) = number
                .checked_sub(first)
                .and_then(|index| self.open.get_mut(index as usize))
            else {
                continue; // too late, or a duplicate of one that is settled
            };
            if attempt.verdict.is_some() {
                continue;
            }
            let latency = now.saturating_sub(attempt.sent);
            match verdict {
                Ok(()) if latency > ANSWER_LIMIT => {}
                Ok(()) => {
                    attempt.verdict = Some(true);
                    self.gaps.arrived(now, latency);
                    self.answered.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    attempt.verdict = Some(false);
                    self.first_failure.get_or_insert_with(|| error.to_string());
                }
            }
        }
        while let Some(attempt) = self.open.front() {
            let verdict = attempt
                .verdict
                .or((now.saturating_sub(attempt.sent) > ANSWER_LIMIT).then_some(false));
            let Some(answered) = verdict else { break };
            self.gaps.settled(attempt.sent, answered);
            self.asker.forget(attempt.number);
            self.open.pop_front();
        }
    }
}
