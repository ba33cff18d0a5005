//! Measurements of whole crossings: the same guest moved by Ferry and by QEMU, alternating in one run.

pub mod ferry;
pub mod qemu;
pub mod timeline;

use std::time::Duration;

use serde::Serialize;

/// A guest and a link to move it over.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub name: &'static str,
    pub memory_mib: u64,
    pub cpus: u32,
    /// Orders for the built-in guest.
    pub work: &'static str,
    /// How long the guest works before it is moved.
    pub warm_up: Duration,
    /// The bandwidth both contestants may use; `None`: all there is.
    pub link_bytes_per_sec: Option<u64>,
    /// The downtime both are asked to keep.
    pub downtime: Duration,
    /// How long a crossing may take before it counts as one that did not end.
    pub patience: Duration,
    /// Whether each contestant moves it once more with leave to slow the guest down.
    pub slowing: bool,
}

/// What one crossing cost, as far as it can be seen from outside.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    pub contestant: String,
    pub completed: bool,
    /// From the command to the moment the other side's guest runs and the command has ended.
    pub total_ms: f64,
    /// Largest gap between two heartbeats seen outside, across both sides.
    pub gap_ms: f64,
    /// The same in the second before the crossing: what the machine's own noise is worth.
    pub gap_before_ms: f64,
    /// What the contestant says it sent.
    pub bytes: u64,
    /// What the contestant says its downtime was.
    pub own_downtime_ms: f64,
    /// Pages the guest wrote per second during the crossing, over the same before it.
    pub progress: f64,
    /// The guest reported damaged evidence, or went silent afterwards.
    pub damaged: bool,
}

/// A TCP port of loopback that was free a moment ago.
pub fn free_port() -> std::io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port())
}

/// Has as much memory of this host touched and freed as a crossing will need.
///
/// A host that is itself a virtual machine may have given its free memory back; the first touch then costs many times
/// what it costs on metal, and whoever comes first would pay for it.
pub fn warm_memory() -> anyhow::Result<()> {
    let status = std::process::Command::new(std::env::current_exe()?)
        .args(["--touch", "1280"])
        .status()?;
    anyhow::ensure!(
        status.success(),
        "memory could not be touched before the crossing"
    );
    Ok(())
}

/// What the child of `warm_memory` does.
pub fn touch_memory(mib: u64) -> anyhow::Result<()> {
    let config = ferry_vmm::config::MachineConfig {
        memory: ferry_vmm::size::ByteSize(mib << 20),
        ..Default::default()
    };
    let ram = ferry_vmm::memory::allocate(&config)?;
    Ok(ferry_vmm::memory::populate(&ram)?)
}
