//! Two hosts and a guest in memory: everything a crossing needs, with witnesses for what must never happen.
#![allow(
    dead_code,
    unused_imports,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)] // each test binary uses its part

mod blocks;
mod chance;
mod ledger;
mod machines;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use ferry_migration::block::BlockKind;
use ferry_migration::clock::Clock;
use ferry_migration::handover::SessionId;
use ferry_migration::incoming::Terms;
use ferry_migration::machine::Unobserved;
use ferry_migration::options::{Handle, Options};
use ferry_migration::outgoing::{World, cross};
use ferry_migration::report::Report;
use ferry_migration::transport::loopback::{Host, Loopback};

pub use blocks::{FakeBlock, FakeSink};
pub use chance::{Dice, StepClock};
pub use ledger::{MemoryLedger, Witness};
pub use machines::{Built, FakeIncoming, FakeOutgoing, MACHINE, Stand};

/// Both hosts.
pub struct Stage {
    pub witness: Arc<Witness>,
    pub outgoing: FakeOutgoing,
    pub our_ledger: MemoryLedger,
    pub their_ledger: MemoryLedger,
    pub built: Arc<Built>,
    pub clock: Arc<StepClock>,
    pub handle: Handle,
    pub host: Arc<Mutex<Host>>,
}

impl Stage {
    pub fn new(seed: u64) -> Self {
        Self::with_blocks(
            seed,
            vec![
                FakeBlock::new(0, BlockKind::Memory, 700),
                FakeBlock::new(1, BlockKind::Memory, 40),
                FakeBlock::new(7, BlockKind::Disk, 21),
            ],
        )
    }

    pub fn with_blocks(seed: u64, blocks: Vec<Arc<FakeBlock>>) -> Self {
        let witness: Arc<Witness> = Arc::default();
        witness.here.store(true, Ordering::Release);
        let mut dice = Dice::new(seed);
        blocks.iter().for_each(|block| block.fill(&mut dice));
        let state = (0..70_000).map(|_| dice.roll() as u8).collect();
        let outgoing = FakeOutgoing {
            blocks,
            witness: Arc::clone(&witness),
            stand: Stand::Running,
            throttled: 0,
            released: false,
            state,
            unfit_after: u64::MAX,
            checks: 0,
            log: Vec::new(),
        };
        let our_ledger = MemoryLedger::new(1, &witness, true);
        let their_ledger = MemoryLedger::new(2, &witness, false);
        let built: Arc<Built> = Arc::default();
        let clock: Arc<StepClock> = Arc::default();
        let host = Arc::new(Mutex::new(new_host(&built, &witness, &their_ledger, &clock)));
        let mut stage = Stage {
            witness,
            outgoing,
            our_ledger,
            their_ledger,
            built,
            clock,
            handle: Handle::new(),
            host,
        };
        stage.guest_works(seed, 6);
        stage
    }

    /// The guest writes while the engine copies.
    pub fn guest_works(&mut self, seed: u64, per_cent: u64) {
        for (at, block) in self.outgoing.blocks.iter().enumerate() {
            block.guest_writes(Some(Dice::new(seed + 77 * at as u64)), per_cent);
        }
    }

    /// The incoming process is killed and started again: only its ledger is left.
    pub fn restart_host(&self) {
        self.witness.there.store(false, Ordering::Release);
        *self.host.lock().unwrap() = new_host(&self.built, &self.witness, &self.their_ledger, &self.clock);
    }

    /// The other host agrees to these terms.
    pub fn set_terms(&self, terms: Terms) {
        let machine = FakeIncoming {
            built: Arc::clone(&self.built),
            witness: Arc::clone(&self.witness),
        };
        let (ledger, clock) = (
            Box::new(self.their_ledger.clone()),
            Arc::clone(&self.clock) as Arc<dyn Clock>,
        );
        *self.host.lock().unwrap() = Host::new(Box::new(machine), ledger, clock, terms);
    }

    pub fn loopback(&self, lanes: u16) -> Loopback {
        Loopback::new(Arc::clone(&self.host), lanes)
    }

    pub fn cross(&mut self, link: &mut dyn ferry_migration::link::Link, options: &Options) -> Report {
        let world = World {
            machine: &mut self.outgoing,
            link,
            ledger: &mut self.our_ledger,
            clock: &*self.clock,
            observer: &Unobserved,
            handle: &self.handle,
        };
        let report = cross(world, options);
        self.witness.check();
        report
    }

    /// Memory and disks of both sides are the same, and so is the state.
    pub fn assert_equal(&self) {
        let sinks = self.built.sinks.lock().unwrap();
        for block in &self.outgoing.blocks {
            let sink = sinks
                .iter()
                .find(|sink| sink.info.id == block.info.id)
                .expect("a sink for each block");
            let (ours, theirs) = (block.bytes(), sink.bytes());
            let unit = block.info.unit_bytes() as usize;
            let differ: Vec<usize> = (0..block.info.units() as usize)
                .filter(|u| {
                    let range = u * unit..((u + 1) * unit).min(ours.len());
                    ours[range.clone()] != theirs[range]
                })
                .collect();
            assert!(
                differ.is_empty(),
                "units {differ:?} of {} differ",
                block.info.name
            );
        }
        assert_eq!(*self.built.state.lock().unwrap(), self.outgoing.state);
    }
}

pub fn new_host(
    built: &Arc<Built>,
    witness: &Arc<Witness>,
    ledger: &MemoryLedger,
    clock: &Arc<StepClock>,
) -> Host {
    let machine = FakeIncoming {
        built: Arc::clone(built),
        witness: Arc::clone(witness),
    };
    Host::new(
        Box::new(machine),
        Box::new(ledger.clone()),
        Arc::clone(clock) as Arc<dyn Clock>,
        Terms::default(),
    )
}

pub fn options(session: u8, lanes: u16) -> Options {
    let mut options = Options::new(SessionId([session; 16]));
    options.lanes = lanes;
    options.limits.policy = "qemu".parse().unwrap();
    options
}
