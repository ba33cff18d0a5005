//! `ferry simulate`: what each policy would do to a service, without a machine.

mod html;
mod paper;
mod text;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ferry_migration::cost::{Cost, Queue, parse_duration, parse_memory, parse_rate, parse_size, parse_sla};
use ferry_migration::policy::{Limits, Policy};
use ferry_migration::report::Report;
use ferry_migration::sim::disk::Disk;
use ferry_migration::sim::link::{Change, Sharing};
use ferry_migration::sim::pages::{Outcome, Scenario};
use ferry_migration::sim::replay::{Fact, Replay};
use ferry_migration::sim::trace::{NAMES, Trace, Writing};

use crate::{output, say};

/// Show what each policy would do: late requests, time, downtime, bytes
///
/// A guest that writes as a trace says moves over a link that it shares with its own service, once per policy. What
/// moves it is the engine itself, both sides of it, every message and frame, in simulated time; all that arrives is
/// compared. The same seed gives the same numbers to the byte.
///
/// The cost is in seconds of outage: the part of requests that come too late, added up over the move, and the downtime.
/// A Mbit is 10^6 bits, a Mibit 2^20.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    ferry simulate --trace ref --memory 512M --link 256Mbit --policy qemu,calm-adaptive,calm-live --sla rate=20/s,size=1MB,deadline=1s --seed 1\n  \
    ferry simulate --trace bursts --policy all --html bursts.html\n  \
    ferry simulate --policy qemu,calm-live --disk 4G,allocated=25%,rate=2MB/s,hot=5%,discard=200kB/s\n  \
    ferry simulate --model --policy all     # page by page instead of the engine: many runs, or the systems' own dirty logs\n  \
    ferry report web --json > web.json && ferry simulate --trace web.json --policy all     # a real crossing, other policies\n  \
    ferry simulate --paper calm     # Table 2 and Figures 4 and 5 of CALM, beside the paper's numbers\n  \
    ferry simulate --paper lmdt     # the transfer cost formula and its table\n  \
    ferry simulate --traces         # the traces that come along")]
pub struct SimulateArgs {
    /// What the guest writes: a name (see --traces), a name with its number (uniform:0.05), a JSON file, or the report of
    /// a crossing (`ferry migrate --report FILE`, `ferry report NAME --json`): then memory, disks, link and what the switch
    /// takes are those of that crossing, as far as nothing else is said here
    #[arg(long, value_name = "TRACE", default_value = "ref")]
    pub trace: String,
    /// The guest's memory [default: 512M]
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub memory: Option<u64>,
    /// A disk that moves with the memory; may be given several times. SIZE, and if wanted: allocated=25% or 1G [50%],
    /// zero=10% of that are zeroes [0%], rate=2MB/s written [0], hot=5% of the allocated take 9 of 10 writes [10%],
    /// discard=200kB/s discarded [0]
    #[arg(long, value_name = "SIZE,...", value_parser = disk, conflicts_with_all = ["model", "paper"])]
    pub disk: Vec<Disk>,
    /// The capacity of the link [default: 256Mbit]
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub link: Option<u64>,
    /// The policies, separated by commas; "all" for every one (fixed at half of the link)
    #[arg(
        long,
        value_name = "P,...",
        default_value = "xen-basic,qemu,virtualbox,calm-fixed,calm-adaptive,calm-live"
    )]
    pub policy: String,
    /// What the service promises
    #[arg(long, value_name = "SLA", default_value = "rate=20/s,size=1MB,deadline=1s", value_parser = sla)]
    pub sla: Cost,
    /// Seed of everything that is random
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// How the service shares the link: "first", its packets go before those of a crossing that yields (calm-live
    /// does), or "reserved", what the crossing takes is taken from the service
    #[arg(long, value_name = "HOW", default_value = "first", value_parser = ["first", "reserved"])]
    pub sharing: String,
    /// With --sharing first: how long a request may wait for the crossing to yield, and the crossing to see silence
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = time)]
    pub reaction: Duration,
    /// The request rate over time as TIME=FACTOR,... repeated after the last TIME: 0s=0.4,10s=1.2,20s
    #[arg(long, value_name = "LOAD")]
    pub load: Option<String>,
    /// The link's capacity over time as TIME=FACTOR,...; 0 is a lost connection: 5s=0,8s=1
    #[arg(long, value_name = "FACTORS")]
    pub capacity: Option<String>,
    /// The link's delay
    #[arg(long, value_name = "TIME", default_value = "0ms", value_parser = time)]
    pub delay: Duration,
    /// What the switch takes besides copying [default: 0ms]
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub switch: Option<Duration>,
    /// The downtime that policies with such a rule aim at
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = time)]
    pub downtime: Duration,
    /// The downtime is a contract: calm-live does not switch above it
    #[arg(long)]
    pub contract: bool,
    /// Give up after this long
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub deadline: Option<Duration>,
    /// How far vCPUs may be slowed, in percent
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=99))]
    pub throttle: u8,
    /// The price of a second of crossing, in seconds of outage
    #[arg(long, value_name = "SECONDS", default_value_t = 0.01)]
    pub time_price: f64,
    /// What a page of 4 KiB is on the wire on average [default: 4096]
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub wire_page: Option<u64>,
    /// Writes per second to one page, told to calm-fixed and calm-adaptive [default: the trace's true mean]
    #[arg(long, value_name = "RATE")]
    pub page_rate: Option<f64>,
    /// A model of a crossing page by page instead of the engine: twenty times as fast, memory only. The policies of
    /// other systems take their dirty log as those systems do, at the start of a round, and not just before each page is
    /// sent as the engine does
    #[arg(long)]
    pub model: bool,
    /// Reproduce a paper: calm or lmdt, with the model
    #[arg(long, value_name = "PAPER", value_parser = ["calm", "lmdt"])]
    pub paper: Option<String>,
    /// List the traces that come along
    #[arg(long)]
    pub traces: bool,
    /// The results as JSON
    #[arg(long)]
    pub json: bool,
    /// Write a page with plots
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
}

fn memory(text: &str) -> Result<u64, String> {
    parse_memory(text).map_err(|e| e.to_string())
}

fn rate(text: &str) -> Result<u64, String> {
    parse_rate(text).map_err(|e| e.to_string())
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|e| e.to_string())
}

fn time(text: &str) -> Result<Duration, String> {
    parse_duration(text).map_err(|e| e.to_string())
}

fn disk(text: &str) -> Result<Disk, String> {
    Disk::parse(text).map_err(|e| e.to_string())
}

fn sla(text: &str) -> Result<Cost, String> {
    parse_sla(text).map_err(|e| e.to_string())
}

/// The most memory a simulated guest may have: its pages are kept one by one.
const MOST_MEMORY_BYTES: u64 = 64 << 30;

pub fn run(args: &SimulateArgs) -> Result<()> {
    if args.traces {
        let rows: Vec<_> = NAMES
            .iter()
            .map(|(name, what)| vec![name.to_string(), what.to_string()])
            .collect();
        return say!("{}", output::table(&rows).trim_end());
    }
    match args.paper.as_deref() {
        Some("calm") => return paper::calm(args),
        Some(_) => return paper::lmdt(args),
        None => {}
    }
    let (scenario, fact) = scenario(args)?;
    let outcomes = run_all(&scenario, &policies(args, &scenario)?, how(args))?;
    let title = title(args, &scenario);
    if let Some(path) = &args.html {
        let page = html::page(&title, &outcomes);
        std::fs::write(path, page)
            .with_context(|| format!("the page {} cannot be written", path.display()))?;
    }
    if args.json {
        return output::json(&outcomes);
    }
    say!("{title}\n")?;
    if let Some(fact) = fact {
        say!("{}\n", text::fact(&fact))?;
    }
    say!("{}", text::outcomes(&outcomes))
}

fn title(args: &SimulateArgs, scenario: &Scenario) -> String {
    let sharing = match args.sharing.as_str() {
        "first" => format!(
            "the service goes first where the crossing yields ({:?})",
            args.reaction
        ),
        _ => "the link is shared by reservation".to_string(),
    };
    let disks: u64 = scenario.disks.iter().map(|disk| disk.bytes).sum();
    let disks = if disks > 0 {
        format!(
            " and {} of disk",
            ferry_migration::policy::reason::size(disks as f64)
        )
    } else {
        String::new()
    };
    format!(
        "trace {}, {} MiB{disks}, {}, {sharing}, price of time {}, seed {}",
        args.trace,
        scenario.memory_bytes >> 20,
        ferry_migration::policy::reason::rate(scenario.link.bytes_per_sec),
        args.time_price,
        args.seed
    )
}

fn policies(args: &SimulateArgs, scenario: &Scenario) -> Result<Vec<Policy>> {
    let half = (scenario.link.bytes_per_sec / 2.0) as u64;
    if args.policy.trim() == "all" {
        return Ok(ferry_migration::policy::ALL
            .iter()
            .map(|about| match about.policy {
                Policy::Fixed { .. } => Policy::Fixed {
                    bandwidth_bytes_per_sec: half,
                },
                policy => policy,
            })
            .collect());
    }
    let mut list = Vec::new();
    for name in args.policy.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        list.push(name.parse::<Policy>()?);
    }
    if list.is_empty() {
        bail!("no policy is named; write for example --policy qemu,calm-live");
    }
    Ok(list)
}

/// What plays the crossing.
#[derive(Clone, Copy)]
enum How {
    Engine,
    Model,
}

fn how(args: &SimulateArgs) -> How {
    if args.model { How::Model } else { How::Engine }
}

/// Runs one crossing. What arrived must be what was sent: if not, that is a fault in the engine and no result.
fn play(scenario: &Scenario, how: How) -> Result<Outcome> {
    let crossed = match how {
        How::Model => return Ok(scenario.run()),
        How::Engine => scenario.cross(),
    };
    let (pages, clusters) = (crossed.pages_differ, crossed.clusters_differ);
    if crossed.outcome.crossed && pages + clusters > 0 {
        bail!(
            "with {} {pages} pages and {clusters} clusters differ at the other side: this is a fault in Ferry",
            crossed.outcome.policy
        );
    }
    Ok(crossed.outcome)
}

/// One run per policy, on as many threads as the host has; the order and the numbers do not depend on them.
fn run_all(scenario: &Scenario, policies: &[Policy], how: How) -> Result<Vec<Outcome>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut outcomes = Vec::new();
    for part in policies.chunks(threads) {
        let runs: Vec<_> = part.iter().map(|policy| scenario.with_policy(*policy)).collect();
        std::thread::scope(|scope| {
            let handles: Vec<_> = runs
                .iter()
                .map(|run| scope.spawn(move || play(run, how)))
                .collect();
            for handle in handles {
                outcomes.push(handle.join().map_err(|_| anyhow!("a simulation panicked"))??);
            }
            anyhow::Ok(())
        })?;
    }
    Ok(outcomes)
}

/// A trace or a report is some hundred KiB; what is longer is something else.
const MOST_TRACE_BYTES: u64 = 64 << 20;

/// What `--trace` names: a trace, or a crossing to play again.
fn played(name: &str) -> Result<Replay> {
    let path = PathBuf::from(name);
    if !path.is_file() {
        return Ok(Replay::of(Trace::named(name)?));
    }
    let could_not = || format!("the trace {name} cannot be read");
    if std::fs::metadata(&path).with_context(could_not)?.len() > MOST_TRACE_BYTES {
        bail!("{name} is neither a trace nor the report of a crossing: it is longer than any");
    }
    let text = std::fs::read_to_string(&path).with_context(could_not)?;
    let value: serde_json::Value = serde_json::from_str(&text)
        .with_context(|| format!("{name} is neither a trace nor the report of a crossing"))?;
    if value.get("session").is_none() {
        return Ok(Replay::of(
            Trace::from_json(&text).with_context(|| format!("in {name}"))?,
        ));
    }
    let report: Report =
        serde_json::from_value(value).with_context(|| format!("{name} is not the report of a crossing"))?;
    Ok(Replay::from_report(&report)?)
}

/// What is simulated, and the crossing itself where one is played again.
fn scenario(args: &SimulateArgs) -> Result<(Scenario, Option<Fact>)> {
    let replay = played(&args.trace)?;
    let memory_bytes = args.memory.unwrap_or(replay.memory_bytes);
    let link = args.link.map_or(replay.link_bytes_per_sec, |rate| rate as f64);
    let disks = if args.disk.is_empty() {
        replay.disks
    } else {
        args.disk.clone()
    };
    if memory_bytes > MOST_MEMORY_BYTES {
        bail!("a simulated guest has at most 64 GiB of memory");
    }
    if args.model && !disks.is_empty() {
        bail!("the model has no disks and this crossing has; leave --model away");
    }
    if !args.time_price.is_finite() || args.time_price < 0.0 {
        bail!("the price of time must be a number from 0 on");
    }
    let limits = Limits {
        cost: args.sla.clone(),
        downtime: args.downtime,
        downtime_is_contract: args.contract,
        deadline: args.deadline,
        most_throttle_percent: args.throttle,
        time_price: args.time_price,
        page_write_rate_per_sec: args.page_rate.or_else(|| mean_rate(&replay.trace)),
        ..Limits::default()
    };
    let mut scenario = Scenario::new(replay.trace, memory_bytes, link, limits);
    scenario.seed = args.seed;
    scenario.disks = disks;
    scenario.switch_fixed = args.switch.unwrap_or(replay.switch_fixed);
    let wire_page = args.wire_page.map(|bytes| bytes.max(1) as f64);
    scenario.wire_bytes_per_page = wire_page.unwrap_or(replay.wire_bytes_per_page);
    if scenario.wire_bytes_per_page > 4096.0 && !args.model {
        bail!("a page is at most 4096 bytes on the wire; write for example --wire-page 2048, or --model");
    }
    scenario.at_most = Duration::from_secs(3600);
    scenario.link.delay_secs = args.delay.as_secs_f64();
    if args.sharing == "first" {
        scenario.link.sharing = Sharing::ServiceFirst {
            reaction_secs: args.reaction.as_secs_f64(),
        };
    }
    if let Some(load) = &args.load {
        let (changes, end) = changes(load)?;
        scenario.link.load = changes;
        scenario.link.load_period_secs = end;
    }
    let promised = args.sla.offered_bytes_per_sec().filter(|rate| *rate > 0.0);
    if args.load.is_none()
        && let (Some(used), Some(promised)) = (replay.service_bytes_per_sec, promised)
    {
        // The service was seen to use this much of the link, whatever it promises.
        scenario.link.load = vec![Change {
            at_secs: 0.0,
            factor: used / promised,
        }];
    }
    if let Some(capacity) = &args.capacity {
        scenario.link.capacity = changes(capacity)?.0;
    }
    Ok((scenario, replay.fact))
}

/// The mean rate at which the trace writes a page, which CALM's own policies are told.
fn mean_rate(trace: &Trace) -> Option<f64> {
    let Writing::Classes { classes, .. } = &trace.writing else {
        return None;
    };
    let whole: f64 = classes.iter().map(|c| c.part).sum();
    Some(classes.iter().map(|c| c.part * c.rate).sum::<f64>() / whole)
}

/// `0s=0.4,10s=1.2,20s`: changes in order of time, and where they begin again.
fn changes(text: &str) -> Result<(Vec<Change>, Option<f64>)> {
    let mut list: Vec<Change> = Vec::new();
    let mut end = None;
    for word in text.split(',').map(str::trim) {
        let (at, factor) = word.split_once('=').unwrap_or((word, ""));
        let at_secs = parse_duration(at)?.as_secs_f64();
        if end.is_some() || list.last().is_some_and(|last| last.at_secs >= at_secs) {
            bail!("\"{text}\" does not go forward in time; write for example 0s=0.4,10s=1.2,20s");
        }
        if factor.is_empty() {
            end = Some(at_secs);
            continue;
        }
        let factor = factor.parse::<f64>().ok().filter(|f| f.is_finite() && *f >= 0.0);
        let factor = factor.with_context(|| format!("\"{word}\" has no factor from 0 on"))?;
        list.push(Change { at_secs, factor });
    }
    Ok((list, end))
}

/// The service of the papers, for `--paper`.
fn paper_cost() -> Queue {
    ferry_migration::sim::paper::service()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: SimulateArgs,
    }

    fn args(words: &[&str]) -> SimulateArgs {
        Line::try_parse_from(std::iter::once("simulate").chain(words.iter().copied()))
            .unwrap()
            .args
    }

    fn outcomes_of(args: &SimulateArgs) -> Vec<Outcome> {
        let (scenario, _) = scenario(args).unwrap();
        run_all(&scenario, &policies(args, &scenario).unwrap(), how(args)).unwrap()
    }

    /// The example is a real crossing's report: what moves then is as large as what moved there, and every policy has an
    /// answer. What is said on the command line counts.
    #[test]
    fn the_report_of_a_crossing_is_a_trace() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/report.example.json");
        let words = [
            "--trace",
            file,
            "--policy",
            "qemu,max",
            "--sla",
            "rate=20/s,size=10kB,deadline=1s",
        ];
        let args_of = |more: &[&str]| args(&[words.as_slice(), more].concat());
        let (replayed, fact) = scenario(&args_of(&[])).unwrap();
        let fact = fact.unwrap();
        assert_eq!((replayed.disks.len(), fact.crossed), (1, true));
        for outcome in outcomes_of(&args_of(&[])) {
            let part = outcome.bytes as f64 / fact.bytes as f64;
            assert!(
                outcome.crossed && (0.7..1.3).contains(&part),
                "{part}: {outcome:?}"
            );
        }
        let (said, _) = scenario(&args_of(&[
            "--link", "8Mbit", "--memory", "16M", "--switch", "1s",
        ]))
        .unwrap();
        assert_eq!(
            (said.link.bytes_per_sec, said.memory_bytes, said.switch_fixed),
            (1e6, 16 << 20, Duration::from_secs(1))
        );
        assert!(text::fact(&fact).starts_with("web itself crossed with "));
    }

    #[test]
    fn the_json_has_one_object_per_policy_with_the_promised_fields() {
        let args = args(&[
            "--memory",
            "16M",
            "--link",
            "8Mbit",
            "--sla",
            "rate=20/s,size=31kB,deadline=1s",
            "--policy",
            "qemu,calm-live",
        ]);
        let outcomes = outcomes_of(&args);
        let json = serde_json::to_value(&outcomes).unwrap();
        let list = json.as_array().unwrap();
        assert_eq!(list.len(), 2);
        for (object, name) in list.iter().zip(["qemu", "calm-live"]) {
            assert_eq!(object["policy"], name);
            for field in ["cost", "total_s", "downtime_s", "bytes", "rounds"] {
                assert!(object[field].is_number(), "{field}");
            }
            assert!(object["stop_reason"].as_str().is_some_and(|s| !s.is_empty()));
        }
    }

    /// The engine is what runs unless the model is asked for: only it says what a disk took.
    #[test]
    fn a_disk_crosses_in_the_same_run_and_the_model_has_none() {
        let words = ["--memory", "8M", "--policy", "calm-live"];
        let disk = ["--disk", "16M,allocated=25%,rate=100kB/s"];
        let with = args(&[words.as_slice(), disk.as_slice()].concat());
        let outcomes = outcomes_of(&with);
        assert!(
            outcomes[0].crossed && outcomes[0].disk_bytes >= 4 << 20,
            "{outcomes:?}"
        );
        assert!(text::outcomes(&outcomes).contains("MiB disk)"));
        let line = ["simulate", "--model", "--disk", "16M"];
        assert!(Line::try_parse_from(line).is_err());
    }

    #[test]
    fn the_same_seed_writes_the_same_page_to_the_byte() {
        let args = args(&[
            "--memory",
            "8M",
            "--link",
            "8Mbit",
            "--sla",
            "rate=20/s,size=31kB,deadline=1s",
            "--policy",
            "all",
        ]);
        let page = || html::page("t", &outcomes_of(&args));
        let first = page();
        assert_eq!(first, page());
        assert!(first.contains("<svg") && !first.contains("http://") && !first.contains("https://"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_a_sentence() {
        for (words, part) in [
            (vec!["--policy", "magic"], "there is no policy"),
            (vec!["--trace", "nothing"], "there is no trace"),
            (vec!["--load", "10s=1,5s=2"], "forward in time"),
            (vec!["--time-price", "NaN"], "price of time"),
        ] {
            let args = args(&words);
            let error = scenario(&args)
                .and_then(|(scenario, _)| policies(&args, &scenario))
                .unwrap_err();
            assert!(format!("{error:#}").contains(part), "{error:#}");
        }
        for words in [
            ["--link", "fast"],
            ["--memory", "-1"],
            ["--sla", "rate=1"],
            ["--sharing", "x"],
        ] {
            assert!(
                Line::try_parse_from(std::iter::once("simulate").chain(words)).is_err(),
                "{words:?}"
            );
        }
    }
}
