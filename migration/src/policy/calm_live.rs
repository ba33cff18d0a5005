//! `calm-live`: least total cost - late requests, downtime and the price of time - from what is measured.
//!
//! In every slice it asks: what does making one more byte clean cost now, and what does it save in the switch?
//! Copying costs the late requests and the time; a byte stays copied only as far as the copy is faster than
//! the guest dirties what is clean. Coldest pages go first, so that hot pages are copied last or in the switch.
//! Where the service's packets go first on the link, what they leave idle is nearly free.

use std::time::Duration;

use super::reason::GAINS_NOTHING_SECS;
use super::{Decision, History, Limits, Order, Reason, ServiceUse, Throttle, UNLIMITED};

const SLICE: Duration = Duration::from_millis(100);
const SHORTEST_SLICE: Duration = Duration::from_millis(10);
/// How much of the cost of stopping now it may cost to wait for a better moment, where the writing changes
/// over time.
const PATIENCE: f64 = 0.25;
/// A slice has to save this much more than it costs: a tie stops, and so does a gain that is only noise.
const MARGIN: f64 = 1.01;
/// After this long without progress the guest is slowed, or slowed more.
const LOOK: Duration = Duration::from_secs(3);
/// After this long without progress, with nothing left to try, a contract is given up.
const GIVE_UP: Duration = Duration::from_secs(15);
const PAGE: f64 = 4096.0;

/// What one choice of bandwidth does.
#[derive(Clone, Copy)]
struct Choice {
    bandwidth: f64,
    /// Seconds of outage per second, without the price of time.
    late: f64,
    yields: bool,
}

/// What is known, in wire bytes.
struct Known {
    link: f64,
    remaining: f64,
    dirty: f64,
    load: f64,
    time_price: f64,
    down: f64,
}

pub(super) fn decide(history: &History, limits: &Limits) -> (Decision, Reason) {
    let Some(link) = limits.link(history) else {
        return (Decision::go_on(UNLIMITED), Reason::Unmeasured);
    };
    let ratio = history.wire_ratio();
    let known = Known {
        link,
        remaining: history.remaining_bytes as f64 * ratio,
        dirty: history.dirty_bytes_per_sec() * ratio,
        load: load(history, limits),
        time_price: limits.time_price.max(0.0),
        down: limits.cost.down(),
    };
    let choice = choose(&known, history, limits);
    let downtime = history.switch_fixed.as_secs_f64() + known.remaining / link;
    let limit = limits.downtime.as_secs_f64();

    // Worth another slice?
    let slice = (known.remaining / choice.bandwidth.max(1.0))
        .clamp(SHORTEST_SLICE.as_secs_f64(), SLICE.as_secs_f64());
    let after = (known.remaining - choice.bandwidth * slice).max(0.0) + known.dirty * slice;
    let saved = (known.remaining - after) * (known.down + known.time_price) / link;
    let spent = (choice.late + known.time_price) * slice;
    let step_cost = match known.remaining - after {
        gain if gain > 0.0 => (spent / gain * PAGE).min(GAINS_NOTHING_SECS),
        _ => GAINS_NOTHING_SECS,
    };
    let stop_cost = (known.down + known.time_price) / link * PAGE;
    // What the last seconds brought tells more than a difference of two rates that are nearly equal.
    let (since, gained) = super::stall::progress(history);
    let brought = gained * ratio * (known.down + known.time_price) / link;
    let idles = since >= LOOK && brought < (choice.late + known.time_price) * since.as_secs_f64() / 2.0;
    if known.remaining > 0.0 && saved > spent * MARGIN && !idles {
        let (choice, hurry) = hurry(&known, choice, history, limits);
        if hurry.is_none()
            && dear(&known, choice, history, limits)
            && let Some(wait) = wait(&known, choice, history, limits, false)
        {
            return wait;
        }
        let mut decision = copy(&known, choice, slice, history);
        decision.slow_writes_bytes_per_sec = slow_writes(history, choice.bandwidth / ratio);
        let reason = match hurry {
            Some(left_secs) => Reason::Hurry {
                left_secs,
                bandwidth_bytes_per_sec: choice.bandwidth,
            },
            None if choice.yields => Reason::TakeWhatIsIdle {
                bandwidth_bytes_per_sec: choice.bandwidth,
                service_bytes_per_sec: service(history).map_or(0.0, |s| s.bytes_per_sec),
                dirty_bytes_per_sec: known.dirty,
            },
            None => Reason::StepPays {
                bandwidth_bytes_per_sec: choice.bandwidth,
                dirty_bytes_per_sec: known.dirty,
                late: choice.late,
                step_cost_secs: step_cost,
                stop_cost_secs: stop_cost,
            },
        };
        return (decision, reason);
    }
    if super::stall::link_is_silent(history) {
        return (
            copy(&known, choice, SLICE.as_secs_f64(), history),
            Reason::LinkSilent,
        );
    }
    if limits.downtime_is_contract && known.remaining > 0.0 && downtime > limit {
        return keep_the_contract(&known, history, limits, downtime, limit);
    }
    let steady = idles && saved > spent * MARGIN;
    let kept = limits.downtime_is_contract && downtime <= limit;
    if !kept
        && known.remaining > 0.0
        && let Some(wait) = wait(&known, choice, history, limits, steady)
    {
        return wait;
    }
    let reason = if known.remaining <= 0.0 {
        Reason::LittleLeft {
            remaining_bytes: 0,
            threshold_bytes: 0,
        }
    } else {
        Reason::StepCostsMore {
            step_cost_secs: step_cost,
            stop_cost_secs: stop_cost,
        }
    };
    (Decision::switch(), reason)
}

/// Coldest first, a slice, with the throttle as it is.
fn copy(known: &Known, choice: Choice, slice: f64, history: &History) -> Decision {
    // All of a link that was measured once, in a bad moment perhaps, is a little more than that: what it carries is only
    // seen by trying.
    let bandwidth = if choice.yields || choice.bandwidth >= 0.99 * known.link {
        known.link * 1.25
    } else {
        choice.bandwidth
    };
    let mut decision = Decision::go_on(bandwidth as u64);
    decision.yield_to_service = choice.yields;
    decision.order = Order::ColdestFirst;
    decision.fresh = true;
    decision.ask_again = Duration::from_secs_f64(slice);
    if history.throttle_percent > 0 {
        decision.throttle = Throttle::all(history.throttle_percent);
    }
    decision
}

/// What would be written now if it were one of the quieter moments of those seen.
fn quiet_writing(known: &Known, history: &History) -> f64 {
    let mut rates: Vec<f64> = super::stall::stretches(history)
        .iter()
        .map(|s| s.rate())
        .collect();
    rates.sort_by(f64::total_cmp);
    let clean = history.total_bytes.saturating_sub(history.remaining_bytes) as f64;
    rates
        .get(rates.len() / 4)
        .map_or(known.dirty, |rate| rate * clean)
}

/// Copying hurts the service now, and by what was seen lately it will hurt it much less soon.
fn dear(known: &Known, choice: Choice, history: &History, limits: &Limits) -> bool {
    if choice.late <= known.time_price {
        return false;
    }
    let quiet = quiet_writing(known, history);
    let busiest = limits.cost.offered_bytes_per_sec().unwrap_or(0.0);
    let least_use = history
        .samples
        .iter()
        .map(|s| s.service_bytes_per_sec)
        .fold(f64::INFINITY, f64::min);
    let load = if busiest > 0.0 && least_use.is_finite() {
        known.load.min(least_use / busiest)
    } else {
        known.load
    };
    let price = (choice.late + known.time_price) / (choice.bandwidth - known.dirty).max(1e-9);
    limits
        .cost
        .cheapest(known.link, quiet.min(known.dirty), known.time_price, load)
        .is_some_and(|(_, later)| later < price / 2.0)
}

/// The service's use of the link, if it is a number.
fn service(history: &History) -> Option<ServiceUse> {
    history.service.filter(|s| s.bytes_per_sec.is_finite())
}

/// How many requests arrive, against what the SLA says.
fn load(history: &History, limits: &Limits) -> f64 {
    let Some(service) = service(history) else {
        return 1.0;
    };
    let measured = match (service.requests_per_sec, limits.cost.requests_per_sec()) {
        (Some(now), Some(said)) => now / said,
        _ => match limits.cost.offered_bytes_per_sec() {
            Some(said) if said > 0.0 => service.bytes_per_sec / said,
            _ => 1.0,
        },
    };
    if measured.is_finite() {
        measured.max(0.0)
    } else {
        1.0
    }
}

/// The cheapest bandwidth for the next byte: a reserved one, or what the service leaves idle.
fn choose(known: &Known, history: &History, limits: &Limits) -> Choice {
    let reserved = limits
        .cost
        .cheapest(known.link, known.dirty, known.time_price, known.load)
        .map(|(bandwidth, price)| {
            let choice = Choice {
                bandwidth,
                late: limits.cost.at_load(known.link - bandwidth, known.load),
                yields: false,
            };
            (choice, price)
        });
    let idle = service(history).and_then(|service| {
        let delay = service.goes_first?;
        let bandwidth = known.link - service.bytes_per_sec.max(0.0);
        let late = limits
            .cost
            .at_first_place(known.link, known.load, delay.as_secs_f64());
        let price = (late + known.time_price) / (bandwidth - known.dirty);
        (bandwidth > known.dirty).then_some((
            Choice {
                bandwidth,
                late,
                yields: true,
            },
            price,
        ))
    });
    match (reserved, idle) {
        (Some(r), Some(i)) if i.1 <= r.1 => i.0,
        (Some(r), _) => r.0,
        (None, Some(i)) => i.0,
        // The guest writes faster than the link carries: all of it, and the stop rule decides.
        (None, None) => Choice {
            bandwidth: known.link,
            late: limits.cost.at_load(0.0, known.load),
            yields: false,
        },
    }
}

/// Faster than is cheapest, if the deadline would pass before the rest is copied.
fn hurry(known: &Known, choice: Choice, history: &History, limits: &Limits) -> (Choice, Option<f64>) {
    let Some(deadline) = limits.deadline else {
        return (choice, None);
    };
    let left = deadline.saturating_sub(history.elapsed).as_secs_f64();
    let room = limits.downtime.as_secs_f64() * known.link;
    let needed = known.dirty + (known.remaining - room).max(0.0) / left.max(0.01);
    if needed <= choice.bandwidth {
        return (choice, None);
    }
    let bandwidth = needed.min(known.link);
    let hurried = Choice {
        bandwidth,
        late: limits.cost.at_load(known.link - bandwidth, known.load),
        yields: false,
    };
    (hurried, Some(left))
}

/// Stopping pays, but the downtime would be longer than promised: faster, or slow the guest, or give up.
fn keep_the_contract(
    known: &Known,
    history: &History,
    limits: &Limits,
    downtime: f64,
    limit: f64,
) -> (Decision, Reason) {
    let room = (limit - history.switch_fixed.as_secs_f64()).max(0.0) * known.link;
    let (stuck, stalled) = (super::stall::stuck(history), super::stall::stalled(history));
    // The contract comes before the service level: as fast as it takes, and all the link if that is too slow.
    let cheapest = limits
        .cost
        .cheapest(known.link, known.dirty, known.time_price, known.load);
    let bandwidth = if stuck >= LOOK {
        known.link
    } else {
        cheapest
            .map_or(known.link, |c| c.0)
            .max((known.dirty * 1.1 + room * 0.1).min(known.link))
    };
    let choice = Choice {
        bandwidth,
        late: limits.cost.at_load(known.link - bandwidth, known.load),
        yields: false,
    };
    let mut decision = copy(known, choice, SLICE.as_secs_f64(), history);
    if stuck >= LOOK {
        let percent = throttle_for(known, history, limits);
        if percent > history.throttle_percent {
            decision.throttle = Throttle::all(percent);
            let reason = Reason::Throttle {
                percent,
                dirty_bytes_per_sec: known.dirty,
                bandwidth_bytes_per_sec: bandwidth,
            };
            return (decision, reason);
        }
    }
    // Where the writing goes up and down, a lull may still keep the contract.
    let enough = if super::stall::conditions_change(history) {
        4 * GIVE_UP
    } else {
        GIVE_UP
    };
    if stalled >= enough {
        let reason = Reason::ContractUnreachable {
            dirty_bytes_per_sec: known.dirty,
            bandwidth_bytes_per_sec: known.link,
            limit_secs: limit,
        };
        return (Decision::give_up(), reason);
    }
    let reason = Reason::ContractFirst {
        downtime_secs: downtime,
        limit_secs: limit,
        bandwidth_bytes_per_sec: bandwidth,
    };
    (decision, reason)
}

/// How much slower the guest has to write so that the copy gains; in steps of ten, within what is allowed.
fn throttle_for(known: &Known, history: &History, limits: &Limits) -> u8 {
    let now = f64::from(100 - history.throttle_percent.min(99)) / 100.0;
    let free = known.dirty / now;
    let needed = 1.0 - 0.8 * known.link / free.max(1.0);
    let step = f64::from(history.throttle_percent) + 10.0;
    limits.clamp_throttle((needed * 100.0).max(step) as u8)
}

/// Disk writes that come faster than everything can be copied are held to half of the copy.
fn slow_writes(history: &History, copied_per_sec: f64) -> Option<u64> {
    let disk = history.disk_dirty_bytes_per_sec;
    (history.disk_remaining_bytes > 0 && disk > copied_per_sec && super::stall::stalled(history) >= LOOK)
        .then_some((copied_per_sec / 2.0).max(1.0) as u64)
}

/// Conditions change over time, and a better moment may come: where things go up and down and nothing is gained
/// (`steady`), the next low; else a quieter time. Waiting for it, at a bandwidth that hardly hurts,
/// may cost a part of what the switch would cost now.
fn wait(
    known: &Known,
    choice: Choice,
    history: &History,
    limits: &Limits,
    steady: bool,
) -> Option<(Decision, Reason)> {
    if !super::stall::conditions_change(history) {
        return None;
    }
    let choice = if steady || choice.late <= known.time_price {
        choice
    } else {
        gentle(known, limits)
    };
    let per_sec = known.time_price + choice.late;
    let patience = known.remaining * (known.down + known.time_price) / known.link * PATIENCE / per_sec;
    let waited = history.waited.as_secs_f64();
    let least = history.samples.iter().map(|s| s.remaining_bytes).min();
    let least_bytes = least.unwrap_or(history.remaining_bytes);
    let before = history
        .samples
        .iter()
        .rev()
        .nth(10)
        .map_or(u64::MAX, |s| s.remaining_bytes);
    let falls = history.remaining_bytes < before - before / 100;
    let quiet = known.dirty <= 1.5 * quiet_writing(known, history) && known.dirty < known.link;
    let low = history.remaining_bytes <= least_bytes + least_bytes / 20;
    let at_a_low = low && (steady || (!falls && quiet));
    let sound = per_sec > 0.0 && patience.is_finite();
    if !sound || waited >= patience || patience < SLICE.as_secs_f64() || at_a_low {
        return None;
    }
    let mut decision = copy(known, choice, SLICE.as_secs_f64(), history);
    decision.waiting = true;
    let reason = Reason::WaitForALull {
        remaining_bytes: history.remaining_bytes,
        least_bytes,
        waited_secs: waited,
        patience_secs: patience,
    };
    Some((decision, reason))
}

/// The most bandwidth whose late requests cost no more than the time does.
fn gentle(known: &Known, limits: &Limits) -> Choice {
    let (mut low, mut high) = (0.0, known.link);
    for _ in 0..40 {
        let middle = (low + high) / 2.0;
        if limits.cost.at_load(known.link - middle, known.load) <= known.time_price {
            low = middle;
        } else {
            high = middle;
        }
    }
    Choice {
        bandwidth: low,
        late: limits.cost.at_load(known.link - low, known.load),
        yields: false,
    }
}
