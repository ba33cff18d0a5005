//! Just enough ACPI: the local APIC ids of the vCPUs, and the port that turns the machine off.

use core::slice;

const MAX_IDS: usize = crate::cpu::MAX_CPUS;

pub struct Acpi {
    ids: [u32; MAX_IDS],
    count: usize,
    pub sleep: Sleep,
    /// Port of the power management events, 0 if the tables name none.
    pub events: u16,
    /// PCI configuration space in memory, 0 if the tables name none.
    pub ecam: u64,
}

/// Where to write to turn the machine off, and the sleep type that means off.
#[derive(Clone, Copy)]
pub enum Sleep {
    /// The PM1a control register.
    Control {
        port: u16,
        kind: u8,
    },
    /// The sleep control register of hardware-reduced ACPI, in port space or in memory.
    Port {
        port: u16,
        kind: u8,
    },
    Memory {
        address: u64,
        kind: u8,
    },
}

impl Acpi {
    pub fn apic_ids(&self) -> &[u32] {
        &self.ids[..self.count]
    }

    /// Reads the tables under this root pointer, or under the one found in the BIOS area if it is 0.
    pub fn read(root: u64) -> Acpi {
        let mut acpi = Acpi {
            ids: [0; MAX_IDS],
            count: 0,
            sleep: Sleep::Control { port: 0x604, kind: 0 },
            events: 0,
            ecam: 0,
        };
        let root = if root != 0 { root } else { scan().unwrap_or(0) };
        if root == 0 {
            return acpi;
        }
        let pointer = bytes(root, 36);
        let (table, width) = match (pointer[15], u64_at(pointer, 24)) {
            (2.., xsdt) if xsdt != 0 => (xsdt, 8),
            _ => (u32_at(pointer, 16) as u64, 4),
        };
        for entry in body(table).chunks_exact(width) {
            let at = if width == 8 {
                u64_at(entry, 0)
            } else {
                u32_at(entry, 0) as u64
            };
            match bytes(at, 4) {
                b"APIC" => acpi.read_madt(body(at)),
                b"MCFG" => acpi.ecam = u64_at(body(at), 44 - 36),
                b"FACP" => acpi.read_fadt(body(at)),
                _ => {}
            }
        }
        acpi
    }

    fn read_fadt(&mut self, body: &[u8]) {
        let at = |offset: usize| offset - 36;
        let dsdt = match u64_at(body, at(140)) {
            0 => u32_at(body, at(40)) as u64,
            wide => wide,
        };
        let kind = if dsdt == 0 {
            0
        } else {
            soft_off(self::body(dsdt)).unwrap_or(0)
        };
        let reduced = u32_at(body, at(112)) & 1 << 20 != 0;
        self.events = if reduced { 0 } else { u32_at(body, at(56)) as u16 };
        self.sleep = match (reduced, body.get(at(244)), u64_at(body, at(248))) {
            (true, Some(0), address) => Sleep::Memory { address, kind },
            (true, Some(1), port) => Sleep::Port {
                port: port as u16,
                kind,
            },
            _ => Sleep::Control {
                port: u32_at(body, at(64)) as u16,
                kind,
            },
        };
    }

    fn read_madt(&mut self, body: &[u8]) {
        let mut rest = body.get(8..).unwrap_or(&[]);
        while let [kind, length, ..] = *rest {
            let Some((entry, next)) = rest.split_at_checked(length.max(2) as usize) else {
                return;
            };
            rest = next;
            let (id, flags) = match (kind, entry.len()) {
                (0, 8..) => (entry[3] as u32, u32_at(entry, 4)),
                (9, 16..) => (u32_at(entry, 4), u32_at(entry, 8)),
                _ => continue,
            };
            if flags & 1 != 0 && self.count < MAX_IDS {
                self.ids[self.count] = id;
                self.count += 1;
            }
        }
    }
}

/// The sleep type of S5: the first number of the package named `_S5_`.
fn soft_off(code: &[u8]) -> Option<u8> {
    let at = code.windows(5).position(|w| w == b"_S5_\x12")? + 5;
    // A package length of one byte, a count, then a number: 0, 1, or a byte behind its prefix.
    match *code.get(at + 2)? {
        0x0a => code.get(at + 3).copied(),
        number => Some(number.min(7)),
    }
}

fn scan() -> Option<u64> {
    (0xe_0000..0x10_0000u64)
        .step_by(16)
        .find(|&at| bytes(at, 8) == b"RSD PTR ")
}

/// A table's bytes after its 36-byte header.
fn body(table: u64) -> &'static [u8] {
    let length = u32_at(bytes(table, 8), 4) as usize;
    bytes(table, length.clamp(36, 0x10_0000)).split_at(36).1
}

fn bytes(at: u64, length: usize) -> &'static [u8] {
    // SAFETY: tables lie in memory that is mapped and that nothing writes while they are read.
    unsafe { slice::from_raw_parts(at as *const u8, length) }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .map_or(0, |b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u32_at(bytes, at) as u64 | (u32_at(bytes, at + 4) as u64) << 32
}
