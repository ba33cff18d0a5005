//! What outlives a process: who was seen running, and the ledgers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ferry_migration::failure::{Cause, Reason, Side};
use ferry_migration::handover::{Ledger, LedgerId, MachineId, Record, SessionId};

/// Who runs. The one thing that must never be true is checked whenever it could become true.
#[derive(Default)]
pub struct Witness {
    pub here: AtomicBool,
    pub there: AtomicBool,
    /// The outgoing process is dead: nothing it does counts any more.
    pub outgoing_dead: AtomicBool,
}

impl Witness {
    pub fn check(&self) {
        let both = self.here.load(Ordering::Acquire) && self.there.load(Ordering::Acquire);
        assert!(!both, "the machine runs on both sides");
    }

    pub fn runs_here(&self) -> bool {
        self.here.load(Ordering::Acquire)
    }

    pub fn runs_there(&self) -> bool {
        self.there.load(Ordering::Acquire)
    }
}

/// A ledger whose records outlive the process.
#[derive(Clone)]
pub struct MemoryLedger {
    pub id: LedgerId,
    pub records: Arc<Mutex<BTreeMap<(SessionId, bool), Record>>>,
    /// A dead process writes nothing.
    pub dead: Arc<Witness>,
    mortal: bool,
    pub fails: Arc<AtomicBool>,
}

impl MemoryLedger {
    pub fn new(id: u8, witness: &Arc<Witness>, mortal: bool) -> Self {
        MemoryLedger {
            id: LedgerId([id; 16]),
            records: Arc::default(),
            dead: Arc::clone(witness),
            mortal,
            fails: Arc::default(),
        }
    }
}

impl Ledger for MemoryLedger {
    fn id(&self) -> LedgerId {
        self.id
    }

    fn write(&mut self, record: &Record) -> Result<(), Reason> {
        if self.mortal && self.dead.outgoing_dead.load(Ordering::Acquire) {
            return Err(Reason::new(Cause::Ledger, "the process is dead"));
        }
        if self.fails.load(Ordering::Acquire) {
            return Err(Reason::new(Cause::Ledger, "the ledger's disk is broken"));
        }
        self.records
            .lock()
            .unwrap()
            .insert((record.session, record.side == Side::Incoming), record.clone());
        Ok(())
    }

    fn read(&self, session: SessionId, side: Side) -> Result<Option<Record>, Reason> {
        if self.fails.load(Ordering::Acquire) {
            return Err(Reason::new(Cause::Ledger, "the ledger's disk is broken"));
        }
        Ok(self
            .records
            .lock()
            .unwrap()
            .get(&(session, side == Side::Incoming))
            .cloned())
    }

    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason> {
        Ok(self
            .records
            .lock()
            .unwrap()
            .values()
            .filter(|r| r.machine == machine)
            .cloned()
            .collect())
    }
}
