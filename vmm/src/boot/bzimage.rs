//! Linux bzImage: the setup header, the zero page and the 32-bit entry, which every bzImage has.

use ferry_devices::ram::Ram;

use super::memory_map::Piece;
use super::{Entry, Image, Loaded, Placed, Protocol, write};
use crate::error::Result;
use crate::layout;

// Offsets in the file and in the zero page, from Documentation/arch/x86/boot.rst and zero-page.rst.
const ACPI_RSDP: usize = 0x70;
const E820_COUNT: usize = 0x1e8;
const SETUP_HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const CMDLINE_PTR: usize = 0x228;
const INITRD_MAX: usize = 0x22c;
const CMDLINE_SIZE: usize = 0x238;
const PREFERRED: usize = 0x258;
const INIT_SIZE: usize = 0x260;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;

/// The version with `init_size`: Linux 2.6.35. Older kernels are not worth the cases.
const OLDEST: u16 = 0x020a;
const LOADED_HIGH: u8 = 1;

pub(super) fn is(image: &Image) -> bool {
    image.read::<4>(MAGIC as u64) == Some(*b"HdrS") && image.read(BOOT_FLAG as u64) == Some([0x55, 0xaa])
}

/// The first page of the file up to the end of the setup header: what becomes the zero page.
pub(super) struct SetupHeader(Box<[u8; 4096]>);

impl SetupHeader {
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        self.0
            .get(at..at + N)
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or([0; N])
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(to) = self.0.get_mut(at..at + bytes.len()) {
            to.copy_from_slice(bytes);
        }
    }

    /// First address after the highest place for an initrd.
    pub(super) fn initrd_max(&self) -> u64 {
        u64::from(u32::from_le_bytes(self.get(INITRD_MAX))) + 1
    }

    pub(super) fn cmdline_max(&self) -> u64 {
        u64::from(u32::from_le_bytes(self.get(CMDLINE_SIZE)))
    }

    pub(super) fn write_zero_page(
        mut self,
        ram: &Ram,
        initrd: Option<Placed>,
        rsdp: u64,
        map: &[Piece],
    ) -> Result<()> {
        self.put(LOADER, &[0xff]);
        self.put(CMDLINE_PTR, &(layout::CMDLINE as u32).to_le_bytes());
        if let Some(Placed { at, len }) = initrd {
            self.put(RAMDISK_IMAGE, &(at as u32).to_le_bytes());
            self.put(RAMDISK_SIZE, &(len as u32).to_le_bytes());
        }
        self.put(ACPI_RSDP, &rsdp.to_le_bytes());
        let pieces = map.get(..map.len().min(E820_MAX)).unwrap_or_default();
        self.put(E820_COUNT, &[pieces.len() as u8]);
        for (index, piece) in pieces.iter().enumerate() {
            let at = E820_TABLE + index * 20;
            self.put(at, &piece.start.to_le_bytes());
            self.put(at + 8, &piece.len.to_le_bytes());
            self.put(at + 16, &piece.kind.to_le_bytes());
        }
        write(ram, layout::ZERO_PAGE, self.0.as_slice())
    }
}

pub(super) fn load(image: &Image, ram: &Ram) -> Result<Loaded> {
    let cut = || image.refuse("it begins like a bzImage, but is cut off");
    let version = u16::from_le_bytes(image.read(VERSION as u64).ok_or_else(cut)?);
    let [flags] = image.read(LOAD_FLAGS as u64).ok_or_else(cut)?;
    if version < OLDEST || flags & LOADED_HIGH == 0 {
        return Err(image.refuse(&format!(
            "it speaks boot protocol {}.{}, needed is a bzImage of {}.{} or newer",
            version >> 8,
            version & 0xff,
            OLDEST >> 8,
            OLDEST & 0xff
        )));
    }
    // The byte at 0x201 is the operand of the jump at 0x200: the header ends where the jump goes.
    let [jump] = image.read(0x201).ok_or_else(cut)?;
    let header_end = MAGIC + usize::from(jump);
    let mut header = SetupHeader(Box::new([0; 4096]));
    let filled = header
        .0
        .get_mut(SETUP_HEADER..header_end)
        .is_some_and(|to| image.read_into(SETUP_HEADER as u64, to));
    if !filled || header_end < INIT_SIZE + 4 {
        return Err(cut());
    }
    let [setup_sectors] = header.get(SETUP_HEADER);
    let setup_sectors = if setup_sectors == 0 {
        4
    } else {
        u64::from(setup_sectors)
    };
    let code = (setup_sectors + 1) * 512;
    let code_len = image
        .len()
        .checked_sub(code)
        .filter(|len| *len > 0)
        .ok_or_else(cut)?;
    let at = match u64::from_le_bytes(header.get(PREFERRED)) {
        at if (layout::ONE_MIB..1 << 31).contains(&at) => at,
        _ => layout::ONE_MIB,
    };
    image.load(ram, at, code, code_len)?;
    // It decompresses itself to the same place and needs more room for that.
    let end = at + code_len.max(u64::from(u32::from_le_bytes(header.get(INIT_SIZE))));
    Ok(Loaded {
        entry: Entry::linux(at as u32),
        end,
        protocol: Protocol::Linux(header),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MachineConfig;
    use crate::size::ByteSize;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    fn kernel() -> Vec<u8> {
        let mut file = vec![0u8; 0x400];
        file[SETUP_HEADER] = 1;
        file[BOOT_FLAG..BOOT_FLAG + 2].copy_from_slice(&[0x55, 0xaa]);
        file[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
        file[MAGIC..MAGIC + 4].copy_from_slice(b"HdrS");
        file[VERSION..VERSION + 2].copy_from_slice(&0x020fu16.to_le_bytes());
        file[LOAD_FLAGS] = 1;
        file[INITRD_MAX..INITRD_MAX + 4].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
        file[CMDLINE_SIZE..CMDLINE_SIZE + 4].copy_from_slice(&2047u32.to_le_bytes());
        file[PREFERRED..PREFERRED + 8].copy_from_slice(&0x10_0000u64.to_le_bytes());
        file[INIT_SIZE..INIT_SIZE + 4].copy_from_slice(&0x20_0000u32.to_le_bytes());
        file.extend_from_slice(b"protected mode code");
        file
    }

    fn ram() -> Ram {
        crate::memory::allocate(&MachineConfig {
            memory: ByteSize(16 << 20),
            ..MachineConfig::default()
        })
        .unwrap()
    }

    #[test]
    fn code_and_zero_page_are_where_the_protocol_wants_them() {
        let ram = ram();
        let file = kernel();
        let image = Image::bytes("kernel", &file);
        assert!(is(&image));
        let loaded = load(&image, &ram).unwrap();
        assert_eq!((loaded.entry, loaded.end), (Entry::linux(0x10_0000), 0x30_0000));
        let Protocol::Linux(header) = loaded.protocol else {
            panic!("a bzImage is Linux")
        };
        let map = [Piece {
            start: 0,
            len: 0x9_fc00,
            kind: 1,
        }];
        header
            .write_zero_page(
                &ram,
                Some(Placed {
                    at: 0x80_0000,
                    len: 77,
                }),
                0xe_0000,
                &map,
            )
            .unwrap();
        let read = |at: usize| {
            ram.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + at as u64))
                .unwrap()
        };
        assert_eq!(read(RAMDISK_IMAGE), 0x80_0000);
        assert_eq!(read(RAMDISK_SIZE), 77);
        assert_eq!(read(ACPI_RSDP), 0xe_0000);
        assert_eq!(read(E820_TABLE + 8), 0x9_fc00);
        assert_eq!(read(E820_COUNT) & 0xff, 1);
        let mut code = [0u8; 9];
        ram.read_slice(&mut code, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(&code, b"protected");
    }

    proptest! {
        #[test]
        fn no_header_panics(changes in prop::collection::vec((0usize..0x280, any::<u8>()), 0..12), len in 0usize..0x420) {
            let mut file = kernel();
            for (at, byte) in changes {
                file[at] = byte;
            }
            file.truncate(len);
            let image = Image::bytes("kernel", &file);
            if is(&image) {
                let _ = load(&image, &ram());
            }
        }
    }
}
