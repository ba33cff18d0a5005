//! `ferry info`: all that a machine tells about itself.

use std::time::Duration;

use anyhow::Result;
use ferry_vmm::control::client::Client;
use ferry_vmm::name::Name;

use crate::cli::Globals;
use crate::output;
use crate::say;

/// Show what a machine is and what it does
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry info web\n  ferry info web --json | jq .state")]
pub struct InfoArgs {
    /// The machine
    pub name: Name,
    /// As JSON: the answer of GET /v1/machine
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &InfoArgs, globals: &Globals) -> Result<()> {
    let entry = globals.base()?.alive(&args.name)?;
    let info = Client::of(&entry)?.info()?;
    if args.json {
        return output::json(&info);
    }
    let config = &info.machine.config;
    let or_builtin = |path: &Option<std::path::PathBuf>| match path {
        Some(path) => path.display().to_string(),
        None => "the built-in guest".to_owned(),
    };
    let mut rows = vec![
        ("name", info.name.to_string()),
        ("state", info.machine.state.to_string()),
        (
            "uptime",
            output::uptime(Duration::try_from_secs_f64(info.uptime_seconds).unwrap_or_default()),
        ),
        ("process", info.pid.to_string()),
        ("CPUs", format!("{} ({})", config.cpus, config.cpu_template)),
        ("memory", config.memory.to_string()),
        ("kernel", or_builtin(&config.kernel)),
        ("command line", config.cmdline.clone()),
        ("serial", config.serial.to_string()),
    ];
    rows.extend(
        config
            .disks
            .iter()
            .map(|disk| ("disk", disk.path.display().to_string())),
    );
    rows.extend(config.nets.iter().map(|net| {
        let place = [("tap", &net.tap), ("bridge", &net.bridge)];
        let named = place
            .iter()
            .filter_map(|(key, name)| name.as_ref().map(|name| format!("{key} {name}")));
        ("network", named.collect::<Vec<_>>().join(", "))
    }));
    let exits: Vec<String> = info.machine.exits.iter().map(u64::to_string).collect();
    rows.push(("exits of each CPU", exits.join(" ")));
    rows.extend(
        info.machine
            .without
            .iter()
            .map(|lack| ("KVM here has", lack.clone())),
    );
    rows.push(("control socket", entry.control_socket().display().to_string()));
    rows.push(("log", entry.log().display().to_string()));
    let rows: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(key, value)| vec![key.to_owned(), value])
        .collect();
    say!("{}", output::table(&rows).trim_end())
}
