//! `ferry report`: what happened in a crossing.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail};
use ferry_migration::report::{Probe, Report};
use ferry_vmm::crossing::ledger;
use ferry_vmm::name::Name;

use super::migrate::{bytes, milliseconds, seconds};
use crate::cli::Globals;
use crate::{output, report_page, say};

/// A report is some hundred KiB; what is longer is something else.
const MOST_BYTES: u64 = 64 << 20;

/// Show the report of a crossing
///
/// What was promised and what became of it, each round with the policy's reason, the downtime by its parts. --html writes a
/// page with plots; docs/report.schema.json describes the JSON.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    ferry report web\n  \
    ferry report crossing.json --json\n  \
    ferry report web --html web.html")]
pub struct ReportArgs {
    /// A machine that left this host, or a file that `ferry migrate --report` wrote
    #[arg(value_name = "NAME|FILE")]
    pub what: String,
    /// The whole report as JSON
    #[arg(long, conflicts_with = "html")]
    pub json: bool,
    /// Write a page with plots, one file that needs nothing else; - for standard output
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

pub fn run(args: &ReportArgs, globals: &Globals) -> Result<()> {
    let path = find(&args.what, globals)?;
    let report = read(&path)?;
    if let Some(to) = &args.html {
        let page = report_page::page(&report);
        if to == Path::new("-") {
            return say!("{}", page.trim_end());
        }
        return std::fs::write(to, page)
            .with_context(|| format!("could not write the page to {}", to.display()));
    }
    if args.json {
        return output::json(&report);
    }
    say!("{}", text_of(&report))
}

fn read(path: &Path) -> Result<Report> {
    let could_not = || format!("could not read {}", path.display());
    if std::fs::metadata(path).with_context(could_not)?.len() > MOST_BYTES {
        bail!(
            "{} is not the report of a crossing: it is longer than any",
            path.display()
        );
    }
    let text = std::fs::read(path).with_context(could_not)?;
    serde_json::from_slice(&text)
        .with_context(|| format!("{} is not the report of a crossing", path.display()))
}

fn find(what: &str, globals: &Globals) -> Result<PathBuf> {
    let named: Option<Name> = what.parse().ok();
    if let Some(path) = named.and_then(|name| ledger::newest_report(&globals.base().ok()?, &name)) {
        return Ok(path);
    }
    let path = Path::new(what);
    if path.is_file() {
        return Ok(path.to_owned());
    }
    Err(anyhow!(
        "there is no report of a machine {what} on this host, and no file of that name"
    ))
}

/// Text of any origin on a terminal: what would steer the terminal is shown and does nothing.
fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

fn text_of(report: &Report) -> String {
    let mut text = format!(
        "{}: {}\ntotal {}, downtime {}, {} on the wire over {} lanes, {} reconnects\n",
        plain(&report.name),
        plain(&report.outcome.sentence()),
        seconds(report.total),
        milliseconds(report.downtime.total),
        bytes(report.wire_bytes),
        report.lanes,
        report.reconnects
    );
    if let Some(promise) = &report.promise {
        let when = if promise.at.is_zero() {
            "before the move".to_owned()
        } else {
            format!("after {}", seconds(promise.at))
        };
        text += &format!(
            "promised {when}: total {}, downtime {}, {} on the wire\n",
            seconds(promise.total),
            milliseconds(promise.downtime),
            bytes(promise.wire_bytes)
        );
    }
    text.push('\n');
    text += &rounds(report);
    text += &downtime(report);
    text += &guest(report);
    if let Some(probe) = &report.probe {
        text += &client(probe);
    }
    text.trim_end().to_owned()
}

fn rounds(report: &Report) -> String {
    let head = [
        "round",
        "time",
        "wire",
        "rate",
        "changed pages",
        "clusters",
        "reason",
    ];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for round in &report.rounds {
        rows.push(vec![
            round.round.to_string(),
            seconds(round.took),
            bytes(round.wire_bytes),
            format!("{}/s", bytes(round.rate_bytes_per_sec)),
            round.dirty_pages.to_string(),
            round.dirty_clusters.to_string(),
            plain(&round.reason),
        ]);
    }
    output::table(&rows)
}

fn downtime(report: &Report) -> String {
    let parts = report.downtime.parts();
    let mut rows: Vec<Vec<String>> = parts
        .iter()
        .map(|(name, part)| vec![format!("  {name}"), milliseconds(*part)])
        .collect();
    rows.push(vec!["  total".to_owned(), milliseconds(report.downtime.total)]);
    let mut text = format!("\ndowntime by part\n{}", output::table(&rows));
    if !report.downtime.answer.is_zero() {
        text += &format!(
            "  (the guest ran there {} before its word was heard here)\n",
            milliseconds(report.downtime.answer)
        );
    }
    text
}

/// What the guest felt, as far as it was measured.
fn guest(report: &Report) -> String {
    let impact = &report.impact;
    let mut felt = Vec::new();
    if let Some(behind) = report.clock_behind {
        felt.push(format!("its clock fell behind by {}", milliseconds(behind)));
    }
    if !impact.throttled.is_zero() {
        let each = impact.vcpus.iter().enumerate();
        let each: Vec<String> = each
            .filter(|(_, vcpu)| !vcpu.throttled.is_zero())
            .map(|(number, vcpu)| format!("CPU {number} for {}", milliseconds(vcpu.throttled)))
            .collect();
        felt.push(format!(
            "its CPUs were held back for {} ({})",
            milliseconds(impact.throttled),
            each.join(", ")
        ));
    }
    if let Some(faults) = impact.write_fault_count {
        let cost = match impact.write_faults {
            Some(time) => format!(", which cost it some {}", milliseconds(time)),
            None => String::new(),
        };
        felt.push(format!("it met {faults} write faults{cost}"));
    }
    if !impact.slowed_writes.is_zero() {
        let held = milliseconds(impact.slowed_writes);
        felt.push(format!("its disk writes were held back for {held}"));
    }
    if felt.is_empty() {
        return String::new();
    }
    format!("\nthe guest: {}\n", felt.join(", "))
}

fn client(probe: &Probe) -> String {
    let outage = match &probe.outage {
        Some(outage) => format!(
            "{} lost in a row, an outage of {} to {}",
            outage.lost,
            milliseconds(outage.at_least),
            outage.at_most.map_or_else(|| "no end".to_owned(), milliseconds)
        ),
        None => "no question lost in a row".to_owned(),
    };
    let latency = |latency: Option<std::time::Duration>| latency.map_or_else(|| "-".to_owned(), milliseconds);
    let mut text = format!(
        "\na client of {}: {} of {} questions answered, longest silence {}; {outage}\n  latency: median {}, 99 % {}, longest {}\n",
        plain(&probe.target),
        probe.answered,
        probe.sent,
        milliseconds(probe.longest_silence),
        latency(probe.latency_median),
        latency(probe.latency_99),
        latency(probe.latency_max)
    );
    if let Some(failure) = &probe.first_failure {
        text += &format!("  first failure: {}\n", plain(failure));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example that is in the docs, with every value bent in every way.
    fn example() -> serde_json::Value {
        serde_json::from_str(include_str!("../../../docs/report.example.json")).unwrap()
    }

    fn show(value: &serde_json::Value) -> Option<(String, String)> {
        let report: Report = serde_json::from_value(value.clone()).ok()?;
        Some((text_of(&report), report_page::page(&report)))
    }

    fn leaves(value: &serde_json::Value, path: &mut Vec<String>, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(fields) => fields.iter().for_each(|(name, value)| {
                path.push(name.clone());
                leaves(value, path, found);
                path.pop();
            }),
            serde_json::Value::Array(items) => items.iter().enumerate().for_each(|(at, value)| {
                path.push(at.to_string());
                leaves(value, path, found);
                path.pop();
            }),
            _ => {}
        }
        found.push(format!("/{}", path.join("/")));
    }

    /// A report is a file, and a file can say anything: absurd numbers, texts that steer a terminal or a page, missing
    /// parts. It is shown or refused; nothing panics, and no text gets out of its place.
    #[test]
    fn a_report_of_any_origin_is_shown_or_refused() {
        let whole = example();
        let (text, page) = show(&whole).expect("the example is a report");
        assert!(
            text.contains("downtime by part") && page.contains("<svg"),
            "{text}"
        );
        let mut places = Vec::new();
        leaves(&whole, &mut Vec::new(), &mut places);
        assert!(places.len() > 100, "the example has every part");
        let nasty = serde_json::json!("<script>x</script>\u{1b}[2J'\"&");
        let bent = [
            nasty,
            serde_json::json!(u64::MAX),
            serde_json::json!(0),
            serde_json::json!(-1.5e300),
            serde_json::json!(null),
            serde_json::json!([]),
            serde_json::json!({"secs": u64::MAX, "nanos": 999_999_999}),
        ];
        let mut shown = 0;
        for place in &places {
            for other in &bent {
                let mut value = whole.clone();
                if place == "/" {
                    value = other.clone();
                } else if let Some(spot) = value.pointer_mut(place) {
                    *spot = other.clone();
                }
                if let Some((text, page)) = show(&value) {
                    shown += 1;
                    assert!(!text.contains('\u{1b}'), "{place}");
                    assert!(!page.contains("<script") && !page.contains('\u{1b}'), "{place}");
                    assert!(!page.contains("NaN") && !page.contains(">inf"), "{place}: {page}");
                }
            }
        }
        assert!(shown > 100, "only {shown} were shown");
    }

    #[test]
    fn a_page_needs_nothing_from_elsewhere() {
        let (_, page) = show(&example()).unwrap();
        // What was asked is text, not a link.
        let page = page.replace("http://10.9.0.2/", "");
        for outside in ["<script", "http:", "https:", "src=", "href=", "url(", "@import"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(
            page.matches("<svg").count() >= 5,
            "rates, remaining, downtime and both promises"
        );
    }
}
