//! From a kernel file to a guest that is ready for its first instruction: kernel, initrd, command line and ACPI tables in
//! memory, and the registers of the first CPU.

mod bzimage;
mod elf;
mod entry;
mod image;
mod memory_map;
mod start_info;

use std::path::Path;

use ferry_devices::ram::Ram;
use vm_memory::{Bytes, GuestAddress};

pub use entry::{Entry, set_registers};
pub use image::Image;

use crate::acpi;
use crate::config::MachineConfig;
use crate::error::{MachineError, Result};
use crate::layout;
use crate::memory::regions;

/// Where a loaded kernel lies, and how it wants to be entered.
struct Loaded {
    entry: Entry,
    /// End of the memory that the kernel uses before it has looked at the memory map.
    end: u64,
    protocol: Protocol,
}

enum Protocol {
    /// ELF with a PVH note: the start info tells everything.
    Pvh,
    /// bzImage: the zero page does, which begins with this setup header.
    Linux(bzimage::SetupHeader),
}

/// Puts everything into memory; the answer goes into CPU 0 with `set_registers`.
pub fn load(config: &MachineConfig, ram: &Ram) -> Result<Entry> {
    let kernel = match &config.kernel {
        Some(path) => Image::open("kernel", path)?,
        None => Image::bytes("built-in guest", ferry_images::BUILTIN_GUEST),
    };
    let loaded = load_kernel(&kernel, ram)?;
    let highest = match &loaded.protocol {
        Protocol::Pvh => layout::LOW_RAM_END,
        Protocol::Linux(header) => header.initrd_max(),
    };
    let initrd = config
        .initrd
        .as_deref()
        .map(|path| load_initrd(path, ram, loaded.end, highest))
        .transpose()?;
    write_command_line(ram, &config.cmdline, &loaded.protocol)?;
    let rsdp = acpi::write(ram, config.cpus)?;
    let map = memory_map::of(&regions(ram));
    match loaded.protocol {
        Protocol::Pvh => start_info::write(ram, initrd, rsdp, &map)?,
        Protocol::Linux(header) => header.write_zero_page(ram, initrd, rsdp, &map)?,
    }
    entry::write_gdt(ram)?;
    Ok(loaded.entry)
}

fn load_kernel(kernel: &Image, ram: &Ram) -> Result<Loaded> {
    if elf::is(kernel) {
        elf::load(kernel, ram)
    } else if bzimage::is(kernel) {
        bzimage::load(kernel, ram)
    } else {
        Err(kernel.refuse("it is neither an ELF file nor a bzImage; give a vmlinux or vmlinuz of x86-64"))
    }
}

/// A range of guest memory: address and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Placed {
    at: u64,
    len: u64,
}

/// As high as the protocol allows, so that it is out of the kernel's way.
fn load_initrd(path: &Path, ram: &Ram, kernel_end: u64, highest: u64) -> Result<Placed> {
    let image = Image::open("initrd", path)?;
    let len = image.len();
    if len == 0 {
        return Err(image.refuse("it is empty"));
    }
    let low_ram = regions(ram).first().map_or(0, |region| region.size);
    let at = low_ram
        .min(highest)
        .checked_sub(len)
        .map(|at| at & !0xfff)
        .filter(|at| *at >= kernel_end);
    let Some(at) = at else {
        return Err(image.refuse(&format!(
            "its {len} bytes do not fit between the kernel (up to {kernel_end:#x}) and the end of low memory ({low_ram:#x}); \
             give the machine more with --memory"
        )));
    };
    image.load(ram, at, 0, len)?;
    Ok(Placed { at, len })
}

fn write_command_line(ram: &Ram, text: &str, protocol: &Protocol) -> Result<()> {
    if let Protocol::Linux(header) = protocol
        && text.len() as u64 > header.cmdline_max()
    {
        return Err(MachineError::Host(format!(
            "the command line has {} bytes, this kernel takes at most {}",
            text.len(),
            header.cmdline_max()
        )));
    }
    write(ram, layout::CMDLINE, text.as_bytes())?;
    write(ram, layout::CMDLINE + text.len() as u64, &[0])
}

/// Writes boot data; it is in low memory, which every machine has.
pub(crate) fn write(ram: &Ram, at: u64, bytes: &[u8]) -> Result<()> {
    ram.write_slice(bytes, GuestAddress(at)).map_err(|e| {
        MachineError::Host(format!(
            "boot data for {at:#x} could not be written to guest memory: {e}"
        ))
    })
}
