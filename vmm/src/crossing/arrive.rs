//! A machine arrives: this process waits for one, becomes its process when it has come, and serves it to its end.

use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Receiver, bounded};
use ferry_migration::clock::HostClock;
use ferry_migration::link::LinkErrorKind;
use ferry_migration::receiver::{ReceiveOptions, Received, receive};
use ferry_migration::transport::{Arrival, Listener, PipeListener};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::incoming::{Arrived, Arriving, Reception};
use super::ledger;
use crate::error::{MachineError, Result};

/// Connections that have greeted and wait for their turn.
const WAITING: usize = 64;
/// Strangers that may be greeting at the same time.
const GREETING: usize = 32;
/// How often the listener looks whether it is still wanted.
const GLANCE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work)
        .map_err(|error| MachineError::Host(format!("the thread {name} could not be started: {error}")))
}

/// The connections that come, until this is dropped: then nobody listens here any more.
pub struct Connections {
    arrivals: Option<Receiver<Arrival>>,
    stop: Arc<AtomicBool>,
    listener: Option<JoinHandle<()>>,
}

impl Drop for Connections {
    fn drop(&mut self) {
        // Whoever connects from now on is for somebody else who listens at the same socket, or finds nobody.
        self.stop.store(true, Ordering::Release);
        drop(self.arrivals.take());
        if let Some(listener) = self.listener.take()
            && listener.join().is_err()
        {
            tracing::error!("the listener's thread panicked");
        }
    }
}

/// Greets whoever connects. A stranger that takes its time holds up nobody else, and too many of them wait outside.
pub fn connections(listener: Listener) -> Result<Connections> {
    // The socket may be shared with another receiver: a connection that was seen may be gone when it is accepted.
    rustix::io::ioctl_fionbio(&listener, true)
        .map_err(|errno| MachineError::Host(format!("the listening socket could not be set up: {errno}")))?;
    let (give, arrivals) = bounded(WAITING);
    let listener = Arc::new(listener);
    let (leave, enter) = bounded::<()>(GREETING);
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = spawn("listener", move || {
        while !stopped.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(&*listener, PollFlags::IN)];
            if !matches!(poll(&mut fds, Some(&GLANCE)), Ok(1..)) {
                continue;
            }
            let socket = match listener.accept() {
                Ok(socket) => socket,
                Err(error) if error.kind == LinkErrorKind::Stalled => continue,
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
    Ok(Connections {
        arrivals: Some(arrivals),
        stop,
        listener: Some(thread),
    })
}

/// The connections that come through one pipe.
pub fn pipe_connections(
    reader: impl Read + Send + 'static,
    writer: impl Write + Send + 'static,
    stall: Duration,
) -> Result<Connections> {
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
    Ok(Connections {
        arrivals: Some(arrivals),
        stop: Arc::default(),
        listener: None,
    })
}

/// Waits for one crossing and sees it to its end, well or not. Nobody listens afterwards.
pub fn one(
    reception: Reception,
    connections: Connections,
    stop: &AtomicBool,
    options: &ReceiveOptions,
) -> Result<(Received, Option<Arrived>)> {
    let mut ledger = ledger::open(&reception.base)?;
    let mut arriving = Arriving::new(reception);
    let clock = HostClock::new();
    let received = match &connections.arrivals {
        Some(arrivals) => receive(&mut arriving, &mut ledger, &clock, arrivals, stop, options),
        None => return Err(MachineError::Host("nobody listens any more".into())),
    };
    drop(connections);
    Ok((received, arriving.arrived()))
}
