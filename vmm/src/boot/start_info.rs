//! hvm_start_info, version 1: what a PVH kernel is told (Xen's public/arch-x86/hvm/start_info.h).

use ferry_devices::ram::Ram;

use super::Placed;
use super::memory_map::Piece;
use crate::error::Result;
use crate::layout;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

pub(super) fn write(ram: &Ram, initrd: Option<Placed>, rsdp: u64, map: &[Piece]) -> Result<()> {
    if let Some(Placed { at, len }) = initrd {
        // paddr, size, cmdline_paddr, reserved
        let module: Vec<u8> = [at, len, 0, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        super::write(ram, layout::START_INFO_MODULE, &module)?;
    }
    let mut table = Vec::new();
    for piece in map {
        table.extend_from_slice(&piece.start.to_le_bytes());
        table.extend_from_slice(&piece.len.to_le_bytes());
        table.extend_from_slice(&piece.kind.to_le_bytes());
        table.extend_from_slice(&[0; 4]);
    }
    super::write(ram, layout::START_INFO_MEMMAP, &table)?;
    let mut info = Vec::new();
    let modules = u32::from(initrd.is_some());
    for word in [MAGIC, VERSION, 0, modules] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    let module_list = if initrd.is_some() {
        layout::START_INFO_MODULE
    } else {
        0
    };
    for word in [module_list, layout::CMDLINE, rsdp, layout::START_INFO_MEMMAP] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for word in [map.len() as u32, 0] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    super::write(ram, layout::START_INFO, &info)
}
