//! What can go wrong in a device, each as one sentence that says what to do.

use std::io;
use std::ops::Range;

use crate::state::StateError;

#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    #[error("the guest gave an address outside its memory: {address:#x}, {len} bytes")]
    OutsideRam { address: u64, len: u64 },
    #[error("the guest set up queue {index} of {device} so that it cannot work: {why}")]
    Queue { device: String, index: u16, why: String },
    #[error("{device}: {what}: {source}")]
    Io {
        device: String,
        what: &'static str,
        source: io::Error,
    },
    #[error("{device} was started twice; stop it before starting it again")]
    AlreadyRunning { device: String },
    #[error("interrupt slot {slot} does not exist; the device has {slots}")]
    NoSuchVector { slot: usize, slots: usize },
    #[error("{what}: {source}")]
    Host { what: String, source: io::Error },
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error("{0}")]
    Invalid(String),
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    #[error("the address range {:#x}..{:#x} on the {bus} bus is empty", range.start, range.end)]
    Empty { bus: &'static str, range: Range<u64> },
    #[error("the address range {:#x}..{:#x} on the {bus} bus overlaps {:#x}..{:#x}, which is taken",
        range.start, range.end, taken.start, taken.end)]
    Overlap {
        bus: &'static str,
        range: Range<u64>,
        taken: Range<u64>,
    },
}
