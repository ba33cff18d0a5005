//! The loopback to the other side, over which bytes take their time.

use std::sync::Arc;
use std::time::Duration;

use super::world::{Shared, World};
use crate::block::PAGE_BYTES;
use crate::handover::SessionId;
use crate::link::{Lane, Link, LinkError, LinkErrorKind, Peer};
use crate::transport::loopback::Loopback;

pub(super) struct SimLink {
    pub(super) world: Arc<Shared>,
    pub(super) inner: Loopback,
}

impl SimLink {
    fn up(&self) -> Result<(), LinkError> {
        up(&self.world.lock())
    }
}

fn up(world: &World) -> Result<(), LinkError> {
    if world.link.capacity_at(world.now) > 0.0 {
        Ok(())
    } else {
        Err(LinkError::new(
            LinkErrorKind::Closed,
            "the simulated link is down",
        ))
    }
}

impl Link for SimLink {
    fn control(&mut self) -> Result<Box<dyn Peer>, LinkError> {
        self.up()?;
        Ok(Box::new(SimPeer {
            world: Arc::clone(&self.world),
            inner: self.inner.control()?,
        }))
    }

    fn lane(&mut self, session: SessionId, attempt: u32, index: u16) -> Result<Box<dyn Lane>, LinkError> {
        self.up()?;
        Ok(Box::new(SimLane {
            world: Arc::clone(&self.world),
            inner: self.inner.lane(session, attempt, index)?,
        }))
    }

    fn most_lanes(&self) -> u16 {
        1
    }

    fn parallel(&self) -> bool {
        false
    }
}

struct SimPeer {
    world: Arc<Shared>,
    inner: Box<dyn Peer>,
}

impl Peer for SimPeer {
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        let mut world = self.world.lock();
        up(&world)?;
        let secs = message.len() as f64 / world.rate() + world.link.delay_secs;
        world.pass(secs, message.len() as f64);
        drop(world);
        self.inner.send(message)
    }

    fn receive(&mut self, timeout: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        let reply = self.inner.receive(timeout)?;
        if reply.is_some() {
            let mut world = self.world.lock();
            let delay = world.link.delay_secs;
            world.pass(delay, 0.0);
        }
        Ok(reply)
    }
}

struct SimLane {
    world: Arc<Shared>,
    inner: Box<dyn Lane>,
}

impl Lane for SimLane {
    fn send(&mut self, part: &[u8]) -> Result<(), LinkError> {
        // What a page is when it was read is what arrives: it is on the link while the guest writes on.
        for piece in part.chunks(PAGE_BYTES as usize) {
            let mut world = self.world.lock();
            up(&world)?;
            let secs = piece.len() as f64 / world.rate();
            world.pass(secs, piece.len() as f64);
        }
        self.inner.send(part)
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        self.inner.flush()
    }
}
