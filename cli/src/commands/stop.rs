//! `ferry stop`: asks the guest to power off and waits for it.

use std::time::Duration;

use anyhow::{Result, bail};
use ferry_vmm::control::api::Want;
use ferry_vmm::control::client::Client;
use ferry_vmm::name::Name;

use super::gone;
use crate::cli::Globals;
use crate::{duration, say};

/// Ask a machine to power off, as by its power button
///
/// The guest decides: an operating system shuts down in good order. A guest that does not listen goes on running after
/// --timeout, and the command fails; `ferry kill` ends it at once.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry stop web\n  ferry stop web --timeout 5s || ferry kill web")]
pub struct StopArgs {
    /// The machine
    pub name: Name,
    /// How long to wait, such as 30s or 5m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration::parse)]
    pub timeout: Duration,
}

pub fn run(args: &StopArgs, globals: &Globals) -> Result<()> {
    let (base, name) = (globals.base()?, &args.name);
    Client::of(&base.alive(name)?)?.want(Want::Stopped)?;
    if gone::wait(&base, name, args.timeout)? {
        return say!("{name} has stopped");
    }
    bail!(
        "{name} did not power off within {:?} and still runs: its guest may not listen to the power button; \
         `ferry kill {name}` ends it at once",
        args.timeout
    )
}
