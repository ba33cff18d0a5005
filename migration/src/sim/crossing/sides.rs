//! The simulated machine on either side, and ledgers for as long as the simulation lasts.

use std::sync::Arc;
use std::time::Duration;

use super::block::{Arriving, End, Leaving};
use super::world::Shared;
use crate::block::{BlockId, Sink, Source};
use crate::failure::{Reason, Side};
use crate::handover::{Ledger, LedgerId, MachineId, Record, RunPermit, SessionId};
use crate::machine::{GuestImpact, IncomingMachine, MachineCard, Offer, OutgoingMachine};
use crate::policy::{ServiceUse, Throttle};

const MACHINE: MachineId = MachineId([0x51; 16]);

/// The machine at the side it leaves.
pub(super) struct Here {
    pub(super) world: Arc<Shared>,
    /// What the switch takes besides copying.
    pub(super) switch_fixed: Duration,
}

impl Here {
    fn ends(&self) -> impl Iterator<Item = End> {
        let blocks = self.world.lock().blocks.len();
        let world = Arc::clone(&self.world);
        (0..blocks).map(move |at| End {
            world: Arc::clone(&world),
            at,
        })
    }
}

impl OutgoingMachine for Here {
    fn card(&mut self) -> Result<MachineCard, Reason> {
        Ok(MachineCard {
            machine: MACHINE,
            name: "simulated".into(),
            running: true,
            description: Vec::new(),
        })
    }

    fn sources(&mut self) -> Result<Vec<Arc<dyn Source>>, Reason> {
        Ok(self
            .ends()
            .map(|end| Arc::new(Leaving(end)) as Arc<dyn Source>)
            .collect())
    }

    fn check(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn service(&mut self) -> Option<ServiceUse> {
        self.world.lock().service()
    }

    fn throttle(&mut self, throttle: &Throttle) -> Result<(), Reason> {
        self.world
            .lock()
            .set_throttle(f64::from(throttle.percent) / 100.0);
        Ok(())
    }

    fn slow_writes(&mut self, disk: BlockId, bytes_per_sec: Option<u64>) -> Result<(), Reason> {
        let mut world = self.world.lock();
        for block in world.blocks.iter_mut().filter(|block| block.info.id == disk) {
            block.write_at_most(bytes_per_sec);
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<(), Reason> {
        let mut world = self.world.lock();
        world.stop_guest();
        world.pass(self.switch_fixed.as_secs_f64(), 0.0);
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, Reason> {
        Ok(vec![0x5a; 64 << 10])
    }

    fn release(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn resume(&mut self, _: &RunPermit) -> Result<(), Reason> {
        self.world.lock().running = true;
        Ok(())
    }

    fn departed(&mut self) {}

    fn stranded(&mut self) {}

    fn impact(&mut self) -> GuestImpact {
        let world = self.world.lock();
        GuestImpact {
            throttled: Duration::from_secs_f64(world.throttled_secs),
            slowed_writes: Duration::from_secs_f64(world.held_back_secs),
            ..GuestImpact::default()
        }
    }
}

/// The machine at the side it comes to.
pub(super) struct There {
    pub(super) world: Arc<Shared>,
}

impl IncomingMachine for There {
    fn admit(&mut self, _: &Offer) -> Result<(), Reason> {
        Ok(())
    }

    fn prepare(&mut self, offer: &Offer) -> Result<Vec<Arc<dyn Sink>>, Reason> {
        let sinks = offer.blocks.iter().map(|info| {
            let at = usize::from(info.id.0);
            let world = Arc::clone(&self.world);
            Arc::new(Arriving(End { world, at })) as Arc<dyn Sink>
        });
        Ok(sinks.collect())
    }

    fn restore(&mut self, _: &[u8]) -> Result<(), Reason> {
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Reason> {
        Ok(())
    }

    fn resume(&mut self, _: RunPermit) -> Result<(), Reason> {
        Ok(())
    }

    fn abort(&mut self) {}
}

/// A ledger for as long as the simulation lasts.
pub(super) struct Memo {
    id: LedgerId,
    records: Vec<Record>,
}

impl Memo {
    pub(super) fn new(id: u8) -> Self {
        Memo {
            id: LedgerId([id; 16]),
            records: Vec::new(),
        }
    }
}

impl Ledger for Memo {
    fn id(&self) -> LedgerId {
        self.id
    }

    fn write(&mut self, record: &Record) -> Result<(), Reason> {
        let same = |r: &Record| r.session == record.session && r.side == record.side;
        self.records.retain(|r| !same(r));
        self.records.push(record.clone());
        Ok(())
    }

    fn read(&self, session: SessionId, side: Side) -> Result<Option<Record>, Reason> {
        let found = self
            .records
            .iter()
            .find(|r| r.session == session && r.side == side);
        Ok(found.cloned())
    }

    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason> {
        Ok(self
            .records
            .iter()
            .filter(|r| r.machine == machine)
            .cloned()
            .collect())
    }
}
