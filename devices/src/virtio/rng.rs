//! Virtio entropy: fills the guest's buffers from the host's random source.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;

use super::device::{
    Activation, ActiveQueue, DeviceState, RING_FEATURES, VirtioDevice, VirtioInterrupt, VirtioKind,
    handed_back,
};
use super::serve::{Done, Request, Served, serve};
use super::worker::{More, Poll, Work, Worker, clear};
use crate::error::DeviceError;
use crate::log_once::LogOnce;
use crate::ram::Ram;
use crate::state::{StateError, decode_body, encode_body};

const QUEUE_SIZE: u16 = 64;
const SOURCE: &str = "/dev/urandom";
/// No more for one request; a driver asks again.
const MOST_PER_REQUEST: usize = 64 << 10;
const VERSION: u32 = 1;

pub struct Rng {
    name: String,
    source: File,
    worker: Option<Worker<RngWork>>,
}

/// There is nothing to keep, and the record says so by having no field.
#[derive(Serialize, Deserialize)]
struct Saved {}

impl Rng {
    pub fn new(name: impl Into<String>) -> Result<Self, DeviceError> {
        let source = File::open(SOURCE).map_err(|source| DeviceError::Host {
            what: format!("{SOURCE} cannot be opened"),
            source,
        })?;
        Ok(Self {
            name: name.into(),
            source,
            worker: None,
        })
    }
}

impl VirtioDevice for Rng {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Rng
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn offered_features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn start(&mut self, work: Activation) -> Result<(), DeviceError> {
        let Activation {
            ram,
            features: _,
            queues,
            interrupt,
        } = work;
        let source = self.source.try_clone().map_err(|source| DeviceError::Io {
            device: self.name.clone(),
            what: "its random source is gone",
            source,
        })?;
        let work = RngWork {
            ram,
            queues,
            interrupt,
            source,
            name: self.name.clone(),
            failed: LogOnce::new(),
        };
        Worker::start_only(&mut self.worker, &self.name, work)
    }

    fn stop(&mut self) -> Vec<(u16, Queue)> {
        let work = self.worker.take().and_then(Worker::stop);
        work.map(|work| handed_back(work.queues)).unwrap_or_default()
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        Ok(DeviceState {
            version: VERSION,
            body: encode_body(&self.name, &Saved {})?,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let Saved {} = decode_body(&self.name, state.body_up_to(VERSION, &self.name)?)?;
        Ok(())
    }
}

struct RngWork {
    ram: Ram,
    queues: Vec<ActiveQueue>,
    interrupt: Arc<dyn VirtioInterrupt>,
    source: File,
    name: String,
    failed: LogOnce,
}

impl RngWork {
    fn fill(source: &mut File, ram: &Ram, request: Request<'_>) -> io::Result<u32> {
        let mut writer = request.writer(ram).map_err(io::Error::other)?;
        let mut left = writer.available_bytes().min(MOST_PER_REQUEST);
        let mut buffer = [0; 4096];
        let mut filled = 0;
        while left > 0 {
            let chunk = buffer.get_mut(..left.min(4096)).unwrap_or_default();
            source.read_exact(chunk)?;
            writer.write_all(chunk)?;
            left -= chunk.len();
            filled += chunk.len() as u32;
        }
        Ok(filled)
    }
}

impl Work for RngWork {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        self.queues
            .iter()
            .try_for_each(|active| poll.add(&active.kick, u64::from(active.index)))
    }

    fn ready(&mut self, _token: u64, _poll: &Poll) -> More {
        let Self {
            ram,
            queues,
            interrupt,
            source,
            name,
            failed,
        } = self;
        let Some(ActiveQueue { index, queue, kick }) = queues.first_mut() else {
            return More::Later;
        };
        clear(kick);
        let served = serve(queue, *index, ram, &**interrupt, |request| {
            Done::Used(Self::fill(source, ram, request).unwrap_or_else(|error| {
                failed.warn(|| format!("{name}: a request was answered with nothing: {error}"));
                0
            }))
        });
        if served == Served::More {
            More::Now
        } else {
            More::Later
        }
    }

    fn finish(&mut self) {}
}
