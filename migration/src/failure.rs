//! What went wrong: whose side, in which phase, why, and where the machine is now.

use serde::{Deserialize, Serialize};

use crate::block::{DataError, DataErrorKind};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    Outgoing,
    Incoming,
}

/// The phases of a crossing, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    Negotiate,
    Prepare,
    CopyLive,
    Pause,
    CopyRest,
    SendState,
    Verify,
    HandOver,
    Finish,
}

/// Where the right to run the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Whereabouts {
    /// The outgoing side has it.
    Here,
    /// The incoming side has it.
    There,
    /// It was handed over and nobody confirmed: neither side may run it until `resolve` settles it.
    Unknown,
    /// It ended by itself while it crossed, at the outgoing side: nothing of it runs anywhere.
    Ended,
}

/// The kind of failure, for programs; the message is for people. The numbers are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The connection broke.
    Link,
    /// The other side said nothing for too long.
    Stalled,
    /// No protocol version in common.
    Version,
    /// The other side speaks, but not this protocol, or not in this order.
    Protocol,
    /// Data arrived damaged, or both sides differ.
    Damaged,
    /// The other side cannot run this machine (CPU, KVM features, devices).
    Incompatible,
    /// Not enough memory there.
    NoMemory,
    /// Not enough disk space there.
    NoSpace,
    /// The receiver's limits do not allow it.
    NotAllowed,
    /// A machine or crossing of that name is already there.
    Busy,
    /// Reading or writing the machine's memory or disks failed.
    Data,
    /// The machine itself failed (pause, save, restore, resume).
    Machine,
    /// The ledger could not be written.
    Ledger,
    Cancelled,
    Deadline,
    /// The policy gave up: the guest writes faster than the link carries.
    NotConverging,
    /// After the hand over: the other side did not take the machine.
    Declined,
    /// The guest ended while it crossed: nothing is left to run.
    Ended,
}

/// A failed step. `message` is one clear sentence; the whereabouts and the advice complete it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub side: Side,
    pub phase: Phase,
    pub cause: Cause,
    pub whereabouts: Whereabouts,
    pub message: String,
}

impl Failure {
    pub fn advice(&self) -> &'static str {
        match (self.whereabouts, self.cause) {
            (Whereabouts::Unknown, _) => "ask the other host and settle it with `ferry resolve`",
            (Whereabouts::There, _) => "look at the other host",
            (Whereabouts::Ended, _) => "see the logs of that host, and start it again where you want it",
            (_, Cause::Link | Cause::Stalled) => "check the link and try again",
            (_, Cause::Version | Cause::Protocol) => "use the same version of ferry on both hosts",
            (_, Cause::Damaged) => "try again, and check the memory and the link of both hosts",
            (_, Cause::Incompatible) => "choose a host with the same features",
            (_, Cause::NoMemory | Cause::NoSpace) => "make room on the other host and try again",
            (_, Cause::NotAllowed) => "raise the limits of the receiver or choose another host",
            (_, Cause::Busy) => "wait for it to end, or use another name",
            (_, Cause::Data | Cause::Machine | Cause::Ledger) => "see the logs of that host",
            (_, Cause::Cancelled) => "migrate again when you like",
            (_, Cause::Deadline) => "allow more time, more bandwidth or more downtime",
            (_, Cause::NotConverging) => "allow more bandwidth, more downtime or throttling",
            (_, Cause::Declined) => "try again",
            (_, Cause::Ended) => "start it again where you want it",
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let place = match self.whereabouts {
            Whereabouts::Here => "the machine is here",
            Whereabouts::There => "the machine is at the other side",
            Whereabouts::Ended => "the machine has ended here and runs nowhere",
            Whereabouts::Unknown => "both sides are stopped until it is known who has the machine",
        };
        write!(f, "{}; {place}; {}", self.message, self.advice())
    }
}

impl std::error::Error for Failure {}

/// Why something could not be done, before it is known at which side, in which phase and where the machine is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Reason {
    pub cause: Cause,
    pub message: String,
}

impl Reason {
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        Reason {
            cause,
            message: message.into(),
        }
    }
}

impl From<DataError> for Reason {
    fn from(error: DataError) -> Self {
        let cause = match error.kind {
            DataErrorKind::NoSpace => Cause::NoSpace,
            DataErrorKind::Other => Cause::Data,
        };
        Reason {
            cause,
            message: error.message,
        }
    }
}
