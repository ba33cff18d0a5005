//! A virtio device as a PCI function: puts registers, interrupts and the device together.
//!
//! The device works between `start` and `stop` of its trait; here is when: it starts when the driver says it is
//! ready, and stops for a reset, for a pause, and so for a saved state. Queue positions live in the registers
//! whenever the device does not run.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::common::{Common, Effect, RING_RESET, Registers};
use super::interrupts::{Interrupts, SavedInterrupts};
use super::layout::{self, Capabilities};
use crate::bus::BusDevice;
use crate::error::DeviceError;
use crate::irq::{MsiController, NotifyBinder};
use crate::log_once::LogOnce;
use crate::pci::config::{ConfigSpace, SavedHeader};
use crate::pci::root::PciFunction;
use crate::ram::Ram;
use crate::state::{Record, RecordKey, StateError, Stateful};
use crate::virtio::device::{Activation, ActiveQueue, DeviceState, VirtioDevice, VirtioInterrupt};

const VERSION: u32 = 1;

/// One virtio device in one PCI slot.
pub struct VirtioPci {
    slot: u8,
    interrupts: Arc<Interrupts>,
    inner: Mutex<Inner>,
}

struct Inner {
    config: ConfigSpace,
    capabilities: Capabilities,
    common: Common,
    device: Box<dyn VirtioDevice>,
    interrupts: Arc<Interrupts>,
    ram: Ram,
    binder: Arc<dyn NotifyBinder>,
    /// One for each queue, for the life of the function: ioeventfds and device threads hold duplicates.
    kicks: Vec<EventFd>,
    bar_at: Option<u64>,
    activity: Activity,
    complaints: LogOnce,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Activity {
    /// The machine runs; the device does too if its driver is ready.
    Live { started: bool },
    /// The machine stands still.
    Paused { restored: bool },
}

#[derive(Serialize, Deserialize)]
struct Saved {
    kind: u16,
    header: SavedHeader,
    window: [u8; 16],
    interrupts: SavedInterrupts,
    registers: Registers,
    device_version: u32,
    device: Vec<u8>,
}

impl VirtioPci {
    /// The slot is the record's instance, so it must be the one the function is put into. `msi` needs one slot
    /// more than the device has queues.
    pub fn new(
        slot: u8,
        device: Box<dyn VirtioDevice>,
        ram: Ram,
        msi: Arc<dyn MsiController>,
        binder: Arc<dyn NotifyBinder>,
    ) -> Result<Self, DeviceError> {
        let sizes = device.queue_sizes();
        let (name, kind) = (device.name().to_owned(), device.kind());
        if sizes.len() > layout::MAX_QUEUES {
            return Err(DeviceError::Invalid(format!(
                "{name} would have {} queues; {} is the most",
                sizes.len(),
                layout::MAX_QUEUES
            )));
        }
        let kicks = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<Result<_, _>>();
        let kicks = kicks.map_err(|source| DeviceError::Host {
            what: format!("no event file descriptor for {name}; raise the limit of open files"),
            source,
        })?;
        let queues = sizes.len() as u16;
        let interrupts = Arc::new(Interrupts::new(queues, msi));
        let (config, capabilities) = layout::config_space(kind.number(), queues + 1);
        let common = Common::new(name, device.offered_features(), &sizes, interrupts.clone());
        let inner = Inner {
            config,
            capabilities,
            common,
            device,
            interrupts: interrupts.clone(),
            ram,
            binder,
            kicks,
            bar_at: None,
            activity: Activity::Live { started: false },
            complaints: LogOnce::new(),
        };
        Ok(Self {
            slot,
            interrupts,
            inner: Mutex::new(inner),
        })
    }

    /// How many MSI-X vectors a device of so many queues has.
    pub fn vectors(queues: usize) -> usize {
        queues + 1
    }

    /// Whether the driver may reset queues one by one. Not every version of this program can take such a device over.
    pub fn resets_queues(&self) -> bool {
        self.lock().common.features() & RING_RESET != 0
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn start(&mut self) {
        if self.activity != (Activity::Live { started: false })
            || !self.common.is_driver_ok()
            || self.interrupts.is_reset_needed()
        {
            return;
        }
        let outcome = self.activation().and_then(|work| self.device.start(work));
        match outcome {
            Ok(()) => {
                self.activity = Activity::Live { started: true };
                // Whatever was asked before the device listened is looked at now.
                for (queue, kick) in self.common.queues().iter().zip(&self.kicks) {
                    if queue.enabled {
                        kick_once(kick);
                    }
                }
            }
            Err(error) => self.break_down(&error.to_string()),
        }
    }

    fn activation(&self) -> Result<Activation, DeviceError> {
        let features = self.common.features();
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::new();
        for ((index, slot), kick) in (0u16..).zip(self.common.queues()).zip(&self.kicks) {
            if slot.enabled {
                let device = || self.device.name().to_owned();
                let queue = slot
                    .open(&self.ram, event_idx)
                    .map_err(|why| DeviceError::Queue {
                        device: device(),
                        index,
                        why,
                    })?;
                let kick = kick.try_clone().map_err(|source| DeviceError::Io {
                    device: device(),
                    what: "no event file descriptor for a queue; raise the limit of open files",
                    source,
                })?;
                queues.push(ActiveQueue { index, queue, kick });
            }
        }
        Ok(Activation {
            ram: self.ram.clone(),
            features,
            queues,
            interrupt: self.interrupts.clone(),
        })
    }

    /// Stops the device and takes the positions of its queues back.
    fn stop(&mut self) {
        if self.activity != (Activity::Live { started: true }) {
            return;
        }
        self.activity = Activity::Live { started: false };
        let returned = self.device.stop();
        let enabled = self.common.queues().iter().filter(|queue| queue.enabled).count();
        if returned.len() != enabled {
            self.break_down("its thread died and took queues with it");
        }
        for (index, queue) in &returned {
            if let Some(slot) = self.common.queue_mut(*index) {
                slot.close(queue);
            }
        }
    }

    fn reset(&mut self) {
        self.stop();
        self.device.reset();
        self.interrupts.reset();
        self.common.reset();
        for kick in &self.kicks {
            // What was asked of the old driver's queues is forgotten. It fails only when there is nothing.
            let _ = kick.read();
        }
    }

    /// Takes one queue away from a device at work. The device stops for it, which completes what is in flight, and goes on
    /// with the other queues where they were: as for a pause, and nobody but the driver of this device notices.
    fn reset_queue(&mut self, index: u16) {
        self.stop();
        self.common.forget_queue(index);
        if let Some(kick) = self.kicks.get(usize::from(index)) {
            // What was asked of the old queue is forgotten.
            let _ = kick.read();
        }
        self.start();
    }

    fn add_queue(&mut self, index: u16) {
        // As when it was enabled first: what cannot work breaks the device down, and the others stop, too.
        self.stop();
        if let Some(queue) = self.common.queue_mut(index) {
            queue.enabled = true;
        }
        self.check(index);
        self.start();
    }

    fn break_down(&self, why: &str) {
        self.complaints
            .warn(|| format!("{} needs a reset by its driver: {why}", self.device.name()));
        self.interrupts.needs_reset();
    }

    fn read_bar(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match Region::of(offset, data.len()) {
            Some(Region::Common(at)) => self.common.read(at, data),
            Some(Region::Isr(at)) => {
                data.fill(0);
                if let (0, [first, ..]) = (at, data) {
                    *first = self.interrupts.take_isr();
                }
            }
            Some(Region::Device(at)) => {
                data.fill(0);
                self.device.read_config(at, data);
            }
            Some(Region::Notify(_)) => data.fill(0),
            Some(Region::Table(at)) => self.interrupts.msix().read_table(at, data),
            Some(Region::Pending(at)) => self.interrupts.msix().read_pending(at, data),
            None => {}
        }
    }

    fn write_bar(&mut self, offset: u64, data: &[u8]) {
        match Region::of(offset, data.len()) {
            Some(Region::Common(at)) => match self.common.write(at, data) {
                Effect::Nothing => {}
                Effect::Reset => self.reset(),
                Effect::Start => self.start(),
                Effect::Check(index) => self.check(index),
                Effect::ResetQueue(index) => self.reset_queue(index),
                Effect::AddQueue(index) => self.add_queue(index),
            },
            Some(Region::Device(at)) => self.device.write_config(at, data),
            Some(Region::Notify(at)) => {
                let index = usize::try_from(at / layout::NOTIFY_STRIDE).ok();
                if let Some(kick) = index.and_then(|index| self.kicks.get(index)) {
                    kick_once(kick);
                }
            }
            Some(Region::Table(at)) => self.interrupts.msix().write_table(at, data),
            Some(Region::Isr(_) | Region::Pending(_)) | None => {}
        }
    }

    /// A queue that cannot work is refused when it is enabled, not when it is first used.
    fn check(&mut self, index: u16) {
        let broken = self
            .common
            .queue_mut(index)
            .and_then(|slot| slot.open(&self.ram, false).err());
        if let Some(why) = broken {
            self.break_down(&format!("queue {index} cannot be used: {why}"));
        }
    }

    /// The window capability's register as it was written: BAR, offset and length.
    fn window(&self) -> Option<(u64, usize)> {
        let at = self.capabilities.window;
        let bar = self.config.u32(at + layout::WINDOW_BAR) as u8;
        let length = self.config.u32(at + layout::WINDOW_LENGTH);
        let valid = bar == 0 && matches!(length, 1 | 2 | 4);
        valid.then(|| {
            (
                u64::from(self.config.u32(at + layout::WINDOW_OFFSET)),
                length as usize,
            )
        })
    }

    fn touches_window(&self, offset: u16, len: usize) -> bool {
        let data = self.capabilities.window + layout::WINDOW_DATA;
        usize::from(offset) < data + 4 && data < usize::from(offset) + len
    }

    fn bind(&self) {
        for ((index, kick), at) in (0u64..).zip(&self.kicks).zip(std::iter::repeat(self.bar_at)) {
            let Some(at) = at else { return };
            let address = at + layout::NOTIFY.start + index * layout::NOTIFY_STRIDE;
            if let Err(error) = self.binder.bind(address, kick) {
                self.complaints
                    .warn(|| format!("{}: notifications go the slow way: {error}", self.device.name()));
            }
        }
    }

    fn unbind(&self) {
        for ((index, kick), at) in (0u64..).zip(&self.kicks).zip(std::iter::repeat(self.bar_at)) {
            let Some(at) = at else { return };
            self.binder
                .unbind(at + layout::NOTIFY.start + index * layout::NOTIFY_STRIDE, kick);
        }
    }
}

/// Signals an event; it fails only when it is signalled to the brim.
fn kick_once(kick: &EventFd) {
    let _ = kick.write(1);
}

/// A place inside the BAR, with the offset inside its region.
enum Region {
    Common(u64),
    Isr(u64),
    Device(u64),
    Notify(u64),
    Table(u64),
    Pending(u64),
}

impl Region {
    /// None for a hole, and for an access across a border.
    fn of(offset: u64, len: usize) -> Option<Self> {
        type Make = fn(u64) -> Region;
        let make: [(Range<u64>, Make); 6] = [
            (layout::COMMON, Self::Common),
            (layout::ISR, Self::Isr),
            (layout::DEVICE, Self::Device),
            (layout::NOTIFY, Self::Notify),
            (layout::MSIX_TABLE, Self::Table),
            (layout::MSIX_PENDING, Self::Pending),
        ];
        let end = offset.checked_add(len as u64)?;
        let (range, region) = make.into_iter().find(|(range, _)| range.contains(&offset))?;
        (end <= range.end).then(|| region(offset - range.start))
    }
}

impl BusDevice for VirtioPci {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.lock().read_bar(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.lock().write_bar(offset, data);
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut inner = self.lock();
        if inner.touches_window(offset, data.len())
            && let Some((at, len)) = inner.window()
        {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..len) {
                inner.read_bar(at, value);
            }
            let register = inner.capabilities.window + layout::WINDOW_DATA;
            inner.config.write(register as u16, &value);
        }
        inner.config.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let mut inner = self.lock();
        inner.config.write(offset, data);
        let control = inner.config.u16(inner.capabilities.msix_control);
        self.interrupts.msix().set_control(control);
        if inner.touches_window(offset, data.len())
            && let Some((at, len)) = inner.window()
        {
            let value = inner
                .config
                .u32(inner.capabilities.window + layout::WINDOW_DATA)
                .to_le_bytes();
            inner.write_bar(at, value.get(..len).unwrap_or_default());
        }
    }

    fn bar_size(&self) -> u32 {
        self.lock().config.bar_size()
    }

    fn place_bar(&self, address: u32) {
        self.lock().config.place_bar(address);
    }

    fn bar(&self) -> Option<Range<u64>> {
        self.lock().config.bar()
    }

    fn bar_mapped(&self, at: Option<u64>) {
        let mut inner = self.lock();
        inner.unbind();
        inner.bar_at = at;
        inner.bind();
    }

    fn pause(&self) {
        let mut inner = self.lock();
        inner.stop();
        if let Activity::Live { .. } = inner.activity {
            inner.activity = Activity::Paused { restored: false };
        }
    }

    fn resume(&self) {
        let mut inner = self.lock();
        let Activity::Paused { restored } = inner.activity else {
            return;
        };
        inner.activity = Activity::Live { started: false };
        inner.start();
        if restored && inner.common.is_driver_ok() {
            self.interrupts.send_all();
        }
    }
}

impl Stateful for VirtioPci {
    fn key(&self) -> RecordKey {
        RecordKey::new("virtio-pci", u32::from(self.slot))
    }

    fn save(&self) -> Result<Record, StateError> {
        let inner = self.lock();
        if let Activity::Live { .. } = inner.activity {
            return Err(StateError::Encode {
                name: inner.device.name().to_owned(),
                why: "it is at work; pause it first".to_owned(),
            });
        }
        let DeviceState {
            version: device_version,
            body: device,
        } = inner.device.save()?;
        let mut window = [0; 16];
        inner.config.read(
            (inner.capabilities.window + layout::WINDOW_BAR) as u16,
            &mut window,
        );
        let saved = Saved {
            kind: inner.device.kind().number(),
            header: inner.config.save(),
            window,
            interrupts: self.interrupts.save(),
            registers: inner.common.save(),
            device_version,
            device,
        };
        Record::required(self.key(), VERSION, &saved)
    }

    fn restore(&self, record: &Record) -> Result<(), StateError> {
        let Saved {
            kind,
            header,
            window,
            interrupts,
            registers,
            device_version,
            device,
        } = record.read(&self.key(), VERSION)?;
        let mut inner = self.lock();
        let name = inner.device.name().to_owned();
        let mismatch = |why: String| StateError::Mismatch {
            name: name.clone(),
            why,
        };
        let here = inner.device.kind().number();
        if kind != here {
            return Err(mismatch(format!(
                "slot {} holds virtio device {here} and not {kind}",
                self.slot
            )));
        }
        inner.stop();
        inner.activity = Activity::Paused { restored: true };
        inner.common.restore(registers).map_err(mismatch)?;
        if !self.interrupts.restore(&interrupts) {
            return Err(mismatch("it has another number of interrupts".to_owned()));
        }
        inner.config.restore(&header);
        let window_at = inner.capabilities.window + layout::WINDOW_BAR;
        inner.config.write(window_at as u16, &window);
        let control = self.interrupts.msix().control().to_le_bytes();
        let control_at = inner.capabilities.msix_control;
        inner.config.write(control_at as u16, &control);
        inner.device.restore(&DeviceState {
            version: device_version,
            body: device,
        })
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        inner.stop();
        inner.unbind();
    }
}
