//! The names of CPU features and the CPUID bits they stand for: for templates, and to name what a host lacks.

use super::cpuid::Leaf;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One register of feature bits; `names[n]` is bit n, "" where it has no name here.
pub struct Group {
    pub leaf: u32,
    pub subleaf: Option<u32>,
    pub register: Register,
    names: &'static str,
}

/// Names as in /proc/cpuinfo, from bit 0 on; `-` has no name.
pub const GROUPS: [Group; 11] = [
    Group {
        leaf: 1,
        subleaf: None,
        register: Register::Edx,
        names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx \
                fxsr sse sse2 ss ht tm ia64 pbe",
    },
    Group {
        leaf: 1,
        subleaf: None,
        register: Register::Ecx,
        names: "sse3 pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca \
                sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor",
    },
    Group {
        leaf: 7,
        subleaf: Some(0),
        register: Register::Ebx,
        names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 - smep bmi2 erms invpcid rtm cqm - mpx rdt_a avx512f avx512dq \
                rdseed adx smap avx512ifma - clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw \
                avx512vl",
    },
    Group {
        leaf: 7,
        subleaf: Some(0),
        register: Register::Ecx,
        names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni \
                avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid - bus_lock_detect cldemote - movdiri \
                movdir64b enqcmd sgx_lc pks",
    },
    Group {
        leaf: 7,
        subleaf: Some(0),
        register: Register::Edx,
        names: "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear - - - serialize \
                - tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp \
                flush_l1d arch_capabilities - ssbd",
    },
    Group {
        leaf: 7,
        subleaf: Some(1),
        register: Register::Eax,
        names: "sha512 sm3 sm4 - avx_vnni avx512_bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - \
                amx_fp16 - avx_ifma",
    },
    Group {
        leaf: 0xd,
        subleaf: Some(1),
        register: Register::Eax,
        names: "xsaveopt xsavec xgetbv1 xsaves xfd",
    },
    Group {
        leaf: 0x8000_0001,
        subleaf: None,
        register: Register::Edx,
        names: "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext \
                3dnow",
    },
    Group {
        leaf: 0x8000_0001,
        subleaf: None,
        register: Register::Ecx,
        names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - \
                lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx",
    },
    Group {
        leaf: 0x8000_0008,
        subleaf: None,
        register: Register::Ebx,
        names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs stibp - stibp_always_on - - - - - - \
                amd_ssbd virt_ssbd amd_ssb_no cppc",
    },
    Group {
        leaf: 0x4000_0001,
        subleaf: None,
        register: Register::Eax,
        names: "kvmclock kvm_nopiodelay kvm_mmu_op kvmclock2 kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - \
                kvm_pv_tlb_flush kvm_asyncpf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield \
                kvm_asyncpf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - \
                kvmclock_stable_bit",
    },
];

impl Group {
    pub fn is(&self, leaf: &Leaf) -> bool {
        leaf.leaf == self.leaf && leaf.subleaf == self.subleaf
    }

    /// The bits' names, None for a bit without.
    pub fn names(&self) -> impl Iterator<Item = (u32, &'static str)> {
        (0..)
            .zip(self.names.split_whitespace())
            .filter(|(_, name)| *name != "-")
    }

    /// What to call a bit.
    pub fn name(&self, bit: u32) -> String {
        let named = self
            .names()
            .find(|(at, _)| *at == bit)
            .map(|(_, name)| name.to_owned());
        named
            .unwrap_or_else(|| format!("CPUID {:#x} {:?} bit {bit}", self.leaf, self.register).to_lowercase())
    }

    /// The mask of those bits that have one of these names.
    pub fn mask(&self, wanted: impl Fn(&str) -> bool) -> u32 {
        self.names()
            .filter(|(_, name)| wanted(name))
            .fold(0, |mask, (bit, _)| mask | 1 << bit)
    }
}

impl Leaf {
    pub fn register(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    pub fn register_mut(&mut self, register: Register) -> &mut u32 {
        match register {
            Register::Eax => &mut self.eax,
            Register::Ebx => &mut self.ebx,
            Register::Ecx => &mut self.ecx,
            Register::Edx => &mut self.edx,
        }
    }
}

/// Whether any group knows this name.
pub fn exists(name: &str) -> bool {
    GROUPS.iter().any(|group| group.mask(|n| n == name) != 0)
}

/// The features that a CPUID shows, by name.
pub fn shown(leaves: &[Leaf], name: &str) -> bool {
    GROUPS.iter().any(|group| {
        let mask = group.mask(|n| n == name);
        mask != 0
            && leaves
                .iter()
                .any(|leaf| group.is(leaf) && leaf.register(group.register) & mask != 0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bits_are_where_the_manuals_have_them() {
        let at = |name: &str| {
            let group = GROUPS
                .iter()
                .find(|group| group.mask(|n| n == name) != 0)
                .unwrap();
            (
                group.leaf,
                group.register,
                group.mask(|n| n == name).trailing_zeros(),
            )
        };
        assert_eq!(at("sse2"), (1, Register::Edx, 26));
        assert_eq!(at("ht"), (1, Register::Edx, 28));
        assert_eq!(at("hypervisor"), (1, Register::Ecx, 31));
        assert_eq!(at("x2apic"), (1, Register::Ecx, 21));
        assert_eq!(at("avx2"), (7, Register::Ebx, 5));
        assert_eq!(at("avx512vl"), (7, Register::Ebx, 31));
        assert_eq!(at("la57"), (7, Register::Ecx, 16));
        assert_eq!(at("pks"), (7, Register::Ecx, 31));
        assert_eq!(at("ssbd"), (7, Register::Edx, 31));
        assert_eq!(at("lm"), (0x8000_0001, Register::Edx, 29));
        assert_eq!(at("abm"), (0x8000_0001, Register::Ecx, 5));
        assert_eq!(at("topoext"), (0x8000_0001, Register::Ecx, 22));
        assert_eq!(at("kvm_pv_unhalt"), (0x4000_0001, Register::Eax, 7));
        assert_eq!(at("kvmclock_stable_bit"), (0x4000_0001, Register::Eax, 24));
        for group in &GROUPS {
            assert!(
                group.names.split_whitespace().count() <= 32,
                "{:#x} {:?}",
                group.leaf,
                group.register
            );
        }
    }
}
