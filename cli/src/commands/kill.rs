//! `ferry kill`: ends a machine at once, by its process if need be, and removes what a dead one left.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use ferry_vmm::control::api::Want;
use ferry_vmm::control::client::{Client, ClientError};
use ferry_vmm::name::Name;
use ferry_vmm::rundir::{Base, RunDirError};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::gone;
use crate::cli::Globals;
use crate::say;

/// How long the process may take to hear that it is to end, before it is ended from outside.
const POLITENESS: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(10);

/// End a machine at once
///
/// The guest is not asked: what it had not written to its disks is lost, as when the power fails. Of a machine that is
/// dead already, what it left is removed.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  ferry kill web")]
pub struct KillArgs {
    /// The machine
    pub name: Name,
}

pub fn run(args: &KillArgs, globals: &Globals) -> Result<()> {
    let (base, name) = (globals.base()?, &args.name);
    let entry = match base.alive(name) {
        Err(RunDirError::Dead { end, .. }) => {
            base.bury(name)?;
            return say!("{name} was dead already ({end}); what it left is removed");
        }
        other => other?,
    };
    match Client::of(&entry)?.want_within(Want::Killed, POLITENESS) {
        Ok(_) => {}
        Err(ClientError::Refused(sentence)) => bail!("{name} still runs: {sentence}"),
        // It does not answer, or it ended before its answer was read.
        Err(ClientError::NoAnswer { .. }) if gone::wait(&base, name, Duration::from_millis(500))? => {}
        Err(ClientError::NoAnswer { .. }) => kill_process(&base, name)?,
    }
    if !gone::wait(&base, name, PATIENCE)? {
        kill_process(&base, name)?;
        if !gone::wait(&base, name, PATIENCE)? {
            bail!("{name} still runs: the kernel does not end its process; look at its state with `ps`");
        }
    }
    if base.entry(name)?.is_some() {
        base.bury(name)?;
    }
    say!("{name} is ended")
}

/// The lock says that the process lives. Its handle is taken before the lock is asked again, so that a process id that
/// was reused in between is never hit.
fn kill_process(base: &Base, name: &Name) -> Result<()> {
    let pid_now = || base.entry(name).map(|entry| entry.and_then(|entry| entry.pid));
    let Some(pid) = pid_now()? else { return Ok(()) };
    let handle = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .context("the machine's folder does not name its process; end that by hand")?;
    let handle =
        pidfd_open(handle, PidfdFlags::empty()).with_context(|| format!("could not reach process {pid}"))?;
    if pid_now()? == Some(pid) {
        pidfd_send_signal(&handle, Signal::KILL).with_context(|| format!("could not kill process {pid}"))?;
    }
    Ok(())
}
