//! The report of a crossing as one page. Everything in a report may come from a peer or from a file of any origin.

use std::time::Duration;

use ferry_migration::pages::encode::PageCounts;
use ferry_migration::policy::reason;
use ferry_migration::report::{Downtime, Probe, Promise, Report, Round};

use crate::plot::{Bar, END, Line, chart, head, table, waterfall};

const MIB: f64 = 1_048_576.0;

pub(crate) fn page(report: &Report) -> String {
    let mut html = head(&format!("The crossing of {}", report.name));
    html += &summary(report);
    html += &promise_and_fact(report);
    html += &timeline(report);
    html += &switch(report);
    html += &promises(report);
    html += &decisions(report);
    html += &pages(report);
    if let Some(probe) = &report.probe {
        html += &outage(probe);
    }
    html + END
}

fn time(time: Duration) -> String {
    if time.is_zero() {
        return "0".to_owned();
    }
    reason::time(time.as_secs_f64())
}

fn bytes(count: u64) -> String {
    reason::size(count as f64)
}

fn rate(bytes_per_sec: u64) -> String {
    reason::rate(bytes_per_sec as f64)
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn known(value: Option<String>) -> String {
    value.unwrap_or_else(|| "not measured".to_owned())
}

/// How much the machine was slowed in a round, and which CPUs for it.
fn throttle(round: &Round) -> String {
    let each: Vec<String> = round
        .throttled_vcpus
        .iter()
        .map(|slowed| format!("CPU {}: {} %", slowed.vcpu, slowed.percent))
        .collect();
    match each.is_empty() {
        true => format!("{} %", round.throttle_percent),
        false => format!("{} % ({})", round.throttle_percent, each.join(", ")),
    }
}

fn summary(report: &Report) -> String {
    let compared = match report.checks.compared {
        Some(true) => "compared by hash on both sides: equal",
        Some(false) => "compared by hash on both sides: different",
        None => "each frame by its checksum",
    };
    let impact = &report.impact;
    table(
        &["", ""],
        &[
            row(&["outcome", &report.outcome.sentence()]),
            row(&["session", &report.session.to_string()]),
            row(&["total", &time(report.total)]),
            row(&["prepared in", &time(report.prepare)]),
            row(&["downtime", &time(report.downtime.total)]),
            row(&["on the wire", &bytes(report.wire_bytes)]),
            row(&[
                "link",
                &format!(
                    "{} lanes, {} reconnects, {} pages and clusters sent again for them",
                    report.lanes, report.reconnects, report.resent_units
                ),
            ]),
            row(&[
                "checks",
                &format!("{} frames; {compared}", report.checks.frames_checked),
            ]),
            row(&["CPU time lost to throttling", &time(impact.throttled)]),
            row(&[
                "write faults",
                &known(impact.write_fault_count.map(|count| count.to_string())),
            ]),
            row(&[
                "CPU time lost to write faults",
                &known(impact.write_faults.map(time)),
            ]),
            row(&["disk writes held back", &time(impact.slowed_writes)]),
            row(&[
                "the guest's clock fell behind by",
                &known(report.clock_behind.map(time)),
            ]),
        ],
    )
}

fn promise_and_fact(report: &Report) -> String {
    let Some(promise) = report.promise else {
        return String::new();
    };
    let when = if promise.at.is_zero() {
        "promised before the move".to_owned()
    } else {
        format!("promised after {}", time(promise.at))
    };
    let Promise {
        at: _,
        total,
        downtime,
        wire_bytes,
    } = report.fact;
    "<h2>Promise and fact</h2>\n".to_owned()
        + &table(
            &["", &when, "fact"],
            &[
                row(&["total", &time(promise.total), &time(total)]),
                row(&["downtime", &time(promise.downtime), &time(downtime)]),
                row(&["on the wire", &bytes(promise.wire_bytes), &bytes(wire_bytes)]),
            ],
        )
}

fn timeline(report: &Report) -> String {
    let moments = &report.timeline;
    let at = |time: Duration| time.as_secs_f64();
    let steps = moments.iter().zip(moments.iter().skip(1));
    let rates = steps.map(|(before, after)| {
        let secs = at(after.at.saturating_sub(before.at)).max(1e-6);
        let sent = after.wire_bytes.saturating_sub(before.wire_bytes);
        (at(after.at), sent as f64 * 8.0 / 1e6 / secs)
    });
    let dirty = moments
        .iter()
        .map(|moment| (at(moment.at), moment.dirty_bytes_per_sec as f64 * 8.0 / 1e6));
    let remaining = moments
        .iter()
        .map(|moment| (at(moment.at), moment.remaining_bytes as f64 / MIB));
    let asked = report.rounds.iter().filter_map(|round| {
        let rate = round.bandwidth_bytes_per_sec?;
        Some((at(round.start), rate as f64 * 8.0 / 1e6))
    });
    let changed = report.rounds.iter().map(|round| {
        let written = round.dirty_pages as f64 * 4096.0 + round.dirty_clusters as f64 * 65536.0;
        (at(round.start.saturating_add(round.took)), written / MIB)
    });
    let mut lines = vec![
        Line::new("sent", rates.collect()),
        Line::new("written again", dirty.collect()),
    ];
    let asked: Vec<_> = asked.collect();
    if !asked.is_empty() {
        lines.push(Line::new("asked for by the policy", asked).dashed());
    }
    chart("Rates (Mbit/s)", "s", &lines)
        + &chart(
            "What remains (MiB)",
            "s",
            &[
                Line::new("remaining", remaining.collect()),
                Line::new("changed in the round", changed.collect()),
            ],
        )
}

fn switch(report: &Report) -> String {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let bars: Vec<Bar> = report
        .downtime
        .parts()
        .iter()
        .map(|(name, part)| Bar {
            name: (*name).to_owned(),
            length: ms(*part),
        })
        .collect();
    let Downtime {
        load_there,
        resume_there,
        answer,
        ..
    } = report.downtime;
    waterfall("Downtime", "ms", &bars)
        + &table(
            &["by the other side's clock", ""],
            &[
                row(&["state loaded", &time(load_there.restore)]),
                row(&["disks made durable", &time(load_there.flush)]),
                row(&["from the go-ahead until the guest ran", &time(resume_there)]),
            ],
        )
        + &table(
            &["not downtime", ""],
            &[row(&["until the answer was heard here", &time(answer)])],
        )
}

/// What was promised as the crossing went on.
fn promises(report: &Report) -> String {
    let said: Vec<Promise> = report
        .promise
        .into_iter()
        .chain(report.rounds.iter().filter_map(|round| round.promise))
        .collect();
    if said.is_empty() {
        return String::new();
    }
    let line = |pick: &dyn Fn(&Promise) -> Duration, unit: f64| {
        let mut points: Vec<_> = said
            .iter()
            .map(|promise| (promise.at.as_secs_f64(), pick(promise).as_secs_f64() * unit))
            .collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points
    };
    let fact = |value: Duration, unit: f64| {
        let value = value.as_secs_f64() * unit;
        vec![(0.0, value), (report.total.as_secs_f64(), value)]
    };
    chart(
        "Promised end (seconds), over time",
        "s",
        &[
            Line::new("promised total", line(&|promise| promise.total, 1.0)),
            Line::new("fact", fact(report.fact.total, 1.0)).dashed(),
        ],
    ) + &chart(
        "Promised downtime (ms), over time",
        "s",
        &[
            Line::new("promised downtime", line(&|promise| promise.downtime, 1e3)),
            Line::new("fact", fact(report.fact.downtime, 1e3)).dashed(),
        ],
    )
}

fn decisions(report: &Report) -> String {
    let rows: Vec<Vec<String>> = report
        .rounds
        .iter()
        .map(|round| {
            vec![
                round.round.to_string(),
                time(round.start),
                time(round.took),
                bytes(round.wire_bytes),
                rate(round.rate_bytes_per_sec),
                round
                    .bandwidth_bytes_per_sec
                    .map_or_else(|| "all".to_owned(), rate),
                bytes(round.remaining_bytes),
                throttle(round),
                round.decision.clone(),
                round.reason.clone(),
            ]
        })
        .collect();
    let head = [
        "round",
        "began",
        "took",
        "wire",
        "rate",
        "asked for",
        "then left",
        "throttle",
        "decision",
        "reason",
    ];
    "<h2>What the policy decided</h2>\n".to_owned() + &table(&head, &rows)
}

fn pages(report: &Report) -> String {
    let counts = |what: &str, counts: &PageCounts| {
        let mut cells = vec![what.to_owned()];
        cells.extend(counts.ways().map(|count| count.to_string()));
        cells.extend([bytes(counts.plain_bytes), bytes(counts.wire_bytes)]);
        cells
    };
    "<h2>What crossed</h2>\n".to_owned()
        + &table(
            &[
                "",
                "zero",
                "same",
                "unchanged",
                "known",
                "delta",
                "lz4",
                "raw",
                "plain",
                "wire",
            ],
            &[counts("pages", &report.memory), counts("clusters", &report.disk)],
        )
}

fn outage(probe: &Probe) -> String {
    let mut rows = vec![
        row(&[
            "asked",
            &format!("{}, every {}", probe.target, time(probe.period)),
        ]),
        row(&[
            "questions",
            &format!(
                "{} sent, {} answered, {} lost",
                probe.sent, probe.answered, probe.lost
            ),
        ]),
        row(&[
            "longest silence",
            &format!(
                "{}, from {} on",
                time(probe.longest_silence),
                time(probe.silence_began)
            ),
        ]),
    ];
    rows.push(match &probe.outage {
        Some(outage) => row(&[
            "outage",
            &format!(
                "{} lost in a row: at least {}, at most {}",
                outage.lost,
                time(outage.at_least),
                outage
                    .at_most
                    .map_or_else(|| "unknown, it had not ended".to_owned(), time)
            ),
        ]),
        None => row(&["outage", "none: every question was answered"]),
    });
    for (name, latency) in [
        ("median latency", probe.latency_median),
        ("99 % latency", probe.latency_99),
        ("longest latency", probe.latency_max),
    ] {
        rows.push(row(&[name, &known(latency.map(time))]));
    }
    if let Some(failure) = &probe.first_failure {
        rows.push(row(&["first failure", failure]));
    }
    "<h2>What a client saw</h2>\n".to_owned() + &table(&["", ""], &rows)
}
