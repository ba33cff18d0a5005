//! What the network device needs of a queue beyond virtio-queue: several used buffers published at once, and
//! interrupts only when the driver wants them.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::ram::Ram;

/// The guest's rings cannot be used. The device needs a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("the available ring lies outside memory or its index jumped")]
    Available,
    #[error("the used ring lies outside memory")]
    Used,
    #[error("a descriptor points outside memory, or a chain has no usable buffer")]
    Descriptor,
}

const USED_HEADER: u64 = 4;
const USED_ELEMENT: u64 = 8;
const AVAIL_HEADER: u64 = 4;
const AVAIL_ELEMENT: u64 = 2;

/// One queue with the point up to which the driver has been told.
pub(super) struct Ring {
    pub(super) index: u16,
    pub(super) queue: Queue,
    told_up_to: u16,
}

impl Ring {
    pub(super) fn new(index: u16, queue: Queue) -> Self {
        let told_up_to = queue.next_used();
        Self {
            index,
            queue,
            told_up_to,
        }
    }

    /// A frame in several buffers must appear at once: a driver that sees only its first buffer drops it. So all
    /// elements are written before the index moves over them.
    pub(super) fn publish(&mut self, ram: &Ram, used: &[(u16, u32)]) -> Result<(), Broken> {
        let Some(((last_head, last_len), before)) = used.split_last() else {
            return Ok(());
        };
        for (head, len) in before {
            let slot = self.queue.next_used() % self.queue.size().max(1);
            let address = self
                .queue
                .used_ring()
                .checked_add(USED_HEADER + u64::from(slot) * USED_ELEMENT)
                .ok_or(Broken::Used)?;
            let element = u64::from(*head) | u64::from(*len) << 32;
            ram.write_obj(element.to_le(), GuestAddress(address))
                .map_err(|_| Broken::Used)?;
            self.queue.set_next_used(self.queue.next_used().wrapping_add(1));
        }
        self.queue
            .add_used(ram, *last_head, *last_len)
            .map_err(|_| Broken::Used)
    }

    /// Whether the driver wants to hear of what was published since the last call.
    pub(super) fn wants_interrupt(&mut self, ram: &Ram) -> bool {
        let new = self.queue.next_used();
        let old = std::mem::replace(&mut self.told_up_to, new);
        if new == old {
            return false;
        }
        // The used index must be visible before the driver's wish is read, or both sides miss each other.
        fence(Ordering::SeqCst);
        let avail = self.queue.avail_ring();
        if self.queue.event_idx_enabled() {
            let size = u64::from(self.queue.size());
            return match load(ram, avail.checked_add(AVAIL_HEADER + size * AVAIL_ELEMENT)) {
                Some(event) => new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old),
                None => true,
            };
        }
        load(ram, Some(avail)).is_none_or(|flags| u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks to be kicked for the next available buffer. True: there are some already.
    pub(super) fn ask_for_kick(&mut self, ram: &Ram) -> Result<bool, Broken> {
        self.queue.enable_notification(ram).map_err(|_| Broken::Available)
    }

    /// Spares the driver kicks while we are looking at the ring anyway.
    pub(super) fn spare_kicks(&mut self, ram: &Ram) -> Result<(), Broken> {
        self.queue.disable_notification(ram).map_err(|_| Broken::Used)
    }

    /// Puts back the last `count` chains that were taken and not used.
    pub(super) fn put_back(&mut self, count: u16) {
        let next = self.queue.next_avail().wrapping_sub(count);
        self.queue.set_next_avail(next);
    }
}

fn load(ram: &Ram, address: Option<u64>) -> Option<u16> {
    ram.load(GuestAddress(address?), Ordering::Relaxed)
        .ok()
        .map(u16::from_le)
}
