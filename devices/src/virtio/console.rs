//! Virtio console with one port: what the guest writes goes out, what comes in waits until the guest has room.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{
    Activation, ActiveQueue, DeviceState, RING_FEATURES, VirtioDevice, VirtioInterrupt, VirtioKind,
    handed_back,
};
use super::serve::{Done, Request, Served, serve};
use super::worker::{More, Poll, Work, Worker, clear};
use crate::console_io::{ConsoleInput, ConsoleOutput, InputQueue};
use crate::error::DeviceError;
use crate::log_once::LogOnce;
use crate::ram::Ram;
use crate::state::{StateError, decode_body, encode_body};

const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const INPUT: u64 = 2;
/// A driver writes pages at most; what a hostile one writes beyond this in one request is dropped.
const MOST_PER_REQUEST: usize = 1 << 20;
const CHUNK: usize = 4096;
const VERSION: u32 = 1;

pub struct Console {
    name: String,
    input: Arc<Input>,
    output: Arc<Mutex<ConsoleOutput>>,
    worker: Option<Worker<ConsoleWork>>,
}

/// The way into the console, for whoever reads stdin or a socket.
pub struct Input {
    waiting: InputQueue,
    arrived: EventFd,
}

impl ConsoleInput for Input {
    fn push(&self, bytes: &[u8]) -> usize {
        let taken = self.waiting.push(bytes);
        // Fails only when it is signalled to the brim.
        let _ = self.arrived.write(1);
        taken
    }

    fn wait_for_room(&self, at_most: Duration) -> bool {
        self.waiting.wait_for_room(at_most)
    }
}

#[derive(Serialize, Deserialize)]
struct Saved {
    waiting: Vec<u8>,
}

impl Console {
    pub fn new(name: impl Into<String>, output: ConsoleOutput) -> Result<Self, DeviceError> {
        let name = name.into();
        let arrived = EventFd::new(EFD_NONBLOCK).map_err(|source| DeviceError::Host {
            what: format!("no event file descriptor for {name}; raise the limit of open files"),
            source,
        })?;
        let input = Arc::new(Input {
            waiting: InputQueue::default(),
            arrived,
        });
        Ok(Self {
            name,
            input,
            output: Arc::new(Mutex::new(output)),
            worker: None,
        })
    }

    pub fn input(&self) -> Arc<Input> {
        self.input.clone()
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Console
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn offered_features(&self) -> u64 {
        RING_FEATURES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
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
        let work = ConsoleWork {
            ram,
            queues,
            interrupt,
            input: self.input.clone(),
            output: self.output.clone(),
            name: self.name.clone(),
            complaints: LogOnce::new(),
        };
        Worker::start_only(&mut self.worker, &self.name, work)
    }

    fn stop(&mut self) -> Vec<(u16, Queue)> {
        let work = self.worker.take().and_then(Worker::stop);
        work.map(|work| handed_back(work.queues)).unwrap_or_default()
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        let saved = Saved {
            waiting: self.input.waiting.contents(),
        };
        Ok(DeviceState {
            version: VERSION,
            body: encode_body(&self.name, &saved)?,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let Saved { waiting } = decode_body(&self.name, state.body_up_to(VERSION, &self.name)?)?;
        self.input.waiting.replace(&waiting);
        Ok(())
    }
}

struct ConsoleWork {
    ram: Ram,
    queues: Vec<ActiveQueue>,
    interrupt: Arc<dyn VirtioInterrupt>,
    input: Arc<Input>,
    output: Arc<Mutex<ConsoleOutput>>,
    name: String,
    complaints: LogOnce,
}

impl ConsoleWork {
    fn serve(&mut self, wanted: u16) -> Served {
        let Self {
            ram,
            queues,
            interrupt,
            input,
            output,
            name,
            complaints,
        } = self;
        let Some(active) = queues.iter_mut().find(|active| active.index == wanted) else {
            return Served::Empty;
        };
        clear(&active.kick);
        let complain = |error: io::Error| complaints.warn(|| format!("{name}: bytes were lost: {error}"));
        serve(
            &mut active.queue,
            wanted,
            ram,
            &**interrupt,
            |request| match wanted {
                RECEIVE => receive(&input.waiting, ram, request).unwrap_or_else(|error| {
                    complain(error);
                    Done::Used(0)
                }),
                _ => {
                    transmit(output, ram, request).unwrap_or_else(complain);
                    Done::Used(0)
                }
            },
        )
    }
}

/// Fills one buffer of the guest with what waits.
fn receive(waiting: &InputQueue, ram: &Ram, request: Request<'_>) -> io::Result<Done> {
    let mut writer = request.writer(ram).map_err(io::Error::other)?;
    let room = writer.available_bytes().min(CHUNK);
    if room == 0 {
        return Err(io::Error::other("the guest gave a receive buffer without room"));
    }
    if waiting.is_empty() {
        return Ok(Done::NotNow);
    }
    let bytes = waiting.take(room);
    io::Write::write_all(&mut writer, &bytes)?;
    Ok(Done::Used(bytes.len() as u32))
}

fn transmit(output: &Mutex<ConsoleOutput>, ram: &Ram, request: Request<'_>) -> io::Result<()> {
    let mut reader = request.reader(ram).map_err(io::Error::other)?;
    let all = reader.available_bytes();
    let mut left = all.min(MOST_PER_REQUEST);
    let mut output = output.lock().unwrap_or_else(PoisonError::into_inner);
    let mut buffer = [0; CHUNK];
    while left > 0 {
        let chunk = buffer.get_mut(..left.min(CHUNK)).unwrap_or_default();
        reader.read_exact(chunk)?;
        output.write_all(chunk)?;
        left -= chunk.len();
    }
    output.flush()?;
    if all > MOST_PER_REQUEST {
        return Err(io::Error::other(format!("the guest wrote {all} bytes at once")));
    }
    Ok(())
}

impl Work for ConsoleWork {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&self.input.arrived, INPUT)?;
        self.queues
            .iter()
            .try_for_each(|active| poll.add(&active.kick, u64::from(active.index)))
    }

    fn ready(&mut self, token: u64, _poll: &Poll) -> More {
        let served = if token == u64::from(TRANSMIT) {
            self.serve(TRANSMIT)
        } else {
            clear(&self.input.arrived);
            self.serve(RECEIVE)
        };
        if served == Served::More {
            More::Now
        } else {
            More::Later
        }
    }

    fn finish(&mut self) {}
}
