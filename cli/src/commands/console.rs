//! `ferry console`: the serial port of a running machine in this terminal.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use anyhow::{Context as _, Result};
use ferry_vmm::console_ends::ESCAPE;
use ferry_vmm::name::Name;

use crate::cli::Globals;
use crate::terminal::RawTerminal;

/// Connect this terminal to a machine's serial port
///
/// Shows the last of what it said and what comes; what is typed goes to the guest. Ctrl-] leaves; the machine goes on.
/// Several may be connected at once. Where standard input is no terminal it is sent to the guest, and the output is shown
/// until the machine ends.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry console web\n  echo 'uname -a' | timeout 2 ferry console web")]
pub struct ConsoleArgs {
    /// The machine
    pub name: Name,
}

pub fn run(args: &ConsoleArgs, globals: &Globals) -> Result<()> {
    let entry = globals.base()?.alive(&args.name)?;
    let path = entry.console_socket();
    let mut stream =
        UnixStream::connect(&path).with_context(|| format!("could not connect to {}", path.display()))?;
    let terminal = RawTerminal::enter().context("could not make the terminal raw")?;
    if terminal.is_some() {
        eprintln!("ferry: connected to {}; Ctrl-] leaves", args.name);
    }
    let typing = stream.try_clone().context("could not use the connection twice")?;
    thread::spawn(move || send(typing));
    let copied = copy(&mut stream);
    let was_terminal = terminal.is_some();
    drop(terminal);
    if was_terminal {
        eprintln!("\nferry: disconnected from {}", args.name);
    }
    copied
}

fn copy(stream: &mut UnixStream) -> Result<()> {
    let mut buffer = [0; 16 << 10];
    loop {
        let count = match stream.read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // The machine's process is gone, which is an end like another.
            Err(_) | Ok(0) => return Ok(()),
            Ok(count) => count,
        };
        let mut out = io::stdout().lock();
        out.write_all(buffer.get(..count).unwrap_or_default())?;
        out.flush()?;
    }
}

fn send(mut stream: UnixStream) {
    let is_terminal = io::stdin().is_terminal();
    let mut buffer = [0; 4096];
    loop {
        let count = match io::stdin().lock().read(&mut buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(count) if count > 0 => count,
            _ => return,
        };
        let typed = buffer.get(..count).unwrap_or_default();
        let escape = typed.iter().position(|byte| is_terminal && *byte == ESCAPE);
        if stream
            .write_all(typed.get(..escape.unwrap_or(count)).unwrap_or_default())
            .is_err()
        {
            return;
        }
        if escape.is_some() {
            let _ = stream.shutdown(Shutdown::Both);
            return;
        }
    }
}
