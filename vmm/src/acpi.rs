//! ACPI tables: what a stock kernel needs to find CPUs, interrupt controllers, PCI, the serial port and the power switch.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use ferry_devices::legacy::acpi_pm::{PM_TMR_PORT, PM1A_CNT_PORT, PM1A_EVT_PORT, SLP_TYP_S5};
use ferry_devices::legacy::{rtc, serial};
use ferry_devices::ram::Ram;

use crate::boot;
use crate::error::{MachineError, Result};
use crate::layout;

const OEM: [u8; 6] = *b"FERRY ";
const OEM_TABLE: [u8; 8] = *b"FERRYVMM";

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut out = Vec::new();
    table.to_aml_bytes(&mut out);
    out
}

/// Writes all tables and returns the address of the RSDP, which is also where a kernel that scans finds it.
pub fn write(ram: &Ram, cpus: u32) -> Result<u64> {
    let start = layout::ACPI_TABLES.start;
    // The RSDP comes first and points to what follows.
    let mut place = Place {
        ram,
        next: start + 64,
    };
    let dsdt = place.put(dsdt().as_slice())?;
    let facs = place.put(&bytes(&acpi_tables::facs::FACS::new()))?;
    let fadt = place.put(&bytes(&fadt(dsdt, facs)?))?;
    let madt = place.put(madt(cpus).as_slice())?;
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, 1);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    let mcfg = place.put(&bytes(&mcfg))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, 1);
    [fadt, madt, mcfg]
        .into_iter()
        .for_each(|table| xsdt.add_entry(table));
    let xsdt = place.put(&bytes(&xsdt))?;
    boot::write(ram, start, &bytes(&Rsdp::new(OEM, xsdt)))?;
    Ok(start)
}

struct Place<'a> {
    ram: &'a Ram,
    next: u64,
}

impl Place<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64> {
        // The FACS must be aligned to 64 bytes; the others do not mind.
        let at = self.next.next_multiple_of(64);
        self.next = at + table.len() as u64;
        if self.next > layout::ACPI_TABLES.end {
            return Err(MachineError::Host(
                "the ACPI tables do not fit below 1 MiB".into(),
            ));
        }
        boot::write(self.ram, at, table)?;
        Ok(at)
    }
}

fn fadt(dsdt: u64, facs: u64) -> Result<acpi_tables::fadt::FADT> {
    let low =
        |at: u64| u32::try_from(at).map_err(|_| MachineError::Host("an ACPI table is above 4 GiB".into()));
    let port = |at: u16, bits: u8, access| GAS::new(Space::SystemIo, bits, 0, access, u64::from(at));
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, 1)
        .dsdt_32(low(dsdt)?)
        .dsdt_64(dsdt)
        .firmware_ctrl_32(low(facs)?)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        // The flag says that a button is not in the PM1 registers. The power button is, so it has none; there is no sleep button.
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup);
    fadt.sci_int = (layout::SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVT_PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1A_CNT_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(PM_TMR_PORT).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm1a_evt_blk = port(PM1A_EVT_PORT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(PM1A_CNT_PORT, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(PM_TMR_PORT, 32, AccessSize::DwordAccess);
    fadt.century = rtc::CENTURY_INDEX;
    // A kernel that reboots writes 0xfe to the keyboard controller.
    fadt.reset_reg = port(0x64, 8, AccessSize::ByteAccess);
    fadt.reset_value = 0xfe;
    // Legacy devices are there; VGA is not. Of the keyboard controller there is only the reset line, and it is not
    // announced: a stock kernel would talk to it for seconds before it gives up.
    fadt.iapc_boot_arch = (1u16 | 1 << 2).into();
    Ok(fadt.finalize())
}

fn madt(cpus: u32) -> Sdt {
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM, OEM_TABLE, 1);
    madt.write_u32(36, layout::LAPIC as u32);
    // There is also a pair of 8259s.
    madt.write_u32(40, 1);
    for cpu in 0..cpus.min(crate::config::MAX_CPUS) {
        // Local APIC: processor uid, APIC id, enabled
        madt.append_slice(&[0, 8, cpu as u8, cpu as u8, 1, 0, 0, 0]);
    }
    let mut ioapic = vec![1, 12, 0, 0];
    ioapic.extend_from_slice(&(layout::IOAPIC as u32).to_le_bytes());
    ioapic.extend_from_slice(&0u32.to_le_bytes());
    madt.append_slice(&ioapic);
    // The PIT is at pin 2; the SCI is edge-triggered and active high.
    madt.append_slice(&[2, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    madt.append_slice(&[
        2,
        10,
        0,
        layout::SCI_IRQ as u8,
        layout::SCI_IRQ as u8,
        0,
        0,
        0,
        0x05,
        0,
    ]);
    // NMI at LINT1 of every CPU.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.update_checksum();
    madt
}

fn dsdt() -> Sdt {
    let com1 = serial::COM1;
    let ecam = layout::ECAM;
    let root = bytes(&Scope::new(
        Path::new("_SB_"),
        vec![
            &Raw(pci()),
            &Device::new(
                Path::new("COM1"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                    &Name::new(Path::new("_UID"), &aml::ONE),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![
                            &IO::new(com1.start as u16, com1.start as u16, 1, 8),
                            &Interrupt::new(true, true, false, false, serial::COM1_IRQ),
                        ]),
                    ),
                ],
            ),
            &Device::new(
                Path::new("RTC_"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                    // No interrupt: the device has none.
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&IO::new(
                            rtc::PORTS.start as u16,
                            rtc::PORTS.start as u16,
                            1,
                            2,
                        )]),
                    ),
                ],
            ),
            // Keeps other devices out of the configuration space.
            &Device::new(
                Path::new("MBRD"),
                vec![
                    &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
                    &Name::new(
                        Path::new("_CRS"),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(
                            true,
                            ecam.start as u32,
                            (ecam.end - ecam.start) as u32,
                        )]),
                    ),
                ],
            ),
        ],
    ));
    let s5 = bytes(&Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&SLP_TYP_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    ));
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, 1);
    dsdt.append_slice(&root);
    dsdt.append_slice(&s5);
    dsdt.update_checksum();
    dsdt
}

/// AML that was made already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn pci() -> Vec<u8> {
    let window = layout::PCI_WINDOW;
    let config = layout::PCI_CONFIG_PORTS;
    bytes(&Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &aml::ZERO),
            &Name::new(Path::new("_SEG"), &aml::ZERO),
            &Name::new(Path::new("_BBN"), &aml::ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0u16, 0u16),
                    &IO::new(config.start as u16, config.start as u16, 1, 8),
                    &AddressSpace::new_io(0u16, config.start as u16 - 1, None),
                    &AddressSpace::new_io(config.end as u16, 0xffffu16, None),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        window.start as u32,
                        (window.end - 1) as u32,
                        None,
                    ),
                ]),
            ),
        ],
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MachineConfig;
    use vm_memory::{Bytes, GuestAddress};

    fn read(ram: &Ram, at: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        ram.read_slice(&mut out, GuestAddress(at)).unwrap();
        out
    }

    fn table(ram: &Ram, at: u64) -> Vec<u8> {
        let len = u32::from_le_bytes(read(ram, at + 4, 4).try_into().unwrap()) as usize;
        read(ram, at, len)
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
        let ram = crate::memory::allocate(&MachineConfig::default()).unwrap();
        let rsdp = read(&ram, write(&ram, 254).unwrap(), 36);
        assert_eq!(
            (&rsdp[..8], sum(&rsdp[..20]), sum(&rsdp)),
            (&b"RSD PTR "[..], 0, 0)
        );
        let xsdt = table(&ram, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        assert_eq!(sum(&xsdt), 0);
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let found = table(&ram, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&found), 0, "{:?}", &found[..4]);
            names.push(String::from_utf8(found[..4].to_vec()).unwrap());
            if names.last().unwrap() == "FACP" {
                let dsdt = u64::from_le_bytes(found[140..148].try_into().unwrap());
                assert_eq!(sum(&table(&ram, dsdt)), 0);
                assert_eq!(u32::from_le_bytes(found[56..60].try_into().unwrap()), 0x600);
                // No keyboard controller is announced: probing it costs a stock kernel seconds.
                assert_eq!(found[109..111], [5, 0]);
                // PWR_BUTTON is clear: a kernel looks for the button in PM1. SLP_BUTTON is set: there is none.
                let flags = u32::from_le_bytes(found[112..116].try_into().unwrap());
                assert_eq!(flags >> 4 & 3, 0b10, "{flags:#x}");
            }
            if names.last().unwrap() == "APIC" {
                assert_eq!(
                    found[44..]
                        .chunks(8)
                        .take(254)
                        .filter(|c| c[0] == 0 && c[4] == 1)
                        .count(),
                    254
                );
            }
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }
}
