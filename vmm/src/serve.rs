//! The process that runs a machine: its sockets, its logs, its signals, from the first breath to the last. `run` does
//! the whole; `Outside` and `Serving` are its two halves, for a machine that arrives instead of being started.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ferry_migration::handover::MachineId;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use crate::bounded_log::BoundedLog;
use crate::config::MachineConfig;
use crate::console_ends::{Ends, VISITORS_HISTORY_BYTES};
use crate::control::{self, Control};
use crate::crossing::depart::{Crossings, random};
use crate::error::{MachineError, Result};
use crate::lifecycle::{State, StopReason};
use crate::machine::{Machine, Wiring};
use crate::rundir::RunDir;

/// The guest's serial output that is kept in the runtime directory: this much, twice.
const SERIAL_LOG_LIMIT_BYTES: u64 = 8 << 20;
/// At the end, how long a client or a reader of the output may take before it is left behind.
const LAST_WORDS: Duration = Duration::from_secs(2);

fn host(doing: &str) -> impl FnOnce(io::Error) -> MachineError {
    move |error| MachineError::Host(format!("could not {doing}: {error}"))
}

/// Creates a machine, starts it, and serves it to its end. `ready` is called when the guest runs and the sockets answer.
pub fn run(dir: RunDir, config: &MachineConfig, ready: impl FnOnce()) -> Result<State> {
    config.validate()?;
    let outside = Outside::connect(&dir, config)?;
    let machine = Arc::new(Machine::create(config, outside.wiring())?);
    let serving = Serving::open(dir, outside, machine.clone(), MachineId(random()?))?;
    machine.start()?;
    drop(machine);
    let (cpus, memory) = (config.cpus, config.memory);
    tracing::info!(
        "the machine {} runs: {cpus} CPUs, {memory} of memory",
        serving.control.name
    );
    ready();
    Ok(serving.wait())
}

/// Everything around a machine that is there before it: its consoles and the threads of its control interface.
pub struct Outside {
    runtime: Runtime,
    wiring: Wiring,
    ends: Ends,
}

impl Outside {
    pub fn connect(dir: &RunDir, config: &MachineConfig) -> Result<Outside> {
        dir.write_config(config)
            .map_err(|e| MachineError::Host(e.to_string()))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("control")
            .enable_all()
            .build()
            .map_err(host("start the control threads"))?;
        let (wiring, mut ends) = (Wiring::default(), Ends::default());
        let log = BoundedLog::create(&dir.serial_log(), SERIAL_LOG_LIMIT_BYTES);
        log.and_then(|log| ends.copy(&wiring.serial, "serial log", log))
            .map_err(host("make the serial log"))?;
        ends.socket(
            &runtime,
            &wiring.serial,
            "serial",
            &dir.console_socket(),
            Some(VISITORS_HISTORY_BYTES),
        )
        .map_err(host("make the console's socket"))?;
        ends.connect(&runtime, &wiring.serial, "serial", &config.serial)
            .map_err(MachineError::Host)?;
        if let Some(target) = &config.console {
            ends.connect(&runtime, &wiring.console, "console", target)
                .map_err(MachineError::Host)?;
        }
        Ok(Outside {
            runtime,
            wiring,
            ends,
        })
    }

    pub fn wiring(&self) -> &Wiring {
        &self.wiring
    }
}

/// A machine whose control socket answers.
pub struct Serving {
    dir: RunDir,
    outside: Outside,
    control: Arc<Control>,
    answering: JoinHandle<io::Result<()>>,
}

impl Serving {
    /// `id` stays the machine's own over all its crossings.
    pub fn open(dir: RunDir, outside: Outside, machine: Arc<Machine>, id: MachineId) -> Result<Serving> {
        let crossings = Arc::new(Crossings::new(id, dir.base()));
        let control = Control::new(dir.name().clone(), machine.clone(), crossings.clone());
        let _context = outside.runtime.enter();
        let listener = control::listen(&dir.control_socket()).map_err(host("make the control socket"))?;
        let answering = tokio::spawn(control.clone().serve(listener, ended(machine.clone())));
        end_on_signals(machine, crossings).map_err(host("listen for signals"))?;
        drop(_context);
        Ok(Serving {
            dir,
            outside,
            control,
            answering,
        })
    }

    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Serves until the machine has ended, then takes everything down: last output, last answers, the machine itself,
    /// and after it its folder.
    pub fn wait(self) -> State {
        let Serving {
            mut dir,
            outside,
            control,
            answering,
        } = self;
        let Outside {
            runtime,
            wiring,
            ends,
        } = outside;
        let end = loop {
            if let Some(end) = control.machine.wait(State::is_final, Duration::from_secs(3600)) {
                break end;
            }
        };
        tracing::info!("the machine {} has ended: {end}", control.name);
        control.crossings.wait();
        let Wiring { serial, console } = wiring;
        serial.close();
        console.close();
        ends.finish(LAST_WORDS);
        let _ = runtime.block_on(async { tokio::time::timeout(LAST_WORDS, answering).await });
        runtime.shutdown_timeout(LAST_WORDS);
        drop(control);
        drop(ends);
        if let State::Failed { .. } = end {
            dir.keep(&end);
        }
        end
    }
}

async fn ended(machine: Arc<Machine>) {
    let mut states = machine.watch();
    let _ = states.wait_for(State::is_final).await;
}

/// A process manager's SIGTERM, Ctrl-C or a closed terminal ends the machine in good order.
fn end_on_signals(machine: Arc<Machine>, crossings: Arc<Crossings>) -> io::Result<()> {
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ] {
        let (mut signals, machine, crossings) = (signal(kind)?, machine.clone(), crossings.clone());
        tokio::spawn(async move {
            while signals.recv().await.is_some() {
                tracing::info!("a signal asks the machine to end");
                let (machine, crossings) = (machine.clone(), crossings.clone());
                let stopped = tokio::task::spawn_blocking(move || {
                    crossings.end();
                    machine.stop(StopReason::Requested)
                })
                .await;
                if let Ok(Err(error)) = stopped {
                    tracing::error!("the machine did not stop: {error}");
                }
            }
        });
    }
    Ok(())
}
