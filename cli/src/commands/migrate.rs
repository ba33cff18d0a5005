//! `ferry migrate`: moves a running machine to another host, and shows it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use ferry_migration::cost::{Cost, parse_duration, parse_rate, parse_sla};
use ferry_migration::failure::Whereabouts;
use ferry_migration::pages::encode::Compression;
use ferry_migration::policy::{DeadlineAction, Limits, Policy};
use ferry_migration::report::Report;
use ferry_network::probe::ProbeTarget;
use ferry_vmm::control::client::{Client, ClientError};
use ferry_vmm::crossing::ledger;
use ferry_vmm::crossing::request::{CrossingLine, CrossingRequest};
use ferry_vmm::name::Name;
use tokio::signal::unix::{SignalKind, signal};

use super::dry_run;
use super::probing::Probing;
use super::progress::Screen;
use crate::cli::Globals;
use crate::failure::Usage;
use crate::say;
use crate::ssh::{SshDestination, Tunnel};

/// Move a running machine to another host: memory, devices and disks
///
/// DESTINATION is where `ferry receive` listens there, tcp://HOST:PORT or unix:PATH; or ssh://[USER@]HOST[:PORT], which
/// starts the receiver there and needs nothing set up. The machine runs on while it is copied, stands still for the last
/// rest, and then runs there. Until that moment everything that goes wrong leaves it running here. Ctrl-C cancels.
///
/// The last line says where the machine is.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    ferry migrate web ssh://beta.lan\n  \
    ferry migrate web tcp://beta.lan:7070 --tls keys/alpha.lan --downtime 100ms\n  \
    ferry migrate web tcp://10.0.0.2:7070 --policy calm-live --sla rate=20/s,size=1MB,deadline=1s --link 1Gbit\n  \
    ferry migrate web tcp://10.0.0.2:7070 --dry-run\n  \
    ferry migrate web tcp://10.0.0.2:7070 --probe http://10.0.0.80/\n  \
    ferry migrate --cancel web")]
pub struct MigrateArgs {
    /// The machine
    pub name: Name,
    /// tcp://HOST:PORT, unix:PATH or ssh://[USER@]HOST[:PORT]
    #[arg(required_unless_present = "cancel")]
    pub destination: Option<String>,
    /// Cancel the crossing that goes on; the machine stays
    #[arg(long, conflicts_with = "destination")]
    pub cancel: bool,
    /// How bandwidth and the moment to stop are chosen: calm-live, calm-adaptive, calm-fixed, qemu, cloud-hypervisor, virtualbox, xen-basic, xen-code, max, fixed:RATE [default: max, or calm-live with --sla or --throttle]
    #[arg(long, value_name = "P")]
    pub policy: Option<Policy>,
    /// What the machine's service promises its clients: rate=20/s,size=1MB,deadline=1s; or table=FILE
    #[arg(long, value_name = "SLA", value_parser = sla)]
    pub sla: Option<Cost>,
    /// What the link carries, if it is known: 1Gbit, 100Mbit [default: measured]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub link: Option<u64>,
    /// Never copy faster than this while the machine runs
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub bandwidth: Option<u64>,
    /// How long the machine may stand still; calm-live weighs a default, and keeps what is given [default: 300ms]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub downtime: Option<Duration>,
    /// How long the crossing may take, from the moment it is asked for to the switch
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub deadline: Option<Duration>,
    /// What happens at the deadline: cancel, pause (stop the machine and copy the rest) or continue
    #[arg(long, value_name = "ACTION", default_value = "cancel", value_parser = action, requires = "deadline")]
    pub on_deadline: DeadlineAction,
    /// How much the policy may slow the machine's CPUs to get across, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..100))]
    pub throttle: u8,
    /// Connections that carry data
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub lanes: u16,
    /// auto (where it makes the crossing faster), off or always
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = compression)]
    pub compress: Compression,
    /// Compare all memory and disks on both sides before the machine runs there
    #[arg(long)]
    pub verify: bool,
    /// Both hosts see the same disk images: only memory and state cross
    #[arg(long)]
    pub shared_storage: bool,
    /// TLS with this host's keys, a folder that `ferry keys` made
    #[arg(long, value_name = "DIR")]
    pub tls: Option<PathBuf>,
    /// How long the other side may make no progress before the link counts as broken
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
    pub stall: Duration,
    /// How long to try to get a broken link back
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = time)]
    pub reconnect: Duration,
    /// The command that starts ferry on the other host, for ssh://
    #[arg(long, value_name = "COMMAND", default_value = "ferry")]
    pub remote_ferry: String,
    /// The ssh program, for ssh://
    #[arg(long, value_name = "PROGRAM", default_value = "ssh", hide = true)]
    pub ssh: String,
    /// Write the report here, as JSON
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Ask the machine's service all the time and report the outage that a client saw: tcp:HOST:PORT, icmp:HOST or http://HOST/PATH
    #[arg(long, value_name = "TARGET", conflicts_with_all = ["cancel", "dry_run"])]
    pub probe: Option<ProbeTarget>,
    /// How long to go on asking after the crossing
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = time, requires = "probe")]
    pub probe_for: Duration,
    /// Only say what would happen: watch the machine for a second, ask the receiver, measure the link; nothing is changed
    #[arg(long, conflicts_with_all = ["cancel", "report"])]
    pub dry_run: bool,
    /// Everything that happens as JSON lines, the report last; with --dry-run one object
    #[arg(long)]
    pub json: bool,
}

fn rate(text: &str) -> Result<u64, String> {
    parse_rate(text).map_err(|error| error.to_string())
}

fn time(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|error| error.to_string())
}

fn sla(text: &str) -> Result<Cost, String> {
    parse_sla(text).map_err(|error| error.to_string())
}

fn action(text: &str) -> Result<DeadlineAction, String> {
    match text {
        "cancel" => Ok(DeadlineAction::Cancel),
        "pause" => Ok(DeadlineAction::PauseAndFinish),
        "continue" => Ok(DeadlineAction::GoOn),
        _ => Err(format!("{text:?} is none of cancel, pause, continue")),
    }
}

/// What a machine may stand still if nobody says anything.
const DOWNTIME: Duration = Duration::from_millis(300);

fn compression(text: &str) -> Result<Compression, String> {
    match text {
        "auto" => Ok(Compression::Auto),
        "off" => Ok(Compression::Off),
        "always" => Ok(Compression::Always),
        _ => Err(format!("{text:?} is none of auto, off, always")),
    }
}

impl MigrateArgs {
    fn limits(&self) -> Limits {
        let policy = self.policy.unwrap_or(if self.sla.is_some() || self.throttle > 0 {
            Policy::CalmLive
        } else {
            Policy::Max
        });
        Limits {
            policy,
            link_bytes_per_sec: self.link,
            most_bandwidth_bytes_per_sec: self.bandwidth,
            downtime: self.downtime.unwrap_or(DOWNTIME),
            // Whoever allows the machine to be slowed down for it means it.
            downtime_is_contract: self.downtime.is_some() || self.throttle > 0,
            deadline: self.deadline,
            on_deadline: self.on_deadline,
            cost: self.sla.clone().unwrap_or_else(Cost::unknown),
            most_throttle_percent: self.throttle,
            ..Limits::default()
        }
    }
}

pub fn run(args: &MigrateArgs, globals: &Globals) -> Result<ExitCode> {
    let client = Client::of(&globals.base()?.alive(&args.name)?)?;
    let Some(destination) = args.destination.as_deref().filter(|_| !args.cancel) else {
        return if client.cancel_crossing()?.cancelled {
            say!(
                "the crossing of {} is being cancelled; the machine stays here",
                args.name
            )?;
            Ok(ExitCode::SUCCESS)
        } else {
            Err(anyhow!(
                "{} is not crossing; there is nothing to cancel",
                args.name
            ))
        };
    };
    if let Some(path) = &args.report {
        // Found out now, and not when the machine is gone.
        std::fs::File::options()
            .append(true)
            .create(true)
            .open(path)
            .with_context(|| format!("the report cannot be written to {}", path.display()))?;
    }
    let tunnel = if destination.starts_with("ssh://") {
        let to: SshDestination = destination
            .parse()
            .map_err(|error: anyhow::Error| Usage(error.to_string()))?;
        Some(Tunnel::open(
            &args.ssh,
            &to,
            &format!("{} receive --stdio", args.remote_ferry),
        )?)
    } else {
        None
    };
    let request = CrossingRequest {
        destination: match &tunnel {
            Some(tunnel) => format!("pipe:{}", tunnel.socket().display()),
            None => destination.to_owned(),
        },
        named: tunnel.is_some().then(|| destination.to_owned()),
        tls: args
            .tls
            .as_deref()
            .map(std::path::absolute)
            .transpose()
            .context("could not find the keys")?,
        limits: args.limits(),
        lanes: args.lanes,
        compression: args.compress,
        verify: args.verify,
        shared_storage: args.shared_storage,
        stall: args.stall,
        reconnect_for: args.reconnect,
    };
    cancel_on_signals(&args.name, globals)?;
    if args.dry_run {
        let rehearsal = client.rehearse(&request)?;
        drop(tunnel);
        return dry_run::show(&rehearsal, destination, args);
    }
    let probing = args.probe.as_ref().map(Probing::start).transpose()?;
    let mut report = None;
    let mut began = None;
    let mut screen = Screen::new(args.json);
    let told = client.cross(&request, |line| {
        began.get_or_insert_with(Instant::now);
        match line {
            CrossingLine::Report(found) => report = Some(*found),
            CrossingLine::Event(_) => screen.show(&line),
        }
    });
    match told {
        // Its process is gone, which is said below.
        Err(ClientError::NoAnswer { .. }) if began.is_some() => {}
        other => other?,
    }
    screen.clear();
    drop(tunnel);
    let mut report = report.ok_or_else(|| {
        anyhow!(
            "the process of {} ended before it said how the crossing went; `ferry list` here and there shows where the machine is",
            args.name
        )
    })?;
    if let Some(probing) = probing {
        report.probe = probing.finish(began.unwrap_or_else(Instant::now), args.probe_for);
        ledger::amend_report(&globals.base()?, &args.name, &report);
    }
    if args.json {
        screen.show(&CrossingLine::Report(Box::new(report.clone())));
    }
    if let Some(path) = &args.report {
        let text = serde_json::to_vec_pretty(&report)?;
        if let Err(error) = std::fs::write(path, text) {
            // The last line says where the machine is, whatever becomes of the file.
            eprintln!(
                "warning: the report could not be written to {}: {error}; `ferry report {}` has it",
                path.display(),
                args.name
            );
        }
    }
    finish(&report, destination, args)
}

/// Ctrl-C cancels, and the last line still says where the machine is. Who presses it again does not wait for that.
fn cancel_on_signals(name: &Name, globals: &Globals) -> Result<()> {
    let client = Client::of(&globals.base()?.alive(name)?)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("could not listen for signals")?;
    let listen = |kind| {
        let _context = runtime.enter();
        signal(kind).context("could not listen for signals")
    };
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let name = name.clone();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for _ in 0..2 {
                runtime.block_on(async {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                    }
                });
                eprintln!("cancelling the crossing of {name}");
                if client.cancel_crossing().is_err() {
                    // Its process has no crossing any more, or hangs: the last line says what came of it.
                    eprintln!("it may be over already; Ctrl-C again does not wait for the last line");
                }
            }
            std::process::exit(130);
        })
        .context("could not start a thread")?;
    Ok(())
}

fn finish(report: &Report, destination: &str, args: &MigrateArgs) -> Result<ExitCode> {
    let name = &args.name;
    match (&report.outcome.failure, report.outcome.whereabouts) {
        (None, Whereabouts::There) => {
            if !args.json {
                say!(
                    "{name} is at {destination} now: {} in {}, {} on the wire, it stood still for {}{}",
                    what(report),
                    seconds(report.total),
                    bytes(report.wire_bytes),
                    milliseconds(report.downtime.total),
                    promised(report)
                )?;
                if let Some(probe) = &report.probe {
                    say!(
                        "a client of {} waited {} at the longest; {} of {} questions were not answered",
                        probe.target,
                        milliseconds(probe.longest_silence),
                        probe.lost,
                        probe.sent
                    )?;
                }
            }
            Ok(ExitCode::SUCCESS)
        }
        _ if args.json => Ok(ExitCode::FAILURE),
        (Some(failure), _) => Err(anyhow!("{failure}")),
        (None, _) => Err(anyhow!("{}", report.outcome.sentence())),
    }
}

/// What was promised before the move, if anything was.
fn promised(report: &Report) -> String {
    match report.promise {
        Some(promise) if promise.at.is_zero() => format!(
            "; promised were {}, {} and {}",
            seconds(promise.total),
            bytes(promise.wire_bytes),
            milliseconds(promise.downtime)
        ),
        _ => String::new(),
    }
}

fn what(report: &Report) -> String {
    let rounds = report.rounds.len();
    format!("{rounds} round{}", if rounds == 1 { "" } else { "s" })
}

pub(super) fn bytes(count: u64) -> String {
    let mib = count as f64 / f64::from(1 << 20);
    if mib >= 10240.0 {
        format!("{:.1} GiB", mib / 1024.0)
    } else {
        format!("{mib:.1} MiB")
    }
}

pub(super) fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

pub(super) fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
