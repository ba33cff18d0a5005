//! Virtio balloon: takes memory from the guest and gives it back, gives free pages to the host at once (reporting),
//! and learns which pages need not travel (hints).

mod hints;
mod stats;
mod work;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::hints::FreePages;
pub use self::stats::GuestMemoryStats;

use self::hints::FreePageHints;
use self::work::BalloonWork;
use super::device::{Activation, DeviceState, RING_FEATURES, VirtioDevice, VirtioInterrupt, VirtioKind};
use super::worker::Worker;
use crate::error::DeviceError;
use crate::ram::Ram;
use crate::state::{StateError, decode_body, encode_body};

const QUEUE_SIZE: u16 = 128;
const VERSION: u32 = 1;
/// The balloon counts in these, whatever the guest's pages are.
pub const BALLOON_PAGE_SIZE: u64 = 4096;

const F_STATS: u32 = 1;
const F_DEFLATE_ON_OOM: u32 = 2;
const F_FREE_PAGE_HINT: u32 = 3;
const F_PAGE_POISON: u32 = 4;
const F_REPORTING: u32 = 5;
const FEATURES: [u32; 5] = [
    F_STATS,
    F_DEFLATE_ON_OOM,
    F_FREE_PAGE_HINT,
    F_PAGE_POISON,
    F_REPORTING,
];

/// How the machine gives memory back to the host. It knows what the memory is made of.
pub trait Reclaim: Send + Sync {
    /// Gives back the host memory behind these guest addresses (whole pages inside memory); they read as zero after.
    fn release(&self, range: Range<u64>) -> io::Result<()>;
}

pub struct Balloon {
    name: String,
    reclaim: Arc<dyn Reclaim>,
    control: Arc<BalloonControl>,
    worker: Option<Worker<BalloonWork>>,
}

/// What a user, or the crossing, can ask of a running balloon.
pub struct BalloonControl {
    ram: Ram,
    shared: Mutex<Shared>,
    /// Wakes the device's thread: somebody wants fresh statistics.
    ask_stats: EventFd,
    /// Statistics have come.
    stats_came: Condvar,
}

struct Shared {
    /// How many pages the guest shall give, and how many it says it has given.
    target_pages: u32,
    actual_pages: u32,
    poison: u32,
    hints: FreePageHints,
    stats: Option<GuestMemoryStats>,
    /// How often statistics came.
    stats_count: u64,
    /// While a driver is there.
    interrupt: Option<Arc<dyn VirtioInterrupt>>,
    /// The driver has to be told to look at the configuration as soon as the device runs.
    owed: bool,
    features: u64,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    target_pages: u32,
    actual_pages: u32,
    poison: u32,
    next_hint_command: u32,
    stats: Option<GuestMemoryStats>,
    features: u64,
}

impl BalloonControl {
    /// Asks the guest to give so much memory (rounded down to pages). More than it can spare is its own limit.
    pub fn set_target_bytes(&self, bytes: u64) {
        let mut shared = self.lock();
        shared.target_pages = u32::try_from(bytes / BALLOON_PAGE_SIZE).unwrap_or(u32::MAX);
        shared.config_changed();
    }

    pub fn target_bytes(&self) -> u64 {
        u64::from(self.lock().target_pages) * BALLOON_PAGE_SIZE
    }

    /// What the guest says it has given.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.lock().actual_pages) * BALLOON_PAGE_SIZE
    }

    /// The guest's last statistics, if it ever sent some.
    pub fn stats(&self) -> Option<GuestMemoryStats> {
        self.lock().stats.clone()
    }

    /// Asks the guest for fresh statistics; `stats` has them a little later.
    pub fn request_stats(&self) {
        // Fails only when it is signalled to the brim.
        let _ = self.ask_stats.write(1);
    }

    /// Fresh statistics, if the guest sends some in time, and otherwise its last ones.
    pub fn fresh_stats(&self, at_most: Duration) -> Option<GuestMemoryStats> {
        let shared = self.lock();
        let before = shared.stats_count;
        if !shared.has(F_STATS) || shared.interrupt.is_none() {
            return shared.stats.clone();
        }
        self.request_stats();
        let waited = self
            .stats_came
            .wait_timeout_while(shared, at_most, |shared| shared.stats_count == before);
        let (shared, _) = waited.unwrap_or_else(PoisonError::into_inner);
        shared.stats.clone()
    }

    fn take_stats(&self, stats: GuestMemoryStats) {
        let mut shared = self.lock();
        shared.stats = Some(stats);
        shared.stats_count += 1;
        self.stats_came.notify_all();
    }

    /// Asks the guest which of its pages are free. False if there is no driver that can say, or if freed pages must
    /// keep a pattern there. The dirty log must be on: read `hints` for the rules.
    pub fn start_hints(&self) -> bool {
        let mut shared = self.lock();
        if shared.interrupt.is_none() || !shared.may_hint() {
            return false;
        }
        shared.hints.start(&self.ram);
        shared.config_changed();
        true
    }

    /// True when the guest has said all.
    pub fn hints_complete(&self) -> bool {
        self.lock().hints.is_complete()
    }

    /// The pages that need not travel, as known now.
    pub fn free_pages(&self) -> FreePages {
        self.lock().hints.free_pages()
    }

    /// The dirty log shows that this was written since `start_hints`.
    pub fn wrote(&self, address: u64, len: u64) {
        self.lock().hints.wrote(address, len);
    }

    /// Ends the hints, after a crossing or because it failed, and lets the guest use those pages again.
    pub fn end_hints(&self) {
        let mut shared = self.lock();
        shared.hints.end();
        shared.config_changed();
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn config_changed(&mut self) {
        match &self.interrupt {
            Some(interrupt) => interrupt.config_changed(),
            None => self.owed = true,
        }
    }

    fn has(&self, feature: u32) -> bool {
        self.features & 1 << feature != 0
    }

    /// A guest that poisons its free pages expects to find the poison again, and a page that did not travel, or was
    /// given back, has none.
    fn may_hint(&self) -> bool {
        self.has(F_FREE_PAGE_HINT) && !self.has(F_PAGE_POISON)
    }

    fn config(&self) -> [u8; 16] {
        let words = [
            self.target_pages,
            self.actual_pages,
            self.hints.command(),
            self.poison,
        ];
        let mut image = [0; 16];
        image
            .iter_mut()
            .zip(words.iter().flat_map(|word| word.to_le_bytes()))
            .for_each(|(to, from)| *to = from);
        image
    }
}

impl Balloon {
    pub fn new(name: impl Into<String>, ram: Ram, reclaim: Arc<dyn Reclaim>) -> Result<Self, DeviceError> {
        let name = name.into();
        let ask_stats = EventFd::new(EFD_NONBLOCK).map_err(|source| DeviceError::Host {
            what: format!("no event file descriptor for {name}; raise the limit of open files"),
            source,
        })?;
        let shared = Shared {
            target_pages: 0,
            actual_pages: 0,
            poison: 0,
            hints: FreePageHints::new(),
            stats: None,
            stats_count: 0,
            interrupt: None,
            owed: false,
            features: 0,
        };
        let control = Arc::new(BalloonControl {
            ram: ram.clone(),
            shared: Mutex::new(shared),
            ask_stats,
            stats_came: Condvar::new(),
        });
        Ok(Self {
            name,
            reclaim,
            control,
            worker: None,
        })
    }

    pub fn control(&self) -> Arc<BalloonControl> {
        self.control.clone()
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> VirtioKind {
        VirtioKind::Balloon
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn offered_features(&self) -> u64 {
        FEATURES
            .iter()
            .fold(RING_FEATURES, |features, feature| features | 1 << feature)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; work::ROLES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let image = self.control.lock().config();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at)
                .ok()
                .and_then(|at| image.get(at))
                .copied()
                .unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        // The driver writes `actual` and `poison_val`, each whole.
        let Ok(value) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(value);
        let mut shared = self.control.lock();
        match offset {
            4 => shared.actual_pages = value,
            12 => shared.poison = value,
            _ => {}
        }
    }

    fn start(&mut self, work: Activation) -> Result<(), DeviceError> {
        let (interrupt, features) = (work.interrupt.clone(), work.features);
        let worker = BalloonWork::new(
            self.name.clone(),
            work,
            self.reclaim.clone(),
            self.control.clone(),
        );
        Worker::start_only(&mut self.worker, &self.name, worker)?;
        let mut shared = self.control.lock();
        shared.interrupt = Some(interrupt);
        shared.features = features;
        if std::mem::take(&mut shared.owed) {
            shared.config_changed();
        }
        Ok(())
    }

    fn stop(&mut self) -> Vec<(u16, Queue)> {
        self.control.lock().interrupt = None;
        self.worker
            .take()
            .and_then(Worker::stop)
            .map(BalloonWork::into_queues)
            .unwrap_or_default()
    }

    fn reset(&mut self) {
        // What the user asked for stays; what the driver told goes.
        let mut shared = self.control.lock();
        let Shared {
            target_pages: _,
            actual_pages,
            poison,
            hints,
            stats,
            stats_count: _,
            interrupt,
            owed,
            features,
        } = &mut *shared;
        (*actual_pages, *poison, *features) = (0, 0, 0);
        hints.end();
        *stats = None;
        *interrupt = None;
        // A new driver reads it all.
        *owed = false;
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let shared = self.control.lock();
        // A session of hints belongs to the crossing that asked for it and does not travel.
        let Shared {
            target_pages,
            actual_pages,
            poison,
            hints,
            stats,
            stats_count: _,
            interrupt: _,
            owed: _,
            features,
        } = &*shared;
        let saved = Saved {
            target_pages: *target_pages,
            actual_pages: *actual_pages,
            poison: *poison,
            next_hint_command: hints.next_command(),
            stats: stats.clone(),
            features: *features,
        };
        Ok(DeviceState {
            version: VERSION,
            body: encode_body(&self.name, &saved)?,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let Saved {
            target_pages,
            actual_pages,
            poison,
            next_hint_command,
            stats,
            features,
        } = decode_body(&self.name, state.body_up_to(VERSION, &self.name)?)?;
        let mut shared = self.control.lock();
        shared.target_pages = target_pages;
        shared.actual_pages = actual_pages;
        shared.poison = poison;
        shared.hints.restore(next_hint_command);
        shared.stats = stats;
        shared.features = features;
        // What its driver was told of it is not known, and an interrupt too many does no harm.
        shared.owed = true;
        Ok(())
    }
}
