//! ELF kernels with a PVH entry note. Headers may lie: every offset and address is checked before it is used.

use ferry_devices::ram::Ram;

use super::{Entry, Image, Loaded, Protocol};
use crate::error::Result;
use crate::layout;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const EM_X86_64: u16 = 62;
const PROGRAM_HEADER_SIZE: u16 = 56;
/// A kernel has a handful; the field could say 65,535.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// XEN_ELFNOTE_PHYS32_ENTRY
const NOTE_PVH_ENTRY: u32 = 18;
/// Notes are small; a segment that says otherwise is not read.
const MAX_NOTES_BYTES: u64 = 64 << 10;

pub(super) fn is(image: &Image) -> bool {
    image.read::<4>(0) == Some(*b"\x7fELF")
}

struct Segment {
    kind: u32,
    offset: u64,
    paddr: u64,
    file_size: u64,
    mem_size: u64,
}

fn u16_at(image: &Image, at: u64) -> Option<u16> {
    image.read(at).map(u16::from_le_bytes)
}

fn u32_at(image: &Image, at: u64) -> Option<u32> {
    image.read(at).map(u32::from_le_bytes)
}

fn u64_at(image: &Image, at: u64) -> Option<u64> {
    image.read(at).map(u64::from_le_bytes)
}

fn segment(image: &Image, at: u64) -> Option<Segment> {
    Some(Segment {
        kind: u32_at(image, at)?,
        offset: u64_at(image, at.checked_add(8)?)?,
        paddr: u64_at(image, at.checked_add(24)?)?,
        file_size: u64_at(image, at.checked_add(32)?)?,
        mem_size: u64_at(image, at.checked_add(40)?)?,
    })
}

pub(super) fn load(image: &Image, ram: &Ram) -> Result<Loaded> {
    let cut = || image.refuse("its ELF headers point beyond the end of the file; is it cut off?");
    let ident: [u8; 6] = image.read(0).ok_or_else(cut)?;
    if ident[4] != 2 || ident[5] != 1 || u16_at(image, 18) != Some(EM_X86_64) {
        return Err(image.refuse("it is an ELF file, but not a 64-bit one for x86-64"));
    }
    let table = u64_at(image, 32).ok_or_else(cut)?;
    let entry_size = u16_at(image, 54).ok_or_else(cut)?;
    let count = u16_at(image, 56).ok_or_else(cut)?;
    if entry_size != PROGRAM_HEADER_SIZE || count == 0 || count > MAX_PROGRAM_HEADERS {
        return Err(image.refuse(&format!(
            "its ELF header announces {count} program headers of {entry_size} bytes; expected are 1 to \
             {MAX_PROGRAM_HEADERS} of {PROGRAM_HEADER_SIZE}"
        )));
    }
    let mut end = 0;
    let mut pvh_entry = None;
    let mut loaded: Vec<(u64, u64)> = Vec::new();
    for index in 0..u64::from(count) {
        let at = table.checked_add(index * u64::from(entry_size)).ok_or_else(cut)?;
        let part = segment(image, at).ok_or_else(cut)?;
        if part.kind == PT_NOTE && pvh_entry.is_none() {
            pvh_entry = find_note(image, &part);
        }
        if part.kind != PT_LOAD || part.mem_size == 0 {
            continue;
        }
        if part.file_size > part.mem_size {
            return Err(image.refuse(&format!(
                "its segment {index} is larger in the file than in memory"
            )));
        }
        if part.paddr < layout::ONE_MIB {
            return Err(image.refuse(&format!(
                "its segment {index} belongs to {:#x}, but memory below 1 MiB holds the boot data",
                part.paddr
            )));
        }
        let part_end = part.paddr.checked_add(part.mem_size);
        let part_end = part_end.filter(|_| ram_has(ram, part.paddr, part.mem_size)).ok_or_else(|| {
            image.refuse(&format!(
                "its segment {index} wants {} bytes at {:#x}, where the machine has no memory; give it more with --memory",
                part.mem_size, part.paddr
            ))
        })?;
        image.load(ram, part.paddr, part.offset, part.file_size)?;
        loaded.push((part.paddr, part_end));
        end = end.max(part_end);
    }
    let entry = pvh_entry.ok_or_else(|| {
        image.refuse(
            "it has no PVH entry note; a Linux vmlinux needs CONFIG_PVH=y, or give its bzImage instead",
        )
    })?;
    if !loaded
        .iter()
        .any(|(start, end)| (*start..*end).contains(&u64::from(entry)))
    {
        return Err(image.refuse(&format!("its PVH entry {entry:#x} is in none of its segments")));
    }
    Ok(Loaded {
        entry: Entry::pvh(entry),
        end,
        protocol: Protocol::Pvh,
    })
}

fn ram_has(ram: &Ram, at: u64, len: u64) -> bool {
    use vm_memory::{GuestAddress, GuestMemoryBackend};
    usize::try_from(len).is_ok_and(|len| ram.check_range(GuestAddress(at), len))
}

/// The PVH entry among the notes of one segment. Notes that make no sense end the search.
fn find_note(image: &Image, notes: &Segment) -> Option<u32> {
    let end = notes.offset.checked_add(notes.file_size.min(MAX_NOTES_BYTES))?;
    let padded = |len: u32| u64::from(len).next_multiple_of(4);
    let mut at = notes.offset;
    while at.checked_add(12)? <= end {
        let (name_len, value_len) = (u32_at(image, at)?, u32_at(image, at + 4)?);
        let kind = u32_at(image, at + 8)?;
        let name = at + 12;
        let value = name.checked_add(padded(name_len))?;
        if kind == NOTE_PVH_ENTRY
            && image.read::<4>(name) == Some(*b"Xen\0")
            && name_len == 4
            && value_len >= 4
        {
            // Linux writes 4 or 8 bytes; the address has 32 bits either way.
            return u32_at(image, value);
        }
        at = value.checked_add(padded(value_len))?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MachineConfig;
    use crate::size::ByteSize;
    use ferry_images::tiny_kernel;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    fn ram() -> Ram {
        crate::memory::allocate(&MachineConfig {
            memory: ByteSize(16 << 20),
            ..MachineConfig::default()
        })
        .unwrap()
    }

    fn refused(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut file = tiny_kernel(b"\xf4");
        change(&mut file);
        load(&Image::bytes("kernel", &file), &ram())
            .err()
            .expect("must be refused")
            .to_string()
    }

    fn put(file: &mut [u8], at: usize, value: u64) {
        file[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    #[test]
    fn a_kernel_is_loaded_where_it_says() {
        let ram = ram();
        let loaded = load(&Image::bytes("kernel", &tiny_kernel(b"hello")), &ram).unwrap();
        assert_eq!(loaded.entry, Entry::pvh(0x10_0000));
        assert_eq!(loaded.end, 0x10_1000);
        let mut there = [0u8; 6];
        ram.read_slice(&mut there, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(&there, b"hello\0");
    }

    #[test]
    fn headers_that_lie_are_refused_by_name() {
        assert!(refused(|f| f[4] = 1).contains("not a 64-bit"));
        assert!(refused(|f| put(f, 32, u64::MAX - 3)).contains("beyond the end"));
        assert!(refused(|f| f[56] = 200).contains("200 program headers"));
        assert!(refused(|f| put(f, 64 + 8, u64::MAX)).contains("cut off"));
        assert!(refused(|f| put(f, 64 + 24, 1 << 40)).contains("no memory"));
        assert!(refused(|f| put(f, 64 + 24, 0x8000)).contains("below 1 MiB"));
        assert!(refused(|f| put(f, 64 + 40, u64::MAX)).contains("no memory"));
        assert!(refused(|f| put(f, 64 + 32, 0x2000)).contains("larger in the file"));
        assert!(refused(|f| f[0x208] = 17).contains("no PVH entry note"));
        assert!(refused(|f| f[0x212] = 0x70).contains("none of its segments"));
        assert!(refused(|f| f.truncate(100)).contains("cut off"));
    }

    proptest! {
        /// Whatever the headers say: an answer or an error, never a panic, and never a write outside memory.
        #[test]
        fn no_header_panics(changes in prop::collection::vec((0usize..0x220, any::<u8>()), 1..12), len in 0usize..0x1100) {
            let mut file = tiny_kernel(&[0xf4; 64]);
            for (at, byte) in changes {
                file[at] = byte;
            }
            file.truncate(len.max(4));
            file[..4].copy_from_slice(b"\x7fELF");
            let ram = ram();
            let _ = load(&Image::bytes("kernel", &file), &ram);
            let mut low = vec![0u8; 1 << 20];
            ram.read_slice(&mut low, GuestAddress(0)).unwrap();
            prop_assert!(low.iter().all(|b| *b == 0), "boot data was overwritten");
        }
    }
}
