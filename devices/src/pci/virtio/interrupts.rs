//! How a virtio function interrupts its driver. Apart from the function's own lock, because a device's thread speaks
//! up while the function waits for that very thread to stop.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::irq::MsiController;
use crate::pci::msix::{Msix, NO_VECTOR, SavedMsix};
use crate::virtio::device::VirtioInterrupt;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

pub(super) struct Interrupts {
    msix: Mutex<Msix>,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
}

#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
pub(super) struct SavedInterrupts {
    msix: SavedMsix,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
    generation: u8,
    needs_reset: bool,
}

impl Interrupts {
    pub(super) fn new(queues: u16, controller: Arc<dyn MsiController>) -> Self {
        Self {
            msix: Mutex::new(Msix::new(queues.saturating_add(1), controller)),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
        }
    }

    pub(super) fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets what the driver set up here. The MSI-X table is PCI's and stays.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        self.queue_vectors
            .iter()
            .for_each(|vector| vector.store(NO_VECTOR, Ordering::SeqCst));
        self.isr.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::SeqCst);
    }

    pub(super) fn queue_vector(&self, index: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(index))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    pub(super) fn set_queue_vector(&self, index: u16, vector: u16) {
        if let Some(stored) = self.queue_vectors.get(usize::from(index)) {
            stored.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    /// A vector that does not exist reads back as none, which tells the driver so.
    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix().len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    /// Reading the interrupt status clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::SeqCst)
    }

    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub(super) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    fn send(&self, vector: u16, isr: u8) {
        let mut msix = self.msix();
        if msix.enabled() {
            msix.trigger(vector);
        } else {
            // There is no interrupt line; a driver that polls finds it here.
            self.isr.fetch_or(isr, Ordering::SeqCst);
        }
    }

    /// Every interrupt once: one that was on its way inside the old host's KVM may not have travelled, and a driver
    /// takes one too many without harm.
    pub(super) fn send_all(&self) {
        for vector in &self.queue_vectors {
            let vector = vector.load(Ordering::SeqCst);
            if vector != NO_VECTOR {
                self.send(vector, ISR_QUEUE);
            }
        }
        let config = self.config_vector();
        if config != NO_VECTOR {
            self.send(config, ISR_CONFIG);
        }
    }

    pub(super) fn save(&self) -> SavedInterrupts {
        let Self {
            msix: _,
            config_vector,
            queue_vectors,
            isr,
            generation,
            needs_reset,
        } = self;
        SavedInterrupts {
            msix: self.msix().save(),
            config_vector: config_vector.load(Ordering::SeqCst),
            queue_vectors: queue_vectors
                .iter()
                .map(|vector| vector.load(Ordering::SeqCst))
                .collect(),
            isr: isr.load(Ordering::SeqCst),
            generation: generation.load(Ordering::SeqCst),
            needs_reset: needs_reset.load(Ordering::SeqCst),
        }
    }

    /// False if the state is of a function with another number of queues.
    pub(super) fn restore(&self, saved: &SavedInterrupts) -> bool {
        let SavedInterrupts {
            msix,
            config_vector,
            queue_vectors,
            isr,
            generation,
            needs_reset,
        } = saved;
        if queue_vectors.len() != self.queue_vectors.len() || !self.msix().restore(msix) {
            return false;
        }
        self.set_config_vector(*config_vector);
        (0u16..)
            .zip(queue_vectors)
            .for_each(|(index, vector)| self.set_queue_vector(index, *vector));
        self.isr.store(*isr, Ordering::SeqCst);
        self.generation.store(*generation, Ordering::SeqCst);
        self.needs_reset.store(*needs_reset, Ordering::SeqCst);
        true
    }
}

impl VirtioInterrupt for Interrupts {
    fn queue(&self, index: u16) {
        self.send(self.queue_vector(index), ISR_QUEUE);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.send(self.config_vector(), ISR_CONFIG);
    }

    fn needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.config_changed();
        }
    }
}
