//! One queue as the driver sets it up, and the checks before a device may touch it.

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use crate::ram::Ram;

/// The driver's settings and, while no device owns the queue, its position.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueSlot {
    pub(super) max_size: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) desc_table: u64,
    pub(super) avail_ring: u64,
    pub(super) used_ring: u64,
    next_avail: u16,
    next_used: u16,
    /// The driver has reset it alone and may set it up again while the device works.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(super) was_reset: bool,
}

impl QueueSlot {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            enabled: false,
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            next_avail: 0,
            next_used: 0,
            was_reset: false,
        }
    }

    /// The queue at its position, or why it cannot be used.
    pub(super) fn open(&self, ram: &Ram, event_idx: bool) -> Result<Queue, String> {
        let Self {
            max_size,
            size,
            enabled,
            desc_table,
            avail_ring,
            used_ring,
            next_avail,
            next_used,
            was_reset: _,
        } = *self;
        let entries = u64::from(size);
        let areas = [
            ("descriptor table", desc_table, 16 * entries, Permissions::Read),
            ("available ring", avail_ring, 6 + 2 * entries, Permissions::Read),
            ("used ring", used_ring, 6 + 8 * entries, Permissions::Write),
        ];
        for (what, address, len, permissions) in areas {
            // virtio-queue takes an available ring at 0 for one that was never set.
            if address == 0 || !ram.check_range(GuestAddress(address), len as usize, permissions) {
                return Err(format!("its {what} at {address:#x} is not in memory"));
            }
        }
        let state = QueueState {
            max_size,
            next_avail,
            next_used,
            event_idx_enabled: event_idx,
            size,
            ready: enabled,
            desc_table,
            avail_ring,
            used_ring,
        };
        Queue::try_from(state).map_err(|error| error.to_string())
    }

    /// Takes the position back from the device.
    pub(super) fn close(&mut self, queue: &Queue) {
        self.next_avail = queue.next_avail();
        self.next_used = queue.next_used();
    }
}
