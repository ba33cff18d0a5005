//! A guest that reads and writes configuration space, BARs and the MSI-X table with any width, anywhere.

use std::sync::Arc;

use ferry_devices::bus::Bus;
use ferry_devices::pci::access::{ConfigPorts, ECAM_LEN, PORTS};
use ferry_devices::records::RecordReader;
use ferry_devices::request::{MachineEvents, MachineRequest};

use crate::input::Input;
use crate::rig::{self, ECAM, Outside, Rig};

struct Ignored;

impl MachineEvents for Ignored {
    fn request(&self, _: MachineRequest) {}
}

pub(crate) fn config(bytes: &[u8]) {
    let mut outside = Outside::default();
    let devices = || vec![rig::rng(), rig::console(&mut Outside::default())];
    let rig = Rig::new(rig::memory(), devices());
    let ports = Arc::new(Bus::new("port"));
    ports
        .insert(
            PORTS,
            Arc::new(ConfigPorts::new(rig.root.clone(), Arc::new(Ignored))),
        )
        .unwrap();
    let mut input = Input::new(bytes);
    while act(&rig, &ports, &mut input).is_some() {}
    rig.root.pause();
    // What such a guest left behind can be saved, and a new machine takes it.
    let records = rig.root.save().unwrap();
    drop(rig);
    let again = Rig::new(rig::memory(), vec![rig::rng(), rig::console(&mut outside)]);
    let mut reader = RecordReader::new(records.clone());
    again.root.restore(&mut reader).unwrap();
    assert_eq!(again.root.save().unwrap(), records);
    again.root.resume();
    again.root.pause();
}

fn act(rig: &Rig, ports: &Bus, input: &mut Input) -> Option<()> {
    let what = input.u8()?;
    let len = usize::from(what >> 4) % 9;
    let write = what & 8 != 0;
    let (address, on) = match what & 7 {
        0 | 1 => (u64::from(input.u8()?) + PORTS.start - 4, ports),
        2 | 3 => {
            // A function that is there, mostly.
            let (slot, register) = (u64::from(input.u8()?), u64::from(input.u16()?));
            let bus_offset = if slot & 0x80 == 0 { slot % 3 } else { slot % 32 } << 15;
            (ECAM + (bus_offset + register % 0x1200) % ECAM_LEN, &*rig.bus)
        }
        4 | 5 => (0xc000_0000 + u64::from(input.u16()?), &*rig.bus),
        6 => (0xc001_0000 + u64::from(input.u16()?), &*rig.bus),
        _ => (input.u64()?, &*rig.bus),
    };
    if write {
        let bytes = input.u64()?.to_le_bytes();
        on.write(address, bytes.get(..len).unwrap_or(&bytes));
    } else {
        let mut bytes = [0; 8];
        on.read(address, bytes.get_mut(..len).unwrap_or_default());
    }
    Some(())
}
