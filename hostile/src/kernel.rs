//! Kernel files: whatever they say of themselves, they are loaded into guest memory or refused.

use ferry_vmm::config::MachineConfig;
use ferry_vmm::size::ByteSize;
use ferry_vmm::{boot, memory};

use crate::rig::nameless;

fn load(bytes: &[u8]) {
    let (_file, path) = nameless(bytes, 0);
    let config = MachineConfig {
        memory: ByteSize(16 << 20),
        kernel: Some(path),
        cmdline: "console=ttyS0".to_owned(),
        ..MachineConfig::default()
    };
    let ram = memory::allocate(&config).unwrap();
    let _ = boot::load(&config, &ram);
}

/// Behind a header that says ELF, so that the fuzzer need not find it.
pub(crate) fn elf(bytes: &[u8]) {
    let mut file = b"\x7fELF\x02\x01".to_vec();
    file.extend_from_slice(bytes);
    load(&file);
}

/// With the marks of a bzImage in place: the boot flag, "HdrS" and a version.
pub(crate) fn bzimage(bytes: &[u8]) {
    let mut file = bytes.to_vec();
    file.resize(bytes.len().max(0x400), 0);
    for (at, mark) in [(0x1fe, &b"\x55\xaa"[..]), (0x202, b"HdrS\x0c\x02")] {
        file.splice(at..at + mark.len(), mark.iter().copied());
    }
    load(&file);
}
