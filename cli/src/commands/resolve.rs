//! `ferry resolve`: what is known of a machine whose crossing was cut at the hand over, and the user's word on it.

use anyhow::{Result, anyhow};
use ferry_migration::handover::{Record, Standing};
use ferry_vmm::control::client::Client;
use ferry_vmm::crossing::ledger;
use ferry_vmm::name::Name;

use crate::cli::Globals;
use crate::say;

/// Settle where a machine is, when a crossing was cut at the hand over
///
/// If the link breaks in the very moment in which the right to run passes, and does not come back, this side cannot know
/// whether the machine runs there. It stays stopped here, whole, until you say. Look at the other host first: run
/// `ferry resolve` there too, without a name.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    ferry resolve               # what this host's ledger says of unsettled crossings\n  \
    ferry resolve web --here    # the other host does not run it: it goes on here\n  \
    ferry resolve web --there   # the other host runs it: what is left here goes")]
pub struct ResolveArgs {
    /// The machine that is stopped here in doubt
    #[arg(required_if_eq("here", "true"), required_if_eq("there", "true"))]
    pub name: Option<Name>,
    /// It does not run at the other side: it runs on here
    #[arg(long, conflicts_with = "there")]
    pub here: bool,
    /// It runs at the other side: here it ends
    #[arg(long)]
    pub there: bool,
}

pub fn run(args: &ResolveArgs, globals: &Globals) -> Result<()> {
    let base = globals.base()?;
    match (&args.name, args.here || args.there) {
        (Some(name), true) => {
            let info = Client::of(&base.alive(name)?)?.resolve(args.here)?;
            say!("{name} is {} here", info.machine.state)
        }
        _ => {
            let ledger = ledger::open(&base)?;
            let records = ledger.all().map_err(|error| anyhow!("{error}"))?;
            let mut shown = 0;
            for record in records.iter().filter(|record| unsettled(record)) {
                shown += 1;
                say!("{}", sentence(record))?;
            }
            if shown == 0 {
                say!("every crossing of this host is settled")?;
            }
            Ok(())
        }
    }
}

fn unsettled(record: &Record) -> bool {
    matches!(
        record.standing,
        Standing::GivenAway | Standing::Taken | Standing::Declined
    )
}

fn sentence(record: &Record) -> String {
    let Record {
        session,
        machine,
        epoch,
        side: _,
        standing,
        peer: _,
    } = record;
    let what = match standing {
        Standing::GivenAway => "was given away by this host and nobody confirmed it; ask the other host",
        Standing::Taken => "was taken by this host: it is this host's, and the other one must not run it",
        Standing::Declined => "was declined by this host and will never run here: the other host may run it",
        Standing::Gone => "is at the other host",
        Standing::Kept => "stayed at this host",
    };
    format!("crossing {session}: machine {machine} (hand over {epoch}) {what}")
}
