//! What KVM notes of writes to one region of memory, as the crossing asks for it: by the dirty log or by dirty rings.
//!
//! The log. With manual protection, reading the log does not clear it: a page stays writable, and its bit set, until `clear` is
//! called for it. A page that is written between `survey` and `clear` is written *without* a further trace. Therefore the
//! crossing clears first and reads the page after; the other order loses the write. Clearing late, just before the page
//! is read, is what makes the mode worth its trouble: a page that changes often is sent once, not twice.
//!
//! Without manual protection `survey` clears as it reads, all pages at once, and `clear` has nothing to do.
//!
//! The rings are like that too: what a survey gives out is protected already (`ring.rs` says how), and comes up again only
//! if it is written again. They begin empty, the log with manual protection begins full; the crossing minds neither, since
//! its first pass is everything that has content.

use std::sync::Arc;

use crate::crossing::DirtyLog;
use crate::kvm::raw;
use crate::kvm::vm::Vm;
use crate::memory::Region;

pub struct RegionLog {
    pub(crate) vm: Arc<Vm>,
    pub(crate) region: Region,
    pub(crate) manual: bool,
}

impl RegionLog {
    fn failed(&self, verb: &str, error: impl std::fmt::Display) -> String {
        format!(
            "the dirty log of memory at {:#x} could not be {verb}: {error}",
            self.region.guest
        )
    }
}

impl DirtyLog for RegionLog {
    fn start(&self) -> Result<(), String> {
        self.vm
            .log_dirty_pages(self.region.slot, true)
            .map_err(|e| self.failed("switched on", e))
    }

    fn stop(&self) {
        // A log that stays on costs the guest time and nothing else.
        if let Err(error) = self.vm.log_dirty_pages(self.region.slot, false) {
            tracing::warn!("{}", self.failed("switched off", error));
        }
    }

    fn survey(&self, words: &mut [u64]) -> Result<(), String> {
        let log = self
            .vm
            .fd
            .get_dirty_log(self.region.slot, self.region.size as usize)
            .map_err(|e| self.failed("read", e))?;
        words.iter_mut().zip(log).for_each(|(word, more)| *word |= more);
        Ok(())
    }

    fn clear(&self, first_word: usize, words: &[u64]) -> Result<(), String> {
        if !self.manual {
            return Ok(());
        }
        let first_page = first_word as u64 * 64;
        let left = self.region.pages().saturating_sub(first_page);
        let pages =
            u32::try_from((words.len() as u64 * 64).min(left)).map_err(|e| self.failed("cleared", e))?;
        if pages == 0 {
            return Ok(());
        }
        raw::clear_dirty_log(&self.vm.fd, self.region.slot, first_page, pages, words)
            .map_err(|e| self.failed("cleared", e))
    }
}

pub struct RegionRing {
    pub(crate) vm: Arc<Vm>,
    pub(crate) region: Region,
}

impl RegionRing {
    fn failed(&self, verb: &str, error: impl std::fmt::Display) -> String {
        format!(
            "the tracking of writes to memory at {:#x} by dirty rings could not be {verb}: {error}",
            self.region.guest
        )
    }

    /// Adds the pages that were written; `false`: there are others that nobody watches.
    fn take(&self, words: &mut [u64]) -> Result<bool, String> {
        let Some(rings) = &self.vm.rings else {
            return Ok(true);
        };
        rings
            .take(&self.vm.fd, self.region.slot, words)
            .map_err(|e| self.failed("read", e))
    }

    /// What is left from an earlier time says nothing.
    fn forget(&self) -> Result<(), String> {
        let pages = self.region.pages().div_ceil(64) as usize;
        self.take(&mut vec![0; pages]).map(|_watched| ())
    }

    fn switch(&self, on: bool) -> Result<(), String> {
        let verb = if on { "switched on" } else { "switched off" };
        self.vm
            .log_dirty_pages(self.region.slot, on)
            .map_err(|e| self.failed(verb, e))
    }
}

impl DirtyLog for RegionRing {
    fn start(&self) -> Result<(), String> {
        self.forget()?;
        self.switch(true)
    }

    fn stop(&self) {
        if let Err(sentence) = self.switch(false).and_then(|()| self.forget()) {
            tracing::warn!("{sentence}");
        }
    }

    fn survey(&self, words: &mut [u64]) -> Result<(), String> {
        if !self.take(words)? {
            tracing::warn!(
                "KVM was interrupted when it protected memory at {:#x} anew; all of it counts as written",
                self.region.guest
            );
            // Switched on, KVM protects every page.
            self.switch(false)?;
            self.switch(true)?;
            let pages = self.region.pages();
            for (index, word) in words.iter_mut().enumerate() {
                let here = pages.saturating_sub(index as u64 * 64);
                *word = if here < 64 { (1 << here) - 1 } else { u64::MAX };
            }
        }
        Ok(())
    }

    fn clear(&self, _: usize, _: &[u64]) -> Result<(), String> {
        Ok(())
    }
}
