//! The house's walls: which room may know of which.

use std::process::{Command, Stdio};

use ferry_tests::host::{PATIENCE, finish};

fn dependencies(package: &str) -> Vec<String> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or("cargo".into()));
    cargo.args([
        "tree",
        "--offline",
        "--edges",
        "normal,build",
        "--prefix",
        "none",
        "--package",
        package,
    ]);
    cargo
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let tree = finish(cargo.spawn().unwrap(), PATIENCE).success().stdout;
    let names: Vec<String> = tree
        .lines()
        .filter_map(|line| line.split(' ').next())
        .map(str::to_owned)
        .collect();
    assert!(names.len() > 5, "{tree}");
    names
}

#[test]
fn the_engine_knows_neither_kvm_nor_devices_and_devices_know_neither_kvm_nor_the_engine() {
    for (package, strangers) in [
        (
            "ferry-migration",
            &[
                "ferry-devices",
                "ferry-vmm",
                "ferry-network",
                "ferry-images",
                "vm-memory",
                "virtio",
            ][..],
        ),
        (
            "ferry-devices",
            &["ferry-migration", "ferry-vmm", "ferry-network", "ferry-images"],
        ),
        (
            "ferry-network",
            &[
                "ferry-migration",
                "ferry-vmm",
                "ferry-devices",
                "ferry-images",
                "vm-memory",
                "virtio",
            ],
        ),
    ] {
        for name in dependencies(package) {
            let stranger =
                strangers.iter().any(|stranger| name.starts_with(stranger)) || name.contains("kvm");
            assert!(!stranger, "{package} depends on {name}");
        }
    }
    // The question can be answered with yes: the machine's room knows all of them.
    let vmm = dependencies("ferry-vmm");
    for known in ["kvm-ioctls", "ferry-devices", "ferry-migration"] {
        assert!(vmm.iter().any(|name| name == known), "{vmm:?}");
    }
}
