//! `ferry load`: asks a service as its users would and records what they felt; checks what a guest wrote to its disk.
//!
//! As a library: [`generator::Load`] runs a load in the background, [`journal::check`] and [`database::check`] read a disk.

pub mod arrivals;
mod blocks;
mod calc;
pub mod database;
pub mod generator;
mod http;
pub mod journal;
pub mod record;
#[cfg(test)]
mod tests;

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args, Subcommand};
use ferry_network::probe::{GapReport, HttpUrl, Probe, ProbeTarget};

use crate::duration;
use crate::output;
use crate::say;
use generator::{Load, Plan, Service};

/// Ask a service as its users would and record latencies, missed deadlines and gaps; or check what a guest wrote to its disk.
///
/// Requests come as a Poisson process, whether or not earlier ones were answered, and latency counts from the moment
/// at which a request was due. The same seed gives the same arrivals.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  ferry load http http://192.0.2.2/ --rate 20 --deadline 300ms --for 30s\n  \
                        ferry load calc udp:192.0.2.2:7 --rate 200\n  \
                        ferry load probe icmp:192.0.2.2 --period 10ms\n  \
                        ferry load journal disk.img --acked 4711\n  \
                        ferry load database disk.qcow2 --committed 180352"
)]
pub struct LoadArgs {
    #[command(subcommand)]
    pub what: What,
}

#[derive(Debug, Subcommand)]
pub enum What {
    Http(HttpArgs),
    Calc(CalcArgs),
    Probe(ProbeArgs),
    Journal(JournalArgs),
    Database(DatabaseArgs),
}

#[derive(Debug, Clone, Args)]
pub struct Pace {
    /// Requests per second, on average
    #[arg(long, default_value_t = 20.0, value_name = "N")]
    pub rate: f64,
    /// How long; without it until interrupted
    #[arg(long = "for", value_name = "DURATION", value_parser = duration::parse)]
    pub duration: Option<Duration>,
    /// Count requests that were not answered within this
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    pub deadline: Option<Duration>,
    /// Give a request up after this
    #[arg(long, default_value = "10s", value_name = "DURATION", value_parser = duration::parse)]
    pub timeout: Duration,
    /// Of the arrival times
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub seed: u64,
    /// One JSON object per second, and one at the end
    #[arg(long)]
    pub json: bool,
}

/// Fetch a page again and again.
#[derive(Debug, Args)]
pub struct HttpArgs {
    /// http://HOST[:PORT]/PATH
    pub url: HttpUrl,
    #[command(flatten)]
    pub pace: Pace,
    /// A new connection for every request
    #[arg(long)]
    pub no_keep_alive: bool,
    /// Count an answer as wrong that is not the same as the first
    #[arg(long)]
    pub same: bool,
}

/// Ask the built-in guest's calculator for sums of two primes and check them.
#[derive(Debug, Args)]
pub struct CalcArgs {
    /// udp:HOST:PORT or tcp:HOST:PORT
    pub target: String,
    #[command(flatten)]
    pub pace: Pace,
    /// Connections that are kept and used in turn (TCP)
    #[arg(long, default_value_t = 4, value_name = "N")]
    pub connections: usize,
}

/// Ask at a fixed period and tell how long there was no answer.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// icmp:HOST, tcp:HOST:PORT, udp:HOST:PORT (an echo service) or http://HOST/PATH
    pub target: ProbeTarget,
    /// Time between two questions
    #[arg(long, default_value = "10ms", value_name = "DURATION", value_parser = duration::parse)]
    pub period: Duration,
    /// How long; without it until interrupted
    #[arg(long = "for", value_name = "DURATION", value_parser = duration::parse)]
    pub duration: Option<Duration>,
    /// One JSON object at the end
    #[arg(long)]
    pub json: bool,
}

/// Check the journal that the built-in guest (work=disk) wrote: nothing acknowledged may be missing.
#[derive(Debug, Args)]
pub struct JournalArgs {
    /// A disk image, raw or qcow2, or a block device
    pub image: PathBuf,
    /// The highest record that the guest reported as acknowledged; without it the journal's own word is taken
    #[arg(long, value_name = "N")]
    pub acked: Option<u64>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

/// Check the database that the built-in guest (work=database) kept: rows and log are sound, nothing committed is missing.
#[derive(Debug, Args)]
pub struct DatabaseArgs {
    /// A disk image, raw or qcow2, or a block device
    pub image: PathBuf,
    /// The most updates that the guest reported as committed; without it the database's own word is taken
    #[arg(long, value_name = "N")]
    pub committed: Option<u64>,
    /// One JSON object
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &LoadArgs) -> Result<()> {
    match &args.what {
        What::Http(args) => {
            let service = Service::Http {
                url: args.url.clone(),
                keep_alive: !args.no_keep_alive,
                same: args.same,
            };
            run_load(service, &args.pace)
        }
        What::Calc(args) => run_load(calc_service(&args.target, args.connections)?, &args.pace),
        What::Probe(args) => run_probe(args),
        What::Journal(args) => run_journal(args),
        What::Database(args) => run_database(args),
    }
}

fn calc_service(target: &str, connections: usize) -> Result<Service> {
    let resolve = |text: &str| -> Result<SocketAddr> {
        text.to_socket_addrs()
            .with_context(|| format!("{text:?} is not an address HOST:PORT that can be found"))?
            .next()
            .with_context(|| format!("{text:?} has no address"))
    };
    match target.split_once(':') {
        Some(("udp", address)) => Ok(Service::CalcUdp(resolve(address)?)),
        Some(("tcp", address)) => Ok(Service::CalcTcp {
            address: resolve(address)?,
            connections,
        }),
        _ => bail!("{target:?} is no calculator; use udp:HOST:PORT or tcp:HOST:PORT"),
    }
}

fn run_load(service: Service, pace: &Pace) -> Result<()> {
    let interrupted = interrupted()?;
    let load = Load::start(Plan {
        service,
        rate_per_sec: pace.rate,
        duration: pace.duration,
        deadline: pace.deadline,
        timeout: pace.timeout,
        seed: pace.seed,
    })?;
    let mut next = Instant::now() + Duration::from_secs(1);
    while !load.is_over() && !interrupted.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(20));
        if pace.json && Instant::now() >= next {
            next += Duration::from_secs(1);
            say!("{}", json_line("so-far", &load.so_far())?)?;
        }
    }
    let summary = load.finish();
    if pace.json {
        say!("{}", json_line("summary", &summary)?)?;
    } else {
        print_text(&summary.text())?;
    }
    if summary.wrong > 0 {
        bail!("{} answers were wrong", summary.wrong);
    }
    Ok(())
}

/// The object with its type in front, as in the guest's own lines.
fn json_line(kind: &str, value: &impl serde::Serialize) -> Result<String> {
    let mut value = serde_json::to_value(value)?;
    if let Some(object) = value.as_object_mut() {
        object.insert("t".to_owned(), kind.into());
    }
    Ok(value.to_string())
}

fn print_text(text: &str) -> Result<()> {
    say!("{}", text.trim_end())
}

/// Set by the first Ctrl-C, so that the numbers are still printed. The second one kills as usual.
fn interrupted() -> Result<Arc<AtomicBool>> {
    static FLAG: OnceLock<Arc<AtomicBool>> = OnceLock::new();
    if let Some(flag) = FLAG.get() {
        return Ok(Arc::clone(flag));
    }
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    std::thread::Builder::new()
        .name("interrupt".into())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let Ok(runtime) = runtime else { return };
            if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
                if set.swap(true, Ordering::Relaxed) {
                    return;
                }
                if runtime.block_on(tokio::signal::ctrl_c()).is_ok() {
                    std::process::exit(130);
                }
            }
        })
        .context("a thread cannot be started")?;
    Ok(Arc::clone(FLAG.get_or_init(|| flag)))
}

fn run_probe(args: &ProbeArgs) -> Result<()> {
    let interrupted = interrupted()?;
    let probe = Probe::start(args.target.clone(), args.period)
        .with_context(|| format!("the probe of {} cannot start", args.target))?;
    let began = Instant::now();
    while args.duration.is_none_or(|duration| began.elapsed() < duration)
        && !interrupted.load(Ordering::Relaxed)
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    let report = probe.finish().context("the probe's thread died")?;
    if args.json {
        return say!("{}", json_line("probe", &report)?);
    }
    print_text(&probe_text(&report))
}

fn probe_text(report: &GapReport) -> String {
    let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
    let row = |name: &str, value: String| vec![name.to_owned(), value];
    let outage = match &report.outage {
        None => "none".to_owned(),
        Some(outage) => {
            let most = outage.at_most.map_or("it had not ended".to_owned(), ms);
            format!(
                "{} lost in a row from {:.2} s on: between {} and {most}",
                outage.lost,
                outage.began.as_secs_f64(),
                ms(outage.at_least)
            )
        }
    };
    let mut rows = vec![
        row("target", report.target.clone()),
        row(
            "asked",
            format!(
                "{} times, one every {}; {} answered, {} lost",
                report.sent,
                ms(report.period),
                report.answered,
                report.lost
            ),
        ),
        row("outage", outage),
        row(
            "longest silence",
            format!(
                "{}, from {:.2} s on",
                ms(report.longest_silence),
                report.silence_began.as_secs_f64()
            ),
        ),
    ];
    if let (Some(median), Some(p99), Some(max)) =
        (report.latency_median, report.latency_99, report.latency_max)
    {
        rows.push(row(
            "latency",
            format!("median {}, 99 % {}, longest {}", ms(median), ms(p99), ms(max)),
        ));
    }
    if let Some(failure) = &report.first_failure {
        rows.push(row("first failure", failure.clone()));
    }
    output::table(&rows)
}

fn run_journal(args: &JournalArgs) -> Result<()> {
    let report = journal::check(&args.image, args.acked)?;
    if args.json {
        say!("{}", json_line("journal", &report)?)?;
    } else {
        say!(
            "{}: {} of {} acknowledged records are sound, the last is {}; {} starts",
            args.image.display(),
            report.demanded - report.missing,
            report.demanded,
            report.last,
            report.starts
        )?;
    }
    if report.is_whole() {
        return Ok(());
    }
    let numbers: Vec<String> = report.missing_numbers.iter().map(u64::to_string).collect();
    bail!(
        "the journal of {} is damaged: {} acknowledged records are missing (first: {}), {} lie in the wrong place",
        args.image.display(),
        report.missing,
        numbers.join(", "),
        report.misplaced
    )
}

fn run_database(args: &DatabaseArgs) -> Result<()> {
    let report = database::check(&args.image, args.committed)?;
    let name = args.image.display();
    if args.json {
        say!("{}", json_line("database", &report)?)?;
    } else {
        say!(
            "{name}: {} of {} rows are sound; {} updates are committed, the last {} blocks of them in the log of epoch {}",
            report.rows - report.damaged,
            report.rows,
            report.committed,
            report.log_blocks,
            report.epoch
        )?;
    }
    if report.is_whole() {
        return Ok(());
    }
    let rows: Vec<String> = report.damaged_rows.iter().map(u64::to_string).collect();
    let first = if rows.is_empty() {
        "none".to_owned()
    } else {
        rows.join(", ")
    };
    bail!(
        "the database of {name} is damaged: {} rows are not sound (first: {first}), {} are older than the log, {} updates are \
         impossible, {} blocks of the log lie beyond a hole, and {} of {} committed updates are there",
        report.damaged,
        report.outdated,
        report.impossible,
        report.beyond_a_hole,
        report.committed.min(report.demanded),
        report.demanded
    )
}
