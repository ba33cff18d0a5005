//! `ferry migrate --probe`: asks the machine's service all the time, from before the crossing until after it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use ferry_migration::report::{Probe, ProbeOutage};
use ferry_network::probe::{GapReport, Outage, ProbeTarget};

/// Fine enough to see a downtime of some milliseconds, and no load for a service.
const PERIOD: Duration = Duration::from_millis(2);
/// A service that says nothing for so long is not there.
const FIRST_ANSWER: Duration = Duration::from_secs(3);

pub(super) struct Probing {
    probe: ferry_network::probe::Probe,
    began: Instant,
}

impl Probing {
    /// Begins to ask, and returns when the service has answered.
    pub(super) fn start(target: &ProbeTarget) -> Result<Probing> {
        let began = Instant::now();
        let probe = ferry_network::probe::Probe::start(target.clone(), PERIOD)
            .with_context(|| format!("{target} cannot be asked"))?;
        while probe.answered() == 0 {
            if began.elapsed() > FIRST_ANSWER {
                let why = probe.finish().and_then(|report| report.first_failure);
                let why = why.unwrap_or_else(|| "no answer".to_owned());
                bail!(
                    "nothing answers at {target} ({why}); the machine was not moved: correct the target, or leave --probe out"
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(Probing { probe, began })
    }

    /// Asks on for a while, ends, and tells what was seen, in the crossing's time.
    pub(super) fn finish(self, crossing_began: Instant, go_on_for: Duration) -> Option<Probe> {
        std::thread::sleep(go_on_for);
        let early = crossing_began.saturating_duration_since(self.began);
        Some(seen(self.probe.finish()?, early))
    }
}

/// The same numbers in the report's words. `early`: how long before the crossing the asking began.
fn seen(gaps: GapReport, early: Duration) -> Probe {
    let GapReport {
        target,
        period,
        sent,
        answered,
        lost,
        longest_silence,
        silence_began,
        outage,
        latency_median,
        latency_99,
        latency_max,
        first_failure,
    } = gaps;
    Probe {
        target,
        period,
        sent,
        answered,
        lost,
        longest_silence,
        silence_began: silence_began.saturating_sub(early),
        outage: outage.map(
            |Outage {
                 lost,
                 began,
                 at_least,
                 at_most,
             }| ProbeOutage {
                lost,
                began: began.saturating_sub(early),
                at_least,
                at_most,
            },
        ),
        latency_median,
        latency_99,
        latency_max,
        first_failure,
    }
}
