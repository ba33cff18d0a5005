//! Carrying a round: batches of units are taken, read, encoded, paced and sent, by one worker for each lane.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::block::{BlockInfo, BlockKind, DataError, Source, Span};
use crate::clock::Clock;
use crate::custody::Custody;
use crate::link::{Lane, LinkError};
use crate::pacing::Pace;
use crate::pages::encode::{Compression, Encoder, Memory, PageCounts};
use crate::units::UnitSet;
use crate::wire::WINDOW_BYTES;

/// A block with its source, as the outgoing side works with it.
pub(crate) struct Cargo {
    pub(crate) info: BlockInfo,
    pub(crate) source: Arc<dyn Source>,
}

/// Why a round was not carried to its end.
#[derive(Debug)]
pub(crate) enum CarryError {
    Link(LinkError),
    Data(DataError),
    /// Somebody asked for it (the caller knows what: a cancel, a deadline, a machine that ended).
    Stopped,
}

/// What the workers and the one who watches them tell each other.
#[derive(Debug, Default)]
pub(crate) struct Meters {
    /// End now, in the middle of a frame if need be: the lanes are of no more use afterwards.
    pub(crate) stop: AtomicBool,
    /// Begin no more batches: what is begun is finished, and the lanes stay good.
    pub(crate) enough: AtomicBool,
    pub(crate) sent_bytes: AtomicU64,
    /// Nanoseconds that the pace held data back, and that the lanes were busy sending; over all lanes.
    pub(crate) held_back: AtomicU64,
    pub(crate) sending: AtomicU64,
}

/// What all workers of a round share.
pub(crate) struct Work<'a> {
    pub(crate) cargo: &'a [Cargo],
    pub(crate) custody: &'a Custody,
    pub(crate) memory: &'a Memory,
    pub(crate) pace: &'a Mutex<Pace>,
    pub(crate) clock: &'a dyn Clock,
    pub(crate) meters: &'a Meters,
    pub(crate) round: u32,
}

impl Work<'_> {
    fn ends(&self) -> bool {
        self.meters.stop.load(Ordering::Acquire) || self.meters.enough.load(Ordering::Acquire)
    }
}

/// Longest wait between two looks at `stop`.
const PATIENCE: Duration = Duration::from_millis(50);

struct Worker {
    index: usize,
    lane: Box<dyn Lane>,
    sequence: u64,
    encoder: Encoder,
}

/// What a worker carried, memory and disks apart.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Carried {
    pub(crate) memory: PageCounts,
    pub(crate) disk: PageCounts,
    pub(crate) frames: u64,
}

impl Carried {
    pub(crate) fn add(&mut self, other: &Carried) {
        self.memory.add(&other.memory);
        self.disk.add(&other.disk);
        self.frames += other.frames;
    }

    pub(crate) fn wire_bytes(&self) -> u64 {
        self.memory.wire_bytes + self.disk.wire_bytes
    }
}

struct Batch {
    cargo: usize,
    spans: Vec<Span>,
}

/// All lanes of the crossing's present connection.
pub(crate) struct Carrier {
    workers: Vec<Worker>,
    parallel: bool,
    /// Encoders of lanes that broke: what they have measured stays true.
    spare: Vec<Encoder>,
    compression: Compression,
}

impl Carrier {
    pub(crate) fn new(compression: Compression, parallel: bool) -> Self {
        Carrier {
            workers: Vec::new(),
            parallel,
            spare: Vec::new(),
            compression,
        }
    }

    /// Uses these lanes from now on, counting frames from the beginning.
    pub(crate) fn lanes(&mut self, lanes: Vec<Box<dyn Lane>>, version: u16) {
        self.drop_lanes();
        for (index, lane) in lanes.into_iter().enumerate() {
            let mut encoder = self.spare.pop().unwrap_or_else(|| Encoder::new(self.compression));
            encoder.speak(version);
            self.workers.push(Worker {
                index,
                lane,
                sequence: 0,
                encoder,
            });
        }
    }

    /// The lanes broke, or are of no more use.
    pub(crate) fn drop_lanes(&mut self) {
        self.spare
            .extend(self.workers.drain(..).map(|worker| worker.encoder));
    }

    /// How many lanes may be busy at the same time.
    pub(crate) fn busy_at_once(&self) -> u32 {
        if self.parallel {
            self.workers.len().max(1) as u32
        } else {
            1
        }
    }

    /// How many frames left on each lane.
    pub(crate) fn frames(&self) -> Vec<u64> {
        self.workers.iter().map(|worker| worker.sequence).collect()
    }

    /// Carries `sets` (one for each block of the cargo). `tick` is called often, from this thread, with what has
    /// left so far.
    pub(crate) fn carry(
        &mut self,
        work: &Work<'_>,
        sets: &[UnitSet],
        tick: &mut dyn FnMut(),
    ) -> Result<Carried, CarryError> {
        let mut batches = Batches::new(work, sets).peekable();
        let few = {
            let units: u64 = sets.iter().map(UnitSet::count).sum();
            units <= 64
        };
        if batches.peek().is_none() {
            return Ok(Carried::default());
        }
        if self.parallel && !few {
            self.carry_in_parallel(work, batches, tick)
        } else {
            self.carry_inline(work, batches, tick)
        }
    }

    fn carry_inline(
        &mut self,
        work: &Work<'_>,
        batches: impl Iterator<Item = Batch>,
        tick: &mut dyn FnMut(),
    ) -> Result<Carried, CarryError> {
        let mut carried = Carried::default();
        let lanes = self.workers.len().max(1);
        for (number, batch) in batches.enumerate() {
            if let Some(worker) = self.workers.get_mut(number % lanes) {
                carried.add(&worker.carry(work, &batch)?);
            }
            tick();
            if work.ends() {
                break;
            }
        }
        for worker in &mut self.workers {
            worker.lane.flush().map_err(CarryError::Link)?;
        }
        Ok(carried)
    }

    fn carry_in_parallel(
        &mut self,
        work: &Work<'_>,
        batches: impl Iterator<Item = Batch>,
        tick: &mut dyn FnMut(),
    ) -> Result<Carried, CarryError> {
        let lanes = self.workers.len();
        let (give, get) = crossbeam::channel::bounded::<Batch>(lanes);
        let failed = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mut running = Vec::with_capacity(lanes);
            let (say_done, done) = crossbeam::channel::bounded::<()>(lanes);
            for worker in &mut self.workers {
                let name = format!("lane-{}", worker.index);
                let (get, failed, say_done) = (get.clone(), &failed, say_done.clone());
                let run = move || {
                    let outcome = worker.run(work, &get, failed);
                    if outcome.is_err() {
                        failed.store(true, Ordering::Release);
                    }
                    let _ = say_done.try_send(());
                    outcome
                };
                match std::thread::Builder::new().name(name).spawn_scoped(scope, run) {
                    Ok(thread) => running.push(thread),
                    Err(error) => {
                        failed.store(true, Ordering::Release);
                        drop(give);
                        return Err(CarryError::Data(DataError::new(format!(
                            "no thread could be started for a lane: {error}"
                        ))));
                    }
                }
            }
            drop(get);
            'feed: for mut batch in batches {
                loop {
                    tick();
                    if failed.load(Ordering::Acquire) || work.ends() {
                        break 'feed;
                    }
                    match give.send_timeout(batch, PATIENCE) {
                        Ok(()) => break,
                        Err(crossbeam::channel::SendTimeoutError::Timeout(back)) => batch = back,
                        Err(crossbeam::channel::SendTimeoutError::Disconnected(_)) => break 'feed,
                    }
                }
            }
            drop(give);
            let mut carried = Carried::default();
            let mut outcome = Ok(());
            for thread in running {
                while !thread.is_finished() && done.recv_timeout(PATIENCE).is_err() {
                    tick();
                }
                match thread.join() {
                    Ok(Ok(part)) => carried.add(&part),
                    // A link that broke explains why the others were stopped.
                    Ok(Err(CarryError::Stopped)) => {
                        outcome = outcome.and(Err(CarryError::Stopped));
                    }
                    Ok(Err(error)) => outcome = Err(error),
                    Err(_) => {
                        outcome = Err(CarryError::Data(DataError::new("a lane's thread panicked")));
                    }
                }
            }
            outcome.map(|()| carried)
        })
    }
}

impl Worker {
    fn run(
        &mut self,
        work: &Work<'_>,
        batches: &crossbeam::channel::Receiver<Batch>,
        failed: &AtomicBool,
    ) -> Result<Carried, CarryError> {
        let mut carried = Carried::default();
        for batch in batches {
            if failed.load(Ordering::Acquire) {
                return Err(CarryError::Stopped);
            }
            carried.add(&self.carry(work, &batch)?);
        }
        self.lane.flush().map_err(CarryError::Link)?;
        Ok(carried)
    }

    /// One batch: take, read, encode, send - in this order (see `custody`).
    fn carry(&mut self, work: &Work<'_>, batch: &Batch) -> Result<Carried, CarryError> {
        let Some(cargo) = work.cargo.get(batch.cargo) else {
            return Ok(Carried::default());
        };
        if work.meters.stop.load(Ordering::Acquire) {
            return Err(CarryError::Stopped);
        }
        work.custody
            .take(cargo.info.id, &batch.spans)
            .map_err(CarryError::Data)?;
        let mut counts = self
            .encoder
            .encode(
                work.memory,
                &*cargo.source,
                &cargo.info,
                &batch.spans,
                work.round,
                work.clock,
            )
            .map_err(CarryError::Data)?;
        let mut frames = 0;
        if self.encoder.has_frame() {
            // From here on a part of it may be at the other side: the sequence number is used up.
            self.sequence += 1;
            frames = 1;
            work.custody.sent(self.index, self.sequence, &batch.spans);
            let start = work.clock.now();
            let Worker {
                lane,
                encoder,
                sequence,
                ..
            } = self;
            let frame = encoder.frame(&cargo.info, *sequence, work.round);
            let bytes = frame.len();
            counts.wire_bytes = bytes as u64;
            send_paced(&mut **lane, frame, work)?;
            let took = work.clock.now().saturating_sub(start);
            encoder.costs.sent(bytes, took);
            work.meters
                .sending
                .fetch_add(took.as_nanos() as u64, Ordering::Relaxed);
        }
        let mut carried = Carried {
            frames,
            ..Carried::default()
        };
        match cargo.info.kind {
            BlockKind::Memory => carried.memory = counts,
            BlockKind::Disk => carried.disk = counts,
        }
        Ok(carried)
    }
}

fn send_paced(lane: &mut dyn Lane, frame: &[u8], work: &Work<'_>) -> Result<(), CarryError> {
    let mut rest = frame;
    while !rest.is_empty() {
        let (wait, piece) = {
            let mut pace = work.pace.lock().unwrap_or_else(PoisonError::into_inner);
            let piece = rest.len().min(pace.piece_bytes());
            (pace.book(work.clock.now(), piece), piece)
        };
        let (now, later) = rest.split_at(piece);
        let until = work.clock.now() + wait;
        work.meters
            .held_back
            .fetch_add(wait.as_nanos() as u64, Ordering::Relaxed);
        loop {
            let left = until.saturating_sub(work.clock.now());
            if left.is_zero() {
                break;
            }
            if work.meters.stop.load(Ordering::Acquire) {
                return Err(CarryError::Stopped);
            }
            work.clock.sleep(left.min(PATIENCE));
        }
        lane.send(now).map_err(CarryError::Link)?;
        work.meters.sent_bytes.fetch_add(piece as u64, Ordering::Relaxed);
        rest = later;
    }
    Ok(())
}

/// Cuts what is to be carried into batches, as long as the present pace allows: disks first, since they change
/// less while they wait.
struct Batches<'a> {
    work: &'a Work<'a>,
    sets: &'a [UnitSet],
    order: Vec<usize>,
    at: usize,
    unit: u64,
}

impl<'a> Batches<'a> {
    fn new(work: &'a Work<'a>, sets: &'a [UnitSet]) -> Self {
        let mut order: Vec<usize> = (0..work.cargo.len()).collect();
        order.sort_by_key(|at| {
            work.cargo
                .get(*at)
                .map(|cargo| cargo.info.kind == BlockKind::Memory)
        });
        Batches {
            work,
            sets,
            order,
            at: 0,
            unit: 0,
        }
    }
}

impl Iterator for Batches<'_> {
    type Item = Batch;

    fn next(&mut self) -> Option<Batch> {
        let pace = *self.work.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let most_bytes = pace.batch_bytes(WINDOW_BYTES as usize);
        loop {
            let cargo = *self.order.get(self.at)?;
            let (info, set) = (&self.work.cargo.get(cargo)?.info, self.sets.get(cargo)?);
            let mut units_left = (most_bytes / info.unit_bytes() as usize).max(1) as u64;
            let mut spans = Vec::new();
            while units_left > 0
                && let Some((first, count)) = set.next_run(self.unit)
            {
                // Full batches end where a window ends, so that raw runs stay whole.
                let window_units = WINDOW_BYTES / u64::from(info.unit_bytes());
                let to_window_end = window_units - first % window_units;
                let count = count.min(units_left).min(to_window_end);
                spans.push(Span {
                    block: info.id,
                    first,
                    count: count as u32,
                });
                units_left -= count;
                self.unit = first + count;
                if count == to_window_end && units_left < window_units / 2 {
                    break;
                }
            }
            if !spans.is_empty() {
                return Some(Batch { cargo, spans });
            }
            self.at += 1;
            self.unit = 0;
        }
    }
}
