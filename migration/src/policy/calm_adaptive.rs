//! `calm-adaptive`: for the next page the cheapest bandwidth, taking every page to be written at one known rate;
//! stop when the cheapest step costs what copying the page in the switch costs.

use std::time::Duration;

use super::calm_fixed::RESIDUE_SECS;
use super::reason::GAINS_NOTHING_SECS;
use super::{Decision, History, Limits, Reason};

const PAGE: f64 = 4096.0;

pub(super) fn decide(history: &History, limits: &Limits) -> (Decision, Reason) {
    let Some(link) = limits.link(history) else {
        return (Decision::go_on(super::UNLIMITED), Reason::Unmeasured);
    };
    let lam = limits
        .page_write_rate_per_sec
        .or_else(|| history.page_write_rate_per_sec())
        .unwrap_or(0.0);
    let clean = history.total_bytes.saturating_sub(history.remaining_bytes) as f64;
    let dirty = lam * clean;
    let stop_cost = limits.cost.down() / link;
    let residue = (link * RESIDUE_SECS) as u64;
    if history.remaining_bytes <= residue {
        let reason = Reason::LittleLeft {
            remaining_bytes: history.remaining_bytes,
            threshold_bytes: residue,
        };
        return (Decision::switch(), reason);
    }
    match limits.cost.cheapest(link, dirty, 0.0, 1.0) {
        Some((bandwidth, price)) if price < (1.0 - 1e-9) * stop_cost => {
            let mut decision = Decision::go_on(bandwidth as u64);
            decision.fresh = true;
            decision.ask_again = Duration::from_millis(10);
            let reason = Reason::StepPays {
                bandwidth_bytes_per_sec: bandwidth,
                dirty_bytes_per_sec: dirty,
                late: limits.cost.at(link - bandwidth),
                step_cost_secs: price * PAGE,
                stop_cost_secs: stop_cost * PAGE,
            };
            (decision, reason)
        }
        found => {
            let reason = Reason::StepCostsMore {
                step_cost_secs: found.map_or(GAINS_NOTHING_SECS, |f| (f.1 * PAGE).min(GAINS_NOTHING_SECS)),
                stop_cost_secs: stop_cost * PAGE,
            };
            (Decision::switch(), reason)
        }
    }
}
