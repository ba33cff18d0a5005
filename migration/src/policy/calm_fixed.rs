//! `calm-fixed`: one bandwidth and one stop point of least total cost, planned from one page write rate.

use std::time::Duration;

use super::plan::Problem;
use super::{Decision, History, LEAST_BANDWIDTH_BYTES_PER_SEC, Limits, Reason};

const PAGE: f64 = 4096.0;

/// The rest that the paper's runs leave even where everything should be copied: this much of the link's time.
pub(super) const RESIDUE_SECS: f64 = 1.0 / 128.0;

pub(super) fn decide(given: Option<u64>, history: &History, limits: &Limits) -> (Decision, Reason) {
    let Some(link) = limits.link(history) else {
        return (Decision::go_on(super::UNLIMITED), Reason::Unmeasured);
    };
    let lam = limits
        .page_write_rate_per_sec
        .or_else(|| history.page_write_rate_per_sec())
        .unwrap_or(0.0);
    let problem = Problem {
        pages: history.total_bytes as f64 / PAGE,
        link: link / PAGE,
        lam,
        cost: &|pages| limits.cost.at(pages * PAGE),
        down: limits.cost.down(),
    };
    let (bandwidth, planned) = match given {
        Some(bandwidth) => {
            let bandwidth = bandwidth.max(LEAST_BANDWIDTH_BYTES_PER_SEC) as f64;
            (
                bandwidth,
                problem.best_clean((bandwidth / PAGE).min(problem.link)) * PAGE,
            )
        }
        None => {
            let plan = problem.best_fixed(None);
            (plan.bandwidth * PAGE, plan.clean * PAGE)
        }
    };
    let clean = history.total_bytes.saturating_sub(history.remaining_bytes) as f64;
    let reachable = history.total_bytes as f64 - link * RESIDUE_SECS;
    if clean >= planned.min(reachable) {
        let reason = Reason::PlanReached {
            clean_bytes: clean,
            planned_bytes: planned,
        };
        return (Decision::switch(), reason);
    }
    let mut decision = Decision::go_on(bandwidth as u64);
    decision.fresh = true;
    decision.ask_again = Duration::from_millis(10);
    let reason = Reason::Plan {
        clean_bytes: clean,
        planned_bytes: planned,
        bandwidth_bytes_per_sec: bandwidth,
    };
    (decision, reason)
}
