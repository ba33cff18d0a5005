//! The common configuration registers: features, status and queue set-up, and what may be changed when.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};

use super::interrupts::Interrupts;
use super::queue::QueueSlot;
use crate::log_once::LogOnce;

pub(super) const ACKNOWLEDGE: u8 = VIRTIO_CONFIG_S_ACKNOWLEDGE as u8;
pub(super) const DRIVER: u8 = VIRTIO_CONFIG_S_DRIVER as u8;
pub(super) const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
pub(super) const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
pub(super) const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;
const FAILED: u8 = VIRTIO_CONFIG_S_FAILED as u8;
const STATUS_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
pub(super) const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

pub(super) const RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;

const LEN: usize = 0x40;
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;
const QUEUE_RESET: u64 = 0x3a;

/// The registers. `offered` includes what the transport itself offers: VERSION_1 and RING_RESET.
pub(super) struct Common {
    name: String,
    offered: u64,
    interrupts: Arc<Interrupts>,
    registers: Registers,
    ignored: LogOnce,
}

#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub(super) struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    status: u8,
    queue_select: u16,
    queues: Vec<QueueSlot>,
}

/// What a write asks the function to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// Stop the device and forget its driver; `reset` of these registers included.
    Reset,
    /// DRIVER_OK was set just now.
    Start,
    /// A queue was enabled; see whether it can be used.
    Check(u16),
    /// A queue of a device at work is to be taken away from it; `forget_queue` of these registers included.
    ResetQueue(u16),
    /// The same queue is to be used again: stop, enable it, see whether it can be used, and start.
    AddQueue(u16),
}

impl Common {
    pub(super) fn new(name: String, offered: u64, queue_sizes: &[u16], interrupts: Arc<Interrupts>) -> Self {
        let registers = Registers {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|size| QueueSlot::new(*size)).collect(),
        };
        Self {
            name,
            offered: offered | VERSION_1 | RING_RESET,
            interrupts,
            registers,
            ignored: LogOnce::new(),
        }
    }

    pub(super) fn features(&self) -> u64 {
        self.registers.driver_features
    }

    /// Whether the driver has finished its set-up.
    pub(super) fn is_driver_ok(&self) -> bool {
        self.registers.status & DRIVER_OK != 0
    }

    pub(super) fn queues(&self) -> &[QueueSlot] {
        &self.registers.queues
    }

    pub(super) fn queue_mut(&mut self, index: u16) -> Option<&mut QueueSlot> {
        self.registers.queues.get_mut(usize::from(index))
    }

    pub(super) fn reset(&mut self) {
        let Registers {
            device_feature_select,
            driver_feature_select,
            driver_features,
            status,
            queue_select,
            queues,
        } = &mut self.registers;
        (*device_feature_select, *driver_feature_select, *driver_features) = (0, 0, 0);
        (*status, *queue_select) = (0, 0);
        queues
            .iter_mut()
            .for_each(|queue| *queue = QueueSlot::new(queue.max_size));
    }

    /// The queue as before the driver set it up.
    pub(super) fn forget_queue(&mut self, index: u16) {
        if let Some(queue) = self.queue_mut(index) {
            *queue = QueueSlot::new(queue.max_size);
            queue.was_reset = true;
        }
    }

    fn status(&self) -> u8 {
        self.registers.status
            | if self.interrupts.is_reset_needed() {
                NEEDS_RESET
            } else {
                0
            }
    }

    fn selected(&self) -> Option<&QueueSlot> {
        self.registers
            .queues
            .get(usize::from(self.registers.queue_select))
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        for (at, byte) in data.iter_mut().enumerate() {
            let from = usize::try_from(offset)
                .ok()
                .and_then(|offset| image.get(offset.checked_add(at)?));
            *byte = from.copied().unwrap_or(0);
        }
    }

    /// All registers as they read now.
    fn image(&self) -> [u8; LEN] {
        let Registers {
            device_feature_select,
            driver_feature_select,
            driver_features,
            queue_select,
            ..
        } = &self.registers;
        let half = |features: u64, select: u32| match select {
            0 => features as u32,
            1 => (features >> 32) as u32,
            _ => 0,
        };
        let mut image = [0; LEN];
        let mut rest = &mut image[..];
        let mut put = |bytes: &[u8]| {
            // The registers fill 0x38 bytes of 0x40.
            if let Some((head, tail)) = std::mem::take(&mut rest).split_at_mut_checked(bytes.len()) {
                head.copy_from_slice(bytes);
                rest = tail;
            }
        };
        put(&device_feature_select.to_le_bytes());
        put(&half(self.offered, *device_feature_select).to_le_bytes());
        put(&driver_feature_select.to_le_bytes());
        put(&half(*driver_features, *driver_feature_select).to_le_bytes());
        put(&self.interrupts.config_vector().to_le_bytes());
        put(&(self.registers.queues.len() as u16).to_le_bytes());
        put(&[self.status(), self.interrupts.generation()]);
        put(&queue_select.to_le_bytes());
        let queue = self.selected().cloned().unwrap_or(QueueSlot::new(0));
        put(&queue.size.to_le_bytes());
        put(&self.interrupts.queue_vector(*queue_select).to_le_bytes());
        put(&u16::from(queue.enabled).to_le_bytes());
        // The notification offset is the index.
        put(&queue_select.to_le_bytes());
        put(&queue.desc_table.to_le_bytes());
        put(&queue.avail_ring.to_le_bytes());
        put(&queue.used_ring.to_le_bytes());
        image
    }

    /// Takes a write of a register's own width (64-bit registers also by halves) and ignores everything else.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let value = data
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        match (offset, data.len()) {
            (STATUS, 1) => return self.write_status(value as u8),
            (DEVICE_FEATURE_SELECT, 4) => self.registers.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.registers.driver_feature_select = value as u32,
            (DRIVER_FEATURE, 4) => self.write_features(value as u32),
            (CONFIG_VECTOR, 2) => self.interrupts.set_config_vector(value as u16),
            (QUEUE_SELECT, 2) => self.registers.queue_select = value as u16,
            (QUEUE_VECTOR, 2) => self
                .interrupts
                .set_queue_vector(self.registers.queue_select, value as u16),
            _ => return self.write_queue(offset, data.len(), value),
        }
        Effect::Nothing
    }

    fn write_status(&mut self, value: u8) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let old = self.registers.status;
        let mut new = old | value & STATUS_BITS;
        if value & old != old {
            self.ignore("clears status bits without a reset");
            return Effect::Nothing;
        }
        let acceptable = |features: u64| features & !self.offered == 0 && features & VERSION_1 != 0;
        if new & FEATURES_OK != 0 && old & FEATURES_OK == 0 && !acceptable(self.registers.driver_features) {
            // The bit stays clear, which is how the driver learns.
            new &= !FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && new & FEATURES_OK == 0 {
            self.ignore("says it is ready without agreed features");
            new &= !DRIVER_OK;
        }
        self.registers.status = new;
        if new & DRIVER_OK != 0 && old & DRIVER_OK == 0 {
            Effect::Start
        } else {
            Effect::Nothing
        }
    }

    fn write_features(&mut self, value: u32) {
        if self.registers.status & FEATURES_OK != 0 {
            self.ignore("changes features after they were agreed");
            return;
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_feature_select {
            0 => *features = *features & !0xffff_ffff | u64::from(value),
            1 => *features = *features & 0xffff_ffff | u64::from(value) << 32,
            // Features beyond 64 do not exist here; a driver writes zeroes.
            _ => {}
        }
    }

    fn write_queue(&mut self, offset: u64, len: usize, value: u64) -> Effect {
        let index = self.registers.queue_select;
        let running = self.is_driver_ok();
        let may_reset = running && self.features() & RING_RESET != 0;
        let Some(queue) = self.queue_mut(index) else {
            return Effect::Nothing;
        };
        // It reads as 0 again at once: when the write is over, so is the reset.
        if (offset, len, value) == (QUEUE_RESET, 2, 1) && may_reset && queue.enabled {
            return Effect::ResetQueue(index);
        }
        if !matches!(offset, QUEUE_SIZE..QUEUE_VECTOR | QUEUE_ENABLE..0x1e | QUEUE_DESC..0x38) {
            return Effect::Nothing;
        }
        if running && !(may_reset && queue.was_reset) || queue.enabled {
            self.ignore("changes a queue that is in use");
            return Effect::Nothing;
        }
        match (offset, len) {
            (QUEUE_SIZE, 2) => queue.size = value as u16,
            (QUEUE_ENABLE, 2) if value == 1 => {
                if running {
                    return Effect::AddQueue(index);
                }
                queue.enabled = true;
                return Effect::Check(index);
            }
            (QUEUE_DESC..=0x27, _) => set_half(&mut queue.desc_table, offset, len, value),
            (QUEUE_DRIVER..=0x2f, _) => set_half(&mut queue.avail_ring, offset, len, value),
            (QUEUE_DEVICE..=0x37, _) => set_half(&mut queue.used_ring, offset, len, value),
            _ => {}
        }
        Effect::Nothing
    }

    fn ignore(&self, what: &str) {
        self.ignored
            .warn(|| format!("{}: the driver {what}; that is ignored", self.name));
    }

    pub(super) fn save(&self) -> Registers {
        self.registers.clone()
    }

    /// Why the state does not fit, if it does not.
    pub(super) fn restore(&mut self, saved: Registers) -> Result<(), String> {
        let sizes = |registers: &Registers| -> Vec<u16> {
            registers.queues.iter().map(|queue| queue.max_size).collect()
        };
        if sizes(&saved) != sizes(&self.registers) {
            return Err("it has other queues".to_owned());
        }
        // A driver may write any features; they count once they are agreed. Refusing the others here would let a guest
        // make its machine impossible to move.
        let agreed = saved.status & (FEATURES_OK | DRIVER_OK) != 0;
        let foreign = saved.driver_features & !self.offered;
        if agreed && foreign != 0 {
            return Err(format!(
                "its driver uses features that are not offered here ({foreign:#x})"
            ));
        }
        if saved.status & !STATUS_BITS != 0 || agreed && saved.driver_features & VERSION_1 == 0 {
            return Err(format!("its status {:#x} contradicts its features", saved.status));
        }
        self.registers = saved;
        Ok(())
    }
}

/// Writes a 64-bit register whole or by halves.
fn set_half(register: &mut u64, offset: u64, len: usize, value: u64) {
    match (offset % 8, len) {
        (0, 8) => *register = value,
        (0, 4) => *register = *register & !0xffff_ffff | value,
        (4, 4) => *register = *register & 0xffff_ffff | value << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Messages;

    fn registers(offered: u64) -> Common {
        let interrupts = Arc::new(Interrupts::new(1, Arc::new(Messages::default())));
        Common::new("test".to_owned(), offered, &[64], interrupts)
    }

    fn write_features(common: &mut Common, features: u64) {
        for half in 0..2u64 {
            common.write(DRIVER_FEATURE_SELECT, &(half as u32).to_le_bytes());
            common.write(DRIVER_FEATURE, &((features >> (32 * half)) as u32).to_le_bytes());
        }
    }

    #[test]
    fn a_driver_does_not_move_to_a_device_without_the_features_it_uses() {
        let mut rich = registers(1 << 29);
        write_features(&mut rich, 1 << 29 | VERSION_1);
        rich.write(STATUS, &[ACKNOWLEDGE | DRIVER | FEATURES_OK]);
        let refusal = registers(0).restore(rich.save()).unwrap_err();
        assert!(refusal.contains("0x20000000"), "{refusal}");
        registers(1 << 29 | 1 << 5).restore(rich.save()).unwrap();
    }

    #[test]
    fn a_guest_cannot_make_its_machine_impossible_to_move_by_asking_for_features() {
        let mut common = registers(0);
        write_features(&mut common, u64::MAX);
        common.write(STATUS, &[ACKNOWLEDGE | DRIVER | FEATURES_OK]);
        registers(0).restore(common.save()).unwrap();
    }

    #[test]
    fn a_status_that_contradicts_itself_is_refused() {
        let mut saved = registers(0).save();
        saved.status = DRIVER_OK;
        assert!(registers(0).restore(saved.clone()).is_err());
        saved.status = 0x10;
        assert!(registers(0).restore(saved).is_err());
    }
}
