//! The balloon's thread: what each of its queues means.

use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::stats::{ENTRY_LEN, GuestMemoryStats};
use super::{BALLOON_PAGE_SIZE, BalloonControl, F_FREE_PAGE_HINT, F_REPORTING, F_STATS, Reclaim};
use crate::log_once::LogOnce;
use crate::ram::{self, PAGE_SIZE, Ram};
use crate::virtio::device::{Activation, ActiveQueue, VirtioInterrupt};
use crate::virtio::serve::{Done, Request, Served, serve};
use crate::virtio::worker::{More, Poll, Work, clear};

/// All queues a driver may use.
pub(super) const ROLES: usize = 5;
const ASK_STATS: u64 = 100;
/// A driver sends a page of page numbers at most.
const MOST_NUMBERS: usize = 1024;
const MOST_STATS: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Stats,
    Hints,
    Reporting,
}

/// What each queue is for: a queue whose feature is not agreed does not exist, and those behind it move up, as
/// Linux numbers them.
fn roles(features: u64) -> Vec<Role> {
    let optional = [
        (F_STATS, Role::Stats),
        (F_FREE_PAGE_HINT, Role::Hints),
        (F_REPORTING, Role::Reporting),
    ];
    let agreed = optional
        .into_iter()
        .filter(|(feature, _)| features & 1 << feature != 0)
        .map(|(_, role)| role);
    [Role::Inflate, Role::Deflate].into_iter().chain(agreed).collect()
}

pub(super) struct BalloonWork {
    queues: Vec<(Role, ActiveQueue)>,
    inner: Inner,
    /// The statistics buffer the guest gave and that is kept until somebody asks.
    held_stats: Option<u16>,
}

struct Inner {
    name: String,
    ram: Ram,
    interrupt: Arc<dyn VirtioInterrupt>,
    reclaim: Arc<dyn Reclaim>,
    control: Arc<BalloonControl>,
    may_release_reported: bool,
    complaints: LogOnce,
}

impl BalloonWork {
    pub(super) fn new(
        name: String,
        work: Activation,
        reclaim: Arc<dyn Reclaim>,
        control: Arc<BalloonControl>,
    ) -> Self {
        let Activation {
            ram,
            features,
            queues,
            interrupt,
        } = work;
        let roles = roles(features);
        let with_role = |active: ActiveQueue| {
            // A queue the driver enabled without its feature has no meaning; it is kept and never served.
            let role = roles
                .get(usize::from(active.index))
                .copied()
                .unwrap_or(Role::Deflate);
            (role, active)
        };
        let poisons = features & 1 << super::F_PAGE_POISON != 0;
        let may_release_reported = features & 1 << F_REPORTING != 0 && !poisons;
        let complaints = LogOnce::new();
        let inner = Inner {
            name,
            ram,
            interrupt,
            reclaim,
            control,
            may_release_reported,
            complaints,
        };
        Self {
            queues: queues.into_iter().map(with_role).collect(),
            inner,
            held_stats: None,
        }
    }

    pub(super) fn into_queues(self) -> Vec<(u16, Queue)> {
        self.queues
            .into_iter()
            .map(|(_, active)| (active.index, active.queue))
            .collect()
    }

    /// Gives the kept statistics buffer back, which makes the guest fill it anew.
    fn ask_stats(&mut self) {
        let Some((_, active)) = self.queues.iter_mut().find(|(role, _)| *role == Role::Stats) else {
            return;
        };
        if let Some(head) = self.held_stats.take() {
            if active.queue.add_used(&self.inner.ram, head, 0).is_err() {
                self.inner.interrupt.needs_reset();
            }
            self.inner.interrupt.queue(active.index);
        }
    }
}

impl Work for BalloonWork {
    fn register(&mut self, poll: &Poll) -> io::Result<()> {
        poll.add(&self.inner.control.ask_stats, ASK_STATS)?;
        self.queues
            .iter()
            .try_for_each(|(_, active)| poll.add(&active.kick, u64::from(active.index)))
    }

    fn ready(&mut self, token: u64, _poll: &Poll) -> More {
        if token == ASK_STATS {
            clear(&self.inner.control.ask_stats);
            self.ask_stats();
            return More::Later;
        }
        let Self {
            queues,
            inner,
            held_stats,
        } = self;
        let Some((role, active)) = queues
            .iter_mut()
            .find(|(_, active)| u64::from(active.index) == token)
        else {
            return More::Later;
        };
        clear(&active.kick);
        let ActiveQueue {
            index,
            queue,
            kick: _,
        } = active;
        let served = serve(
            queue,
            *index,
            &inner.ram,
            &*inner.interrupt,
            |request| match *role {
                Role::Stats => inner.stats(request, held_stats),
                Role::Inflate => inner.answer(inner.inflate(request)),
                Role::Deflate => Done::Used(0),
                Role::Hints => inner.answer(inner.hint(request)),
                Role::Reporting => inner.answer(inner.report(request)),
            },
        );
        if served == Served::More {
            More::Now
        } else {
            More::Later
        }
    }

    fn finish(&mut self) {
        // The kept buffer is not used yet: the next device thread takes it from the queue once more. It is the last
        // one taken, because a second one is refused while one is kept.
        if self.held_stats.take().is_some()
            && let Some((_, active)) = self.queues.iter_mut().find(|(role, _)| *role == Role::Stats)
        {
            active.queue.go_to_previous_position();
        }
    }
}

impl Inner {
    fn answer(&self, outcome: io::Result<()>) -> Done {
        if let Err(error) = outcome {
            self.complaints
                .warn(|| format!("{}: a request of the guest was ignored: {error}", self.name));
        }
        Done::Used(0)
    }

    fn stats(&self, request: Request<'_>, held: &mut Option<u16>) -> Done {
        if held.is_some() {
            self.complaints
                .warn(|| format!("{}: the guest sends statistics nobody asked for", self.name));
            return Done::Broken;
        }
        *held = Some(request.head_index());
        match read_bytes(&self.ram, request, MOST_STATS * ENTRY_LEN) {
            Ok(bytes) => self.control.take_stats(GuestMemoryStats::parse(&bytes)),
            Err(error) => {
                self.answer(Err(error));
            }
        }
        Done::Later
    }

    /// The guest gives pages, by number.
    fn inflate(&self, request: Request<'_>) -> io::Result<()> {
        let bytes = read_bytes(&self.ram, request, MOST_NUMBERS * 4)?;
        let numbers = bytes
            .chunks_exact(4)
            .filter_map(|bytes| bytes.try_into().ok())
            .map(u32::from_le_bytes);
        let mut pages: Vec<u32> = numbers.collect();
        pages.sort_unstable();
        pages.dedup();
        let runs = pages.chunk_by(|a, b| a.checked_add(1) == Some(*b));
        for run in runs {
            let start = run
                .first()
                .map_or(0, |first| u64::from(*first) * BALLOON_PAGE_SIZE);
            self.release(start..start + run.len() as u64 * BALLOON_PAGE_SIZE)?;
        }
        Ok(())
    }

    /// The guest lends free pages until this request is answered, and takes them back empty.
    fn report(&self, request: Request<'_>) -> io::Result<()> {
        if !self.may_release_reported {
            return Ok(());
        }
        for descriptor in request.writable() {
            let (start, end) = (
                descriptor.addr().0,
                descriptor.addr().0.saturating_add(descriptor.len().into()),
            );
            let (first, last) = (start.div_ceil(PAGE_SIZE), end / PAGE_SIZE);
            if first < last {
                self.release(first * PAGE_SIZE..last * PAGE_SIZE)?;
            }
        }
        Ok(())
    }

    /// Gives memory back to the host. Its pages now read as zero, which is a change that no dirty log of KVM shows:
    /// marked after the fact, so that nobody sends the old contents later than the mark.
    fn release(&self, range: Range<u64>) -> io::Result<()> {
        let len = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
        let start = GuestAddress(range.start);
        // Checked piece by piece, because a range may lie in two regions but not in the hole between.
        for piece in self.ram.get_slices(start, len) {
            piece.map_err(|_| io::Error::other(format!("{:#x} is not in memory", range.start)))?;
        }
        self.reclaim.release(range)?;
        ram::mark_dirty(&self.ram, start, len).map_err(io::Error::other)
    }

    /// Either a command id to read, or free pages as buffers to write.
    fn hint(&self, request: Request<'_>) -> io::Result<()> {
        for descriptor in request {
            if descriptor.is_write_only() {
                let mut shared = self.control.lock();
                if shared.may_hint() {
                    shared.hints.hint(descriptor.addr().0, descriptor.len().into());
                }
            } else if descriptor.len() >= 4 {
                use vm_memory::Bytes;
                let command: u32 = self.ram.read_obj(descriptor.addr()).map_err(io::Error::other)?;
                self.control.lock().hints.guest_says(u32::from_le(command));
            }
        }
        Ok(())
    }
}

/// The readable part of a request, up to a limit.
fn read_bytes(ram: &Ram, request: Request<'_>, limit: usize) -> io::Result<Vec<u8>> {
    let mut reader = request.reader(ram).map_err(io::Error::other)?;
    let mut bytes = vec![0; reader.available_bytes().min(limit)];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}
