//! What a guest relies on, and whether a host can give it: the first question of every crossing.

use std::fmt;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::cpuid::{self, Leaf};
use super::features::GROUPS;
use crate::config::MachineConfig;
use crate::error::{Doing, Result};
use crate::kvm::Capabilities;
use crate::state::clock::tsc_is_close;
use crate::state::msrs;

/// All that a machine's guest may have seen of its host. Fixed when the machine is created; travels with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    pub cpus: u32,
    pub memory_bytes: u64,
    pub cpuid: Vec<Leaf>,
    /// The model-specific registers that are saved.
    pub msrs: Vec<u32>,
    pub tsc_khz: u32,
    pub pit: bool,
}

/// What a host could give a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostFeatures {
    pub cpuid: Vec<Leaf>,
    pub msrs: Vec<u32>,
    pub tsc_khz: u32,
    pub memory_bytes: u64,
    pub caps: Capabilities,
}

impl HostFeatures {
    pub fn probe(kvm: &Kvm) -> Result<HostFeatures> {
        let vm = kvm.create_vm().doing("create a virtual machine to look at")?;
        let vcpu = vm.create_vcpu(0).doing("create a CPU to look at")?;
        Ok(HostFeatures {
            cpuid: cpuid::supported(kvm)?,
            msrs: msrs::candidates(kvm)?,
            tsc_khz: vcpu.get_tsc_khz().doing("read the TSC's frequency")?,
            memory_bytes: crate::memory::host_memory().unwrap_or(u64::MAX),
            caps: Capabilities::probe(kvm)?,
        })
    }
}

/// One thing that the guest relies on and the host does not have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    pub name: String,
    /// The whole sentence.
    pub why: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.why)
    }
}

/// Everything that stands in the way of this guest on that host; nothing is left for the guest to find out.
pub fn compatible(guest: &Description, host: &HostFeatures) -> Result<(), Vec<Mismatch>> {
    let Description {
        cpus,
        memory_bytes,
        cpuid,
        msrs,
        tsc_khz,
        pit,
    } = guest;
    let mut missing = Vec::new();
    let mut miss = |name: &str, why: String| {
        missing.push(Mismatch {
            name: name.to_owned(),
            why,
        })
    };
    if *cpus > host.caps.max_vcpus {
        miss(
            "cpus",
            format!(
                "the guest has {cpus} CPUs, KVM allows {} there",
                host.caps.max_vcpus
            ),
        );
    }
    if *memory_bytes > host.memory_bytes {
        miss(
            "memory",
            format!(
                "the guest has {memory_bytes} bytes of memory, the host {}",
                host.memory_bytes
            ),
        );
    }
    for group in &GROUPS {
        let Some(shown) = cpuid.iter().find(|leaf| group.is(leaf)) else {
            continue;
        };
        let mut here = host
            .cpuid
            .iter()
            .find(|leaf| group.is(leaf))
            .map_or(0, |leaf| leaf.register(group.register));
        // These do not come from the processor: we set them, or KVM's capability stands for them.
        here |= group.mask(|name| match name {
            "hypervisor" | "ht" | "osxsave" => true,
            "tsc_deadline_timer" => host.caps.tsc_deadline_timer,
            _ => false,
        });
        let lacking = shown.register(group.register) & !here;
        for bit in (0..32).filter(|bit| lacking & 1 << bit != 0) {
            let name = group.name(bit);
            miss(
                &name,
                format!("the guest sees the CPU feature {name}, the host does not have it"),
            );
        }
    }
    let vendor = |leaves: &[Leaf]| {
        leaves
            .iter()
            .find(|leaf| leaf.leaf == 0)
            .map(|leaf| (leaf.ebx, leaf.edx, leaf.ecx))
    };
    if vendor(cpuid) != vendor(&host.cpuid) {
        miss(
            "vendor",
            "the guest's processor and the host's are of different makers".into(),
        );
    }
    let address_bits = |leaves: &[Leaf]| {
        leaves
            .iter()
            .find(|leaf| leaf.leaf == 0x8000_0008)
            .map_or(36, |leaf| leaf.eax & 0xff)
    };
    if address_bits(cpuid) > address_bits(&host.cpuid) {
        miss(
            "address_bits",
            format!(
                "the guest counts on {} bits of physical address, the host has {}",
                address_bits(cpuid),
                address_bits(&host.cpuid)
            ),
        );
    }
    let components = |leaves: &[Leaf]| {
        leaves
            .iter()
            .find(|leaf| leaf.leaf == 0xd && leaf.subleaf == Some(0))
            .map_or(0, |leaf| leaf.eax)
    };
    let lacking = components(cpuid) & !components(&host.cpuid);
    if lacking != 0 {
        miss(
            "xcr0",
            format!("the guest's XCR0 has components {lacking:#x} that the host does not have"),
        );
    }
    for index in msrs.iter().filter(|index| !host.msrs.contains(index)) {
        let name = format!("msr_{index:#x}");
        miss(
            &name,
            format!("the guest has the model-specific register {index:#x}, the host does not know it"),
        );
    }
    if !tsc_is_close(*tsc_khz, host.tsc_khz) && !host.caps.tsc_control {
        miss(
            "tsc",
            format!(
                "the guest's TSC runs at {tsc_khz} kHz, the host's at {} kHz, and its KVM cannot scale it",
                host.tsc_khz
            ),
        );
    }
    if *pit && !host.caps.pit2 {
        miss(
            "pit",
            "the guest has a PIT, the host's KVM cannot give it one".into(),
        );
    }
    if missing.is_empty() { Ok(()) } else { Err(missing) }
}

impl Description {
    /// Whether a configuration makes a machine of this description's shape.
    pub fn fits(&self, config: &MachineConfig) -> bool {
        self.cpus == config.cpus && self.memory_bytes == config.memory.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
        Leaf {
            leaf,
            subleaf,
            eax,
            ebx,
            ecx,
            edx,
        }
    }

    fn host() -> HostFeatures {
        HostFeatures {
            cpuid: vec![
                leaf(0, None, [13, 1, 2, 3]),
                leaf(1, None, [0, 0, 1 << 20, 1 << 26]),
                leaf(7, Some(0), [0, 1 << 5, 0, 0]),
                leaf(0xd, Some(0), [7, 0, 0, 0]),
                leaf(0x8000_0008, None, [46, 0, 0, 0]),
            ],
            msrs: vec![0x174, 0x175],
            tsc_khz: 2_000_000,
            memory_bytes: 1 << 34,
            caps: Capabilities {
                max_vcpus: 8,
                memory_slots: 32,
                manual_dirty_protect: 3,
                dirty_ring_bytes: 0,
                pit2: true,
                xsave2_bytes: 4096,
                nested_state_bytes: 0,
                tsc_control: false,
                tsc_deadline_timer: true,
                tsc_offset: true,
                clock_realtime: true,
                clock_host_tsc: true,
                clock_tsc_stable: true,
                kvmclock_ctrl: true,
                pre_fault_memory: false,
            },
        }
    }

    fn guest() -> Description {
        Description {
            cpus: 2,
            memory_bytes: 1 << 30,
            // With the bits that the machine adds: hypervisor and TSC deadline.
            cpuid: vec![
                leaf(0, None, [13, 1, 2, 3]),
                leaf(1, None, [0, 0, 1 << 20 | 1 << 31 | 1 << 24, 1 << 26 | 1 << 28]),
                leaf(7, Some(0), [0, 1 << 5, 0, 0]),
                leaf(0xd, Some(0), [7, 0, 0, 0]),
                leaf(0x8000_0008, None, [46, 0, 0, 0]),
            ],
            msrs: vec![0x174],
            tsc_khz: 2_000_100,
            pit: true,
        }
    }

    #[test]
    fn a_host_with_everything_is_compatible_with_more_than_the_guest_uses() {
        assert_eq!(compatible(&guest(), &host()), Ok(()));
    }

    #[test]
    fn each_thing_that_is_missing_is_named_and_nothing_else() {
        let one = |guest: Description, host: HostFeatures| {
            let missing = compatible(&guest, &host).expect_err("must not be compatible");
            assert_eq!(missing.len(), 1, "{missing:?}");
            missing[0].name.clone()
        };
        let with = |change: &dyn Fn(&mut HostFeatures)| {
            let mut host = host();
            change(&mut host);
            one(guest(), host)
        };
        assert_eq!(with(&|h| h.cpuid[2].ebx = 0), "avx2");
        assert_eq!(with(&|h| h.cpuid[1].edx = 0), "sse2");
        assert_eq!(with(&|h| h.cpuid[1].ecx = 0), "sse4_2");
        assert_eq!(with(&|h| h.cpuid[0].ebx = 9), "vendor");
        assert_eq!(with(&|h| h.cpuid[3].eax = 3), "xcr0");
        assert_eq!(with(&|h| h.cpuid[4].eax = 39), "address_bits");
        assert_eq!(with(&|h| h.msrs.clear()), "msr_0x174");
        assert_eq!(with(&|h| h.tsc_khz = 2_500_000), "tsc");
        assert_eq!(with(&|h| h.caps.pit2 = false), "pit");
        assert_eq!(with(&|h| h.caps.max_vcpus = 1), "cpus");
        assert_eq!(with(&|h| h.caps.tsc_deadline_timer = false), "tsc_deadline_timer");
        assert_eq!(with(&|h| h.memory_bytes = 1 << 29), "memory");
        let mut scaled = host();
        (scaled.tsc_khz, scaled.caps.tsc_control) = (2_500_000, true);
        assert_eq!(compatible(&guest(), &scaled), Ok(()));
    }

    #[test]
    fn a_description_survives_json_and_refuses_unknown_fields() {
        let text = serde_json::to_string(&guest()).unwrap();
        assert_eq!(serde_json::from_str::<Description>(&text).unwrap(), guest());
        assert!(serde_json::from_str::<Description>(&text.replacen("cpus", "cpuz", 1)).is_err());
    }
}
