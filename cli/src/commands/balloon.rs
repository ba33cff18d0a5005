//! `ferry balloon`: memory that a guest gives to its host, and what it says of its memory.

use anyhow::Result;
use ferry_vmm::control::api::BalloonTarget;
use ferry_vmm::control::client::Client;
use ferry_vmm::name::Name;
use ferry_vmm::size::ByteSize;

use crate::cli::Globals;
use crate::{output, say};

/// Ask a machine's guest to give memory to the host, or to take it back
///
/// Wants a machine that was started with --balloon. The guest gives what it can spare, in its own time; what it says of its
/// memory is shown where it says something.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  ferry balloon web\n  ferry balloon web --target 512M\n  ferry balloon web --target 0"
)]
pub struct BalloonArgs {
    /// The machine
    pub name: Name,
    /// How much of its memory the guest shall give; 0 gives all of it back
    #[arg(long, value_name = "SIZE")]
    pub target: Option<ByteSize>,
    /// As JSON: the answer of GET /v1/balloon
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &BalloonArgs, globals: &Globals) -> Result<()> {
    let client = Client::of(&globals.base()?.alive(&args.name)?)?;
    let info = match args.target {
        Some(target) => client.set_balloon(BalloonTarget {
            target_bytes: target.0,
        })?,
        None => client.balloon()?,
    };
    if args.json {
        return output::json(&info);
    }
    let size = |bytes: u64| ByteSize(bytes).to_string();
    let mut rows = vec![
        ("target", size(info.target_bytes)),
        ("given by the guest", size(info.actual_bytes)),
    ];
    if let Some(guest) = info.guest {
        let told = [
            ("free in the guest", guest.free_bytes),
            ("available in the guest", guest.available_bytes),
            ("disk cache of the guest", guest.disk_cache_bytes),
            ("memory of the guest", guest.total_bytes),
        ];
        rows.extend(
            told.into_iter()
                .filter_map(|(key, bytes)| Some((key, size(bytes?)))),
        );
    }
    let rows = rows.into_iter().map(|(key, value)| vec![key.to_owned(), value]);
    say!("{}", output::table(&rows.collect::<Vec<_>>()).trim_end())
}
