//! KVM's dirty rings: each vCPU notes the pages that it writes in a ring of its own, which this process empties.
//!
//! An entry goes round in three steps. KVM fills it in and marks it *dirty*; we read it and mark it *harvested*; at
//! `KVM_RESET_DIRTY_RINGS` KVM protects the pages of all harvested entries anew and has the entries back. Both marks are
//! in one word of the entry, which is read with acquire and written with release order, so that neither side sees the
//! mark before what it says.
//!
//! Only after the reset is a page watched again, so nobody may read the page for the crossing between the two: a write
//! after that reading would leave no trace. Therefore an entry is noted and its page protected under one lock, and what
//! was noted is only given out under the same lock. A second write to a page is a second entry.
//!
//! **A signal must not meet the reset.** Since Linux 6.16 KVM breaks it off when the thread has a signal waiting, answers
//! with the number of entries that it got to as if that were all, and forgets to protect the last few pages of those it
//! counted. Writes to them would leave no trace. vCPU threads are stopped by signals, so the thread that resets keeps all
//! of them waiting meanwhile. What cannot be kept waiting (a stop from the terminal, say) shows in the count, unless it
//! comes between the very last entry and the return; then nobody knows which pages are watched, and tracking begins anew
//! with every page noted.
//!
//! A ring that is nearly full keeps its vCPU from running until it is emptied (`KVM_EXIT_DIRTY_RING_FULL`); the vCPU's
//! own thread does that, for all rings at once. Nothing is ever dropped for want of room.
//!
//! Which processors fill a buffer of their own first (page-modification logging): KVM moves it into the ring whenever
//! the vCPU leaves the guest. What is still in there is seen by a later harvest, at the latest when the vCPUs stand still.
#![allow(unsafe_code)] // memory shared with KVM, and two raw ioctls

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::error::{Doing, MachineError, Result};
use crate::kvm::caps::{CAP_DIRTY_LOG_RING, CAP_DIRTY_LOG_RING_ACQ_REL, Capabilities};

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

/// The marks of an entry: KVM filled it in, and we have read it.
const DIRTY: u32 = 1;
const HARVESTED: u32 = 2;
const ENTRY_BYTES: u32 = size_of::<kvm_dirty_gfn>() as u32;
/// The least that KVM maps, a page of entries.
pub const LEAST_ENTRIES: u32 = 4096 / ENTRY_BYTES;
/// The most that any KVM so far allows.
pub const MOST_ENTRIES: u32 = 65_536;

/// Says in one sentence why this host cannot have rings of that size, if so.
pub fn check(caps: &Capabilities, entries: u32) -> Result<()> {
    let most = caps.dirty_ring_bytes / ENTRY_BYTES;
    if most == 0 {
        return Err(MachineError::Host(
            "this host's KVM has no dirty ring; leave --dirty-ring out, and changed pages come from the dirty log".into(),
        ));
    }
    if entries > most {
        return Err(MachineError::Host(format!(
            "this host's KVM allows dirty rings of at most {most} entries, {entries} were asked for; give a smaller --dirty-ring"
        )));
    }
    Ok(())
}

/// What a vCPU has cost and done since its ring was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RingUse {
    /// Entries that were harvested: pages that it wrote while they were protected.
    pub pages: u64,
    /// How often it had to wait because its ring was full, and for how long altogether.
    pub full: u64,
    pub waited: Duration,
}

/// The rings of all vCPUs of a VM.
pub struct Rings {
    entries: u32,
    inner: Mutex<Inner>,
}

struct Inner {
    rings: Vec<Ring>,
    /// Pages noted and not given out yet, one bit each, by memory slot.
    noted: Vec<Vec<u64>>,
    /// Slots in which pages may be unwatched that nobody noted.
    torn: Vec<bool>,
    /// Entries that were harvested and that KVM has not taken back.
    owed: u64,
}

/// How often KVM may break one reset off.
const PATIENCE: u32 = 1000;

impl Rings {
    /// Switches the rings of a VM on, before its first vCPU. `slots`: the pages of each memory slot.
    pub(crate) fn enable(vm: &VmFd, caps: &Capabilities, entries: u32, slots: &[u64]) -> Result<Rings> {
        check(caps, entries)?;
        let named = |cap| vm.check_extension_raw(cap) > 0;
        let name = match named(CAP_DIRTY_LOG_RING_ACQ_REL) {
            true => CAP_DIRTY_LOG_RING_ACQ_REL,
            false => CAP_DIRTY_LOG_RING,
        };
        let mut cap = kvm_bindings::kvm_enable_cap {
            cap: name as u32,
            ..Default::default()
        };
        cap.args[0] = u64::from(entries) * u64::from(ENTRY_BYTES);
        vm.enable_cap(&cap).map_err(|e| {
            let hint = match e.errno() {
                libc::EINVAL => "; processors that log modified pages themselves need 1024 at least",
                _ => "",
            };
            MachineError::Host(format!(
                "KVM refused dirty rings of {entries} entries: {}{hint}; change --dirty-ring",
                std::io::Error::from_raw_os_error(e.errno())
            ))
        })?;
        Ok(Rings {
            entries,
            inner: Mutex::new(Inner {
                rings: Vec::new(),
                noted: slots
                    .iter()
                    .map(|pages| vec![0; pages.div_ceil(64) as usize])
                    .collect(),
                torn: vec![false; slots.len()],
                owed: 0,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Maps the ring of the next vCPU.
    pub(crate) fn add(&self, vcpu: &VcpuFd) -> Result<()> {
        let ring = Ring::map(vcpu, self.entries).doing("map a CPU's dirty ring")?;
        self.lock().rings.push(ring);
        Ok(())
    }

    /// By the thread of a vCPU whose ring is full.
    pub(crate) fn make_room(&self, vm: &VmFd, vcpu: u32) -> std::io::Result<()> {
        let begun = Instant::now();
        let mut inner = self.lock();
        let harvested = inner.harvest(vm);
        if let Some(ring) = inner.rings.get_mut(vcpu as usize) {
            ring.used.full += 1;
            ring.used.waited += begun.elapsed();
        }
        harvested
    }

    /// Harvests, and gives out what was noted of a slot: those pages are protected. `false`: some are not, and the slot's
    /// tracking has to begin anew.
    #[must_use = "pages that nobody watches are lost"]
    pub(crate) fn take(&self, vm: &VmFd, slot: u32, words: &mut [u64]) -> std::io::Result<bool> {
        let mut inner = self.lock();
        inner.harvest(vm)?;
        if let Some(noted) = inner.noted.get_mut(slot as usize) {
            for (word, noted) in words.iter_mut().zip(noted) {
                *word |= std::mem::take(noted);
            }
        }
        let torn = inner.torn.get_mut(slot as usize).map(std::mem::take);
        Ok(torn != Some(true))
    }

    /// Of each vCPU, in order.
    pub fn used(&self) -> Vec<RingUse> {
        self.lock().rings.iter().map(|ring| ring.used).collect()
    }
}

impl Inner {
    /// Notes everything that is in the rings and has KVM protect those pages anew.
    fn harvest(&mut self, vm: &VmFd) -> std::io::Result<()> {
        for ring in &mut self.rings {
            self.owed += ring.collect(&mut self.noted);
        }
        let mut patience = PATIENCE;
        while self.owed > 0 {
            let reset = without_signals(|| {
                // SAFETY: the ioctl has no argument.
                let count = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
                u64::try_from(count).or_else(|_| match std::io::Error::last_os_error() {
                    error if error.kind() == std::io::ErrorKind::Interrupted => Ok(0),
                    error => Err(error),
                })
            })?;
            if reset < self.owed {
                self.torn.fill(true);
                patience -= 1;
                if patience == 0 {
                    return Err(std::io::Error::other(format!(
                        "KVM does not take back {} entries",
                        self.owed
                    )));
                }
            }
            self.owed = self.owed.saturating_sub(reset);
        }
        Ok(())
    }
}

/// Does it while no signal can reach this thread, but those that nobody can hold up.
fn without_signals<T>(work: impl FnOnce() -> T) -> T {
    // SAFETY: both sets are plain data on the stack, `before` is written by the first call and read by the second; the
    // mask of this thread alone changes, and is as it was afterwards.
    unsafe {
        let mut all = std::mem::zeroed();
        let mut before = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let done = work();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        done
    }
}

/// The ring of one vCPU, mapped. The mapping keeps the vCPU's file, and so the VM, alive in the kernel.
struct Ring {
    first: NonNull<kvm_dirty_gfn>,
    entries: u32,
    /// The entry that KVM fills in next, as far as we have seen; always below `entries`.
    next: u32,
    used: RingUse,
}

// SAFETY: the mapping belongs to the ring alone and is memory of the process, the same for all threads; its entries are
// read under the lock that the ring lies behind.
unsafe impl Send for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, entries: u32) -> std::io::Result<Ring> {
        let bytes = entries as usize * ENTRY_BYTES as usize;
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at a place that the kernel chooses; nothing else of the process is touched.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(at.cast()).filter(|_| at != libc::MAP_FAILED) {
            Some(first) => Ok(Ring {
                first,
                entries,
                next: 0,
                used: RingUse::default(),
            }),
            None => Err(std::io::Error::last_os_error()),
        }
    }

    /// Notes the entries that KVM has filled in and hands them back; they are KVM's again at the reset.
    fn collect(&mut self, noted: &mut [Vec<u64>]) -> u64 {
        let mut found = 0;
        while found < u64::from(self.entries) {
            // SAFETY: `next` is below `entries`, and the mapping holds that many.
            let entry = unsafe { self.first.as_ptr().add(self.next as usize) };
            // SAFETY: the word is aligned, lives as long as the mapping, and both sides access it as one.
            let mark = unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) };
            if mark.load(Ordering::Acquire) & DIRTY == 0 {
                break;
            }
            // SAFETY: KVM wrote both before the mark that was just read, and writes no more until the reset.
            let (slot, page) = unsafe { ((*entry).slot, (*entry).offset) };
            // The upper half names an address space; there is one.
            let word = noted
                .get_mut((slot & 0xffff) as usize)
                .and_then(|words| words.get_mut((page / 64) as usize));
            if let Some(word) = word {
                *word |= 1 << (page % 64);
            }
            mark.store(HARVESTED, Ordering::Release);
            self.next = (self.next + 1) % self.entries;
            found += 1;
        }
        self.used.pages += found;
        found
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let bytes = self.entries as usize * ENTRY_BYTES as usize;
        // SAFETY: exactly the mapping that `map` made, and nothing points into it any more.
        unsafe { libc::munmap(self.first.as_ptr().cast(), bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_rings_or_with_smaller_ones_says_so() {
        let Ok(kvm) = crate::kvm::open() else {
            eprintln!("skipped: no KVM");
            return;
        };
        let mut caps = Capabilities::probe(&kvm).unwrap();
        caps.dirty_ring_bytes = 0;
        let none = check(&caps, 4096).unwrap_err().to_string();
        assert!(
            none.contains("no dirty ring") && none.contains("leave --dirty-ring out"),
            "{none}"
        );
        caps.dirty_ring_bytes = 65_536;
        check(&caps, 4096).unwrap();
        let small = check(&caps, 8192).unwrap_err().to_string();
        assert!(small.contains("at most 4096 entries, 8192"), "{small}");
    }
}
