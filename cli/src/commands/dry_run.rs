//! What `ferry migrate --dry-run` shows.

use std::process::ExitCode;

use anyhow::{Result, anyhow};
use ferry_migration::estimate::{Estimate, Range};
use ferry_migration::policy::reason;
use ferry_vmm::crossing::rehearse::{Forecast, Receiver, Rehearsal, Size};

use super::migrate::{MigrateArgs, bytes};
use crate::{output, say};

pub(super) fn show(rehearsal: &Rehearsal, destination: &str, args: &MigrateArgs) -> Result<ExitCode> {
    if args.json {
        output::json(rehearsal)?;
    } else {
        say!("{}", text(rehearsal, destination))?;
    }
    let name = &rehearsal.name;
    match &rehearsal.receiver {
        Receiver::No { why, .. } => Err(anyhow!("{name} would not cross to {destination}: {why}")),
        Receiver::Nothing { why } if rehearsal.link.is_none() => Err(anyhow!(
            "nothing can be said of a crossing to {destination}: {why}; state what the link carries with --link to see what it would take"
        )),
        Receiver::Nothing { .. } | Receiver::Yes => Ok(ExitCode::SUCCESS),
    }
}

fn text(rehearsal: &Rehearsal, destination: &str) -> String {
    let Rehearsal {
        name,
        destination: _,
        receiver,
        memory,
        disks,
        empty_part,
        wire_ratio,
        writes,
        link,
        forecasts,
    } = rehearsal;
    let mut lines = vec![match receiver {
        Receiver::Yes => format!("{destination} would take {name}"),
        Receiver::No { why, .. } => format!("{destination} would not take {name}: {why}"),
        Receiver::Nothing { why } => format!("{destination} could not be asked: {why}"),
    }];
    let size = |what: &str, size: &Size| {
        format!(
            "{what}: {} of {} in use",
            bytes(size.used_bytes),
            bytes(size.total_bytes)
        )
    };
    let mut sizes = size("memory", memory);
    if disks.total_bytes > 0 {
        sizes = format!("{sizes}; {}", size("disks", disks));
    }
    lines.push(format!(
        "{sizes}; of that {:.0} % empty, the rest {:.0} % of its size on the wire",
        empty_part * 100.0,
        wire_ratio * 100.0
    ));
    if !writes.is_empty() {
        let written = |w: &ferry_vmm::crossing::rehearse::Written| {
            format!("{} in {}", bytes(w.bytes), reason::time(w.window.as_secs_f64()))
        };
        let written: Vec<String> = writes.iter().map(written).collect();
        lines.push(format!("written: {}", written.join(", ")));
    }
    if let Some(link) = link {
        let how = if link.measured { "measured" } else { "as you say" };
        let trip = link.round_trip.map_or_else(String::new, |trip| {
            format!("; a round trip takes {}", reason::time(trip.as_secs_f64()))
        });
        lines.push(format!(
            "link: {} ({how}){trip}",
            reason::rate(link.bytes_per_sec as f64)
        ));
    }
    if !forecasts.is_empty() {
        lines.push(String::new());
        lines.push(table(forecasts));
    }
    lines.join("\n")
}

fn table(forecasts: &[Forecast]) -> String {
    let costs = forecasts.iter().any(|forecast| forecast.estimate.cost.is_some());
    let mut head = vec!["POLICY", "TOTAL", "DOWNTIME", "ON THE WIRE"];
    if costs {
        head.push("COST");
    }
    head.push("WHY IT ENDS");
    let mut rows = vec![head.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for Forecast {
        policy,
        chosen,
        estimate,
    } in forecasts
    {
        let mut row = vec![format!("{policy}{}", if *chosen { " *" } else { "" })];
        row.extend(numbers(estimate));
        if costs {
            let cost = estimate.cost.filter(|_| estimate.crosses);
            row.push(cost.map_or_else(|| "-".to_owned(), |cost| reason::time(cost.expected)));
        }
        row.push(estimate.reason.clone());
        rows.push(row);
    }
    output::table(&rows).trim_end().to_owned()
}

/// Expected, and the range in brackets.
fn range(range: &Range, shown: impl Fn(f64) -> String) -> String {
    let [low, expected, high] = [range.low, range.expected, range.high].map(shown);
    if low == high {
        expected
    } else {
        format!("{expected} ({low} to {high})")
    }
}

fn numbers(estimate: &Estimate) -> [String; 3] {
    if !estimate.crosses {
        return ["does not cross".to_owned(), "-".to_owned(), "-".to_owned()];
    }
    [
        range(&estimate.total_secs, reason::time),
        range(&estimate.downtime_secs, reason::time),
        range(&estimate.wire_bytes, |size| bytes(size as u64)),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_that_does_not_cross_is_not_given_a_time() {
        let mut estimate = Estimate {
            reason: "too much is written".into(),
            ..Estimate::default()
        };
        assert_eq!(numbers(&estimate), ["does not cross", "-", "-"]);
        estimate.crosses = true;
        estimate.total_secs = Range {
            low: 1.0,
            expected: 1.5,
            high: 2.0,
        };
        assert_eq!(numbers(&estimate)[0], "1.5 s (1.0 s to 2.0 s)");
    }
}
