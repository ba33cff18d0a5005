//! What a vCPU can do: ports, the services of ring 0, its local APIC, sleeping and starting its peers.

use core::arch::asm;
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

pub const MAX_CPUS: usize = 64;
const LAPIC: u64 = 0xfee0_0000;
const AP_PAGE: u64 = 0x8000;
const INTERRUPT_STACK: u64 = 4096;
const TSS_SIZE: u64 = 128;
pub const TIMER_VECTOR: u8 = 0x40;
/// Devices get vectors from here on.
pub const DEVICE_VECTOR: u8 = 0x50;
pub const WAKE_VECTOR: u8 = 0x42;
pub const SERIAL_VECTOR: u8 = 0x41;

unsafe extern "C" {
    static ap_page: u8;
    static ap_page_end: u8;
    static vectors: u8;
    static mut idt: [[u64; 2]; 256];
    static mut interrupt_stacks: [[u64; 512]; MAX_CPUS];
    static mut tss_area: [u8; MAX_CPUS * 128 + 8192 + 64];
    static vector_counts: [AtomicU64; 256];
}

/// How many vCPUs have arrived in ring 3.
static ARRIVED: AtomicUsize = AtomicUsize::new(0);
static APIC_IDS: [AtomicU32; MAX_CPUS] = [const { AtomicU32::new(0) }; MAX_CPUS];

pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: reads a port; devices here have no side effect on memory from port reads.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, nomem, preserves_flags)) };
    value
}

pub fn out8(port: u16, value: u8) {
    // SAFETY: writes a port.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) };
}

pub fn in16(port: u16) -> u16 {
    let value: u16;
    // SAFETY: reads a port.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nostack, nomem, preserves_flags)) };
    value
}

pub fn out16(port: u16, value: u16) {
    // SAFETY: writes a port.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags)) };
}

pub fn in32(port: u16) -> u32 {
    let value: u32;
    // SAFETY: reads a port.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, nomem, preserves_flags)) };
    value
}

pub fn out32(port: u16, value: u32) {
    // SAFETY: writes a port.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) };
}

/// All bytes in one string instruction: one exit to the monitor where it can be one.
pub fn out_bytes(port: u16, bytes: &[u8]) {
    // SAFETY: reads `bytes` and writes a port.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _, options(nostack, preserves_flags))
    };
}

fn service(which: u64, a: u64, b: u64, c: u64) -> u64 {
    let answer;
    // SAFETY: ring 0's services change rax, rcx and rdx only; the call pushes on this stack, which the
    // absence of `nostack` allows.
    unsafe {
        asm!("call service_gate", inout("rax") which => answer, in("rdi") a, in("rsi") b, inout("rdx") c => _, out("rcx") _)
    };
    answer
}

pub fn write_msr(register: u32, value: u64) {
    service(2, register as u64, value, 0);
}

pub fn triple_fault() -> ! {
    service(4, 0, 0, 0);
    halt()
}

/// An instruction that a KVM which emulates ring 0 cannot emulate; elsewhere an invalid opcode.
pub fn emulation_failure() {
    service(5, 0, 0, 0);
}

pub fn invalid_opcode() -> ! {
    // SAFETY: raises an exception that `on_exception` reports.
    unsafe { asm!("ud2", options(noreturn)) }
}

/// Stops this vCPU for good.
pub fn halt() -> ! {
    loop {
        service(6, 0, 0, 0);
    }
}

fn lapic_read(offset: u64) -> u32 {
    // SAFETY: the local APIC's page is mapped and answers aligned 32-bit accesses.
    unsafe { ((LAPIC + offset) as *const u32).read_volatile() }
}

fn lapic_write(offset: u64, value: u32) {
    // SAFETY: as above.
    unsafe { ((LAPIC + offset) as *mut u32).write_volatile(value) }
}

/// How often an interrupt vector was taken, by all vCPUs.
pub fn vector_count(vector: u8) -> u64 {
    // SAFETY: a table of counters that ring 0 increments with locked instructions.
    unsafe { vector_counts[vector as usize].load(Ordering::Relaxed) }
}

/// Whether the serial port has interrupted since the last call. Only the first vCPU asks.
pub fn serial_interrupted() -> bool {
    static SEEN: AtomicU64 = AtomicU64::new(0);
    let count = vector_count(SERIAL_VECTOR);
    SEEN.swap(count, Ordering::Relaxed) != count
}

/// A vCPU as seen by the code that runs on it.
pub struct Cpu {
    pub index: usize,
    pub apic_id: u32,
    seen: u64,
}

impl Cpu {
    /// Gives this vCPU its task state (port rights, interrupt stack), its local APIC, its clock, and interrupts.
    pub fn arrive(index: usize) -> Cpu {
        // SAFETY: each vCPU writes only its own task state, descriptor and stack; index < MAX_CPUS.
        unsafe {
            let area = &raw mut tss_area as *mut u8;
            let area_size = (MAX_CPUS * 128 + 8192 + 1) as u64;
            area.add(area_size as usize - 1).write(0xff);
            let tss = area.add(index * TSS_SIZE as usize);
            let stack_top = (&raw mut interrupt_stacks as u64) + (index as u64 + 1) * INTERRUPT_STACK;
            (tss.add(4) as *mut u64).write_unaligned(stack_top);
            (tss.add(36) as *mut u64).write_unaligned(stack_top);
            (tss.add(44) as *mut u64).write_unaligned(stack_top - INTERRUPT_STACK / 2);
            let bitmap = (MAX_CPUS as u64 - index as u64) * TSS_SIZE;
            (tss.add(102) as *mut u16).write_unaligned(bitmap as u16);
        }
        crate::clock::arrive(index);
        lapic_write(0xf0, 0x1ff); // on, spurious vector 255
        lapic_write(0x80, 0); // let every priority in
        lapic_write(0x350, 0x1_0000); // LINT0 masked: nothing from the old interrupt controller
        lapic_write(0x3e0, 0xb); // timer counts undivided
        lapic_write(0x320, TIMER_VECTOR as u32); // one shot
        let apic_id = lapic_read(0x20) >> 24;
        service(3, 0, 0, 0);
        APIC_IDS[index].store(apic_id, Ordering::Relaxed);
        ARRIVED.fetch_add(1, Ordering::SeqCst);
        let mut cpu = Cpu {
            index,
            apic_id,
            seen: 0,
        };
        cpu.seen = cpu.interrupts();
        cpu
    }

    fn counter(&self) -> *const u64 {
        // SAFETY: only an address is taken.
        unsafe { (&raw const interrupt_stacks as *const u64).add(self.index * 512) }
    }

    /// Interrupts taken by this vCPU.
    pub fn interrupts(&self) -> u64 {
        // SAFETY: the first word of this vCPU's interrupt stack, which ring 0 increments.
        unsafe { self.counter().read_volatile() }
    }

    /// Halts until an interrupt, at most for `ns`. An interrupt since the last sleep ends it at once, so
    /// nothing that came in after the caller looked at its work is slept over.
    pub fn sleep(&mut self, ns: u64) {
        let count = ns.clamp(1000, 1_000_000_000) as u32; // KVM's local APIC counts nanoseconds
        service(0, self.counter() as u64, self.seen, count as u64);
        self.seen = self.interrupts();
    }

    /// Forgets interrupts so far: call before looking for work, then `sleep` if there is none.
    pub fn look(&mut self) {
        self.seen = self.interrupts();
    }
}

/// Before the first `arrive`: fills the interrupt table and silences the old interrupt controllers.
pub fn prepare() {
    // SAFETY: only the first vCPU runs, with interrupts off; the entries are 16 bytes apart in `vectors`.
    unsafe {
        for vector in 0..256u64 {
            let entry = &raw const vectors as u64 + 16 * vector;
            let stack = if vector < 32 { 2 } else { 1 };
            let gate = entry & 0xffff | 0x08 << 16 | stack << 32 | 0x8e << 40 | (entry >> 16 & 0xffff) << 48;
            (&raw mut idt as *mut [u64; 2])
                .add(vector as usize)
                .write_volatile([gate, entry >> 32]);
        }
    }
}

pub fn silence_old_controllers() {
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
}

/// The local APIC ids of the vCPUs that have arrived, by index.
pub fn apic_id_of(index: usize) -> u32 {
    APIC_IDS[index % MAX_CPUS].load(Ordering::Relaxed)
}

/// Starts the vCPUs with these local APIC ids, one after the other; returns how many run in all.
pub fn start_peers(apic_ids: impl Iterator<Item = u32>) -> usize {
    // SAFETY: the first page below 1 MiB that nothing uses any more; copied before any vCPU runs it.
    unsafe {
        let size = &raw const ap_page_end as usize - &raw const ap_page as usize;
        core::ptr::copy_nonoverlapping(&raw const ap_page, AP_PAGE as *mut u8, size);
    }
    for apic_id in apic_ids {
        let before = ARRIVED.load(Ordering::SeqCst);
        if before >= MAX_CPUS {
            break;
        }
        lapic_write(0x310, apic_id << 24);
        lapic_write(0x300, 0x4500); // INIT
        wait(200_000, before);
        // The second time as long as Linux waits: a busy host may keep a vCPU from its first instruction for a while, and
        // who works without it is a smaller guest than was asked for.
        for patience in [100_000_000, 10_000_000_000] {
            lapic_write(0x310, apic_id << 24);
            lapic_write(0x300, 0x4600 | (AP_PAGE >> 12) as u32); // start at AP_PAGE
            if wait(patience, before) {
                break;
            }
        }
    }
    ARRIVED.load(Ordering::SeqCst)
}

/// Ends the sleep of all other vCPUs.
pub fn wake_peers() {
    lapic_write(0x300, 0xc_4000 | WAKE_VECTOR as u32);
}

/// Waits until more vCPUs than `before` have arrived, at most `ns`.
fn wait(ns: u64, before: usize) -> bool {
    let end = crate::clock::now(0) + ns;
    while ARRIVED.load(Ordering::SeqCst) == before {
        if crate::clock::now(0) > end {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}

/// Routes an input of the first IOAPIC to a vector on the vCPU with local APIC id 0, edge triggered.
pub fn route_io_interrupt(input: u32, vector: u8) {
    const IOAPIC: u64 = 0xfec0_0000;
    let write = |register: u32, value: u32| {
        // SAFETY: the IOAPIC's index and data registers.
        unsafe {
            (IOAPIC as *mut u32).write_volatile(register);
            ((IOAPIC + 0x10) as *mut u32).write_volatile(value);
        }
    };
    write(0x10 + 2 * input + 1, 0);
    write(0x10 + 2 * input, vector as u32);
}
