//! The machines of both sides: they note what the engine asks of them, and fail when they are told to.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use ferry_migration::block::{BlockId, Sink, Source};
use ferry_migration::failure::{Cause, Reason};
use ferry_migration::handover::{MachineId, RunPermit};
use ferry_migration::machine::{IncomingMachine, MachineCard, Offer, OutgoingMachine};

use super::blocks::{FakeBlock, FakeSink};
use super::chance::Dice;
use super::ledger::Witness;

/// How the machine stands at the outgoing side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stand {
    Running,
    Paused,
    Departed,
    Stranded,
}

pub struct FakeOutgoing {
    pub blocks: Vec<Arc<FakeBlock>>,
    pub witness: Arc<Witness>,
    pub stand: Stand,
    pub throttled: u8,
    pub released: bool,
    pub state: Vec<u8>,
    /// Fails `check` from the n-th time on.
    pub unfit_after: u64,
    pub checks: u64,
    pub log: Vec<&'static str>,
}

impl FakeOutgoing {
    fn dead(&self) -> bool {
        self.witness.outgoing_dead.load(Ordering::Acquire)
    }
}

pub const MACHINE: MachineId = MachineId([0x4d; 16]);

impl OutgoingMachine for FakeOutgoing {
    fn card(&mut self) -> Result<MachineCard, Reason> {
        Ok(MachineCard {
            machine: MACHINE,
            name: "web".into(),
            running: true,
            description: b"two vCPUs".to_vec(),
        })
    }

    fn sources(&mut self) -> Result<Vec<Arc<dyn Source>>, Reason> {
        Ok(self
            .blocks
            .iter()
            .map(|block| Arc::clone(block) as Arc<dyn Source>)
            .collect())
    }

    fn check(&mut self) -> Result<(), Reason> {
        self.checks += 1;
        if self.checks > self.unfit_after {
            return Err(Reason::new(Cause::Machine, "the guest powered off"));
        }
        Ok(())
    }

    fn throttle(&mut self, throttle: &ferry_migration::policy::Throttle) -> Result<(), Reason> {
        self.throttled = throttle.percent;
        Ok(())
    }

    fn slow_writes(&mut self, _: BlockId, _: Option<u64>) -> Result<(), Reason> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Reason> {
        self.log.push("pause");
        if !self.dead() {
            self.stand = Stand::Paused;
        }
        self.witness.here.store(false, Ordering::Release);
        self.blocks.iter().for_each(|block| block.guest_writes(None, 0));
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, Reason> {
        self.log.push("save");
        // Saving devices writes to the guest, too.
        let mut dice = Dice::new(self.checks);
        self.blocks[0].write_unit(1, &mut dice);
        Ok(self.state.clone())
    }

    fn release(&mut self) -> Result<(), Reason> {
        self.log.push("release");
        self.released = true;
        Ok(())
    }

    fn resume(&mut self, _: &RunPermit) -> Result<(), Reason> {
        self.log.push("resume");
        if self.dead() {
            return Ok(());
        }
        self.released = false;
        self.stand = Stand::Running;
        self.witness.here.store(true, Ordering::Release);
        self.witness.check();
        Ok(())
    }

    fn departed(&mut self) {
        self.log.push("departed");
        if !self.dead() {
            self.stand = Stand::Departed;
        }
    }

    fn stranded(&mut self) {
        self.log.push("stranded");
        if !self.dead() {
            self.stand = Stand::Stranded;
        }
    }
}

/// What a host has built.
#[derive(Default)]
pub struct Built {
    pub sinks: Mutex<Vec<Arc<FakeSink>>>,
    pub state: Mutex<Vec<u8>>,
    pub aborted: AtomicU64,
    pub prepared: AtomicU64,
    pub refuse: Mutex<Option<Reason>>,
    pub start_fails: AtomicBool,
    /// Content from an earlier time, for each block.
    pub libraries: Mutex<BTreeMap<u16, Vec<u8>>>,
    pub room: AtomicU64,
    /// A ledger whose disk breaks while the state is loaded.
    pub ledger_breaks: Mutex<Option<Arc<AtomicBool>>>,
}

pub struct FakeIncoming {
    pub built: Arc<Built>,
    pub witness: Arc<Witness>,
}

impl IncomingMachine for FakeIncoming {
    fn admit(&mut self, offer: &Offer) -> Result<(), Reason> {
        assert_eq!(offer.card.description, b"two vCPUs");
        self.built.refuse.lock().unwrap().clone().map_or(Ok(()), Err)
    }

    fn prepare(&mut self, offer: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason> {
        self.built.prepared.fetch_add(1, Ordering::AcqRel);
        let libraries = self.built.libraries.lock().unwrap();
        let sinks: Vec<_> = offer
            .blocks
            .iter()
            .map(|info| {
                let sink = FakeSink::new(info.clone());
                let sink = match libraries.get(&info.id.0) {
                    Some(content) => sink.with_library(content),
                    None => sink,
                };
                match self.built.room.load(Ordering::Acquire) {
                    0 => {}
                    room => sink.room_left.store(room, Ordering::Release),
                }
                Arc::new(sink)
            })
            .collect();
        *self.built.sinks.lock().unwrap() = sinks.clone();
        Ok(sinks.into_iter().map(|sink| sink as Arc<dyn Sink>).collect())
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Reason> {
        *self.built.state.lock().unwrap() = state.to_vec();
        if let Some(fails) = &*self.built.ledger_breaks.lock().unwrap() {
            fails.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn resume(&mut self, _: RunPermit) -> Result<(), Reason> {
        if self.built.start_fails.load(Ordering::Acquire) {
            return Err(Reason::new(Cause::Machine, "the vCPU would not start"));
        }
        self.witness.there.store(true, Ordering::Release);
        self.witness.check();
        Ok(())
    }

    fn abort(&mut self) {
        self.built.aborted.fetch_add(1, Ordering::AcqRel);
    }
}
