//! What a write to a protected page costs a guest on this host: measured, by a small machine of its own that does nothing
//! else, first with its memory unprotected and then protected as a crossing does it.
//!
//! Its one vCPU runs a few instructions in user mode (where the processor runs them itself on any KVM): a byte into each of
//! some pages, then a byte to where nothing is, which brings it out to us. What a turn takes longer over protected pages
//! is the faults' cost; where it met no faults (processors that log modified pages themselves), there is none. A busy machine of many vCPUs pays more, since they wait for each other; this says nothing of that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ferry_devices::ram::Ram;
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use crate::cpu::cpuid;
use crate::crossing::DirtyLog;
use crate::error::{Doing, MachineError, Result};
use crate::kvm::Capabilities;
use crate::kvm::dirty::{RegionLog, RegionRing};
use crate::kvm::vm::Vm;
use crate::memory::regions;

const MEMORY: u64 = 4 << 20;
/// Level 4, 3 and 2 of the page tables, identity, for user mode.
const TABLES: [u64; 3] = [0x1000, 0x2000, 0x3000];
const CODE: u64 = 0x10_000;
/// Where the pages begin that are written.
const PAGES_AT: u64 = 2 << 20;
const PAGES: u64 = 256;
/// Mapped for the guest, and no memory.
const OUTSIDE: u64 = 8 << 20;
const TURNS: usize = 7;
/// More than the pages of one turn: a ring that is full would be measured too.
const RING_ENTRIES: u32 = 1024;

/// mov rdi, rbx; again: mov [rdi], al; add rdi, 0x1000; cmp rdi, rsi; jb again; mov [r8], al; jmp to the start
const PROGRAM: [u8; 22] = [
    0x48, 0x89, 0xdf, 0x88, 0x07, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0x39, 0xf7, 0x72, 0xf2,
    0x41, 0x88, 0x00, 0xeb, 0xea,
];

struct Probe {
    vcpu: VcpuFd,
    vm: Arc<Vm>,
}

/// The cost of one write fault; none where tracking makes no faults, or they are not counted. `with_rings`: as the
/// machine's writes are tracked.
pub fn measure(kvm: &Kvm, caps: &Capabilities, with_rings: bool) -> Result<Option<Duration>> {
    let ram = Ram::from_ranges(&[(GuestAddress(0), MEMORY as usize)])
        .map_err(|e| MachineError::Host(format!("no memory to measure write faults with: {e}")))?;
    fill(&ram).map_err(|e| MachineError::Host(format!("the machine to measure write faults with: {e}")))?;
    let vm = Vm::create(kvm, caps, &ram, with_rings.then_some(RING_ENTRIES))?;
    let vcpu = vm.fd.create_vcpu(0).doing("create a CPU to measure with")?;
    vm.add_vcpu(&vcpu)?;
    vcpu.set_cpuid2(&cpuid::for_vcpu(&cpuid::supported(kvm)?, 0)?)
        .doing("set the CPUID of a CPU to measure with")?;
    set_registers(&vcpu)?;
    let mut probe = Probe { vcpu, vm };
    // The first touch of each page is no write fault.
    probe.turn()?;
    let free = median((0..TURNS).map(|_| probe.turn()).collect::<Result<_>>()?);
    let log = probe.log(&ram, caps)?;
    let failed = MachineError::Host;
    log.start().map_err(failed)?;
    let (mut protected, faults_before) = (Vec::new(), probe.faults());
    for _ in 0..TURNS {
        let mut words = vec![0; (MEMORY / 4096 / 64) as usize];
        log.survey(&mut words).map_err(failed)?;
        log.clear(0, &vec![u64::MAX; words.len()]).map_err(failed)?;
        protected.push(probe.turn()?);
    }
    let faults = probe
        .faults()
        .zip(faults_before)
        .map(|(now, before)| now - before);
    log.stop();
    let cost = median(protected).saturating_sub(free) / PAGES as u32;
    Ok(faults
        .filter(|faults| *faults >= PAGES * TURNS as u64 / 2)
        .map(|_| cost))
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn fill(ram: &Ram) -> std::result::Result<(), vm_memory::GuestMemoryError> {
    // Present, writable, user; the last level in pages of 2 MiB, as far as beyond the memory.
    let [level4, level3, level2] = TABLES;
    ram.write_obj(level3 | 7, GuestAddress(level4))?;
    ram.write_obj(level2 | 7, GuestAddress(level3))?;
    for page in 0..8u64 {
        ram.write_obj(page << 21 | 0x87, GuestAddress(level2 + page * 8))?;
    }
    ram.write_slice(&PROGRAM, GuestAddress(CODE))
}

fn set_registers(vcpu: &VcpuFd) -> Result<()> {
    let segment = |selector, type_, l| kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1 - l,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    };
    let mut sregs = vcpu
        .get_sregs()
        .doing("read the registers of a CPU to measure with")?;
    sregs.cs = segment(0x33, 11, 1);
    let data = segment(0x2b, 3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        limit: 0x67,
        selector: 0x40,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    // Long mode, with paging and write protection.
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0033, TABLES[0], 0x620, 0x500);
    vcpu.set_sregs(&sregs)
        .doing("set the segment registers of a CPU to measure with")?;
    let regs = kvm_regs {
        rip: CODE,
        rbx: PAGES_AT,
        rsi: PAGES_AT + PAGES * 4096,
        r8: OUTSIDE,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs)
        .doing("set the registers of a CPU to measure with")
}

impl Probe {
    /// Until all pages were written once.
    fn turn(&mut self) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(OUTSIDE, _)) => return Ok(begun.elapsed()),
                Ok(VcpuExit::Intr) => {}
                Ok(other) => {
                    return Err(MachineError::Host(format!(
                        "the CPU to measure write faults with came out by {other:?}"
                    )));
                }
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(e).doing("run a CPU to measure with"),
            }
        }
    }

    fn faults(&self) -> Option<u64> {
        self.vm.tracked().first().and_then(|tracked| tracked.faults)
    }

    fn log(&self, ram: &Ram, caps: &Capabilities) -> Result<Box<dyn DirtyLog>> {
        let vm = self.vm.clone();
        let Some(region) = regions(ram).first().copied() else {
            return Err(MachineError::Host(
                "there is no memory to measure write faults with".into(),
            ));
        };
        let manual = caps.manual_dirty_protect != 0;
        Ok(match vm.rings {
            Some(_) => Box::new(RegionRing { vm, region }),
            None => Box::new(RegionLog { vm, region, manual }),
        })
    }
}
