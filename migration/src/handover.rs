//! Who may run the machine: sessions, epochs, the permit, and what both sides keep of them.

use serde::{Deserialize, Serialize};

use crate::failure::{Reason, Side};

/// One crossing. Random; given by the caller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SessionId(pub [u8; 16]);

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// The machine over all its crossings: random, made when the machine is made.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MachineId(pub [u8; 16]);

impl std::fmt::Display for MachineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for MachineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self}")
    }
}

/// One ledger's identity, so that "no record of it" from another or a new ledger is not taken for evidence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct LedgerId(pub [u8; 16]);

/// The right to run one machine. Cannot be copied or made outside this module: the outgoing side holds it
/// until the go-ahead consumes it, the incoming side gets it from an accepted go-ahead.
#[derive(Debug, PartialEq, Eq)]
pub struct RunPermit {
    session: SessionId,
}

impl RunPermit {
    pub fn session(&self) -> SessionId {
        self.session
    }
}

/// How one side stands to a crossing, as it survives a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Standing {
    /// Outgoing: the go-ahead may be out. Not allowed to run until the other side proves it never will.
    GivenAway,
    /// Outgoing: the other side confirmed that it has the machine.
    Gone,
    /// Outgoing: the other side proved that it never will run the machine.
    Kept,
    /// Incoming: took the go-ahead. The machine is this side's.
    Taken,
    /// Incoming: will never run the machine of this session, whatever arrives later.
    Declined,
}

/// What a side keeps of one crossing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub session: SessionId,
    pub machine: MachineId,
    /// Counts the hand overs of this machine: an offer of an old copy is refused.
    pub epoch: u64,
    pub side: Side,
    pub standing: Standing,
    /// The ledger of the other side, whose word counts as evidence.
    pub peer: Option<LedgerId>,
}

/// The durable memory of a side. `write` returns only when the record will survive a crash of the host.
pub trait Ledger: Send {
    fn id(&self) -> LedgerId;
    fn write(&mut self, record: &Record) -> Result<(), Reason>;
    fn read(&self, session: SessionId) -> Result<Option<Record>, Reason>;
    /// All records of a machine, in no order.
    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason>;
}
