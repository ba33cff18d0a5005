//! virtio-blk: a disk for the guest, over any image, with several queues.

mod config;
mod flights;
mod queue;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES};
use virtio_queue::{Queue, QueueT};

use self::config::{QUEUE_SIZE, Shape};
use self::flights::{Flights, Shared};
use self::queue::BlockQueue;
use super::device::{Activation, ActiveQueue, DeviceState, VirtioDevice, VirtioKind};
use super::worker::Worker;
use crate::disk::{Disk, DiskCache, engine};
use crate::error::DeviceError;
use crate::log_once::LogOnce;
use crate::state::{StateError, decode_body, encode_body};

const STATE_VERSION: u32 = 1;
const MAX_QUEUES: u16 = 64;

/// The block device of one disk.
pub struct BlockDevice {
    shape: Shape,
    shared: Arc<Shared>,
    /// What the guest wrote to the `writeback` field, or the default.
    wants_writeback: bool,
    running: Vec<Worker<BlockQueue>>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    shape: Shape,
    wants_writeback: bool,
}

impl BlockDevice {
    /// `name` is for messages and threads, such as "disk0"; `serial` is what the guest sees.
    pub fn new(name: &str, disk: Arc<Disk>, serial: Option<&str>, queues: u16) -> Result<Self, DeviceError> {
        let serial = serial.unwrap_or(name);
        if serial.len() > VIRTIO_BLK_ID_BYTES as usize {
            return Err(DeviceError::Invalid(format!(
                "the serial number {serial:?} of {name} is longer than {VIRTIO_BLK_ID_BYTES} bytes"
            )));
        }
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(DeviceError::Invalid(format!(
                "{name} can have 1 to {MAX_QUEUES} queues, not {queues}"
            )));
        }
        let shape = Shape {
            size: disk.size(),
            block_size: disk.block_size(),
            discard_granularity: u32::try_from(disk.discard_granularity()).unwrap_or(4096),
            read_only: disk.is_read_only(),
            queues,
            serial: serial.to_owned(),
        };
        let wants_writeback = writeback_by_default(&disk);
        let shared = Shared {
            name: name.to_owned(),
            disk,
            writeback: AtomicBool::new(wants_writeback),
            refused: LogOnce::new(),
            failed: LogOnce::new(),
            broken: LogOnce::new(),
        };
        Ok(Self {
            shape,
            shared: Arc::new(shared),
            wants_writeback,
            running: Vec::new(),
        })
    }

    pub fn disk(&self) -> &Arc<Disk> {
        &self.shared.disk
    }

    fn spawn(&self, work: &Activation, queue: ActiveQueue) -> Result<Worker<BlockQueue>, DeviceError> {
        let ActiveQueue { index, queue, kick } = queue;
        let name = format!("{}-q{index}", self.shared.name);
        let failed = |what| {
            let device = self.shared.name.clone();
            move |source| DeviceError::Io { device, what, source }
        };
        let engine = engine::for_queue(&self.shared.disk, usize::from(queue.size()), &name)
            .map_err(failed("it has no way to its image"))?;
        let flights = Flights::new(
            Arc::clone(&self.shared),
            work.ram.clone(),
            self.shape.serial.clone(),
            work.has(VIRTIO_BLK_F_FLUSH),
            engine,
            usize::from(queue.size()),
        );
        let queue = BlockQueue::new(index, queue, kick, Arc::clone(&work.interrupt), flights)
            .map_err(failed("it cannot get a timer"))?;
        Worker::spawn(&name, queue).map_err(failed("it cannot start a thread"))
    }
}

impl VirtioDevice for BlockDevice {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Block
    }

    fn name(&self) -> &str {
        &self.shared.name
    }

    fn offered_features(&self) -> u64 {
        config::features(&self.shape)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.shape.queues)]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&self.shape, self.wants_writeback, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The user who asked for write-through gets it whatever the guest says.
        if let Some(writeback) = config::written_writeback(offset, data)
            && self.shared.disk.cache() != DiskCache::Writethrough
        {
            self.wants_writeback = writeback;
            self.shared.writeback.store(writeback, Ordering::Relaxed);
        }
    }

    fn start(&mut self, mut work: Activation) -> Result<(), DeviceError> {
        if !self.running.is_empty() {
            let device = self.shared.name.clone();
            return Err(DeviceError::AlreadyRunning { device });
        }
        // A driver that does not know of the field cannot have changed it.
        let writeback = if work.has(VIRTIO_BLK_F_CONFIG_WCE) {
            self.wants_writeback
        } else {
            writeback_by_default(&self.shared.disk)
        };
        self.shared.writeback.store(writeback, Ordering::Relaxed);
        for queue in std::mem::take(&mut work.queues) {
            match self.spawn(&work, queue) {
                Ok(worker) => self.running.push(worker),
                Err(error) => {
                    self.stop();
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue)> {
        let name = &self.shared.name;
        let ended = self.running.drain(..).filter_map(|worker| {
            let queue = worker.stop();
            if queue.is_none() {
                tracing::error!("{name}: the thread of a queue panicked; the queue is lost");
            }
            queue
        });
        ended.map(BlockQueue::into_queue).collect()
    }

    fn reset(&mut self) {
        self.wants_writeback = writeback_by_default(&self.shared.disk);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let Self {
            shape,
            shared,
            wants_writeback,
            running: _,
        } = self;
        let state = State {
            shape: shape.clone(),
            wants_writeback: *wants_writeback,
        };
        let body = encode_body(&shared.name, &state)?;
        Ok(DeviceState {
            version: STATE_VERSION,
            body,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let name = self.shared.name.clone();
        if state.version > STATE_VERSION {
            return Err(StateError::Version {
                name,
                found: state.version,
                known: STATE_VERSION,
            });
        }
        let State {
            shape,
            wants_writeback,
        } = decode_body(&name, &state.body)?;
        self.fits(&shape)
            .map_err(|why| StateError::Mismatch { name, why })?;
        self.shape = shape;
        self.wants_writeback = wants_writeback;
        Ok(())
    }
}

impl BlockDevice {
    /// Whether this disk can be what the guest was told that it has.
    fn fits(&self, told: &Shape) -> Result<(), String> {
        let Shape {
            size,
            block_size,
            discard_granularity,
            read_only,
            queues,
            serial,
        } = told;
        let here = &self.shape;
        let disk = &self.shared.disk;
        if *size != disk.size() {
            return Err(format!(
                "the disk had {size} bytes, and its image here has {}",
                disk.size()
            ));
        }
        let sizes_ok = block_size.is_power_of_two() && (512..=1 << 16).contains(block_size);
        if !sizes_ok || !discard_granularity.is_power_of_two() || !size.is_multiple_of(u64::from(*block_size))
        {
            return Err("its block sizes make no sense".to_owned());
        }
        if !block_size.is_multiple_of(disk.block_size()) {
            let needed = disk.block_size();
            return Err(format!(
                "the guest writes blocks of {block_size} bytes, and direct I/O needs {needed} here; \
                use another cache mode"
            ));
        }
        if *read_only != disk.is_read_only() {
            return Err("it was read-only at one side and is writable at the other".to_owned());
        }
        if *queues != here.queues {
            return Err(format!("it had {queues} queues, and has {} here", here.queues));
        }
        if serial.len() > VIRTIO_BLK_ID_BYTES as usize {
            return Err("its serial number is too long".to_owned());
        }
        Ok(())
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        self.stop();
    }
}

fn writeback_by_default(disk: &Disk) -> bool {
    disk.cache() != DiskCache::Writethrough
}
