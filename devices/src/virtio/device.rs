//! The contract between a virtio device and the transport that carries it.
//!
//! A device owns its queues only between `start` and `stop`. Stopping is the one mechanism for pause, reset and
//! save: it drains what is in flight, joins the device's threads and hands the queues back at their positions.
//! Starting again with the same queues is resume; with restored queues it is the far end of a crossing.

use std::sync::Arc;

use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::error::DeviceError;
use crate::ram::Ram;
use crate::state::StateError;

/// Every virtio device there is, by its number in the specification. The one list of them: the tests that every
/// device must pass (`virtio::tests`) match on it, so a device that is not tested does not compile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum VirtioKind {
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
}

impl VirtioKind {
    pub fn number(self) -> u16 {
        self as u16
    }
}

/// The device's own part of the saved state, without transport and queues.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceState {
    pub version: u32,
    /// Named-field MessagePack, by `state::encode_body`.
    pub body: Vec<u8>,
}

impl DeviceState {
    /// The body, if this program knows the version.
    pub fn body_up_to(&self, known: u32, name: &str) -> Result<&[u8], StateError> {
        let Self { version: found, body } = self;
        if *found > known {
            return Err(StateError::Version {
                name: name.to_owned(),
                found: *found,
                known,
            });
        }
        Ok(body)
    }
}

/// One virtio device. The transport calls it under a lock, from vCPU threads and from the machine's thread.
pub trait VirtioDevice: Send {
    fn kind(&self) -> VirtioKind;
    /// A name for messages, threads and state records, such as "disk0".
    fn name(&self) -> &str;
    /// Device features and ring features. The transport adds VERSION_1 itself.
    fn offered_features(&self) -> u64;
    /// The largest size of each queue, each a power of two. Fixed for the life of the device.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads device configuration. Any offset and width: what is not there reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes device configuration. Any offset and width: what is not writable is ignored. May come while running.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Takes the queues the guest has enabled and begins to serve them, on named threads. The transport has
    /// checked each queue with `is_valid`, has set `event_idx`, and kicks each queue once after this returns.
    /// On an error nothing runs, and the transport sets NEEDS_RESET.
    fn start(&mut self, work: Activation) -> Result<(), DeviceError>;
    /// Finishes what is in flight, joins the threads and returns every queue `start` was given, in any order.
    /// A device that is not running returns nothing. Never blocks on the guest or on a client.
    fn stop(&mut self) -> Vec<(u16, Queue)>;
    /// The guest has reset the device; it is stopped. Forget what the driver negotiated and told (not what the
    /// user configured). The next `start` is a new driver's.
    fn reset(&mut self);

    /// Only called while stopped.
    fn save(&self) -> Result<DeviceState, StateError>;
    /// Only called while stopped, on a device made with the same configuration.
    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError>;
}

/// All that a device needs to work.
pub struct Activation {
    pub ram: Ram,
    /// What driver and device agreed on.
    pub features: u64,
    /// The queues the guest has enabled, by rising index. Others do not exist for this activation.
    pub queues: Vec<ActiveQueue>,
    pub interrupt: Arc<dyn VirtioInterrupt>,
}

/// One enabled queue and the event that says there is something in it.
pub struct ActiveQueue {
    pub index: u16,
    pub queue: Queue,
    pub kick: EventFd,
}

/// What every device here can do with a ring.
pub const RING_FEATURES: u64 = 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// Queues as `stop` hands them back.
pub fn handed_back(queues: Vec<ActiveQueue>) -> Vec<(u16, Queue)> {
    let without_event = |active: ActiveQueue| (active.index, active.queue);
    queues.into_iter().map(without_event).collect()
}

/// How a device speaks up. Cheap, callable from any thread.
pub trait VirtioInterrupt: Send + Sync {
    /// Something was added to the used ring of this queue.
    fn queue(&self, index: u16);
    /// The device configuration has changed.
    fn config_changed(&self);
    /// The guest broke the rules so that the device cannot go on: sets DEVICE_NEEDS_RESET and tells the driver.
    fn needs_reset(&self);
}

impl Activation {
    pub fn has(&self, feature_bit: u32) -> bool {
        feature_bit < 64 && self.features & (1 << feature_bit) != 0
    }
}
