//! `ferry pulse`: a migration without a network.

use anyhow::Result;
use ferry_vmm::control::client::Client;
use ferry_vmm::name::Name;

use crate::cli::Globals;
use crate::{output, say};

/// Save a machine, rebuild it and restore it in place
///
/// A migration without a network: all state of CPUs and devices is saved, everything but the memory is made anew, and the
/// state is put back. A guest that notices anything but the time it stood still has found a mistake of ours.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry pulse web\n  ferry pulse web --count 1000")]
pub struct PulseArgs {
    /// The machine
    pub name: Name,
    /// How many times
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub count: u32,
    /// The result as JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &PulseArgs, globals: &Globals) -> Result<()> {
    let name = &args.name;
    let report = Client::of(&globals.base()?.alive(name)?)?.pulse(args.count)?;
    if args.json {
        return output::json(&report);
    }
    say!(
        "{name}: {} pulses; the guest stood still for {:.1} ms in the middle of them and {:.1} ms at most",
        report.pulses,
        report.median_ms,
        report.longest_ms
    )
}
