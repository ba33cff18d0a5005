//! Interrupts from devices into KVM: lines of the IOAPIC, and messages by routing entries with an event each (irqfd).
//!
//! A message that is on its way inside KVM when the APICs are saved would be lost; therefore a restored function sends each
//! of its interrupts once (`VirtioPci`), and nothing is waited for here.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ferry_devices::error::DeviceError;
use ferry_devices::irq::{IrqLine, MsiController, MsiMessage};
use ferry_devices::log_once::LogOnce;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Doing, Result};
use crate::kvm::vm::Vm;
use crate::layout::IOAPIC_PINS;

/// An edge-triggered line. Set by ioctl, not by event: when `trigger` returns the interrupt is in the controller's
/// state, and no save can miss it.
struct Line {
    vm: Arc<Vm>,
    gsi: u32,
    failed: LogOnce,
}

impl IrqLine for Line {
    fn trigger(&self) {
        let pulse = self
            .vm
            .fd
            .set_irq_line(self.gsi, true)
            .and_then(|()| self.vm.fd.set_irq_line(self.gsi, false));
        if let Err(errno) = pulse {
            self.failed
                .warn(|| format!("interrupt {} was not delivered: {errno}", self.gsi));
        }
    }
}

/// All interrupts of one machine.
pub struct Interrupts {
    vm: Arc<Vm>,
    table: Mutex<Table>,
}

struct Table {
    /// What each message interrupt says; those without an entry are masked.
    messages: BTreeMap<u32, MsiMessage>,
    next: u32,
    /// While a machine is being restored the table is written once, at the end.
    held: bool,
}

impl Interrupts {
    pub fn new(vm: Arc<Vm>) -> Result<Arc<Interrupts>> {
        let table = Table {
            messages: BTreeMap::new(),
            next: IOAPIC_PINS,
            held: false,
        };
        let interrupts = Interrupts {
            vm,
            table: Mutex::new(table),
        };
        interrupts.write(&interrupts.lock())?;
        Ok(Arc::new(interrupts))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A pin of the IOAPIC (and of the PICs, for the first 16).
    pub fn line(&self, gsi: u32) -> Arc<dyn IrqLine> {
        Arc::new(Line {
            vm: self.vm.clone(),
            gsi,
            failed: LogOnce::new(),
        })
    }

    /// The message interrupts of one PCI function with so many vectors.
    pub fn messages(self: &Arc<Self>, vectors: usize) -> Result<Arc<Messages>> {
        let mut table = self.lock();
        let first = table.next;
        table.next += vectors as u32;
        drop(table);
        let slots = (first..)
            .take(vectors)
            .map(|gsi| {
                Ok(Slot {
                    gsi,
                    event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                        .doing("make an event for an interrupt")?,
                    armed: AtomicBool::new(false),
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Arc::new(Messages {
            all: self.clone(),
            slots,
            change: Mutex::new(()),
            failed: LogOnce::new(),
        }))
    }

    /// Changes are collected until `release`: writing KVM's table is slow, and a restore sets dozens.
    pub fn hold(&self) {
        self.lock().held = true;
    }

    pub fn release(&self) -> Result<()> {
        let mut table = self.lock();
        table.held = false;
        self.write(&table)
    }

    fn set(&self, gsi: u32, message: Option<MsiMessage>) -> Result<()> {
        let mut table = self.lock();
        let before = match message {
            Some(message) => table.messages.insert(gsi, message),
            None => table.messages.remove(&gsi),
        };
        // A route that is not there any more hurts nobody: its event is taken off KVM.
        if table.held || message.is_none() || before == message {
            return Ok(());
        }
        self.write(&table)
    }

    fn write(&self, table: &Table) -> Result<()> {
        let mut entries: Vec<kvm_irq_routing_entry> = (0..IOAPIC_PINS).flat_map(pin).collect();
        entries.extend(table.messages.iter().map(|(gsi, message)| route(*gsi, message)));
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| std::io::Error::other(format!("{e:?}")))
            .doing("make the table of interrupt routes")?;
        self.vm
            .fd
            .set_gsi_routing(&routing)
            .doing("set the table of interrupt routes")
    }
}

/// Where the interrupt lines of a PC go: the timer to pin 2 of the IOAPIC, every other line to the pin of its number.
fn pin(gsi: u32) -> Vec<kvm_irq_routing_entry> {
    let entry = |irqchip, pin| kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            irqchip: kvm_irq_routing_irqchip { irqchip, pin },
        },
        ..Default::default()
    };
    let mut entries = Vec::new();
    match gsi {
        0..8 => entries.push(entry(KVM_IRQCHIP_PIC_MASTER, gsi)),
        8..16 => entries.push(entry(KVM_IRQCHIP_PIC_SLAVE, gsi - 8)),
        _ => {}
    }
    match gsi {
        0 => entries.push(entry(KVM_IRQCHIP_IOAPIC, 2)),
        2 => {}
        gsi => entries.push(entry(KVM_IRQCHIP_IOAPIC, gsi)),
    }
    entries
}

fn route(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let msi = kvm_irq_routing_msi {
        address_lo: message.address as u32,
        address_hi: (message.address >> 32) as u32,
        data: message.data,
        __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1::default(),
    };
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

struct Slot {
    gsi: u32,
    event: EventFd,
    /// The event is registered with KVM.
    armed: AtomicBool,
}

/// The message interrupts of one PCI function.
pub struct Messages {
    all: Arc<Interrupts>,
    slots: Vec<Slot>,
    /// One change at a time.
    change: Mutex<()>,
    failed: LogOnce,
}

impl Messages {
    fn connect(&self, slot: &Slot) -> Result<()> {
        self.all
            .vm
            .fd
            .register_irqfd(&slot.event, slot.gsi)
            .doing("connect an interrupt")
    }

    fn disconnect(&self, slot: &Slot) -> Result<()> {
        self.all
            .vm
            .fd
            .unregister_irqfd(&slot.event, slot.gsi)
            .doing("disconnect an interrupt")
    }
}

impl MsiController for Messages {
    fn set(&self, slot: usize, message: Option<MsiMessage>) -> Result<(), DeviceError> {
        let slots = self.slots.len();
        let slot = self
            .slots
            .get(slot)
            .ok_or(DeviceError::NoSuchVector { slot, slots })?;
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = |e: crate::error::MachineError| DeviceError::Invalid(e.to_string());
        self.all.set(slot.gsi, message).map_err(refused)?;
        let armed = slot.armed.load(Ordering::Acquire);
        match (armed, message.is_some()) {
            (false, true) => {
                self.connect(slot).map_err(refused)?;
                slot.armed.store(true, Ordering::Release);
            }
            (true, false) => {
                slot.armed.store(false, Ordering::Release);
                self.disconnect(slot).map_err(refused)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn trigger(&self, slot: usize) {
        let Some(slot) = self
            .slots
            .get(slot)
            .filter(|slot| slot.armed.load(Ordering::Acquire))
        else {
            return;
        };
        if let Err(error) = slot.event.write(1) {
            self.failed
                .warn(|| format!("a message interrupt was not delivered: {error}"));
        }
    }
}
