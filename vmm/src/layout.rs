//! Where everything is in the guest's physical address space and port space. One page of constants, no code.

use std::ops::Range;

pub const GIB: u64 = 1 << 30;

/// Memory below 4 GiB ends here; what is more begins at `HIGH_RAM`.
pub const LOW_RAM_END: u64 = 3 * GIB;
pub const HIGH_RAM: u64 = 4 * GIB;

/// 32-bit BARs.
pub const PCI_WINDOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// Configuration space of one bus.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
pub const IOAPIC: u64 = 0xfec0_0000;
pub const LAPIC: u64 = 0xfee0_0000;
/// Where KVM on VMX keeps a page for the identity map and three for the TSS of real mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: u64 = 0xfffb_d000;

pub const PCI_CONFIG_PORTS: Range<u64> = 0xcf8..0xd00;

pub const SCI_IRQ: u32 = 9;
/// Pins of the IOAPIC; message interrupts get the numbers above.
pub const IOAPIC_PINS: u32 = 24;

// What the boot leaves in low memory. Each is below 0x9fc00, which the memory map calls usable, as the boot protocols
// want it: the kernel has read them before it uses that memory.
pub const BOOT_GDT: u64 = 0x500;
pub const START_INFO: u64 = 0x6000;
pub const START_INFO_MODULE: u64 = 0x6040;
pub const START_INFO_MEMMAP: u64 = 0x6100;
pub const ZERO_PAGE: u64 = 0x7000;
pub const BOOT_STACK: u64 = 0x8ff0;
pub const CMDLINE: u64 = 0x2_0000;

/// Usable low memory ends here; from here to 1 MiB a PC has its ROMs, and we the ACPI tables.
pub const EBDA: u64 = 0x9_fc00;
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0x10_0000;
pub const ONE_MIB: u64 = 0x10_0000;
