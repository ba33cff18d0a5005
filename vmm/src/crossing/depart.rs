//! A machine leaves: one crossing at a time, on a thread of its own, steered and watched over the control socket.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_migration::clock::HostClock;
use ferry_migration::failure::{Reason, Side};
use ferry_migration::handover::{Ledger as _, MachineId, SessionId, Standing};
use ferry_migration::link::Link;
use ferry_migration::machine::Observer;
use ferry_migration::options::{Handle, Options};
use ferry_migration::outgoing::{World, cross};
use ferry_migration::report::{Event, Report};
use ferry_migration::transport::{Address, PipeLink, SocketLink, Tls};

use super::ledger;
use super::outgoing::{Doubt, Leaving};
use super::request::{CrossingLine, CrossingRequest};
use crate::error::{MachineError, Result};
use crate::lifecycle::StopReason;
use crate::machine::Machine;
use crate::name::Name;
use crate::rundir::Base;

/// The crossings of one machine.
pub struct Crossings {
    pub id: MachineId,
    base: Base,
    current: Mutex<Option<Arc<Handle>>>,
    doubt: Arc<Doubt>,
}

/// Takes the line that ends a crossing's thread, however it ends.
struct Ended<'a>(&'a Crossings);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        *self.0.lock() = None;
    }
}

type Tell = Box<dyn Fn(CrossingLine) + Send + Sync>;

struct Teller(Tell);

impl Observer for Teller {
    fn event(&self, event: &Event) {
        (self.0)(CrossingLine::Event(event.clone()));
    }
}

impl Crossings {
    pub fn new(id: MachineId, base: Base) -> Crossings {
        Crossings {
            id,
            base,
            current: Mutex::default(),
            doubt: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Handle>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the crossing that goes on, if it can still be ended; false when there is none.
    pub fn cancel(&self) -> bool {
        self.lock().as_ref().map(|handle| handle.cancel()).is_some()
    }

    /// One sentence if the machine must not run here because it may run elsewhere.
    pub fn may_run(&self) -> Result<()> {
        match self.doubt.session() {
            None => Ok(()),
            Some(session) => Err(MachineError::Host(format!(
                "the machine must not run here: its crossing {session} was cut at the hand over and it may run at the \
                 other side; `ferry resolve` shows what is known and settles it"
            ))),
        }
    }

    /// Settles a doubt by the user's word: the machine runs on here, or it is gone. False when there is no doubt.
    pub fn resolve(&self, machine: &Machine, here: bool) -> Result<bool> {
        let Some(session) = self.doubt.session() else {
            return Ok(false);
        };
        let mut ledger = ledger::open(&self.base)?;
        let host = |reason: Reason| MachineError::Host(reason.to_string());
        if let Some(mut record) = ledger.read(session, Side::Outgoing).map_err(host)? {
            record.standing = if here { Standing::Kept } else { Standing::Gone };
            ledger.write(&record).map_err(host)?;
        }
        self.doubt.set(None);
        if here {
            for disk in machine.disks() {
                disk.take_lock()
                    .map_err(|error| MachineError::Host(error.to_string()))?;
            }
            machine.resume()?;
        } else {
            machine.stop(StopReason::HandedOver)?;
        }
        Ok(true)
    }

    /// Begins a crossing and returns; `tell` hears of everything, the report last.
    pub fn begin(
        self: &Arc<Self>,
        machine: &Arc<Machine>,
        name: &Name,
        request: CrossingRequest,
        tell: impl Fn(CrossingLine) + Send + Sync + 'static,
    ) -> Result<Arc<Handle>> {
        self.may_run()?;
        let session = SessionId(random()?);
        let link = open_link(session, &request)?;
        let handle = Arc::new(Handle::new());
        {
            let mut current = self.lock();
            if current.is_some() {
                return Err(MachineError::Host(format!(
                    "{name} is crossing already; wait for it, or cancel it with `ferry migrate --cancel {name}`"
                )));
            }
            *current = Some(handle.clone());
        }
        let (this, machine, name, steered) = (self.clone(), machine.clone(), name.clone(), handle.clone());
        let spawned = std::thread::Builder::new()
            .name("crossing".into())
            .spawn(move || {
                let ended = Ended(&this);
                let teller = Teller(Box::new(tell));
                let report = this.cross(machine, &name, &request, session, link, &steered, &teller);
                drop(ended);
                match report {
                    Ok(report) => {
                        ledger::keep_report(&this.base, &name, &report);
                        (teller.0)(CrossingLine::Report(Box::new(report)));
                    }
                    Err(error) => tracing::error!("the crossing did not begin: {error}"),
                }
            });
        if let Err(error) = spawned {
            *self.lock() = None;
            return Err(MachineError::Host(format!(
                "the crossing's thread could not be started: {error}"
            )));
        }
        Ok(handle)
    }

    #[allow(clippy::too_many_arguments)] // all that a crossing is made of, used once
    fn cross(
        &self,
        machine: Arc<Machine>,
        name: &Name,
        request: &CrossingRequest,
        session: SessionId,
        mut link: Box<dyn Link>,
        handle: &Handle,
        observer: &Teller,
    ) -> Result<Report> {
        let mut ledger = ledger::open(&self.base)?;
        let mut leaving = Leaving::new(
            machine,
            self.id,
            name.clone(),
            session,
            request.shared_storage,
            self.doubt.clone(),
        );
        let mut options = Options::new(session);
        options.lanes = request.lanes;
        options.compression = request.compression;
        options.verify = request.verify;
        options.limits = request.limits.clone();
        options.stall = request.stall;
        options.reconnect_for = request.reconnect_for;
        let clock = HostClock::new();
        let world = World {
            machine: &mut leaving,
            link: link.as_mut(),
            ledger: &mut ledger,
            clock: &clock,
            observer,
            handle,
        };
        Ok(cross(world, &options))
    }
}

fn open_link(session: SessionId, request: &CrossingRequest) -> Result<Box<dyn Link>> {
    let refuse = |text: String| MachineError::Config(crate::config::ConfigError(text));
    if let Some(path) = request.destination.strip_prefix("pipe:") {
        let near = UnixStream::connect(path).map_err(|error| {
            MachineError::Host(format!("the pipe at {path} could not be opened: {error}"))
        })?;
        let far = near.try_clone().map_err(|error| {
            MachineError::Host(format!("the pipe at {path} could not be opened: {error}"))
        })?;
        let link = PipeLink::new(session, near, far, request.stall);
        return Ok(Box::new(
            link.map_err(|error| MachineError::Host(error.to_string()))?,
        ));
    }
    let address: Address = request.destination.parse().map_err(refuse)?;
    let tls = match &request.tls {
        Some(dir) => Some(Tls::from_dir(dir, Vec::new()).map_err(|error| refuse(error.to_string()))?),
        None => None,
    };
    Ok(Box::new(SocketLink::new(session, address, tls, request.stall)))
}

pub(crate) fn random() -> Result<[u8; 16]> {
    use std::io::Read as _;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| MachineError::Host(format!("the host gives no random numbers: {error}")))?;
    Ok(bytes)
}
