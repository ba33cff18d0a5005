//! What users get wrong: each ends in one sentence, before anything runs.

use ferry_vmm::config::{CpuTemplate, MachineConfig};
use ferry_vmm::cpu::features;
use ferry_vmm::error::MachineError;
use ferry_vmm::machine::{Machine, Wiring};
use ferry_vmm::size::ByteSize;

use crate::harness::{config, skip};

fn refused(change: impl FnOnce(&mut MachineConfig)) -> String {
    let mut config = config(1, "");
    change(&mut config);
    Machine::create(&config, &Wiring::default())
        .err()
        .expect("must be refused")
        .to_string()
}

#[test]
fn wrong_files_and_numbers_are_refused_by_name() {
    if skip() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    std::fs::write(&text, "this is no kernel").unwrap();
    let folder = dir.path().to_owned();
    let missing = dir.path().join("missing");

    for (error, words) in [
        (
            refused(|c| c.kernel = Some(text.clone())),
            vec!["text", "neither an ELF file nor a bzImage"],
        ),
        (
            refused(|c| c.kernel = Some(folder.clone())),
            vec!["it is a directory"],
        ),
        (
            refused(|c| c.kernel = Some(missing.clone())),
            vec!["missing", "No such file"],
        ),
        (
            refused(|c| c.kernel = Some("/dev/null".into())),
            vec!["no regular file"],
        ),
        (refused(|c| c.cpus = 0), vec!["between 1 and 254"]),
        (refused(|c| c.cpus = 10_000), vec!["10000"]),
        (refused(|c| c.memory = ByteSize(0)), vec!["too little"]),
        (refused(|c| c.memory = ByteSize(1 << 44)), vec!["this host has"]),
        (
            refused(|c| c.cpu_template = CpuTemplate::File(missing.clone())),
            vec!["missing", "cannot be read"],
        ),
        (
            refused(|c| c.disks = vec![missing.display().to_string().parse().unwrap()]),
            vec!["missing"],
        ),
    ] {
        assert!(words.iter().all(|word| error.contains(word)), "{error}");
        assert!(!error.contains('\n'), "one sentence: {error}");
    }
}

#[test]
fn a_template_decides_what_cpuid_says() {
    if skip() {
        return;
    }
    let shown = |template: &str| {
        let config = MachineConfig {
            cpu_template: template.parse().unwrap(),
            ..config(2, "")
        };
        let leaves = Machine::create(&config, &Wiring::default())?
            .description()
            .cpuid
            .clone();
        Ok::<_, MachineError>(move |name: &str| features::shown(&leaves, name))
    };
    let host = shown("host").unwrap();
    assert!(
        host("hypervisor") && host("ht") && host("lm") && !host("vmx") && !host("svm") && !host("monitor")
    );
    match shown("x86-64-v2") {
        Ok(v2) => assert!(v2("sse4_2") && v2("hypervisor") && v2("x2apic") && !v2("avx") && !v2("avx2")),
        // A KVM that does not list what its guests see all the same.
        Err(error) => assert!(!host("sse4_2") && error.to_string().contains("sse4_2"), "{error}"),
    }
}
