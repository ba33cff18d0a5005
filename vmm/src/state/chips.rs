//! The interrupt controllers and the timer that KVM keeps for the whole machine.
//!
//! Restored after all vCPUs: KVM delivers what is pending in the IOAPIC to the local APICs as it is set, and a local APIC
//! that is set afterwards would forget it again. The PICs and the timer have no such wish.

use ferry_devices::state::{Record, RecordKey};
use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::blob::Blob;
use super::saved;
use crate::error::{Doing, MachineError, Result};
use crate::kvm::Capabilities;

const VERSION: u32 = 1;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chips {
    pub pic_master: Blob<kvm_irqchip>,
    pub pic_slave: Blob<kvm_irqchip>,
    pub ioapic: Blob<kvm_irqchip>,
    /// None where KVM has no timer.
    pub pit: Option<Blob<kvm_pit_state2>>,
}

fn get(vm: &VmFd, chip_id: u32) -> Result<Blob<kvm_irqchip>> {
    let mut chip = kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)
        .doing(format!("read interrupt controller {chip_id}"))?;
    Ok(Blob(chip))
}

fn set(vm: &VmFd, chip_id: u32, chip: &Blob<kvm_irqchip>) -> Result<()> {
    if chip.0.chip_id != chip_id {
        return Err(MachineError::Saved(format!(
            "the state of interrupt controller {chip_id} says that it is number {}",
            chip.0.chip_id
        )));
    }
    vm.set_irqchip(&chip.0)
        .doing(format!("set interrupt controller {chip_id}"))
}

pub fn save(vm: &VmFd, caps: &Capabilities) -> Result<Chips> {
    Ok(Chips {
        pic_master: get(vm, KVM_IRQCHIP_PIC_MASTER)?,
        pic_slave: get(vm, KVM_IRQCHIP_PIC_SLAVE)?,
        ioapic: get(vm, KVM_IRQCHIP_IOAPIC)?,
        pit: caps
            .pit2
            .then(|| vm.get_pit2().doing("read the timer").map(Blob))
            .transpose()?,
    })
}

pub fn restore(vm: &VmFd, caps: &Capabilities, chips: &Chips) -> Result<()> {
    let Chips {
        pic_master,
        pic_slave,
        ioapic,
        pit,
    } = chips;
    set(vm, KVM_IRQCHIP_PIC_MASTER, pic_master)?;
    set(vm, KVM_IRQCHIP_PIC_SLAVE, pic_slave)?;
    set(vm, KVM_IRQCHIP_IOAPIC, ioapic)?;
    match pit {
        Some(pit) if caps.pit2 => vm.set_pit2(&pit.0).doing("set the timer"),
        Some(_) => Err(MachineError::Saved(
            "the guest has a PIT, and this host's KVM cannot give it one".into(),
        )),
        None => Ok(()),
    }
}

pub fn key() -> RecordKey {
    RecordKey::new("chips", 0)
}

pub fn to_record(chips: &Chips) -> Result<Record> {
    Record::required(key(), VERSION, chips).map_err(saved)
}

pub fn from_record(record: &Record) -> Result<Chips> {
    record.read(&key(), VERSION).map_err(saved)
}
