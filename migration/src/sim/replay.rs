//! A recorded crossing as a simulation: a guest that writes as that one was seen to write, over a link like that one.
//!
//! Where the policy counted which pages are written how often, the report has the groups. Where not, the rounds are what
//! was seen: of pages that are written at one rate, a known part is dirty at the end of each round, so the numbers of
//! dirty pages say how many pages there are of each rate.

use std::time::Duration;

use super::disk::{Disk, Holds, Part};
use super::trace::{Class, Trace, TraceError, Writing};
use crate::block::{CLUSTER_BYTES, PAGE_BYTES};
use crate::failure::Whereabouts;
use crate::pages::encode::PageCounts;
use crate::policy::Policy;
use crate::report::{Report, Round, Wrote};

/// What is simulated, and what the crossing itself was.
#[derive(Clone, Debug, PartialEq)]
pub struct Replay {
    pub trace: Trace,
    pub memory_bytes: u64,
    pub disks: Vec<Disk>,
    pub link_bytes_per_sec: f64,
    pub wire_bytes_per_page: f64,
    /// The downtime less the copying in it.
    pub switch_fixed: Duration,
    pub service_bytes_per_sec: Option<f64>,
    /// The crossing itself; none where something else is simulated.
    pub fact: Option<Fact>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Fact {
    pub name: String,
    /// None: the report is from before it was written down.
    pub policy: Option<Policy>,
    pub crossed: bool,
    /// Without negotiating and preparing, which the simulator does not have.
    pub total_s: f64,
    pub downtime_s: f64,
    pub bytes: u64,
    pub rounds: usize,
}

/// The rates that memory is thought to be made of, in writes per second to each page: a thousandth to two hundred.
const RATES: usize = 31;

fn rate(at: usize) -> f64 {
    0.001 * 1.5f64.powi(at as i32)
}

/// What is written so often within the shortest round that was seen is dirty at its end, how often it ever was: nothing is
/// thought to be hotter.
const HOTTEST: f64 = 2.0;
/// Each sweep improves every class once.
const SWEEPS: usize = 300;
/// A round is explained if as many units were dirty, but for this part of them: chance and the model are no better.
const CLOSE_ENOUGH: f64 = 0.07;
/// Fewer dirty units are chance alone.
const LEAST_DIRTY: f64 = 64.0;
/// A longer report is no report of ours; see also the reader's limit in bytes.
const MOST_ROUNDS: usize = 100_000;

impl Replay {
    /// A trace, with the sizes that the papers have.
    pub fn of(trace: Trace) -> Replay {
        Replay {
            trace,
            memory_bytes: 512 << 20,
            disks: Vec::new(),
            link_bytes_per_sec: 32e6,
            wire_bytes_per_page: f64::from(PAGE_BYTES),
            switch_fixed: Duration::ZERO,
            service_bytes_per_sec: None,
            fact: None,
        }
    }

    pub fn from_report(report: &Report) -> Result<Replay, TraceError> {
        let wrong = |why: &str| {
            TraceError(format!(
                "the report of {:?} cannot be played again: {why}",
                report.name
            ))
        };
        let crossed = report.outcome.whereabouts == Whereabouts::There;
        let live: &[Round] = match report.rounds.len() {
            0 => return Err(wrong("it has no round; nothing was copied")),
            count if count > MOST_ROUNDS => return Err(wrong("it has more rounds than any crossing")),
            // The last one was with the machine stopped.
            count if crossed && count > 1 => report.rounds.get(..count - 1).unwrap_or_default(),
            _ => report.rounds.as_slice(),
        };
        let rounds = live.iter().flat_map(|round| [&round.memory, &round.disk]);
        if !rounds.chain([&report.memory, &report.disk]).all(plausible) {
            return Err(wrong("it counts more pages than there can be"));
        }
        let conduct = report.conduct.as_ref();
        let policy = conduct.and_then(|conduct| conduct.policy.parse::<Policy>().ok());
        let fastest = live
            .iter()
            .map(|round| round.rate_bytes_per_sec)
            .max()
            .unwrap_or(0);
        let link = conduct.and_then(|c| c.link_bytes_per_sec).unwrap_or(fastest);
        if link == 0 {
            return Err(wrong("nothing in it says what the link carried"));
        }
        // Policies that plan anew all the time have no rounds after which everything dirty is sent.
        let by_rounds = !matches!(policy, Some(Policy::CalmFixed { .. } | Policy::CalmAdaptive));
        let memory = Kind {
            unit_bytes: f64::from(PAGE_BYTES),
            wrote: conduct.map(|c| &c.memory),
            counts: &report.memory,
            carried: |round| &round.memory,
            noted: |round| round.dirty_pages,
            live,
        };
        let disk = Kind {
            unit_bytes: f64::from(CLUSTER_BYTES),
            wrote: conduct.map(|c| &c.disk),
            counts: &report.disk,
            carried: |round| &round.disk,
            noted: |round| round.dirty_clusters,
            live,
        };
        let mean = mean_rate(report);
        let classes = memory.classes(&disk, by_rounds, mean);
        let pages: f64 = classes.iter().map(|class| class.part).sum();
        if !(1.0..=MOST_UNITS).contains(&pages) {
            return Err(wrong(
                "no memory that a simulation could have crossed in its first round",
            ));
        }
        let written = report
            .memory
            .units()
            .saturating_sub(report.memory.zero + report.memory.same);
        let wire = report.memory.wire_bytes as f64 / (written as f64).max(1.0);
        let copying = report
            .downtime
            .last_pages
            .saturating_add(report.downtime.last_clusters);
        let Some(switch_fixed) = report.downtime.total.checked_sub(copying) else {
            return Err(wrong("the parts of its downtime are longer than the whole"));
        };
        Ok(Replay {
            trace: Trace {
                name: report.name.clone(),
                writing: Writing::Classes {
                    classes,
                    stretches: Vec::new(),
                },
                device_pages: 0,
            },
            memory_bytes: pages.round() as u64 * u64::from(PAGE_BYTES),
            disks: disk.disk(&memory, by_rounds, mean)?.into_iter().collect(),
            link_bytes_per_sec: link as f64,
            wire_bytes_per_page: wire.clamp(64.0, f64::from(PAGE_BYTES)),
            switch_fixed,
            service_bytes_per_sec: conduct
                .and_then(|c| c.service_bytes_per_sec)
                .map(|rate| rate as f64),
            fact: Some(Fact {
                name: report.name.clone(),
                policy,
                crossed,
                total_s: report.total.saturating_sub(report.prepare).as_secs_f64(),
                downtime_s: report.downtime.total.as_secs_f64(),
                bytes: report.wire_bytes,
                rounds: live.len(),
            }),
        })
    }
}

/// No simulation has more pages or clusters.
const MOST_UNITS: f64 = (1u64 << 26) as f64;

/// Sums of them do not overflow.
fn plausible(counts: &PageCounts) -> bool {
    counts.ways().iter().all(|count| *count < 1 << 48)
}

/// Pages or clusters, as the report has them.
struct Kind<'a> {
    unit_bytes: f64,
    wrote: Option<&'a Wrote>,
    counts: &'a PageCounts,
    /// What a round carried of them, and how many were written in it.
    carried: fn(&Round) -> &PageCounts,
    noted: fn(&Round) -> u64,
    live: &'a [Round],
}

impl Kind<'_> {
    /// Units that had to cross at least once.
    fn used(&self) -> f64 {
        match self.wrote {
            Some(wrote) => wrote.first_bytes as f64 / self.unit_bytes,
            None => self.first() as f64,
        }
    }

    /// Units of the first round.
    fn first(&self) -> u64 {
        self.live.first().map_or(0, |round| (self.carried)(round).units())
    }

    /// Each round as far as it tells of the writing. What is dirty at the end is what was written and what the round left
    /// unsent; the report has the sum of both over memory and disks, since some were both. `other` has the rest of it.
    fn seen(&self, other: &Kind<'_>) -> Vec<Seen> {
        let (mut due, mut others_due) = (self.used(), other.used());
        let round = |round: &Round| {
            let unsent = |kind: &Kind<'_>, due: f64| (due - (kind.carried)(round).units() as f64).max(0.0);
            let left = unsent(self, due) * self.unit_bytes;
            let others_left = unsent(other, others_due) * other.unit_bytes;
            let noted = |kind: &Kind<'_>| (kind.noted)(round) as f64;
            let written = noted(self) * self.unit_bytes + noted(other) * other.unit_bytes;
            let over = (round.remaining_bytes as f64 - written).clamp(0.0, left + others_left);
            let part = over / (left + others_left).max(1.0);
            let seen = Seen {
                secs: round.took.as_secs_f64(),
                sent: 1.0 - (left / self.unit_bytes / due.max(1.0)).min(1.0),
                dirty: noted(self) + part * left / self.unit_bytes,
            };
            due = seen.dirty;
            others_due = noted(other) + part * others_left / other.unit_bytes;
            seen
        };
        self.live.iter().map(round).collect()
    }

    /// Those of them that were empty: on the wire they are next to nothing.
    fn empty(&self) -> f64 {
        ((self.counts.zero + self.counts.same) as f64).min(self.used())
    }

    /// Classes of what is not empty; `part` counts units.
    fn classes(&self, other: &Kind<'_>, by_rounds: bool, mean: f64) -> Vec<Class> {
        let units = self.used() - self.empty();
        let groups = self.wrote.map_or(&[][..], |wrote| &wrote.groups);
        let mut classes = if !groups.is_empty() {
            let class = |group: &crate::report::Group| Class {
                part: group.bytes as f64 / self.unit_bytes,
                rate: sound(group.writes_per_sec),
            };
            // The coldest has also what was never there; how much is written there stays the same.
            let mut classes: Vec<Class> = groups.iter().map(class).collect();
            let hot: f64 = classes.iter().skip(1).map(|class| class.part).sum();
            if let Some(cold) = classes.first_mut() {
                let part = (units - hot).max(0.0);
                cold.rate = if part > 0.0 {
                    cold.rate * cold.part / part
                } else {
                    0.0
                };
                cold.part = part;
            }
            classes
        } else if by_rounds {
            from_rounds(&self.seen(other), units)
        } else {
            vec![Class {
                part: units,
                rate: mean,
            }]
        };
        classes.retain(|class| class.part > 0.0);
        classes
    }

    fn disk(&self, other: &Kind<'_>, by_rounds: bool, mean: f64) -> Result<Option<Disk>, TraceError> {
        let bytes = self
            .wrote
            .map_or(self.first() * u64::from(CLUSTER_BYTES), |wrote| wrote.bytes);
        let clusters = bytes.div_ceil(u64::from(CLUSTER_BYTES)) as f64;
        if clusters == 0.0 || self.used() == 0.0 {
            return Ok(None);
        }
        if clusters > MOST_UNITS {
            return Err(TraceError(
                "the disks in the report are larger than a simulation's".into(),
            ));
        }
        let part = |units: f64, holds: Holds, rate: f64| Part {
            part: units / clusters,
            holds,
            writes_per_sec: rate,
            discards_per_sec: 0.0,
        };
        let classes = self.classes(other, by_rounds, mean);
        let mut parts: Vec<Part> = classes
            .iter()
            .map(|c| part(c.part, Holds::Data, c.rate))
            .collect();
        parts.push(part(self.empty(), Holds::Zeroes, 0.0));
        parts.push(part((clusters - self.used()).max(0.0), Holds::Hole, 0.0));
        Ok(Some(Disk { bytes, parts }))
    }
}

fn sound(value: f64) -> f64 {
    if value.is_finite() {
        value.clamp(0.0, 1e6)
    } else {
        0.0
    }
}

/// How often one clean unit was written, from the flow of bytes that got dirty while so many were clean.
fn mean_rate(report: &Report) -> f64 {
    let whole = report.timeline.first().map_or(0, |moment| moment.remaining_bytes);
    let (mut dirtied, mut clean) = (0.0, 0.0);
    for pair in report.timeline.windows(2) {
        if let [before, after] = pair {
            let secs = after.at.saturating_sub(before.at).as_secs_f64();
            dirtied += after.dirty_bytes_per_sec as f64 * secs;
            clean += whole.saturating_sub(after.remaining_bytes) as f64 * secs;
        }
    }
    if clean > 0.0 { sound(dirtied / clean) } else { 0.0 }
}

/// What one round tells.
struct Seen {
    secs: f64,
    /// Which part of what was dirty when it began was sent in it. A round may end early.
    sent: f64,
    /// Units that were dirty at its end.
    dirty: f64,
}

/// Which part of the units that are written at `rate` is dirty at the end of each round. A round sends what was dirty when
/// it began, evenly over its time; a unit that was sent is dirty again if it is written in what is left of the round.
fn dirty_parts(rate: f64, rounds: &[Seen]) -> Vec<f64> {
    let mut dirty = 1.0;
    rounds
        .iter()
        .map(|Seen { secs, sent, .. }| {
            let writes = rate * secs;
            let written = -(-writes).exp_m1();
            let again = if writes > 1e-6 {
                1.0 - written / writes
            } else {
                writes / 2.0
            };
            dirty = dirty * (sent * again + 1.0 - sent) + (1.0 - dirty) * written;
            dirty
        })
        .collect()
}

/// Classes, together at most `units`, that leave as many dirty after each round as there were. A few rounds are explained
/// by many mixtures: the one is taken whose hottest pages are the least hot. What is over was never seen written.
fn from_rounds(seen: &[Seen], units: f64) -> Vec<Class> {
    // Hundreds of short rounds at the end say all the same.
    const MOST_SEEN: usize = 64;
    let seen = seen.get(..seen.len().min(MOST_SEEN)).unwrap_or_default();
    let shortest = seen.iter().map(|seen| seen.secs).fold(f64::INFINITY, f64::min);
    let told_apart = (0..RATES).take_while(|at| rate(*at) * shortest <= HOTTEST);
    let parts: Vec<Vec<f64>> = told_apart.map(|at| dirty_parts(rate(at), seen)).collect();
    let mut counts = Vec::new();
    for hottest in 1..=parts.len() {
        let (fitted, worst) = fit(parts.get(..hottest).unwrap_or_default(), seen, units);
        counts = fitted;
        if worst < CLOSE_ENOUGH {
            break;
        }
    }
    counts.resize(RATES, 0.0);
    // More than there is: the coldest become fewer that are written more often, which shows as much in a short time.
    for at in 0..RATES {
        let over = counts.iter().sum::<f64>() - units;
        if over <= 0.0 {
            break;
        }
        let last = at + 1 == RATES;
        let share = rate(at) / rate(at + 1);
        let Some(count) = counts.get_mut(at) else { break };
        let moved = if last { over } else { over / (1.0 - share) }.min(*count);
        *count -= moved;
        if let Some(hotter) = counts.get_mut(at + 1) {
            *hotter += moved * share;
        }
    }
    let written: f64 = counts.iter().sum();
    let cold = Class {
        part: (units - written).max(0.0),
        rate: 0.0,
    };
    let classes = counts.iter().enumerate().map(|(at, count)| Class {
        part: *count,
        rate: rate(at),
    });
    std::iter::once(cold).chain(classes).collect()
}

/// Least squares of the relative errors, one class after the other, none below zero; and the largest of these errors.
fn fit(parts: &[Vec<f64>], seen: &[Seen], units: f64) -> (Vec<f64>, f64) {
    let weight = |seen: &Seen| 1.0 / seen.dirty.max(LEAST_DIRTY);
    let mut counts = vec![0.0f64; parts.len()];
    // Modelled minus measured, kept up to date.
    let mut error: Vec<f64> = seen.iter().map(|seen| -seen.dirty).collect();
    for _ in 0..SWEEPS {
        for (count, part) in counts.iter_mut().zip(parts) {
            let (mut up, mut down) = (0.0, 0.0);
            for ((part, error), seen) in part.iter().zip(&error).zip(seen) {
                let weight = weight(seen).powi(2);
                up -= weight * part * error;
                down += weight * part * part;
            }
            if down > 0.0 {
                let next = (*count + up / down).clamp(0.0, units);
                let change = next - *count;
                *count = next;
                error
                    .iter_mut()
                    .zip(part)
                    .for_each(|(error, part)| *error += change * part);
            }
        }
    }
    let relative = error
        .iter()
        .zip(seen)
        .map(|(error, seen)| error.abs() * weight(seen));
    (counts, relative.fold(0.0, f64::max))
}

#[cfg(test)]
mod tests {
    use super::super::link::Sharing;
    use super::super::pages::Scenario;
    use super::super::paper;
    use super::*;
    use crate::cost::Cost;
    use crate::policy::Limits;

    fn recorded(policy: Policy, disks: Vec<Disk>) -> (Scenario, Report) {
        let mut trace = Trace::reference();
        trace.device_pages /= 8;
        let mut scenario = paper::scenario(trace, 64, 32.0, policy, 1);
        scenario.limits.cost = Cost::unknown();
        scenario.disks = disks;
        scenario.switch_fixed = Duration::from_millis(40);
        let report = scenario.cross().report;
        // As it is read from a file.
        let report = serde_json::from_str(&serde_json::to_string(&report).unwrap()).unwrap();
        (scenario, report)
    }

    fn again(replay: &Replay, policy: Policy) -> super::super::pages::Outcome {
        let limits = Limits {
            policy,
            ..Limits::default()
        };
        let mut scenario = Scenario::new(
            replay.trace.clone(),
            replay.memory_bytes,
            replay.link_bytes_per_sec,
            limits,
        );
        scenario.disks.clone_from(&replay.disks);
        scenario.switch_fixed = replay.switch_fixed;
        scenario.wire_bytes_per_page = replay.wire_bytes_per_page;
        scenario.link.sharing = Sharing::Reserved;
        // The same writes are not drawn again.
        scenario.seed = 99;
        scenario.cross().outcome
    }

    fn near(got: f64, fact: f64, part: f64, what: &str) {
        assert!((got - fact).abs() <= part * fact, "{what}: {got} for {fact}");
    }

    /// The guest is made of what the report says alone. With the policy of the crossing it does what the crossing did: time
    /// and bytes within a tenth, because a few hundred hot pages leave much to chance. Where a limit says when to stop, the
    /// downtime keeps it here as there, and chance which round is the last; calm-live stops when as much is left.
    #[test]
    fn a_crossing_is_played_again_from_its_report_as_it_was() {
        for policy in [Policy::Qemu, Policy::Max, Policy::CalmLive] {
            let (_, report) = recorded(policy, Vec::new());
            let replay = Replay::from_report(&report).unwrap();
            let fact = replay.fact.as_ref().unwrap();
            assert_eq!(fact.policy, Some(policy));
            let outcome = again(&replay, policy);
            assert!(outcome.crossed && fact.crossed);
            near(outcome.total_s, fact.total_s, 0.1, &format!("{policy}: total"));
            near(
                outcome.bytes as f64,
                fact.bytes as f64,
                0.1,
                &format!("{policy}: bytes"),
            );
            let (said, was) = (outcome.downtime_s, fact.downtime_s);
            if policy == Policy::CalmLive {
                near(said, was, 0.2, "calm-live: downtime");
            } else {
                assert!(said < 0.4 && was < 0.4, "{policy}: {said} for {was}");
            }
        }
    }

    /// What another policy would have done: what is asked of a recorded crossing is what the real guest answers,
    /// within 15 %. Three rounds say how many pages are hot, and only roughly how hot.
    #[test]
    fn what_another_policy_would_have_done_is_what_it_does() {
        let (scenario, report) = recorded(Policy::Qemu, Vec::new());
        let replay = Replay::from_report(&report).unwrap();
        for policy in [Policy::Max, Policy::XenCode, Policy::VirtualBox, Policy::CalmLive] {
            let truth = scenario.with_policy(policy).cross().outcome;
            let said = again(&replay, policy);
            near(said.total_s, truth.total_s, 0.15, &format!("{policy}: total"));
            near(
                said.bytes as f64,
                truth.bytes as f64,
                0.15,
                &format!("{policy}: bytes"),
            );
        }
    }

    #[test]
    fn disks_are_played_again_too() {
        let disk = Disk::parse("64M,allocated=50%,zero=10%,rate=300kB/s,hot=10%").unwrap();
        for policy in [Policy::Qemu, Policy::CalmLive] {
            let (_, report) = recorded(policy, vec![disk.clone()]);
            let replay = Replay::from_report(&report).unwrap();
            assert_eq!(replay.disks.iter().map(|disk| disk.bytes).sum::<u64>(), 64 << 20);
            let outcome = again(&replay, policy);
            near(
                outcome.total_s,
                replay.fact.as_ref().unwrap().total_s,
                0.1,
                &format!("{policy}: total"),
            );
            near(
                outcome.disk_bytes as f64,
                report.disk.wire_bytes as f64,
                0.1,
                &format!("{policy}: disk"),
            );
        }
    }

    /// Reports from before conduct was written down have their rounds.
    #[test]
    fn an_older_report_is_played_again_from_its_rounds() {
        let (_, mut report) = recorded(Policy::Qemu, Vec::new());
        report.conduct = None;
        let replay = Replay::from_report(&report).unwrap();
        near(
            again(&replay, Policy::Qemu).total_s,
            replay.fact.as_ref().unwrap().total_s,
            0.05,
            "total",
        );
    }

    #[test]
    fn what_no_crossing_reports_is_refused_and_never_panics() {
        let (_, report) = recorded(Policy::Max, Vec::new());
        let refused = |change: fn(&mut Report)| {
            let mut report = report.clone();
            change(&mut report);
            Replay::from_report(&report).unwrap_err().to_string()
        };
        assert!(refused(|r| r.rounds.clear()).contains("nothing was copied"));
        assert!(refused(|r| r.conduct.as_mut().unwrap().link_bytes_per_sec = Some(0)).contains("link"));
        assert!(refused(|r| r.conduct.as_mut().unwrap().memory.first_bytes = 0).contains("no memory"));
        assert!(refused(|r| r.conduct.as_mut().unwrap().memory.first_bytes = u64::MAX).contains("no memory"));
        assert!(refused(|r| r.memory.raw = u64::MAX).contains("can be"));
        assert!(refused(|r| r.downtime.last_pages = Duration::from_secs(1 << 40)).contains("longer"));
        let mut odd = report.clone();
        odd.rounds[0].dirty_pages = u64::MAX;
        odd.rounds[0].took = Duration::ZERO;
        let replay = Replay::from_report(&odd).unwrap();
        assert!(replay.memory_bytes > 0 && replay.link_bytes_per_sec.is_finite());
    }
}
