//! `ferry report`: what happened in a crossing.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use ferry_migration::report::Report;
use ferry_vmm::crossing::ledger;
use ferry_vmm::name::Name;

use super::migrate::{bytes, milliseconds, seconds};
use crate::cli::Globals;
use crate::{output, say};

/// Show the report of a crossing
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry report web\n  ferry report crossing.json --json")]
pub struct ReportArgs {
    /// A machine that left this host, or a file that `ferry migrate --report` wrote
    #[arg(value_name = "NAME|FILE")]
    pub what: String,
    /// The whole report as JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &ReportArgs, globals: &Globals) -> Result<()> {
    let path = find(&args.what, globals)?;
    let text = std::fs::read(&path).with_context(|| format!("could not read {}", path.display()))?;
    let report: Report = serde_json::from_slice(&text)
        .with_context(|| format!("{} is not the report of a crossing", path.display()))?;
    if args.json {
        return output::json(&report);
    }
    say!("{}", text_of(&report))
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

fn text_of(report: &Report) -> String {
    let mut text = format!(
        "{}: {}\ntotal {}, downtime {}, {} on the wire over {} lanes, {} reconnects\n\n",
        report.name,
        report.outcome.sentence(),
        seconds(report.total),
        milliseconds(report.downtime.total),
        bytes(report.wire_bytes),
        report.lanes,
        report.reconnects
    );
    let mut rows = vec![
        [
            "round",
            "time",
            "wire",
            "rate",
            "changed pages",
            "clusters",
            "reason",
        ]
        .map(str::to_owned)
        .to_vec(),
    ];
    for round in &report.rounds {
        rows.push(vec![
            round.round.to_string(),
            seconds(round.took),
            bytes(round.wire_bytes),
            format!("{}/s", bytes(round.rate_bytes_per_sec)),
            round.dirty_pages.to_string(),
            round.dirty_clusters.to_string(),
            round.reason.clone(),
        ]);
    }
    text += &output::table(&rows);
    text += "\ndowntime by part\n";
    let parts = report.downtime.parts();
    let mut rows: Vec<Vec<String>> = parts
        .iter()
        .map(|(name, part)| vec![format!("  {name}"), milliseconds(*part)])
        .collect();
    rows.push(vec!["  total".to_owned(), milliseconds(report.downtime.total)]);
    text += &output::table(&rows);
    text.trim_end().to_owned()
}
