//! Model-specific registers: which ones travel, and reading and writing them although some refuse.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};

use crate::error::{Doing, MachineError, Result};

/// The TSC has a way of its own, see `clock`.
pub const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_PAT: u32 = 0x277;
const MTRR_DEF_TYPE: u32 = 0x2ff;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    pub index: u32,
    pub value: u64,
}

/// What KVM lists, and the memory types, which it does not list but keeps.
pub fn candidates(kvm: &Kvm) -> Result<Vec<u32>> {
    let listed = kvm
        .get_msr_index_list()
        .doing("list its model-specific registers")?;
    let mut all: Vec<u32> = listed.as_slice().to_vec();
    all.extend([IA32_PAT, MTRR_DEF_TYPE, 0x250, 0x258, 0x259]);
    all.extend(0x268..0x270);
    all.extend(0x200..0x210);
    all.retain(|index| *index != IA32_TSC);
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// Those that this vCPU lets us read: KVM lists some that a guest without the feature does not have.
pub fn readable(vcpu: &VcpuFd, candidates: &[u32]) -> Result<Vec<u32>> {
    Ok(read_each(vcpu, candidates)?
        .into_iter()
        .map(|msr| msr.index)
        .collect())
}

fn wrapped(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|e| {
        MachineError::Saved(format!(
            "a list of {} registers is too long: {e:?}",
            entries.len()
        ))
    })
}

/// Reads what can be read, and leaves out the rest.
fn read_each(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<Msr>> {
    let mut out = Vec::with_capacity(wanted.len());
    let mut rest = wanted;
    while !rest.is_empty() {
        let (now, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let entries: Vec<_> = now
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = wrapped(&entries)?;
        let read = vcpu.get_msrs(&mut msrs).doing("read model-specific registers")?;
        out.extend(msrs.as_slice().iter().take(read).map(|e| Msr {
            index: e.index,
            value: e.data,
        }));
        // KVM stops at the first that it refuses: go on behind it.
        let skip = if read < now.len() { read + 1 } else { read };
        rest = rest.get(skip..).unwrap_or_default();
    }
    Ok(out)
}

/// Reads all of `wanted`; each must be there.
pub fn read(vcpu: &VcpuFd, wanted: &[u32]) -> Result<Vec<Msr>> {
    let got = read_each(vcpu, wanted)?;
    if got.len() != wanted.len() {
        let missing: Vec<String> = wanted
            .iter()
            .filter(|index| !got.iter().any(|msr| msr.index == **index))
            .map(|index| format!("{index:#x}"))
            .collect();
        return Err(MachineError::Saved(format!(
            "model-specific registers {} cannot be read any more",
            missing.join(", ")
        )));
    }
    Ok(got)
}

/// Writes them all, the TSC deadline last: it counts in the TSC, and only with the local APIC in its timer's mode. A
/// register that refuses its own present value (read-only ones do) is as it should be.
pub fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    let mut ordered = msrs.to_vec();
    ordered.sort_by_key(|msr| msr.index == IA32_TSC_DEADLINE);
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let (now, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let entries: Vec<_> = now
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        let written = vcpu
            .set_msrs(&wrapped(&entries)?)
            .doing("write model-specific registers")?;
        rest = rest.get(written..).unwrap_or_default();
        if written < now.len()
            && let Some((refused, more)) = rest.split_first()
        {
            let here = read_each(vcpu, &[refused.index])?;
            if here.first().map(|msr| msr.value) != Some(refused.value) {
                return Err(MachineError::Saved(format!(
                    "model-specific register {:#x} cannot be set to {:#x} here; this host's processor or KVM lacks a \
                     feature that the guest uses",
                    refused.index, refused.value
                )));
            }
            rest = more;
        }
    }
    Ok(())
}
