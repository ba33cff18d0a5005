//! Who answers for a dirty bit between the moment it is taken and the moment its page has arrived.
//!
//! # On dirty bits and who owes them
//!
//! A page that the guest wrote is noted somewhere: in KVM's log, in the monitor's own bitmap, in a disk's write
//! tracker. To copy it, the note must be cleared *first* and the page read *afterwards*, or a write between the
//! two is lost. So there is always a time in which the note is gone and the page has not arrived, and in this
//! time the only one who knows that the page must still cross is the engine. If it forgets - an error return
//! that skips a line, a lane that died with a frame in its buffer, a crossing that is given up - then the page
//! is stale at the other side, nobody notices, and the guest fails hours later somewhere else. Propolis had
//! exactly this bug in its first retry.
//!
//! Therefore taking and owing are one step here, and nothing but two things ends a debt:
//!
//! * **delivered**: the other side said that it *holds* the frame (not that it was written to a socket);
//! * **put back**: the unit is noted at its source again, as if it had never been taken, and everything that
//!   the encoders believed about what the other side holds of it is forgotten, since a difference against a
//!   version that never arrived would be worse than no difference.
//!
//! What is still owed when a [`Custody`] is dropped is put back. There is no way to lose it by returning early.

use std::sync::{Arc, Mutex, PoisonError};

use crate::block::{BlockId, BlockInfo, DataError, Source, Span};
use crate::pages::encode::Memory;
use crate::units::UnitSet;

pub struct Custody {
    blocks: Vec<Charge>,
    /// For each lane, what its frames held, until somebody says whether they arrived.
    lanes: Vec<Mutex<Vec<Sent>>>,
    memory: Arc<Memory>,
}

struct Charge {
    info: BlockInfo,
    source: Arc<dyn Source>,
    owed: Mutex<UnitSet>,
    /// Taken only to see whether they are written again. They wait to be sent, and are owed like the others.
    watched: Mutex<UnitSet>,
}

struct Sent {
    sequence: u64,
    spans: Box<[Span]>,
}

impl Custody {
    pub fn new(sources: &[Arc<dyn Source>], lanes: usize, memory: Arc<Memory>) -> Self {
        let blocks = sources
            .iter()
            .map(|source| {
                let info = source.info();
                let owed = Mutex::new(UnitSet::empty(info.units()));
                let watched = Mutex::new(UnitSet::empty(info.units()));
                Charge {
                    info,
                    source: Arc::clone(source),
                    owed,
                    watched,
                }
            })
            .collect();
        Custody {
            blocks,
            lanes: (0..lanes).map(|_| Mutex::default()).collect(),
            memory,
        }
    }

    fn charge(&self, block: BlockId) -> Option<&Charge> {
        self.blocks.iter().find(|charge| charge.info.id == block)
    }

    /// Takes spans (of one block) over: from here on they are owed.
    pub fn take(&self, block: BlockId, spans: &[Span]) -> Result<(), DataError> {
        let charge = self
            .charge(block)
            .ok_or_else(|| DataError::new(format!("{block} is not of this machine")))?;
        {
            let (mut owed, mut watched) = (lock(&charge.owed), lock(&charge.watched));
            spans
                .iter()
                .for_each(|span| watched.remove_run(span.first, u64::from(span.count)));
            spans
                .iter()
                .for_each(|span| owed.insert_run(span.first, u64::from(span.count)));
        }
        charge.source.take(spans)
    }

    /// Takes over what waits to be sent anyway, to see whether it is written again meanwhile.
    pub fn watch(&self, block: BlockId, spans: &[Span]) -> Result<(), DataError> {
        let charge = self
            .charge(block)
            .ok_or_else(|| DataError::new(format!("{block} is not of this machine")))?;
        {
            let mut watched = lock(&charge.watched);
            spans
                .iter()
                .for_each(|span| watched.insert_run(span.first, u64::from(span.count)));
        }
        charge.source.take(spans)
    }

    /// Notes that a frame with these spans left on a lane. They are still owed.
    pub fn sent(&self, lane: usize, sequence: u64, spans: &[Span]) {
        if let Some(log) = self.lanes.get(lane) {
            lock(log).push(Sent {
                sequence,
                spans: spans.into(),
            });
        }
    }

    /// Everything taken and not known to have arrived, for each block in the order they were given.
    pub fn owed(&self) -> Vec<UnitSet> {
        self.blocks
            .iter()
            .map(|charge| lock(&charge.owed).clone())
            .collect()
    }

    /// What was taken of a block and is not sent after all.
    pub fn put_back_owed_of(&self, block: BlockId) {
        if let Some(charge) = self.charge(block) {
            Self::put_back_owed(charge, &self.memory);
        }
    }

    fn put_back_owed(charge: &Charge, memory: &Memory) {
        let mut owed = lock(&charge.owed);
        let spans: Vec<Span> = owed.spans(charge.info.id, u32::MAX).collect();
        if !spans.is_empty() {
            charge.source.put_back(&spans);
            spans.iter().for_each(|span| memory.forget(*span));
            owed.clear();
        }
    }

    /// Single units arrived on another way than a frame (their names did).
    pub fn delivered(&self, block: BlockId, units: &UnitSet) {
        if let Some(charge) = self.charge(block) {
            lock(&charge.owed).subtract(units);
        }
    }

    /// The other side holds everything that was taken: nothing is owed. Returns what was.
    pub fn delivered_all(&self) -> Vec<UnitSet> {
        self.lanes.iter().for_each(|log| lock(log).clear());
        let settle = |charge: &Charge| {
            let nothing = UnitSet::empty(charge.info.units());
            std::mem::replace(&mut *lock(&charge.owed), nothing)
        };
        self.blocks.iter().map(settle).collect()
    }

    /// The link broke, and the other side says how many frames of each lane it holds. These are delivered and
    /// returned; the rest is put back.
    pub fn settle(&self, frames: &[u64]) -> Vec<(BlockId, UnitSet)> {
        let mut delivered: Vec<(BlockId, UnitSet)> = self
            .blocks
            .iter()
            .map(|c| (c.info.id, UnitSet::empty(c.info.units())))
            .collect();
        for (lane, log) in self.lanes.iter().enumerate() {
            let held = frames.get(lane).copied().unwrap_or(0);
            for sent in lock(log).drain(..).filter(|sent| sent.sequence <= held) {
                for span in &sent.spans {
                    if let Some((_, set)) = delivered.iter_mut().find(|(id, _)| *id == span.block) {
                        set.insert_run(span.first, u64::from(span.count));
                    }
                }
            }
        }
        for (block, set) in &delivered {
            if let Some(charge) = self.charge(*block) {
                lock(&charge.owed).subtract(set);
            }
        }
        self.put_back();
        delivered
    }

    /// Everything owed is noted at its source again.
    pub fn put_back(&self) {
        for charge in &self.blocks {
            let mut watched = lock(&charge.watched);
            // What was only watched is at the other side as it was sent last: nothing to forget.
            let waiting: Vec<Span> = watched.spans(charge.info.id, u32::MAX).collect();
            if !waiting.is_empty() {
                charge.source.put_back(&waiting);
                watched.clear();
            }
            drop(watched);
            Self::put_back_owed(charge, &self.memory);
        }
        self.lanes.iter().for_each(|log| lock(log).clear());
    }
}

impl Drop for Custody {
    fn drop(&mut self) {
        self.put_back();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BlockKind;
    use crate::pages::cache::DeltaCache;
    use crate::pages::sent::SentHashes;
    use proptest::prelude::*;

    /// A source that only keeps notes, and keeps them for ever.
    struct Notes(Mutex<UnitSet>);

    const BLOCK: BlockId = BlockId(3);
    const UNITS: u64 = 64;

    impl Source for Notes {
        fn info(&self) -> BlockInfo {
            let (kind, name) = (BlockKind::Memory, String::new());
            BlockInfo {
                id: BLOCK,
                kind,
                name,
                bytes: UNITS * 4096,
            }
        }
        fn start_tracking(&self) -> Result<(), DataError> {
            Ok(())
        }
        fn stop_tracking(&self) {}
        fn first_pass(&self) -> Result<UnitSet, DataError> {
            Ok(UnitSet::full(UNITS))
        }
        fn survey(&self, changed: &mut UnitSet) -> Result<(), DataError> {
            changed.union(&lock(&self.0));
            Ok(())
        }
        fn take(&self, spans: &[Span]) -> Result<(), DataError> {
            spans
                .iter()
                .for_each(|s| lock(&self.0).remove_run(s.first, u64::from(s.count)));
            // Some sources fail half way: what they cleared before is owed all the same.
            if spans.iter().any(|s| s.first == 60) {
                Err(DataError::new("broken"))
            } else {
                Ok(())
            }
        }
        fn put_back(&self, spans: &[Span]) {
            spans
                .iter()
                .for_each(|s| lock(&self.0).insert_run(s.first, u64::from(s.count)));
        }
        fn read(&self, _: Span, _: &mut [u8]) -> Result<(), DataError> {
            Ok(())
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Take { first: u64, send: bool },
        Watch { first: u64 },
        AllDelivered,
        LinkBreaks { held: u64 },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0u64..62, any::<bool>()).prop_map(|(first, send)| Step::Take { first, send }),
            1 => (0u64..58).prop_map(|first| Step::Watch { first }),
            1 => Just(Step::AllDelivered),
            1 => (0u64..6).prop_map(|held| Step::LinkBreaks { held }),
        ];
        proptest::collection::vec(step, 0..40)
    }

    proptest! {
        /// Whatever happens, a noted unit is delivered, or it is noted again when custody ends.
        #[test]
        fn no_dirty_bit_is_lost(steps in steps()) {
            let source: Arc<dyn Source> = Arc::new(Notes(Mutex::new(UnitSet::full(UNITS))));
            let memory = Memory { cache: DeltaCache::new(0), sent: SentHashes::new(1, &[source.info()]) };
            let custody = Custody::new(std::slice::from_ref(&source), 1, Arc::new(memory));
            let (mut delivered, mut on_the_way) = (UnitSet::empty(UNITS), Vec::new());
            let mut sequence = 0;
            for step in steps {
                match step {
                    Step::Take { first, send } => {
                        let span = Span { block: BLOCK, first, count: 3.min((UNITS - first) as u32) };
                        if custody.take(BLOCK, &[span]).is_ok() && send {
                            sequence += 1;
                            custody.sent(0, sequence, &[span]);
                            on_the_way.push((sequence, span));
                        }
                    }
                    Step::Watch { first } => {
                        custody.watch(BLOCK, &[Span { block: BLOCK, first, count: 2 }]).unwrap();
                    }
                    Step::AllDelivered => {
                        custody.delivered_all().iter().for_each(|set| delivered.union(set));
                        on_the_way.clear();
                        sequence = 0;
                    }
                    Step::LinkBreaks { held } => {
                        for (number, span) in on_the_way.drain(..) {
                            if number <= held {
                                delivered.insert_run(span.first, u64::from(span.count));
                            }
                        }
                        let settled = custody.settle(&[held]);
                        prop_assert!(settled[0].1.runs().all(|(first, _)| delivered.contains(first)));
                        sequence = 0;
                    }
                }
            }
            drop(custody);
            let mut accounted = delivered;
            source.survey(&mut accounted).unwrap();
            prop_assert_eq!(accounted.count(), UNITS, "a unit is neither delivered nor noted");
        }
    }
}
