//! The state of one vCPU.
//!
//! # The order
//!
//! KVM's getters and setters are not independent of each other, and nothing in their return values tells when the order
//! was wrong: the guest just behaves strangely, rarely. What follows is what the kernel does (arch/x86/kvm/x86.c), and the
//! order that follows from it. No vCPU of the machine may run meanwhile, and each must have completed its last exit (see
//! `crate::vcpu`): both hold when the machine is paused.
//!
//! Saving:
//! 1. **MP state first.** Getting it makes KVM accept a pending INIT or start-up message, which changes registers,
//!    segments and the APIC. Everything read before would be out of date.
//! 2. regs, sregs, XSAVE, XCRs, debug registers, in any order among themselves. (sregs also carries one pending interrupt,
//!    as an older form of what the events hold.)
//! 3. **MSRs, then the local APIC.** The timer runs on while we look. When a TSC deadline passes, KVM may clear the deadline
//!    and set the interrupt's bit in the APIC at once. Deadline first, APIC second: an expiry in between is in both, and the
//!    guest gets one interrupt too many, which it can bear. The other way round it is in neither, and a guest that sleeps
//!    sleeps for ever. (One-shot and periodic timers are the APIC's own; KVM lets one that had run out when it was saved
//!    run out again as soon as it is restored.)
//! 4. **Events last.** Getting them turns what was requested into what is pending (NMIs), and the getters above may
//!    themselves have requested something.
//!
//! Restoring:
//! 1. **CPUID before everything** (done when the vCPU was made): it decides which bits of CR4, XCR0 and which MSRs exist.
//!    It cannot change after the vCPU has run.
//! 2. **TSC frequency** before anything that counts in it. The TSC itself is set by `clock`, before `restore` is called:
//!    the deadline below is compared with it.
//! 3. **regs before events**: setting the registers drops a pending exception, which the events bring back.
//! 4. **sregs before the local APIC**: they hold the APIC's base register with its enable and x2APIC bits, and the APIC's
//!    registers can only be set in a mode that fits. They also come before XCRs (CR4.OSXSAVE).
//! 5. **XCRs before XSAVE**: which components may be set follows from XCR0.
//! 6. **The local APIC before the MSRs**: the TSC deadline is only accepted while the timer is in deadline mode.
//! 7. **MP state after sregs**: sregs that look like those after a reset make KVM set the first vCPU runnable.
//! 8. **Events last**: every setter before may have dropped or requested some.
//! 9. The interrupt chips come after all vCPUs (see `chips`): setting the IOAPIC delivers what is pending in it to the
//!    local APICs, which must be there and must not be overwritten afterwards.

use ferry_devices::state::{Record, RecordKey};
use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::blob::{Blob, Words};
use super::msrs::{self, Msr};
use super::saved;
use crate::error::{Doing, Result};
use crate::kvm::{Capabilities, raw};

const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuState {
    pub mp_state: Blob<kvm_mp_state>,
    pub regs: Blob<kvm_regs>,
    pub sregs: Blob<kvm_sregs>,
    pub xsave: Words,
    pub xcrs: Blob<kvm_xcrs>,
    pub debug_regs: Blob<kvm_debugregs>,
    pub msrs: Vec<Msr>,
    pub lapic: Blob<kvm_lapic_state>,
    pub events: Blob<kvm_vcpu_events>,
    pub tsc: Tsc,
}

/// The TSC of one vCPU when it was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tsc {
    pub khz: u32,
    /// As the guest would have read it.
    pub value: u64,
    /// What KVM added to the host's TSC, where it tells.
    pub offset: Option<u64>,
}

/// Reads the state. `msrs` are the registers to save.
pub fn save(vcpu: &VcpuFd, caps: &Capabilities, wanted_msrs: &[u32]) -> Result<VcpuState> {
    let mp_state = Blob(vcpu.get_mp_state().doing("read whether the CPU runs")?);
    let regs = Blob(vcpu.get_regs().doing("read the CPU's registers")?);
    let sregs = Blob(vcpu.get_sregs().doing("read the CPU's segment registers")?);
    let xsave = Words(raw::get_xsave(vcpu, caps.xsave2_bytes).doing("read the CPU's XSAVE area")?);
    let xcrs = Blob(
        vcpu.get_xcrs()
            .doing("read the CPU's extended control registers")?,
    );
    let debug_regs = Blob(vcpu.get_debug_regs().doing("read the CPU's debug registers")?);
    let msrs = msrs::read(vcpu, wanted_msrs)?;
    let tsc = Tsc {
        khz: vcpu.get_tsc_khz().doing("read the TSC's frequency")?,
        value: msrs::read(vcpu, &[msrs::IA32_TSC])?
            .first()
            .map_or(0, |msr| msr.value),
        offset: if caps.tsc_offset {
            raw::tsc_offset(vcpu).ok()
        } else {
            None
        },
    };
    let lapic = Blob(vcpu.get_lapic().doing("read the CPU's local APIC")?);
    let events = Blob(vcpu.get_vcpu_events().doing("read the CPU's pending events")?);
    Ok(VcpuState {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        msrs,
        lapic,
        events,
        tsc,
    })
}

/// Puts the state into a vCPU that has its CPUID and its TSC and has never run.
pub fn restore(vcpu: &VcpuFd, caps: &Capabilities, state: &VcpuState) -> Result<()> {
    // `tsc` is `clock`'s.
    let VcpuState {
        mp_state,
        regs,
        sregs,
        xsave,
        xcrs,
        debug_regs,
        msrs,
        lapic,
        events,
        tsc: _,
    } = state;
    vcpu.set_regs(&regs.0).doing("set the CPU's registers")?;
    vcpu.set_sregs(&sregs.0)
        .doing("set the CPU's segment registers")?;
    vcpu.set_xcrs(&xcrs.0)
        .doing("set the CPU's extended control registers")?;
    raw::set_xsave(vcpu, caps.xsave2_bytes, &xsave.0).doing("set the CPU's XSAVE area")?;
    vcpu.set_debug_regs(&debug_regs.0)
        .doing("set the CPU's debug registers")?;
    vcpu.set_lapic(&lapic.0).doing("set the CPU's local APIC")?;
    msrs::write(vcpu, msrs)?;
    vcpu.set_mp_state(mp_state.0).doing("set whether the CPU runs")?;
    vcpu.set_vcpu_events(&events.0)
        .doing("set the CPU's pending events")
}

pub fn key(index: u32) -> RecordKey {
    RecordKey::new("vcpu", index)
}

pub fn to_record(index: u32, state: &VcpuState) -> Result<Record> {
    Record::required(key(index), VERSION, state).map_err(saved)
}

pub fn from_record(index: u32, record: &Record) -> Result<VcpuState> {
    record.read(&key(index), VERSION).map_err(saved)
}
