//! Ferry as a contestant: two processes on this host, driven by its own command line.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::timeline::Timeline;
use super::{Outcome, Scenario, free_port};

/// How Ferry is told to move the machine.
#[derive(Clone, Debug)]
pub struct Flavour {
    pub name: &'static str,
    /// Further words for `ferry migrate`.
    pub words: &'static [&'static str],
}

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(ferry: &Path, runtime: &Path, words: &[String], timeline: &Timeline) -> Result<Process> {
    let mut child = Command::new(ferry)
        .arg("--runtime-dir")
        .arg(runtime)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .context("could not start ferry")?;
    if let Some(port) = child.stdout.take() {
        timeline.follow(port);
    }
    Ok(Process(child))
}

/// Moves the scenario's machine once.
pub fn cross(ferry: &Path, dir: &Path, scenario: &Scenario, flavour: &Flavour) -> Result<Outcome> {
    let dir = tempfile::tempdir_in(dir)?;
    let timeline = Timeline::default();
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let address = format!("tcp://127.0.0.1:{}", free_port()?);
    let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let memory = format!("{}M", scenario.memory_mib);
    let cpus = scenario.cpus.to_string();
    let run = [
        "run",
        "bench",
        "--memory",
        &memory,
        "--cpus",
        &cpus,
        "--cmdline",
        scenario.work,
        "--serial",
        "stdio",
    ];
    let _outgoing = start(ferry, &here, &words(&run), &timeline)?;
    let _incoming = start(
        ferry,
        &there,
        &words(&["receive", &address, "--once", "--serial", "stdio"]),
        &timeline,
    )?;
    ensure!(
        timeline.wait_beats(10, Duration::from_secs(20)),
        "the guest does not beat under Ferry"
    );
    std::thread::sleep(scenario.warm_up);

    let report: PathBuf = dir.path().join("report.json");
    let mut migrate = Command::new(ferry);
    migrate
        .arg("--runtime-dir")
        .arg(&here)
        .args(["migrate", "bench", &address]);
    migrate.args(["--downtime", &format!("{}ms", scenario.downtime.as_millis())]);
    migrate.arg("--report").arg(&report).args(flavour.words);
    if let Some(limit) = scenario.link_bytes_per_sec {
        migrate.args(["--bandwidth", &format!("{}Mbit", limit * 8 / 1_000_000)]);
    }
    migrate.args(["--deadline", &format!("{}s", scenario.patience.as_secs())]);
    super::warm_memory()?;
    let started = Instant::now();
    let status = migrate
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .status()?;
    let ended = Instant::now();
    let beats = timeline.beats();
    let alive = timeline.wait_beats(beats + 20, Duration::from_secs(10));
    let report: Value = std::fs::read(&report)
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    std::thread::sleep(Duration::from_millis(1200));
    let before = timeline.write_rate(started - scenario.warm_up.mul_f64(0.6), started);
    let during = timeline.write_rate(started, ended);
    Ok(Outcome {
        contestant: format!("ferry{}", flavour.name),
        completed: status.success(),
        total_ms: (ended - started).as_secs_f64() * 1e3,
        gap_ms: timeline
            .largest_gap(started, ended + Duration::from_millis(200))
            .as_secs_f64()
            * 1e3,
        gap_before_ms: timeline
            .largest_gap(started - Duration::from_secs(1), started)
            .as_secs_f64()
            * 1e3,
        bytes: report["wire_bytes"].as_u64().unwrap_or(0),
        own_downtime_ms: milliseconds(&report["downtime"]["total"]),
        progress: before.zip(during).map_or(0.0, |(before, during)| during / before),
        damaged: timeline.damaged() || !alive,
    })
}

/// A duration of the report in milliseconds.
fn milliseconds(duration: &Value) -> f64 {
    duration["secs"].as_f64().unwrap_or(0.0) * 1e3 + duration["nanos"].as_f64().unwrap_or(0.0) / 1e6
}
