//! The evidence pages and, kept elsewhere, what each of them must contain. Any vCPU may write or check any
//! page: the expected version's top bit is a lock.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::content::{self, Identity, Mismatch, Version, WORDS};
use crate::damage::{self, Damage};
use crate::memory::Pages;

const LOCKED: u64 = 1 << 63;

pub static WRITES: AtomicU64 = AtomicU64::new(0);
pub static CHECKS: AtomicU64 = AtomicU64::new(0);
pub static SWEEPS: AtomicU64 = AtomicU64::new(0);

pub struct Evidence {
    pub pages: Pages,
    expected: &'static [AtomicU64],
    seed: u64,
    random_percent: u64,
    fill_cursor: AtomicU64,
    filled: AtomicU64,
    sweep_cursor: AtomicU64,
}

impl Evidence {
    pub fn new(pages: Pages, expected: &'static [AtomicU64], seed: u64, random_percent: u64) -> Evidence {
        let zero = || AtomicU64::new(0);
        Evidence {
            pages,
            expected,
            seed,
            random_percent,
            fill_cursor: zero(),
            filled: zero(),
            sweep_cursor: zero(),
        }
    }

    pub fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire) >= self.pages.count()
    }

    /// Writes some pages for the first time; false when there are none left to fill.
    pub fn fill_some(&self) -> bool {
        const BATCH: u64 = 32;
        let from = self.fill_cursor.fetch_add(BATCH, Ordering::Relaxed);
        let to = (from + BATCH).min(self.pages.count());
        for page in from..to {
            let v = Version {
                version: 1,
                payload: 1,
            };
            content::write(self.words(page), self.identity(page), v);
            self.unlock(page, v);
            self.filled.fetch_add(1, Ordering::Release);
        }
        from < to
    }

    /// Writes the page's next version: all of it, or its header only. What is overwritten is checked first, so
    /// that no damage can hide under a new version.
    pub fn write(&self, page: u64, whole: bool, now: u64) {
        let old = self.lock(page);
        let (words, id) = (self.words(page), self.identity(page));
        let verdict = if whole {
            content::check(words, id, old)
        } else {
            content::check_header(words, id, old)
        };
        self.judge(page, now, verdict);
        let version = old.version.wrapping_add(1);
        let new = Version {
            version,
            payload: if whole {
                version & i32::MAX as u32
            } else {
                old.payload
            },
        };
        if whole {
            content::write(words, id, new)
        } else {
            content::write_header(words, id, new)
        }
        self.unlock(page, new);
        WRITES.fetch_add(1, Ordering::Relaxed);
    }

    /// Checks the next `count` pages of the sweep.
    pub fn check_some(&self, count: u64, now: u64) {
        let first = self.sweep_cursor.fetch_add(count, Ordering::Relaxed);
        for i in first..first + count {
            let page = i % self.pages.count();
            let v = self.lock(page);
            let verdict = content::check(self.words(page), self.identity(page), v);
            self.unlock(page, v);
            self.judge(page, now, verdict);
            if page + 1 == self.pages.count() {
                SWEEPS.fetch_add(1, Ordering::Relaxed);
            }
        }
        CHECKS.fetch_add(count, Ordering::Relaxed);
    }

    fn judge(&self, page: u64, now: u64, verdict: Result<(), Mismatch>) {
        if let Err(Mismatch { word, want, got }) = verdict {
            let gpa = self.pages.address(page) + 8 * word as u64;
            damage::found(Damage {
                kind: "page",
                item: page,
                gpa,
                want,
                got,
                at_ns: now,
            });
        }
    }

    fn identity(&self, page: u64) -> Identity {
        Identity {
            page,
            seed: self.seed,
            random: content::is_random(page, self.seed, self.random_percent),
        }
    }

    #[allow(clippy::mut_from_ref)]
    fn words(&self, page: u64) -> &mut [u64; WORDS] {
        // SAFETY: the page belongs to the evidence, and whoever holds its lock is alone with it.
        unsafe { &mut *(self.pages.address(page) as *mut [u64; WORDS]) }
    }

    fn lock(&self, page: u64) -> Version {
        let place = &self.expected[page as usize];
        loop {
            let seen = place.fetch_or(LOCKED, Ordering::Acquire);
            if seen & LOCKED == 0 {
                return Version {
                    version: seen as u32,
                    payload: (seen >> 32) as u32,
                };
            }
            core::hint::spin_loop();
        }
    }

    fn unlock(&self, page: u64, v: Version) {
        self.expected[page as usize].store(
            v.version as u64 | ((v.payload as u64) << 32) & !LOCKED,
            Ordering::Release,
        );
    }
}
