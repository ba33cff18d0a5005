//! A machine leaves: one crossing at a time, on a thread of its own, steered and watched over the control socket.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_migration::clock::HostClock;
use ferry_migration::failure::Whereabouts;
use ferry_migration::handover::{MachineId, SessionId};
use ferry_migration::link::Link;
use ferry_migration::machine::{Observer, OutgoingMachine as _};
use ferry_migration::options::{Handle, Options};
use ferry_migration::outgoing::{World, cross};
use ferry_migration::report::{Event, Report};

use super::outgoing::{Leaving, take_back};
use super::rehearse::{self, Foreseen, Rehearsal};
use super::request::{CrossingLine, CrossingRequest};
use super::settle::{Doubt, InDoubt, Place, Settled};
use super::{ledger, settle};
use crate::error::{MachineError, Result};
use crate::lifecycle::StopReason;
use crate::machine::Machine;
use crate::name::Name;
use crate::rundir::Base;

/// In doubt the other side is asked again for at least this long.
const LEAST_DOUBT: Duration = Duration::from_secs(1);
/// How long the end of a machine waits for the end of its crossing.
const ENDING: Duration = Duration::from_secs(15);

/// The crossings of one machine.
pub struct Crossings {
    pub id: MachineId,
    base: Base,
    current: Mutex<Option<Arc<Handle>>>,
    /// The thread of the newest crossing, which may still have to say how it ended.
    thread: Mutex<Option<JoinHandle<()>>>,
    doubt: Arc<Doubt>,
    resolving: Mutex<()>,
    /// What the last rehearsal found, for the promise of the crossing that follows it.
    foreseen: Mutex<Option<Foreseen>>,
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
            thread: Mutex::default(),
            doubt: Arc::default(),
            resolving: Mutex::default(),
            foreseen: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Handle>>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One thing at a time goes on with a machine.
    fn claim(&self, name: &Name) -> Result<Arc<Handle>> {
        let mut current = self.lock();
        if current.is_some() {
            return Err(MachineError::Host(format!(
                "{name} is crossing already; wait for it, or cancel it with `ferry migrate --cancel {name}`"
            )));
        }
        let handle = Arc::new(Handle::new());
        *current = Some(handle.clone());
        Ok(handle)
    }

    /// What would become of a crossing: the machine is watched and the receiver asked. The machine runs on, and nothing
    /// is changed on either side.
    pub fn rehearse(
        &self,
        machine: &Arc<Machine>,
        name: &Name,
        request: &CrossingRequest,
    ) -> Result<Rehearsal> {
        self.may_run()?;
        let session = SessionId(random()?);
        let link = settle::open_link(session, &place_of(request))?;
        let handle = self.claim(name)?;
        let _ended = Ended(self);
        let ledger = ledger::open(&self.base)?;
        let leaving = Leaving::new(
            machine.clone(),
            self.id,
            name.clone(),
            session,
            request.shared_storage,
            place_of(request),
            self.doubt.clone(),
        );
        let (rehearsal, known) = rehearse::rehearse(leaving, request, session, link, &ledger, &handle)?;
        if let Some(known) = known {
            *self.foreseen.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(Foreseen::new(request, known));
        }
        Ok(rehearsal)
    }

    /// Ends the crossing that goes on, if it can still be ended; false when there is none.
    pub fn cancel(&self) -> bool {
        self.lock().as_ref().map(|handle| handle.cancel()).is_some()
    }

    /// One sentence if the machine must not run here because it may run elsewhere.
    pub fn may_run(&self) -> Result<()> {
        match self.doubt.get() {
            None => Ok(()),
            Some(InDoubt { session, .. }) => Err(MachineError::Host(format!(
                "the machine must not run here: its crossing {session} was cut at the hand over and it may run at the \
                 other side; `ferry resolve` shows what is known and settles it"
            ))),
        }
    }

    /// Cancels what goes on and waits for its end, for a machine that is about to be ended: it must not go on elsewhere
    /// unless it is there already.
    pub fn end(&self) {
        let begun = Instant::now();
        while self.cancel() && begun.elapsed() < ENDING {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What is in doubt about the machine, if anything.
    pub fn doubt(&self) -> Option<InDoubt> {
        self.doubt.get()
    }

    /// Settles a doubt: the other side is asked, at `place` or where the machine went, and its word decides. Where it
    /// proves nothing, `here` - the user's word - does. `None` when there is no doubt.
    pub fn resolve(
        &self,
        machine: &Machine,
        place: Option<Place>,
        here: Option<bool>,
    ) -> Result<Option<Settled>> {
        let _one_at_a_time = self.resolving.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(doubt) = self.doubt.get() else {
            return Ok(None);
        };
        let mut ledger = ledger::open(&self.base)?;
        let place = place.unwrap_or(doubt.place);
        let settled = settle::settle(&mut ledger, doubt.session, &place, here)?;
        match settled.whereabouts {
            Whereabouts::Unknown => return Ok(Some(settled)),
            Whereabouts::There => machine.stop(StopReason::HandedOver)?,
            // Settling says this of no machine.
            Whereabouts::Ended => {}
            Whereabouts::Here => {
                machine.set_throttle(&[]);
                take_back(machine).map_err(|reason| MachineError::Host(reason.to_string()))?;
                for disk in machine.disks() {
                    disk.slow_writes(None);
                }
                machine.let_go(doubt.ran)?;
            }
        }
        self.doubt.set(None);
        Ok(Some(settled))
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
        let link = settle::open_link(session, &place_of(&request))?;
        let handle = self.claim(name)?;
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
        match spawned {
            Ok(thread) => {
                *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
                Ok(handle)
            }
            Err(error) => {
                *self.lock() = None;
                Err(MachineError::Host(format!(
                    "the crossing's thread could not be started: {error}"
                )))
            }
        }
    }

    /// Waits until the newest crossing has said everything. When the machine has left there is still a report to make, for
    /// which something is measured: on a busy host that takes its time.
    pub fn wait(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let begun = Instant::now();
        while thread.as_ref().is_some_and(|thread| !thread.is_finished()) && begun.elapsed() < ENDING {
            std::thread::sleep(Duration::from_millis(2));
        }
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
            Place {
                destination: request
                    .named
                    .clone()
                    .unwrap_or_else(|| request.destination.clone()),
                ..place_of(request)
            },
            self.doubt.clone(),
        );
        let mut options = Options::new(session);
        options.lanes = request.lanes;
        options.compression = request.compression;
        options.verify = request.verify;
        options.limits = request.limits.clone();
        options.stall = request.stall;
        options.reconnect_for = request.reconnect_for;
        options.doubt_for = request.reconnect_for.max(LEAST_DOUBT);
        if request.verify {
            let sources = leaving
                .sources()
                .map_err(|error| MachineError::Host(error.to_string()))?;
            options.verify_takes = rehearse::hashing(&sources);
        }
        options.promise = self
            .foreseen
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
            .and_then(|foreseen| foreseen.promise(request));
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

fn place_of(request: &CrossingRequest) -> Place {
    Place {
        destination: request.destination.clone(),
        tls: request.tls.clone(),
        stall: request.stall,
    }
}

pub(crate) fn random() -> Result<[u8; 16]> {
    use std::io::Read as _;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|error| MachineError::Host(format!("the host gives no random numbers: {error}")))?;
    Ok(bytes)
}
