//! A machine arrives: this process waits for one, becomes its process when it has come, and serves it to its end.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use crossbeam::channel::{Receiver, bounded};
use ferry_migration::clock::HostClock;
use ferry_migration::receiver::{ReceiveOptions, Received, receive};
use ferry_migration::transport::{Arrival, Listener, PipeListener};

use super::incoming::{Arrived, Arriving, Reception};
use super::ledger;
use crate::error::{MachineError, Result};

/// Connections that have greeted and wait for their turn.
const WAITING: usize = 64;
/// Strangers that may be greeting at the same time.
const GREETING: usize = 32;

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map(drop)
        .map_err(|error| MachineError::Host(format!("the thread {name} could not be started: {error}")))
}

/// Greets whoever connects. A stranger that takes its time holds up nobody else, and too many of them wait outside.
pub fn connections(listener: Listener) -> Result<Receiver<Arrival>> {
    let (give, arrivals) = bounded(WAITING);
    let listener = Arc::new(listener);
    let (leave, enter) = bounded::<()>(GREETING);
    spawn("listener", move || {
        loop {
            let socket = match listener.accept() {
                Ok(socket) => socket,
                Err(error) => {
                    tracing::warn!("{error}");
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if leave.send(()).is_err() {
                return;
            }
            let (listener, give, enter) = (listener.clone(), give.clone(), enter.clone());
            let greeted = spawn("greeting", move || {
                match listener.greet(socket) {
                    Ok(arrival) => drop(give.send(arrival)),
                    Err(error) => tracing::warn!("{error}"),
                }
                let _ = enter.recv();
            });
            if let Err(error) = greeted {
                tracing::warn!("{error}");
            }
        }
    })?;
    Ok(arrivals)
}

/// The connections that come through one pipe.
pub fn pipe_connections(
    reader: impl Read + Send + 'static,
    writer: impl Write + Send + 'static,
    stall: Duration,
) -> Result<Receiver<Arrival>> {
    let pipe =
        PipeListener::new(reader, writer, stall).map_err(|error| MachineError::Host(error.to_string()))?;
    let (give, arrivals) = bounded(WAITING);
    spawn("listener", move || {
        loop {
            match pipe.accept() {
                Ok(arrival) => {
                    if give.send(arrival).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::debug!("{error}");
                    return;
                }
            }
        }
    })?;
    Ok(arrivals)
}

/// Waits for one crossing and sees it to its end, well or not.
pub fn one(
    reception: Reception,
    arrivals: &Receiver<Arrival>,
    stop: &AtomicBool,
    options: &ReceiveOptions,
) -> Result<(Received, Option<Arrived>)> {
    let mut ledger = ledger::open(&reception.base)?;
    let mut arriving = Arriving::new(reception);
    let clock = HostClock::new();
    let received = receive(&mut arriving, &mut ledger, &clock, arrivals, stop, options);
    Ok((received, arriving.arrived()))
}
