//! `ferry run --detach`: the same command again in a session of its own. The parent waits for one word on a pipe, so it
//! knows whether the machine runs; the child's error goes to the terminal it came from.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, anyhow};
use ferry_vmm::name::Name;

use crate::say;

/// Tells the child that it is one; its arguments are the parent's.
const CHILD: &str = "FERRY_DETACHED_CHILD";
const READY: &str = "ready";

pub(super) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

pub(super) fn start(name: &Name) -> Result<ExitCode> {
    let program = std::env::current_exe().context("could not find the ferry program")?;
    let mut child = Command::new(program)
        .args(std::env::args_os().skip(1))
        .env(CHILD, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start a process for the machine")?;
    let mut word = String::new();
    if let Some(pipe) = child.stdout.take() {
        BufReader::new(pipe)
            .read_line(&mut word)
            .context("could not hear from the machine's process")?;
    }
    if word.trim_end() == READY {
        say!(
            "{name} runs (process {}); `ferry console {name}` connects, `ferry stop {name}` ends it",
            child.id()
        )?;
        return Ok(ExitCode::SUCCESS);
    }
    let status = child.wait().context("could not wait for the machine's process")?;
    match status.code().and_then(|code| u8::try_from(code).ok()) {
        // It has said why.
        Some(code @ 1..) => Ok(ExitCode::from(code)),
        _ => Err(anyhow!(
            "the process of {name} ended before the machine ran ({status})"
        )),
    }
}

/// No terminal can take this process down any more.
pub(super) fn leave_session() -> Result<()> {
    rustix::process::setsid().context("could not leave the terminal")?;
    std::env::set_current_dir("/").context("could not leave the working folder")
}

/// Tells the parent, then lets go of its terminal.
pub(super) fn announce() {
    let _ = writeln!(io::stdout(), "{READY}").and_then(|()| io::stdout().flush());
    let_go();
}

/// Nothing of this process leads to the terminal or pipe that it came from.
pub(super) fn let_go() {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
}
