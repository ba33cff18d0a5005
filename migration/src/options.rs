//! What a caller may set, and the handle by which a crossing is steered while it goes on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::handover::SessionId;
use crate::pages::encode::Compression;
use crate::policy::Limits;
use crate::report::Promise;
use crate::wire::{OLDEST_VERSION, VERSION};

#[derive(Clone, Debug)]
pub struct Options {
    /// Random; names this crossing.
    pub session: SessionId,
    pub lanes: u16,
    pub compression: Compression,
    /// Compare all memory and disks by BLAKE3 inside the switch.
    pub verify: bool,
    /// What the policy may do. Also says the deadline.
    pub limits: Limits,
    /// For old versions of hot pages, to send differences to.
    pub delta_cache_bytes: usize,
    /// A peer that makes no progress for so long has stalled. What takes the other side its time does not count: it gives
    /// signs of life meanwhile.
    pub stall: Duration,
    /// How long to try to get a broken link back. Zero: not at all.
    pub reconnect_for: Duration,
    /// How long to ask for the other side's word after the go-ahead, before giving up in doubt.
    pub doubt_for: Duration,
    /// What comparing is expected to take, for the promise.
    pub verify_takes: Duration,
    /// What is known of the fixed cost of a switch, before this one.
    pub switch_fixed: Duration,
    pub oldest_version: u16,
    pub newest_version: u16,
    /// How often the rest of the crossing is played through, which takes some milliseconds.
    pub foresee_every: Duration,
    /// What was estimated; the report puts it beside what was measured.
    pub promise: Option<Promise>,
}

impl Options {
    pub fn new(session: SessionId) -> Self {
        Options {
            session,
            lanes: 2,
            compression: Compression::Auto,
            verify: false,
            limits: Limits::default(),
            delta_cache_bytes: 24 << 20,
            stall: Duration::from_secs(10),
            reconnect_for: Duration::from_secs(30),
            doubt_for: Duration::from_secs(30),
            verify_takes: Duration::ZERO,
            switch_fixed: Duration::from_millis(30),
            oldest_version: OLDEST_VERSION,
            newest_version: VERSION,
            foresee_every: Duration::from_secs(1),
            promise: None,
        }
    }
}

/// No cap was set by hand.
const NO_CAP: u64 = u64::MAX;

/// Steers a crossing from another thread.
#[derive(Debug)]
pub struct Handle {
    cancelled: AtomicBool,
    switch: AtomicBool,
    cap_bytes_per_sec: AtomicU64,
}

impl Handle {
    pub fn new() -> Self {
        Handle {
            cancelled: AtomicBool::new(false),
            switch: AtomicBool::new(false),
            cap_bytes_per_sec: AtomicU64::new(NO_CAP),
        }
    }

    /// Ends the crossing; the machine stays. Has no effect once the go-ahead is given.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Stops copying live and switches now, whatever the downtime.
    pub fn switch_now(&self) {
        self.switch.store(true, Ordering::Release);
    }

    pub(crate) fn wants_switch(&self) -> bool {
        self.switch.load(Ordering::Acquire)
    }

    /// Caps the live copying from now on; the switch always gets all there is.
    pub fn cap(&self, bytes_per_sec: Option<u64>) {
        self.cap_bytes_per_sec
            .store(bytes_per_sec.unwrap_or(NO_CAP), Ordering::Release);
    }

    pub(crate) fn capped(&self) -> Option<u64> {
        Some(self.cap_bytes_per_sec.load(Ordering::Acquire)).filter(|cap| *cap != NO_CAP)
    }
}

impl Default for Handle {
    fn default() -> Self {
        Handle::new()
    }
}
