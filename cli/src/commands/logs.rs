//! `ferry logs`: what a machine's process wrote, or what its guest said.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use ferry_vmm::name::Name;
use ferry_vmm::rundir::RunDirError;

use crate::cli::Globals;

const STEP: Duration = Duration::from_millis(100);

/// Show a machine's log, or what its guest wrote to the serial port
///
/// Also of a machine that failed or died, until its name is used again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  ferry logs web\n  ferry logs web --serial --follow")]
pub struct LogsArgs {
    /// The machine
    pub name: Name,
    /// The guest's serial output instead of the monitor's log
    #[arg(long)]
    pub serial: bool,
    /// Go on until the machine ends
    #[arg(long, short)]
    pub follow: bool,
}

pub fn run(args: &LogsArgs, globals: &Globals) -> Result<()> {
    let (base, name) = (globals.base()?, &args.name);
    let entry = base
        .entry(name)?
        .ok_or_else(|| RunDirError::Unknown { name: name.clone() })?;
    let path = if args.serial {
        entry.serial_log()
    } else {
        entry.log()
    };
    let mut older = path.clone().into_os_string();
    older.push(".1");
    match File::open(PathBuf::from(older)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        older => show(&mut older.context("could not read the older log")?)?,
    }
    let mut file = File::open(&path).with_context(|| format!("could not read {}", path.display()))?;
    loop {
        let alive = base.entry(name)?.is_some_and(|entry| entry.pid.is_some());
        show(&mut file)?;
        if !args.follow || !alive {
            return Ok(());
        }
        thread::sleep(STEP);
        // At its limit a log begins anew under the same name.
        if let Ok(newer) = File::open(&path)
            && !same(&newer, &file)
        {
            show(&mut file)?;
            file = newer;
        }
    }
}

fn same(one: &File, other: &File) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let id = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino())).ok();
    id(one) == id(other)
}

fn show(file: &mut File) -> Result<()> {
    let mut buffer = [0; 64 << 10];
    let mut out = io::stdout().lock();
    loop {
        let count = file.read(&mut buffer).context("could not read the log")?;
        if count == 0 {
            out.flush()?;
            return Ok(());
        }
        out.write_all(buffer.get(..count).unwrap_or_default())?;
    }
}
