//! Whether a crossing gets nowhere, and what to say to a person who waits for its end.

use std::time::Duration;

use ferry_migration::report::Round;

use super::migrate::seconds;

/// Nothing gained for so long is worth a word.
const LONG: Duration = Duration::from_secs(10);

#[derive(Default)]
pub(super) struct Standstill {
    /// The least that was ever left after a round, and when that was.
    least: Option<(u64, Duration)>,
    told: bool,
}

impl Standstill {
    /// After a round: what to tell, once.
    pub(super) fn after(&mut self, round: &Round) -> Option<String> {
        let at = round.start + round.took;
        let left = round.remaining_bytes;
        let since = match self.least {
            Some((least, since)) if left >= least - least / 50 => since,
            _ => {
                self.least = Some((left, at));
                at
            }
        };
        if self.told || at.saturating_sub(since) < LONG {
            return None;
        }
        self.told = true;
        let copied = round.memory.plain_bytes + round.disk.plain_bytes;
        let per_sec = copied as f64 / round.took.as_secs_f64().max(1e-9);
        // With something to spare, in tenths of a second.
        let switch = (left as f64 / per_sec.max(1.0) * 13.0).ceil() / 10.0;
        Some(format!(
            "the machine writes as fast as it is copied, for {} now; it crosses when it writes less, or end this with Ctrl-C and \
            try --downtime {:.1}s, --throttle 80, or --deadline 60s --on-deadline pause",
            seconds(LONG),
            switch.clamp(0.1, 3600.0)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ferry_migration::pages::encode::PageCounts;

    fn round(at_secs: u64, left: u64) -> Round {
        Round {
            start: Duration::from_secs(at_secs),
            took: Duration::from_secs(1),
            remaining_bytes: left,
            memory: PageCounts {
                plain_bytes: 100_000_000,
                ..PageCounts::default()
            },
            ..Round::default()
        }
    }

    #[test]
    fn ten_seconds_without_gain_are_told_once_and_a_crossing_that_gains_is_left_alone() {
        let mut gains = Standstill::default();
        let told = (0..60).filter_map(|n| gains.after(&round(n, 1_000_000_000 - n * 30_000_000 / 2)));
        assert_eq!(told.count(), 0);
        let mut stands = Standstill::default();
        let told: Vec<String> = (0..60)
            .filter_map(|n| stands.after(&round(n, 200_000_000 + n % 3)))
            .collect();
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("--downtime 2.7s"), "{told:?}");
    }
}
