//! CPU templates: show the guest fewer features than the host has, so that it can move to hosts that have only those.

use std::path::Path;

use serde::Deserialize;

use super::cpuid::Leaf;
use super::features::{GROUPS, exists, shown};
use crate::config::{ConfigError, CpuTemplate};
use crate::error::{MachineError, Result};

/// What every 64-bit guest needs, and what a monitor gives on any host.
const BASE: &str = "fpu vme de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 ht \
                    x2apic tsc_deadline_timer hypervisor syscall nx lm rdtscp kvmclock kvm_nopiodelay kvmclock2 \
                    kvm_asyncpf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt kvm_pv_tlb_flush kvm_pv_send_ipi \
                    kvm_poll_control kvm_pv_sched_yield kvm_asyncpf_int kvm_msi_ext_dest_id \
                    kvmclock_stable_bit cmp_legacy cr8_legacy \
                    arch_capabilities spec_ctrl intel_stibp ssbd md_clear ibpb ibrs stibp amd_ssbd virt_ssbd";
/// x86-64-v2 of the psABI.
const V2: &str = "cx16 lahf_lm popcnt sse3 sse4_1 sse4_2 ssse3";
/// What x86-64-v3 adds, with the xsave that AVX needs.
const V3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave osxsave";

/// A template in a file: `{"base": "x86-64-v2", "add": ["aes"], "remove": ["popcnt"]}`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default = "host")]
    base: String,
    #[serde(default)]
    add: Vec<String>,
    #[serde(default)]
    remove: Vec<String>,
}

fn host() -> String {
    "host".into()
}

/// What a template allows: None allows everything.
struct Rules {
    allowed: Option<Vec<String>>,
    removed: Vec<String>,
    /// What makes the template worth its name: a host without is refused.
    needed: Vec<String>,
}

fn words(text: &str) -> impl Iterator<Item = String> {
    text.split_whitespace().map(str::to_owned)
}

fn rules(template: &CpuTemplate) -> Result<Rules> {
    let level = |needed: &[&str]| {
        let needed: Vec<String> = needed
            .iter()
            .flat_map(|text| words(text))
            .filter(|n| n != "osxsave")
            .collect();
        Rules {
            allowed: Some(words(BASE).chain(needed.clone()).collect()),
            removed: Vec::new(),
            needed,
        }
    };
    match template {
        CpuTemplate::Host => Ok(Rules {
            allowed: None,
            removed: Vec::new(),
            needed: Vec::new(),
        }),
        CpuTemplate::X86_64V2 => Ok(level(&[V2])),
        CpuTemplate::X86_64V3 => Ok(level(&[V2, V3])),
        CpuTemplate::File(path) => from_file(path),
    }
}

fn from_file(path: &Path) -> Result<Rules> {
    let wrong = |why: String| ConfigError(format!("the CPU template {} {why}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|e| wrong(format!("cannot be read: {e}")))?;
    let File { base, add, remove } =
        serde_json::from_str(&text).map_err(|e| wrong(format!("is not a template: {e}")))?;
    if let Some(unknown) = add.iter().chain(&remove).find(|name| !exists(name)) {
        return Err(wrong(format!(
            "names a CPU feature {unknown:?} that this program does not know"
        ))
        .into());
    }
    let mut rules = match base.parse()? {
        CpuTemplate::File(_) => {
            return Err(
                wrong("has another file as its base; use host, x86-64-v2 or x86-64-v3".into()).into(),
            );
        }
        named => rules(&named)?,
    };
    if let Some(allowed) = &mut rules.allowed {
        allowed.extend(add.iter().cloned());
    }
    rules.needed.extend(add);
    rules.needed.retain(|name| !remove.contains(name));
    rules.removed = remove;
    Ok(rules)
}

/// Takes away what the template does not allow. A host that cannot give what the template promises is refused, by name.
pub fn apply(template: &CpuTemplate, leaves: &mut Vec<Leaf>) -> Result<()> {
    let Rules {
        allowed,
        removed,
        needed,
    } = rules(template)?;
    let missing: Vec<&str> = needed
        .iter()
        .filter(|name| !shown(leaves, name))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        return Err(MachineError::Host(format!(
            "this host cannot give the CPU template {template}: it lacks {}; choose a smaller one with --cpu-template",
            missing.join(", ")
        )));
    }
    for group in &GROUPS {
        let removed = group.mask(|name| removed.iter().any(|r| r == name));
        let kept = allowed
            .as_ref()
            .map_or(u32::MAX, |list| group.mask(|name| list.iter().any(|a| a == name)));
        for leaf in leaves.iter_mut().filter(|leaf| group.is(leaf)) {
            *leaf.register_mut(group.register) &= kept & !removed;
        }
    }
    if allowed.is_some() || !removed.is_empty() {
        restrict_xsave(leaves);
    }
    if allowed.is_some() {
        // Leaves of features that no template has: AMX tiles, key locker, and what extends leaf 7.
        leaves.retain(|leaf| {
            !matches!(
                (leaf.leaf, leaf.subleaf),
                (0x19 | 0x1d | 0x1e, _) | (7, Some(1..)) | (0x8000_0007, _)
            )
        });
        for leaf in leaves.iter_mut().filter(|leaf| leaf.leaf == 7) {
            leaf.eax = 0;
        }
    }
    Ok(())
}

/// XCR0 may have those components only whose features the guest sees: x87 and SSE always, AVX with avx, and so on.
fn restrict_xsave(leaves: &mut Vec<Leaf>) {
    if !shown(leaves, "xsave") {
        leaves.retain(|leaf| leaf.leaf != 0xd);
        return;
    }
    let mut components: u32 = 0b11;
    for (name, bits) in [
        ("avx", 1 << 2),
        ("mpx", 0b11 << 3),
        ("avx512f", 0b111 << 5),
        ("pku", 1 << 9),
    ] {
        if shown(leaves, name) {
            components |= bits;
        }
    }
    if shown(leaves, "amx_tile") {
        components |= 0b11 << 17;
    }
    for leaf in leaves
        .iter_mut()
        .filter(|leaf| leaf.leaf == 0xd && leaf.subleaf == Some(0))
    {
        leaf.eax &= components;
        leaf.edx = 0;
    }
    leaves.retain(|leaf| match (leaf.leaf, leaf.subleaf) {
        // Supervisor components (8 and 11 to 16) are left as KVM offers them.
        (0xd, Some(n @ 2..32)) => components & 1 << n != 0 || matches!(n, 8 | 11..=16),
        _ => true,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::features::Register;

    fn everything() -> Vec<Leaf> {
        let mut leaves: Vec<Leaf> = Vec::new();
        for group in &GROUPS {
            if !leaves.iter().any(|leaf| group.is(leaf)) {
                let (leaf, subleaf) = (group.leaf, group.subleaf);
                leaves.push(Leaf {
                    leaf,
                    subleaf,
                    eax: u32::MAX,
                    ebx: u32::MAX,
                    ecx: u32::MAX,
                    edx: u32::MAX,
                });
            }
        }
        leaves.push(Leaf {
            leaf: 0xd,
            subleaf: Some(0),
            eax: u32::MAX,
            ebx: 4096,
            ecx: 4096,
            edx: u32::MAX,
        });
        leaves.push(Leaf {
            leaf: 0xd,
            subleaf: Some(2),
            eax: 256,
            ebx: 576,
            ecx: 0,
            edx: 0,
        });
        leaves.push(Leaf {
            leaf: 0xd,
            subleaf: Some(5),
            eax: 64,
            ebx: 1088,
            ecx: 0,
            edx: 0,
        });
        leaves
    }

    #[test]
    fn v2_hides_avx_and_v3_hides_avx512() {
        let mut v2 = everything();
        apply(&CpuTemplate::X86_64V2, &mut v2).unwrap();
        assert!(shown(&v2, "sse4_2") && shown(&v2, "cx16") && shown(&v2, "lm"));
        // Without it a guest takes kvm-clock for one that jumps from CPU to CPU.
        assert!(shown(&v2, "kvmclock") && shown(&v2, "kvmclock_stable_bit"));
        assert!(!shown(&v2, "avx") && !shown(&v2, "avx2") && !shown(&v2, "vmx") && !shown(&v2, "aes"));
        assert!(
            !v2.iter().any(|leaf| leaf.leaf == 0xd),
            "without xsave there is no leaf 0xd"
        );

        let mut v3 = everything();
        apply(&CpuTemplate::X86_64V3, &mut v3).unwrap();
        assert!(shown(&v3, "avx2") && shown(&v3, "bmi2") && !shown(&v3, "avx512f") && !shown(&v3, "pku"));
        let xcr0 = v3
            .iter()
            .find(|leaf| leaf.leaf == 0xd && leaf.subleaf == Some(0))
            .unwrap();
        assert_eq!(xcr0.register(Register::Eax), 0b111);
        assert!(
            v3.iter().any(|leaf| leaf.subleaf == Some(2)) && !v3.iter().any(|leaf| leaf.subleaf == Some(5))
        );
    }

    #[test]
    fn a_host_that_lacks_what_the_template_promises_is_refused_by_name() {
        let mut small = everything();
        for leaf in small.iter_mut().filter(|leaf| leaf.leaf == 7) {
            leaf.ebx = 0;
        }
        let error = apply(&CpuTemplate::X86_64V3, &mut small).unwrap_err().to_string();
        assert!(error.contains("avx2, bmi1, bmi2"), "{error}");
    }

    #[test]
    fn a_file_adds_and_removes_and_its_mistakes_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.json");
        let template = CpuTemplate::File(path.clone());
        std::fs::write(
            &path,
            r#"{"base": "x86-64-v2", "add": ["aes"], "remove": ["popcnt"]}"#,
        )
        .unwrap();
        let mut leaves = everything();
        apply(&template, &mut leaves).unwrap();
        assert!(shown(&leaves, "aes") && !shown(&leaves, "popcnt") && shown(&leaves, "sse4_2"));

        for (text, why) in [
            (r#"{"remove": ["warp_drive"]}"#, "warp_drive"),
            (r#"{"base": "a.json"}"#, "another file"),
            (r#"{"colour": 1}"#, "colour"),
            ("[", "not a template"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = apply(&template, &mut everything()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
