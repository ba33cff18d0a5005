//! The guests Ferry brings along: the built-in guest, compiled from source and embedded.

mod tiny;

pub use tiny::tiny_kernel;

/// The built-in guest: an x86-64 ELF image with a PVH entry. builtin/README.md says what it can be told.
pub const BUILTIN_GUEST: &[u8] = include_bytes!(env!("FERRY_BUILTIN_GUEST"));

#[cfg(test)]
mod tests {
    use super::BUILTIN_GUEST;

    #[test]
    fn the_guest_is_a_static_elf_with_a_pvh_note() {
        assert_eq!(BUILTIN_GUEST[..4], *b"\x7fELF");
        let (executable, x86_64) = (2, 62);
        assert_eq!((BUILTIN_GUEST[16], BUILTIN_GUEST[18]), (executable, x86_64));
        let note = [4u32, 8, 18].map(u32::to_le_bytes).concat();
        let at = BUILTIN_GUEST
            .windows(16)
            .position(|w| w[..12] == note[..] && w[12..] == *b"Xen\0");
        assert!(at.is_some(), "no PVH note: no monitor would find the entry");
    }
}
