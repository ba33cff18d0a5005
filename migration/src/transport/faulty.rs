//! A link that breaks at a chosen message, for tests: before it, in the middle of it, or after it.
//!
//! Messages are counted over the whole life of the link: what is said and heard on the control connection, and
//! every frame on a lane. A cut breaks everything that is open; what is opened later is whole again, unless the
//! link is told to stay broken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::handover::SessionId;
use crate::link::{Lane, Link, LinkError, LinkErrorKind, Peer};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum When {
    Before,
    Middle,
    After,
}

/// Breaks the link at message `at` (counted from 0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    pub at: u64,
    pub when: When,
}

/// What a cut does beside breaking the link.
pub type OnCut = Arc<dyn Fn() + Send + Sync>;

struct Shared {
    count: AtomicU64,
    cuts: Mutex<Vec<Cut>>,
    /// Counts cuts: an end opened before the last one is broken.
    broken: AtomicU64,
    stays_broken: AtomicBool,
    mends: bool,
    on_cut: OnCut,
}

impl Shared {
    /// Numbers a message and says whether it is cut, and how.
    fn next(&self) -> Option<When> {
        let at = self.count.fetch_add(1, Ordering::AcqRel);
        let cuts = self.cuts.lock().unwrap_or_else(PoisonError::into_inner);
        cuts.iter().find(|cut| cut.at == at).map(|cut| cut.when)
    }

    fn cut(&self) -> LinkError {
        self.broken.fetch_add(1, Ordering::AcqRel);
        if !self.mends {
            self.stays_broken.store(true, Ordering::Release);
        }
        (self.on_cut)();
        broken()
    }
}

fn broken() -> LinkError {
    LinkError::new(LinkErrorKind::Closed, "the link was cut")
}

pub struct Faulty<L> {
    link: L,
    shared: Arc<Shared>,
}

impl<L: Link> Faulty<L> {
    /// `mends`: whether new connections work after a cut.
    pub fn new(link: L, cuts: Vec<Cut>, mends: bool, on_cut: OnCut) -> Self {
        let shared = Shared {
            count: AtomicU64::new(0),
            cuts: Mutex::new(cuts),
            broken: AtomicU64::new(0),
            stays_broken: AtomicBool::new(false),
            mends,
            on_cut,
        };
        Faulty {
            link,
            shared: Arc::new(shared),
        }
    }

    /// How many messages there were so far.
    pub fn count(&self) -> u64 {
        self.shared.count.load(Ordering::Acquire)
    }

    fn open<E>(&mut self, open: impl FnOnce(&mut L) -> Result<E, LinkError>) -> Result<End<E>, LinkError> {
        if self.shared.stays_broken.load(Ordering::Acquire) {
            return Err(broken());
        }
        let opened_after = self.shared.broken.load(Ordering::Acquire);
        Ok(End {
            end: Some(open(&mut self.link)?),
            shared: Arc::clone(&self.shared),
            opened_after,
        })
    }
}

impl<L: Link> Link for Faulty<L> {
    fn control(&mut self) -> Result<Box<dyn Peer>, LinkError> {
        Ok(Box::new(self.open(|link| link.control())?))
    }

    fn lane(&mut self, session: SessionId, attempt: u32, index: u16) -> Result<Box<dyn Lane>, LinkError> {
        Ok(Box::new(self.open(|link| link.lane(session, attempt, index))?))
    }

    fn most_lanes(&self) -> u16 {
        self.link.most_lanes()
    }

    fn reconnects(&self) -> bool {
        self.link.reconnects()
    }

    fn parallel(&self) -> bool {
        self.link.parallel()
    }
}

struct End<E> {
    end: Option<E>,
    shared: Arc<Shared>,
    opened_after: u64,
}

impl<E> End<E> {
    fn whole(&mut self) -> Result<&mut E, LinkError> {
        if self.shared.broken.load(Ordering::Acquire) != self.opened_after {
            self.end = None;
        }
        self.end.as_mut().ok_or_else(broken)
    }
}

impl Peer for End<Box<dyn Peer>> {
    fn send(&mut self, message: &[u8]) -> Result<(), LinkError> {
        self.whole()?;
        match self.shared.next() {
            None => self.whole()?.send(message),
            Some(When::Before | When::Middle) => Err(self.shared.cut()),
            Some(When::After) => {
                self.whole()?.send(message)?;
                Err(self.shared.cut())
            }
        }
    }

    fn receive(&mut self, timeout: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        let Some(message) = self.whole()?.receive(timeout)? else {
            return Ok(None);
        };
        match self.shared.next() {
            None => Ok(Some(message)),
            Some(When::Before | When::Middle) => Err(self.shared.cut()),
            Some(When::After) => {
                self.shared.cut();
                Ok(Some(message))
            }
        }
    }
}

impl Lane for End<Box<dyn Lane>> {
    fn send(&mut self, part: &[u8]) -> Result<(), LinkError> {
        self.whole()?;
        match self.shared.next() {
            None => self.whole()?.send(part),
            Some(When::Before) => Err(self.shared.cut()),
            Some(When::Middle) => {
                let half = part.get(..part.len() / 2).unwrap_or_default();
                self.whole()?.send(half)?;
                Err(self.shared.cut())
            }
            Some(When::After) => {
                self.whole()?.send(part)?;
                Err(self.shared.cut())
            }
        }
    }

    fn flush(&mut self) -> Result<(), LinkError> {
        self.whole()?.flush()
    }
}
