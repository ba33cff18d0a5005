//! `ferry pause`.

use anyhow::Result;
use ferry_vmm::control::api::Want;
use ferry_vmm::control::client::Client;
use ferry_vmm::name::Name;

use crate::cli::Globals;
use crate::say;

/// Stop a machine's CPUs and devices where they are
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry pause web; ferry resume web")]
pub struct PauseArgs {
    /// The machine
    pub name: Name,
}

pub fn run(args: &PauseArgs, globals: &Globals) -> Result<()> {
    let name = &args.name;
    Client::of(&globals.base()?.alive(name)?)?.want(Want::Paused)?;
    say!("{name} is paused; `ferry resume {name}` continues it")
}
