//! Monotonic time in nanoseconds: kvm-clock, which a monitor carries across save, restore and migration.

use core::arch::x86_64::{__cpuid, _mm_lfence, _rdtsc};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use crate::cpu::{MAX_CPUS, write_msr};

const KVM_SYSTEM_TIME_NEW: u32 = 0x4b56_4d01;

/// One vCPU's time page, as the hypervisor fills it.
#[repr(C, align(64))]
struct Page {
    version: u32,
    _pad: u32,
    tsc: u64,
    system_time: u64,
    multiplier: u32,
    shift: i8,
    flags: u8,
}

static mut PAGES: [Page; MAX_CPUS] = [const {
    Page {
        version: 0,
        _pad: 0,
        tsc: 0,
        system_time: 0,
        multiplier: 0,
        shift: 0,
        flags: 0,
    }
}; MAX_CPUS];
static KVM_CLOCK: AtomicBool = AtomicBool::new(false);
static LATEST: AtomicU64 = AtomicU64::new(0);

/// Asks the hypervisor to keep this vCPU's time page.
pub fn arrive(index: usize) {
    if index == 0 {
        KVM_CLOCK.store(has_kvm_clock(), Ordering::SeqCst);
    }
    if KVM_CLOCK.load(Ordering::SeqCst) {
        write_msr(
            KVM_SYSTEM_TIME_NEW,
            &raw const PAGES as u64 + (index * size_of::<Page>()) as u64 + 1,
        );
    }
}

pub fn name() -> &'static str {
    if KVM_CLOCK.load(Ordering::Relaxed) {
        "kvm-clock"
    } else {
        "tsc"
    }
}

fn has_kvm_clock() -> bool {
    (0x4000_0000..0x4001_0000u32).step_by(0x100).any(|leaf| {
        let signature = __cpuid(leaf);
        (signature.ebx, signature.ecx, signature.edx) == (0x4b4d_564b, 0x564b_4d56, 0x4d)
            && __cpuid(leaf + 1).eax & 1 << 3 != 0
    })
}

/// The time, read on the vCPU `index`. Never runs backwards, whatever vCPU asks.
pub fn now(index: usize) -> u64 {
    if !KVM_CLOCK.load(Ordering::Relaxed) {
        // SAFETY: reads a counter.
        return unsafe { _rdtsc() };
    }
    // SAFETY: the page is this vCPU's own; the hypervisor changes it between an odd and an even version.
    let (time, stable) = unsafe {
        let page = (&raw const PAGES as *const Page).add(index);
        loop {
            let version = (&raw const (*page).version).read_volatile();
            fence(Ordering::Acquire);
            let tsc = (&raw const (*page).tsc).read_volatile();
            let base = (&raw const (*page).system_time).read_volatile();
            let multiplier = (&raw const (*page).multiplier).read_volatile();
            let shift = (&raw const (*page).shift).read_volatile();
            let flags = (&raw const (*page).flags).read_volatile();
            _mm_lfence();
            let passed = _rdtsc().wrapping_sub(tsc);
            fence(Ordering::Acquire);
            if version & 1 == 0 && version == (&raw const (*page).version).read_volatile() {
                let passed = if shift < 0 {
                    passed >> -shift
                } else {
                    passed << shift
                };
                break (
                    base.wrapping_add(((passed as u128 * multiplier as u128) >> 32) as u64),
                    flags & 1 != 0,
                );
            }
        }
    };
    if stable {
        time
    } else {
        LATEST.fetch_max(time, Ordering::Relaxed).max(time)
    }
}
