//! QEMU as a contestant: a microvm pair on this host, driven by QMP.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use super::timeline::Timeline;
use super::{Outcome, Scenario};

/// How QEMU is set up to move the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Flavour {
    /// As it comes, but with the bandwidth limit lifted (by default it is 128 MiB/s).
    Default,
    /// Two channels.
    Multifd,
    /// May slow the guest's vCPUs down.
    AutoConverge,
}

struct Qemu {
    child: Child,
    qmp: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(
    dir: &Path,
    name: &str,
    guest: &Path,
    scenario: &Scenario,
    timeline: &Timeline,
    incoming: bool,
) -> Result<Qemu> {
    let qmp = dir.join(format!("{name}.qmp"));
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-machine",
            "microvm,accel=kvm,rtc=on",
            "-cpu",
            // This KVM refuses the one MSR that comes with it.
            "host,-arch-capabilities",
            "-nodefaults",
            "-no-user-config",
        ])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio"])
        .args([
            "-m",
            &format!("{}M", scenario.memory_mib),
            "-smp",
            &scenario.cpus.to_string(),
        ])
        .arg("-kernel")
        .arg(guest)
        .args(["-append", scenario.work])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", qmp.display()));
    if incoming {
        command.args(["-incoming", "defer"]);
    }
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    if let Some(port) = child.stdout.take() {
        timeline.follow(port);
    }
    Ok(Qemu { child, qmp })
}

struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

impl Qmp {
    fn connect(path: &Path) -> Result<Qmp> {
        let started = Instant::now();
        let writer = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if started.elapsed() < Duration::from_secs(5) => {
                    std::thread::sleep(Duration::from_millis(10))
                }
                Err(error) => return Err(error).context("QEMU's control socket does not answer"),
            }
        };
        writer.set_read_timeout(Some(Duration::from_secs(30)))?;
        let mut qmp = Qmp {
            reader: BufReader::new(writer.try_clone()?),
            writer,
        };
        let mut greeting = String::new();
        qmp.reader.read_line(&mut greeting)?;
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        writeln!(
            self.writer,
            "{}",
            json!({ "execute": command, "arguments": arguments })
        )?;
        loop {
            let mut line = String::new();
            if self.reader.read_line(&mut line)? == 0 {
                bail!("QEMU closed its control socket at {command}");
            }
            let reply: Value = serde_json::from_str(&line)?;
            if let Some(value) = reply.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = reply.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
        }
    }
}

/// Moves the scenario's machine once.
pub fn cross(dir: &Path, guest: &Path, scenario: &Scenario, flavour: Flavour) -> Result<Outcome> {
    let dir = tempfile::tempdir_in(dir)?;
    let timeline = Timeline::default();
    let outgoing = start(dir.path(), "out", guest, scenario, &timeline, false)?;
    let incoming = start(dir.path(), "in", guest, scenario, &timeline, true)?;
    let (mut out, mut into) = (Qmp::connect(&outgoing.qmp)?, Qmp::connect(&incoming.qmp)?);
    anyhow::ensure!(
        timeline.wait_beats(10, Duration::from_secs(20)),
        "the guest does not beat under QEMU"
    );
    std::thread::sleep(scenario.warm_up);
    for side in [&mut out, &mut into] {
        if flavour == Flavour::AutoConverge {
            side.call(
                "migrate-set-capabilities",
                json!({ "capabilities": [{ "capability": "auto-converge", "state": true }] }),
            )?;
        }
        if flavour == Flavour::Multifd {
            side.call(
                "migrate-set-capabilities",
                json!({ "capabilities": [{ "capability": "multifd", "state": true }] }),
            )?;
            side.call("migrate-set-parameters", json!({ "multifd-channels": 2 }))?;
        }
    }
    out.call(
        "migrate-set-parameters",
        json!({
            "max-bandwidth": scenario.link_bytes_per_sec.unwrap_or(100 << 30),
            "downtime-limit": scenario.downtime.as_millis() as u64,
        }),
    )?;
    let address = format!("tcp:127.0.0.1:{}", super::free_port()?);
    into.call("migrate-incoming", json!({ "uri": address }))?;

    super::warm_memory()?;
    let started = Instant::now();
    out.call("migrate", json!({ "uri": address }))?;
    let (completed, info) = loop {
        let info = out.call("query-migrate", json!({}))?;
        match info["status"].as_str() {
            Some("completed") => break (true, info),
            Some("failed" | "cancelled") => break (false, info),
            _ if started.elapsed() > scenario.patience => break (false, info),
            _ => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    let ended = Instant::now();
    let beats = timeline.beats();
    let alive = timeline.wait_beats(beats + 20, Duration::from_secs(10));
    std::thread::sleep(Duration::from_millis(1200));
    let before = timeline.write_rate(started - scenario.warm_up.mul_f64(0.6), started);
    let during = timeline.write_rate(started, ended);
    Ok(Outcome {
        contestant: format!("qemu-{}", format!("{flavour:?}").to_lowercase()),
        completed,
        total_ms: (ended - started).as_secs_f64() * 1e3,
        gap_ms: timeline
            .largest_gap(started, ended + Duration::from_millis(200))
            .as_secs_f64()
            * 1e3,
        gap_before_ms: timeline
            .largest_gap(started - Duration::from_secs(1), started)
            .as_secs_f64()
            * 1e3,
        bytes: info["ram"]["transferred"].as_u64().unwrap_or(0),
        own_downtime_ms: info["downtime"].as_f64().unwrap_or(0.0),
        progress: before.zip(during).map_or(0.0, |(before, during)| during / before),
        damaged: timeline.damaged() || !alive,
    })
}
