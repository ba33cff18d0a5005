//! The registers with which the first CPU begins: 32-bit protected mode, flat segments, no paging. Both protocols want the
//! same, but for the register that points to the boot data.

use ferry_devices::ram::Ram;
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::error::{Doing, Result};
use crate::layout;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    rip: u32,
    rbx: u64,
    rsi: u64,
}

impl Entry {
    pub(super) fn pvh(rip: u32) -> Entry {
        Entry {
            rip,
            rbx: layout::START_INFO,
            rsi: 0,
        }
    }

    pub(super) fn linux(rip: u32) -> Entry {
        Entry {
            rip,
            rbx: 0,
            rsi: layout::ZERO_PAGE,
        }
    }
}

// Selectors as the Linux boot protocol names them (__BOOT_CS, __BOOT_DS).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
const GDT: [u64; 5] = [
    0,
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
];

pub(super) fn write_gdt(ram: &Ram) -> Result<()> {
    let bytes: Vec<u8> = GDT.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    super::write(ram, layout::BOOT_GDT, &bytes)
}

/// Puts CPU 0 at the kernel's entry. The other CPUs wait for their start-up message.
pub fn set_registers(vcpu: &VcpuFd, entry: Entry) -> Result<()> {
    let flat = |selector, type_| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        ..Default::default()
    };
    let data = flat(DATA, 3);
    let mut sregs = vcpu.get_sregs().doing("read the registers of CPU 0")?;
    sregs.cs = flat(CODE, 11);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment {
        selector: TASK,
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.ldt = kvm_segment {
        type_: 2,
        unusable: 1,
        ..Default::default()
    };
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = (size_of_val(&GDT) - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    // Protection on; the rest as after a reset of the processor, without which VMX refuses (NE, ET).
    sregs.cr0 = 0x11;
    sregs.cr3 = 0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs)
        .doing("set the segment registers of CPU 0")?;
    let regs = kvm_regs {
        rip: u64::from(entry.rip),
        rbx: entry.rbx,
        rsi: entry.rsi,
        rsp: layout::BOOT_STACK,
        rbp: 0,
        rflags: 2,
        ..Default::default()
    };
    vcpu.set_regs(&regs).doing("set the registers of CPU 0")
}
