//! `ferry resume`.

use anyhow::Result;
use ferry_vmm::control::api::Want;
use ferry_vmm::control::client::Client;
use ferry_vmm::name::Name;

use crate::cli::Globals;
use crate::say;

/// Let a paused machine go on
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry pause web; ferry resume web")]
pub struct ResumeArgs {
    /// The machine
    pub name: Name,
}

pub fn run(args: &ResumeArgs, globals: &Globals) -> Result<()> {
    let name = &args.name;
    Client::of(&globals.base()?.alive(name)?)?.want(Want::Running)?;
    say!("{name} runs")
}
