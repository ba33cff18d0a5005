//! Logs: to standard error when asked for with --log, and always to a machine's own log file.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use ferry_vmm::bounded_log::BoundedLog;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::cli::Globals;
use crate::failure::Usage;

/// A machine's log has this much, twice.
const LOG_LIMIT_BYTES: u64 = 4 << 20;

#[derive(Clone)]
struct Tee {
    file: Option<Arc<Mutex<BoundedLog>>>,
    to_stderr: bool,
}

impl Write for Tee {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if let Some(file) = &self.file {
            file.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .write_all(line)?;
        }
        if self.to_stderr {
            io::stderr().write_all(line)?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Tee {
    type Writer = Tee;

    fn make_writer(&'a self) -> Tee {
        self.clone()
    }
}

/// `file`: a machine's own log. Called once per process.
pub fn init(globals: &Globals, file: Option<&Path>, stderr_is_ours: bool) -> Result<()> {
    let filter = globals.log.as_deref().unwrap_or("info");
    let filter = EnvFilter::try_new(filter).map_err(|error| {
        Usage(format!(
            "--log {filter:?} is not understood ({error}); try info, debug or ferry_vmm=trace"
        ))
    })?;
    let tee = Tee {
        file: match file {
            Some(path) => Some(Arc::new(Mutex::new(
                BoundedLog::create(path, LOG_LIMIT_BYTES)
                    .with_context(|| format!("could not make the log {}", path.display()))?,
            ))),
            None => None,
        },
        to_stderr: globals.log.is_some() && stderr_is_ours,
    };
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(tee)
        .with_ansi(false);
    if globals.log_json {
        subscriber.json().try_init()
    } else {
        subscriber.try_init()
    }
    .map_err(|error| anyhow::anyhow!("could not start the log: {error}"))?;
    // A panic is a mistake of ours; where standard error goes nowhere, the log is the only witness.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tracing::error!("{panic}");
        print(panic);
    }));
    Ok(())
}
