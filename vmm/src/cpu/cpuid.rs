//! The CPUID of a machine, and what of it differs from one vCPU to the next.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::error::{Doing, MachineError, Result};
use crate::kvm::Capabilities;

/// One CPUID leaf as plain data. `subleaf` is None where the leaf has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Leaf {
    pub leaf: u32,
    pub subleaf: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// Everything that this host's KVM could show a guest.
pub fn supported(kvm: &Kvm) -> Result<Vec<Leaf>> {
    let all = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .doing("list the CPUID leaves it supports")?;
    let leaf = |entry: &kvm_cpuid_entry2| Leaf {
        leaf: entry.function,
        subleaf: (entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(entry.index),
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    };
    Ok(all.as_slice().iter().map(leaf).collect())
}

const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;

/// What every guest gets, whatever the template: no leaves that describe this very host's packages, sharing of caches or
/// performance counters, which another host would contradict.
pub fn filter(leaves: &mut Vec<Leaf>, caps: &Capabilities, cpus: u32) {
    // Performance monitoring, SGX, processor trace; and the real topology, which is made anew below.
    leaves.retain(|leaf| !matches!(leaf.leaf, 0x0a | 0x0b | 0x12 | 0x14 | 0x1f));
    for leaf in leaves.iter_mut() {
        match (leaf.leaf, leaf.subleaf) {
            (1, _) => {
                leaf.ecx |= HYPERVISOR;
                if caps.tsc_deadline_timer {
                    leaf.ecx |= TSC_DEADLINE;
                }
                // No MONITOR/MWAIT (a guest in it would not leave for us), no debug store, no perf capabilities; no VMX,
                // because nested state is not saved.
                leaf.ecx &= !(1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 15);
                leaf.edx &= !(1 << 21);
                leaf.edx = if cpus > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
                // Logical processors of the package; the size of a CLFLUSH line stays; the APIC id is each vCPU's own.
                leaf.ebx = leaf.ebx & 0x0000_ff00 | cpus.next_power_of_two().min(255) << 16;
            }
            // Deterministic caches: cores of the package, one thread each.
            (4, _) if leaf.eax & 0x1f != 0 => {
                let level = leaf.eax >> 5 & 7;
                let sharing = if level >= 3 { cpus - 1 } else { 0 };
                leaf.eax = leaf.eax & 0x3fff | sharing.min(0xfff) << 14 | (cpus - 1).min(0x3f) << 26;
            }
            // SGX and processor trace.
            (7, Some(0)) => {
                leaf.ebx &= !(1 << 2 | 1 << 25);
                leaf.ecx &= !(1 << 30);
            }
            // No SVM, as no VMX.
            (0x8000_0001, _) => leaf.ecx &= !(1 << 2),
            (0x8000_0008, _) => leaf.ecx = leaf.ecx & !0xf0ff | (cpus - 1).min(0xff),
            _ => {}
        }
    }
    // One thread per core, all cores in one package. The x2APIC id in EDX is each vCPU's own.
    let bits = cpus.next_power_of_two().trailing_zeros();
    let topology = |subleaf, eax, ebx, ecx| Leaf {
        leaf: 0x0b,
        subleaf: Some(subleaf),
        eax,
        ebx,
        ecx,
        edx: 0,
    };
    if leaves.iter().any(|leaf| leaf.leaf == 0 && leaf.eax >= 0x0b) {
        leaves.push(topology(0, 0, 1, 1 << 8));
        leaves.push(topology(1, bits, cpus, 1 | 2 << 8));
        leaves.push(topology(2, 0, 0, 2));
    }
    leaves.sort_by_key(|leaf| (leaf.leaf, leaf.subleaf));
}

/// The CPUID of one vCPU in KVM's form.
pub fn for_vcpu(leaves: &[Leaf], vcpu: u32) -> Result<CpuId> {
    let entries: Vec<kvm_cpuid_entry2> = leaves
        .iter()
        .map(|leaf| {
            let Leaf {
                leaf,
                subleaf,
                eax,
                mut ebx,
                ecx,
                mut edx,
            } = *leaf;
            match leaf {
                1 => ebx = ebx & 0x00ff_ffff | vcpu << 24,
                0x0b | 0x1f => edx = vcpu,
                _ => {}
            }
            kvm_cpuid_entry2 {
                function: leaf,
                index: subleaf.unwrap_or(0),
                flags: if subleaf.is_some() {
                    KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                } else {
                    0
                },
                eax,
                ebx,
                ecx,
                edx,
                ..Default::default()
            }
        })
        .collect();
    CpuId::from_entries(&entries).map_err(|_| {
        MachineError::Host(format!(
            "a CPUID of {} leaves is more than KVM takes",
            entries.len()
        ))
    })
}
