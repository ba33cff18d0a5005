//! vCPUs: one named thread each, that runs the guest until it is asked to park.
//!
//! # Stopping a vCPU without losing an exit
//!
//! A thread inside KVM_RUN comes out for a signal. A signal that arrives just before it goes in would be lost, so the
//! asker also sets `immediate_exit` in the shared page: KVM then returns with EINTR before entering the guest. The order
//! is: wish, immediate_exit, signal; the thread clears immediate_exit *before* it looks at the wish, so it either sees
//! the wish or finds immediate_exit set at its next KVM_RUN.
//!
//! When KVM_RUN returned with a port or MMIO access, the instruction is not finished: KVM writes the result into the
//! guest's registers at the *next* KVM_RUN. Registers saved before that are those in the middle of an instruction, and a
//! guest restored from them reads the device a second time, or never sees the value. So before a thread parks it calls
//! KVM_RUN once more with immediate_exit set: KVM completes the instruction and returns EINTR without entering the guest.
//! That completion can itself ask for another access (an unaligned one that crosses a page, a string of them), which is
//! served as usual, until EINTR comes.

mod exits;
mod gate;
mod kick;
mod run_page;

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_devices::bus::Bus;
use kvm_ioctls::VcpuFd;

use self::gate::{Gate, Wish};
use self::kick::ThreadId;
use self::run_page::Owned;
use crate::error::{MachineError, Result};
use crate::kvm::vm::Vm;
use crate::lifecycle::Event;

pub use exits::describe;

/// A vCPU that has not stopped by then is stuck in a device.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// One run and one nap of a throttled vCPU.
pub(crate) const THROTTLE_PERIOD: Duration = Duration::from_millis(10);

/// Where a vCPU's accesses go and whom it tells about the guest's end.
#[derive(Clone)]
pub struct Surroundings {
    pub ports: Arc<Bus>,
    pub memory: Arc<Bus>,
    pub end: Arc<dyn EndSink>,
}

/// The guest has ended, or cannot go on. Called from vCPU threads and devices; must not wait for vCPUs.
pub trait EndSink: Send + Sync {
    fn end(&self, event: Event);
}

struct Shared {
    owned: Owned,
    gate: Gate,
    thread: ThreadId,
    /// Per cent of the time that the vCPU must not run.
    throttle: AtomicU8,
    /// For how long it was kept from running by that, in nanoseconds.
    napped: AtomicU64,
    exits: AtomicU64,
}

impl Shared {
    fn ask_park(&self) {
        self.gate.set(Wish::Park);
        self.kick();
    }

    fn kick(&self) {
        self.owned.page.ask_exit();
        self.thread.signal();
    }
}

/// Can ask a vCPU to park, and nothing else.
#[derive(Clone)]
pub struct Parker(Arc<Shared>);

impl Parker {
    pub fn ask_park(&self) {
        self.0.ask_park();
    }
}

pub struct Vcpu {
    index: u32,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Vcpu {
    /// Starts the thread of a vCPU, parked.
    pub fn spawn(index: u32, fd: VcpuFd, vm: Arc<Vm>, around: Surroundings) -> Result<Vcpu> {
        kick::prepare();
        let shared = Arc::new(Shared {
            owned: Owned::new(fd, vm.clone()),
            gate: Gate::new(),
            thread: ThreadId::default(),
            throttle: AtomicU8::new(0),
            napped: AtomicU64::new(0),
            exits: AtomicU64::new(0),
        });
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .stack_size(256 << 10)
            .spawn({
                let shared = shared.clone();
                move || {
                    shared.thread.begin();
                    let _gone = Gone(&shared);
                    run(index, &shared, &vm, &around);
                }
            })
            .map_err(|e| {
                MachineError::Host(format!("the thread of CPU {index} could not be started: {e}"))
            })?;
        Ok(Vcpu {
            index,
            shared,
            thread: Some(thread),
        })
    }

    pub fn run(&self) {
        self.shared.gate.set(Wish::Run);
    }

    /// Asks the thread to park and returns at once; `wait_parked` waits for it.
    pub fn ask_park(&self) {
        self.shared.ask_park();
    }

    /// For whoever ends the guest without owning it.
    pub fn parker(&self) -> Parker {
        Parker(self.shared.clone())
    }

    /// Waits until the vCPU stands still with nothing pending.
    pub fn wait_parked(&self) -> Result<()> {
        let limit = Instant::now() + STOP_LIMIT;
        // One kick is enough; the others cost nothing and help should a device swallow the signal.
        while !self
            .shared
            .gate
            .wait_parked((Instant::now() + Duration::from_millis(100)).min(limit))
        {
            if Instant::now() >= limit {
                return Err(MachineError::Host(format!(
                    "CPU {} did not stop within {} s; it is stuck in a device",
                    self.index,
                    STOP_LIMIT.as_secs()
                )));
            }
            self.shared.kick();
        }
        Ok(())
    }

    /// The vCPU's file descriptor. Waits for ever while the vCPU runs: only for parked ones.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.shared
            .owned
            .fd
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn index(&self) -> u32 {
        self.index
    }

    /// How often the guest left to us.
    pub fn exits(&self) -> u64 {
        self.shared.exits.load(Ordering::Relaxed)
    }

    /// For how long it was kept from running by a throttle, since it was made.
    pub fn napped(&self) -> Duration {
        Duration::from_nanos(self.shared.napped.load(Ordering::Relaxed))
    }

    /// For whoever slows the vCPU down.
    pub(crate) fn napper(&self) -> Napper {
        Napper(self.shared.clone())
    }
}

/// Can slow a vCPU down, and nothing else.
pub(crate) struct Napper(Arc<Shared>);

impl Napper {
    /// Keeps the vCPU from running `percent` of the time (0 to 99).
    pub(crate) fn set_throttle(&self, percent: u8) {
        self.0.throttle.store(percent.min(99), Ordering::Relaxed);
    }

    /// Gets the vCPU out of the guest so that it takes its nap.
    pub(crate) fn kick(&self) {
        self.0.kick();
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.shared.gate.set(Wish::Quit);
        self.shared.kick();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by the panic hook.
            let _ = thread.join();
        }
    }
}

/// Tells the gate when the thread ends, even by a panic.
struct Gone<'a>(&'a Shared);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.thread.end();
        self.0.gate.gone();
    }
}

/// The life of a vCPU thread.
fn run(index: u32, shared: &Shared, vm: &Vm, around: &Surroundings) {
    let Owned { fd, page, .. } = &shared.owned;
    let mut fd = fd.lock().unwrap_or_else(PoisonError::into_inner);
    let mut last_nap = Instant::now();
    let mut has_run = false;
    loop {
        match shared.gate.wish() {
            Wish::Quit => return,
            Wish::Run => {
                let percent = u32::from(shared.throttle.load(Ordering::Relaxed));
                if percent > 0 && last_nap.elapsed() >= THROTTLE_PERIOD {
                    let begun = Instant::now();
                    shared.gate.nap(THROTTLE_PERIOD * percent / (100 - percent));
                    last_nap = Instant::now();
                    let napped = u64::try_from((last_nap - begun).as_nanos()).unwrap_or(u64::MAX);
                    shared.napped.fetch_add(napped, Ordering::Relaxed);
                }
                has_run = true;
                shared.exits.fetch_add(1, Ordering::Relaxed);
                match exits::step(index, &mut fd, page, vm, around) {
                    exits::Step::Again => {}
                    exits::Step::Interrupted => page.clear_exit(),
                    exits::Step::Ended(event) => {
                        // Parks all vCPUs, this one too.
                        shared.gate.set(Wish::Park);
                        around.end.end(event);
                    }
                }
            }
            Wish::Park => {
                if has_run {
                    page.ask_exit();
                    loop {
                        match exits::step(index, &mut fd, page, vm, around) {
                            exits::Step::Again => {}
                            exits::Step::Interrupted => break,
                            exits::Step::Ended(event) => {
                                around.end.end(event);
                                break;
                            }
                        }
                    }
                    page.clear_exit();
                }
                drop(fd);
                if shared.gate.park() == Wish::Quit {
                    return;
                }
                fd = shared.owned.fd.lock().unwrap_or_else(PoisonError::into_inner);
                last_nap = Instant::now();
            }
        }
    }
}
