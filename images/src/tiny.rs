//! The smallest kernel there is, for tests: one segment and a PVH note around code of the caller's.

/// A PVH kernel of one segment at 1 MiB whose code is `code`.
pub fn tiny_kernel(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0u8; 0x1000];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file[16..18].copy_from_slice(&2u16.to_le_bytes());
    file[18..20].copy_from_slice(&62u16.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[54..56].copy_from_slice(&56u16.to_le_bytes());
    file[56..58].copy_from_slice(&2u16.to_le_bytes());
    let mut header = |at: usize, kind: u32, offset: u64, paddr: u64, size: u64, mem: u64| {
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, paddr), (32, size), (40, mem)] {
            file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    header(
        64,
        1,
        0x1000,
        0x10_0000,
        code.len() as u64,
        0x1000.max(code.len() as u64),
    );
    header(120, 4, 0x200, 0, 20, 20);
    for (at, value) in [(0x200, 4u32), (0x204, 4), (0x208, 18), (0x210, 0x10_0000)] {
        file[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    file[0x20c..0x210].copy_from_slice(b"Xen\0");
    file.extend_from_slice(code);
    file
}
