//! `ferry resolve`: where a machine is whose crossing was cut at the hand over. The other side is asked; only where nobody can
//! know, the user decides.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use ferry_migration::failure::{Side, Whereabouts};
use ferry_migration::handover::{Record, Standing};
use ferry_vmm::control::api::ResolveRequest;
use ferry_vmm::control::client::Client;
use ferry_vmm::crossing::ledger;
use ferry_vmm::crossing::settle::{Place, Settled, settle};

use crate::cli::Globals;
use crate::failure::Usage;
use crate::say;
use crate::ssh::{SshDestination, Tunnel};

/// How long the other side may take to answer.
const STALL: Duration = Duration::from_secs(10);

/// Find out where a machine is, when a crossing was cut at the hand over
///
/// If the link breaks in the very moment in which the right to run passes, and does not come back, this side cannot know
/// whether the machine runs there. It stays stopped here, whole. This command asks the receiver that the machine went to; any
/// `ferry receive` of that host answers, also one that was started since. What it says decides: the machine ends here, or it
/// runs on here and never there. Only if nobody can be asked, or the answer proves nothing, your own word counts (--here,
/// --there). If the machine is sent back here, by whichever host has it by then, nothing needs to be settled: that says enough.
///
/// Without a name: what this host's ledger says of crossings that nobody confirmed, and of machines that came. What is settled
/// and needed for nothing is kept for 30 days, and no more than 1000 crossings of it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    ferry resolve                              # what this host's ledger says\n  \
    ferry resolve web                          # asks where web went, and settles it\n  \
    ferry resolve web --ask tcp://beta:7070    # asks there\n  \
    ferry resolve web --here                   # nobody can be asked, and you looked: it runs on here")]
pub struct ResolveArgs {
    /// The machine that is stopped here in doubt; or the number of a crossing, if its machine is gone
    #[arg(required_if_eq("here", "true"), required_if_eq("there", "true"))]
    pub name: Option<String>,
    /// Where to ask, as in `ferry migrate` [default: where the machine went]
    #[arg(long, value_name = "DESTINATION", requires = "name")]
    pub ask: Option<String>,
    /// TLS with this host's keys, a folder that `ferry keys` made [default: as in the crossing]
    #[arg(long, value_name = "DIR", requires = "name")]
    pub tls: Option<PathBuf>,
    /// If nobody can be asked: it does not run at the other side, and runs on here
    #[arg(long, conflicts_with = "there")]
    pub here: bool,
    /// If nobody can be asked: it runs at the other side, and ends here
    #[arg(long)]
    pub there: bool,
    /// The command that starts ferry on the other host, for ssh://
    #[arg(long, value_name = "COMMAND", default_value = "ferry")]
    pub remote_ferry: String,
    /// The ssh program, for ssh://
    #[arg(long, value_name = "PROGRAM", default_value = "ssh", hide = true)]
    pub ssh: String,
}

impl ResolveArgs {
    fn word(&self) -> Option<bool> {
        match (self.here, self.there) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }

    fn tls(&self) -> Result<Option<PathBuf>> {
        let tls = self.tls.as_deref().map(std::path::absolute).transpose();
        tls.context("could not find the keys")
    }

    /// A receiver that ssh starts answers from that host's ledger.
    fn tunnel(&self, destination: &str) -> Result<Option<Tunnel>> {
        if !destination.starts_with("ssh://") {
            return Ok(None);
        }
        let to: SshDestination = destination
            .parse()
            .map_err(|error: anyhow::Error| Usage(error.to_string()))?;
        let receiver = format!("{} receive --stdio", self.remote_ferry);
        Tunnel::open(&self.ssh, &to, &receiver).map(Some)
    }
}

pub fn run(args: &ResolveArgs, globals: &Globals) -> Result<()> {
    let Some(name) = &args.name else {
        return show(globals);
    };
    let living = name
        .parse()
        .ok()
        .and_then(|parsed| globals.base().ok()?.alive(&parsed).ok());
    match living {
        Some(entry) => of_machine(args, name, &Client::of(&entry)?),
        None => of_ledger(args, name, globals),
    }
}

fn of_machine(args: &ResolveArgs, name: &str, client: &Client) -> Result<()> {
    let doubt = client.doubt()?;
    let destination = args.ask.clone().or(doubt.destination).unwrap_or_default();
    let tunnel = if doubt.in_doubt {
        args.tunnel(&destination)?
    } else {
        None
    };
    let ask = match &tunnel {
        Some(tunnel) => Some(format!("pipe:{}", tunnel.socket().display())),
        None => args.ask.clone(),
    };
    let resolution = client.resolve(&ResolveRequest {
        here: args.word(),
        ask,
        tls: args.tls()?,
    })?;
    let settled = Settled {
        whereabouts: resolution.whereabouts,
        evidence: resolution.evidence,
    };
    let here = format!("{name} is {} here", resolution.machine.machine.state);
    conclude(name, settled, args.word(), &here, &destination)
}

/// The process that had the machine is gone, and with it the machine's memory; what is left is the ledger's word.
fn of_ledger(args: &ResolveArgs, name: &str, globals: &Globals) -> Result<()> {
    let base = globals.base()?;
    let mut ledger = ledger::open(&base)?;
    let records = ledger.all().map_err(|error| anyhow!("{error}"))?;
    let found = records
        .iter()
        .find(|record| record.side == Side::Outgoing && record.session.to_string() == name);
    let Some(record) = found.filter(|record| record.standing == Standing::GivenAway) else {
        return Err(match (found, name.parse()) {
            (Some(record), _) => anyhow!("{}", sentence(record)),
            (None, Ok(parsed)) => match base.alive(&parsed) {
                // Says whether there ever was one.
                Err(error) => anyhow::Error::from(error).context(
                    "there is nothing to settle; `ferry resolve` without a name lists crossings by their numbers",
                ),
                Ok(_) => anyhow!("{name} has only now begun to run; ask again"),
            },
            (None, Err(error)) => anyhow::Error::from(error),
        });
    };
    let destination = args.ask.clone().unwrap_or_default();
    let tunnel = args.tunnel(&destination)?;
    let place = Place {
        destination: match &tunnel {
            Some(tunnel) => format!("pipe:{}", tunnel.socket().display()),
            None => destination.clone(),
        },
        tls: args.tls()?,
        stall: STALL,
    };
    let settled = settle(&mut ledger, record.session, &place, args.word())?;
    let here =
        "the machine is not at the other side; its process here is gone, so start it again from its disks";
    conclude(name, settled, args.word(), here, &destination)
}

fn conclude(name: &str, settled: Settled, word: Option<bool>, here: &str, destination: &str) -> Result<()> {
    let Settled {
        whereabouts,
        evidence,
    } = settled;
    match whereabouts {
        Whereabouts::Here if word == Some(false) => Err(anyhow!("{here}, whatever you say: {evidence}")),
        Whereabouts::There if word == Some(true) => Err(anyhow!(
            "{name} is at the other side, whatever you say: {evidence}; here it has ended"
        )),
        Whereabouts::Here => say!("{here}: {evidence}"),
        Whereabouts::Ended => say!("{name} has ended: {evidence}"),
        Whereabouts::There => say!("{name} is at the other side: {evidence}; here it has ended"),
        Whereabouts::Unknown => {
            let at = match destination {
                "" => String::new(),
                some => format!(" at {some}"),
            };
            Err(anyhow!(
                "nobody knows where {name} is: {evidence}; start `ferry receive` there{at} and ask again, or look with \
                 `ferry list` there and then say --here or --there"
            ))
        }
    }
}

fn show(globals: &Globals) -> Result<()> {
    let ledger = ledger::open(&globals.base()?)?;
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

fn unsettled(record: &Record) -> bool {
    matches!(
        record.standing,
        Standing::GivenAway | Standing::Waiting | Standing::Taken | Standing::Declined
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
        heard: _,
        boot: _,
    } = record;
    let what = match standing {
        Standing::GivenAway => "was given away by this host and nobody confirmed it; ask the other host",
        Standing::Waiting => {
            "was awaited by this host, which was restarted meanwhile: nobody knows whether it began to run here, it does not \
             run here now, and the other host has to be told with --here or --there"
        }
        Standing::Taken => "was taken by this host: it is this host's, and the other one must not run it",
        Standing::Declined => "was declined by this host and will never run here: the other host may run it",
        Standing::Gone => "is at the other host",
        Standing::Kept => "stayed at this host",
    };
    format!("crossing {session}: machine {machine} (hand over {epoch}) {what}")
}
