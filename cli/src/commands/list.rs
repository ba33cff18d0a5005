//! `ferry list`: the machines that run here.

use std::time::Duration;

use anyhow::Result;
use ferry_vmm::control::api::MachineInfo;
use ferry_vmm::control::client::{Client, ClientError};
use ferry_vmm::rundir::Entry;
use serde_json::json;

use super::gone;
use crate::cli::Globals;
use crate::output;
use crate::say;

/// One machine that hangs must not hide the others.
const PATIENCE: Duration = Duration::from_secs(2);
/// A process that ends has closed its socket and takes down the rest.
const LAST_BREATH: Duration = Duration::from_secs(1);

/// List the machines that run
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  ferry list\n  ferry list --all    # also those that failed or were killed, whose logs are still there"
)]
pub struct ListArgs {
    /// Also machines that failed or died; `ferry logs` shows their last words, `ferry kill` removes them
    #[arg(long)]
    pub all: bool,
    /// As JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &ListArgs, globals: &Globals) -> Result<()> {
    let base = globals.base()?;
    let mut shown = Vec::new();
    for entry in base.entries()? {
        if entry.pid.is_none() {
            if args.all {
                shown.push((entry.clone(), Err(format!("dead: {}", entry.end()))));
            }
            continue;
        }
        let info = ask(&entry);
        // A machine that was just ending is no machine that does not answer.
        let gone = info.is_err() && gone::wait(&base, &entry.name, LAST_BREATH)?;
        if !gone {
            shown.push((entry, info));
        }
    }
    if args.json {
        let list = shown.iter().map(|(entry, info)| match info {
            Ok(info) => json!(info),
            Err(why) => json!({"name": entry.name, "pid": entry.pid, "error": why}),
        });
        return output::json(&list.collect::<Vec<_>>());
    }
    if shown.is_empty() {
        return say!("no machine runs here; `ferry run NAME` starts one");
    }
    let mut rows = vec![
        ["NAME", "STATE", "CPUS", "MEMORY", "UPTIME", "PROCESS"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for (entry, info) in &shown {
        let pid = entry.pid.map(|pid| pid.to_string()).unwrap_or_default();
        rows.push(match info {
            Ok(info) => vec![
                info.name.to_string(),
                info.machine.state.to_string(),
                info.machine.config.cpus.to_string(),
                info.machine.config.memory.to_string(),
                output::uptime(Duration::try_from_secs_f64(info.uptime_seconds).unwrap_or_default()),
                pid,
            ],
            Err(why) => vec![
                entry.name.to_string(),
                why.clone(),
                String::new(),
                String::new(),
                String::new(),
                pid,
            ],
        });
    }
    say!("{}", output::table(&rows).trim_end())
}

fn ask(entry: &Entry) -> Result<MachineInfo, String> {
    let client = Client::of(entry).map_err(|e| e.to_string())?;
    client.info_within(PATIENCE).map_err(|error| match error {
        ClientError::Refused(sentence) => sentence,
        ClientError::NoAnswer { .. } => "does not answer".to_owned(),
    })
}
