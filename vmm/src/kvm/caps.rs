//! What this host's KVM offers, as plain data: probed once, shown by `ferry info`, compared by a crossing.

use kvm_bindings::{KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_CLOCK_TSC_STABLE};
use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::error::{MachineError, Result};

/// KVM_CAP numbers that kvm-ioctls has no name for.
const CAP_MANUAL_DIRTY_LOG_PROTECT2: u64 = 168;
/// The dirty ring, and its name from before the order of accesses was written down; on x86 both are the same.
pub(super) const CAP_DIRTY_LOG_RING_ACQ_REL: u64 = 223;
pub(super) const CAP_DIRTY_LOG_RING: u64 = 192;
const CAP_PRE_FAULT_MEMORY: u64 = 236;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capabilities {
    pub max_vcpus: u32,
    pub memory_slots: u32,
    /// KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET, as far as present.
    pub manual_dirty_protect: u32,
    /// The largest dirty ring in bytes, 0 without.
    pub dirty_ring_bytes: u32,
    pub pit2: bool,
    /// Bytes of KVM_GET_XSAVE2, 0 when only the 4 KiB of KVM_GET_XSAVE exist.
    pub xsave2_bytes: u32,
    pub nested_state_bytes: u32,
    pub tsc_control: bool,
    pub tsc_deadline_timer: bool,
    pub tsc_offset: bool,
    pub clock_realtime: bool,
    pub clock_host_tsc: bool,
    pub clock_tsc_stable: bool,
    pub kvmclock_ctrl: bool,
    pub pre_fault_memory: bool,
}

impl Capabilities {
    /// Asks KVM. What a machine cannot do without is an error that names it.
    pub fn probe(kvm: &Kvm) -> Result<Capabilities> {
        let needed = [
            (
                Cap::Irqchip,
                "an in-kernel interrupt controller (KVM_CAP_IRQCHIP)",
            ),
            (Cap::Irqfd, "KVM_CAP_IRQFD"),
            (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
            (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
            (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
            (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
            (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
            (Cap::MpState, "KVM_CAP_MP_STATE"),
            (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
            (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
            (Cap::Xcrs, "KVM_CAP_XCRS"),
        ];
        let missing: Vec<&str> = needed
            .iter()
            .filter(|(cap, _)| !kvm.check_extension(*cap))
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            return Err(MachineError::Host(format!(
                "this host's KVM lacks {}; a newer kernel is needed",
                missing.join(" and ")
            )));
        }
        let number = |raw: i32| u32::try_from(raw).unwrap_or(0);
        let ring = number(kvm.check_extension_raw(CAP_DIRTY_LOG_RING_ACQ_REL));
        let old_ring = number(kvm.check_extension_raw(CAP_DIRTY_LOG_RING));
        let clock = number(kvm.check_extension_int(Cap::AdjustClock));
        Ok(Capabilities {
            max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
            memory_slots: u32::try_from(kvm.get_nr_memslots()).unwrap_or(u32::MAX),
            manual_dirty_protect: number(kvm.check_extension_raw(CAP_MANUAL_DIRTY_LOG_PROTECT2)),
            dirty_ring_bytes: ring.max(old_ring),
            pit2: kvm.check_extension(Cap::Pit2) && kvm.check_extension(Cap::PitState2),
            xsave2_bytes: number(kvm.check_extension_int(Cap::Xsave2)),
            nested_state_bytes: number(kvm.check_extension_int(Cap::NestedState)),
            tsc_control: kvm.check_extension(Cap::TscControl),
            tsc_deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
            tsc_offset: kvm.check_extension_raw(u64::from(kvm_bindings::KVM_CAP_VCPU_ATTRIBUTES)) > 0,
            clock_realtime: clock & KVM_CLOCK_REALTIME != 0,
            clock_host_tsc: clock & KVM_CLOCK_HOST_TSC != 0,
            clock_tsc_stable: clock & KVM_CLOCK_TSC_STABLE != 0,
            kvmclock_ctrl: kvm.check_extension(Cap::KvmclockCtrl),
            pre_fault_memory: kvm.check_extension_raw(CAP_PRE_FAULT_MEMORY) > 0,
        })
    }

    /// What is done without here, each as a sentence.
    pub fn without(&self) -> Vec<&'static str> {
        let checks = [
            (
                self.manual_dirty_protect != 0,
                "no manual dirty-log protection: each round write-protects all memory at once",
            ),
            (
                self.dirty_ring_bytes != 0,
                "no dirty ring: changed pages come from the dirty bitmap",
            ),
            (
                self.pit2,
                "no PIT: the guest has the APIC timer and kvm-clock only",
            ),
            (
                self.xsave2_bytes != 0,
                "no XSAVE2: CPU features with more than 4 KiB of state are hidden",
            ),
            (
                self.tsc_control,
                "no TSC scaling: a guest can only come from a host with the same TSC frequency",
            ),
            (
                self.tsc_offset,
                "no TSC offset: the guest's TSC stands still during the switch",
            ),
            (
                self.clock_realtime,
                "no realtime kvm-clock: the guest's clock stands still during the switch",
            ),
            (
                self.pre_fault_memory,
                "no pre-faulting: the guest meets its page faults itself after a switch",
            ),
        ];
        checks
            .into_iter()
            .filter(|(here, _)| !here)
            .map(|(_, sentence)| sentence)
            .collect()
    }
}
