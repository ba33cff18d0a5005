//! What the loader tells: command line, memory map and ACPI root, copied out before anything is overwritten.

const MAGIC: u32 = 0x336e_c578;
pub const MAX_RANGES: usize = 8;
pub const MAX_COMMAND: usize = 2048;

unsafe extern "C" {
    static start_info: u64;
    static image_end: u8;
}

/// The start of memory that the image does not use.
pub fn free_start() -> u64 {
    &raw const image_end as u64
}

pub struct Info {
    command: [u8; MAX_COMMAND],
    command_length: usize,
    ram: [(u64, u64); MAX_RANGES],
    ram_count: usize,
    pub rsdp: u64,
}

impl Info {
    pub fn read() -> Info {
        let mut info = Info {
            command: [0; MAX_COMMAND],
            command_length: 0,
            ram: [(0, 0); MAX_RANGES],
            ram_count: 0,
            rsdp: 0,
        };
        // SAFETY: the loader's structures, laid out as the PVH boot protocol says, in identity-mapped memory.
        unsafe {
            let at = start_info;
            let u32_at = |offset: u64| ((at + offset) as *const u32).read_unaligned();
            let u64_at = |offset: u64| ((at + offset) as *const u64).read_unaligned();
            if u32_at(0) != MAGIC {
                return info;
            }
            let command = u64_at(24) as *const u8;
            while !command.is_null()
                && info.command_length < MAX_COMMAND
                && command.add(info.command_length).read() != 0
            {
                info.command[info.command_length] = command.add(info.command_length).read();
                info.command_length += 1;
            }
            info.rsdp = u64_at(32);
            let entries = if u32_at(4) >= 1 { u32_at(48) as u64 } else { 0 };
            for i in 0..entries {
                let entry = u64_at(40) + 24 * i;
                let (start, size) = (
                    (entry as *const u64).read_unaligned(),
                    ((entry + 8) as *const u64).read_unaligned(),
                );
                if ((entry + 16) as *const u32).read_unaligned() == 1 && info.ram_count < MAX_RANGES {
                    info.ram[info.ram_count] = (start, start.saturating_add(size));
                    info.ram_count += 1;
                }
            }
        }
        info
    }

    pub fn command(&self) -> &str {
        core::str::from_utf8(&self.command[..self.command_length]).unwrap_or("")
    }

    /// Ranges of usable memory, ends exclusive.
    pub fn ram(&self) -> &[(u64, u64)] {
        &self.ram[..self.ram_count]
    }
}
