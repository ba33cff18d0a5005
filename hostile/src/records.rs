//! Saved state from a peer: records as bytes, and device records with any body.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use ferry_devices::clock::Clock;
use ferry_devices::irq::IrqLine;
use ferry_devices::legacy::acpi_pm::AcpiPm;
use ferry_devices::legacy::rtc::Rtc;
use ferry_devices::legacy::serial::Serial;
use ferry_devices::pci::access::ConfigPorts;
use ferry_devices::records::{RecordReader, decode, encode};
use ferry_devices::request::{MachineEvents, MachineRequest};
use ferry_devices::state::{Record, Stateful};

use crate::input::Input;
use crate::rig::{self, Outside, Rig};

struct Quiet;

impl IrqLine for Quiet {
    fn trigger(&self) {}
}

impl MachineEvents for Quiet {
    fn request(&self, _: MachineRequest) {}
}

impl Clock for Quiet {
    fn monotonic(&self) -> Duration {
        Duration::from_secs(100)
    }

    fn wall(&self) -> Duration {
        Duration::from_secs(1_800_000_000)
    }
}

/// All devices.
struct Whole {
    rig: Rig,
    rest: Vec<Arc<dyn Stateful>>,
}

impl Whole {
    fn new() -> Self {
        let (ram, mut outside) = (rig::memory(), Outside::default());
        let devices = vec![
            rig::block(0),
            rig::net(&mut outside),
            rig::rng(),
            rig::balloon(&ram, &mut outside),
            rig::console(&mut outside),
        ];
        let rig = Rig::new(ram, devices);
        let rest: Vec<Arc<dyn Stateful>> = vec![
            Arc::new(Serial::new(0, Arc::new(Quiet), Box::new(io::sink()))),
            Arc::new(Rtc::new(Arc::new(Quiet))),
            Arc::new(AcpiPm::new(Arc::new(Quiet), Arc::new(Quiet), Arc::new(Quiet))),
            Arc::new(ConfigPorts::new(rig.root.clone(), Arc::new(Quiet))),
        ];
        Self { rig, rest }
    }

    fn save(&self) -> Vec<Record> {
        let mut records: Vec<Record> = self.rest.iter().map(|device| device.save().unwrap()).collect();
        records.extend(self.rig.root.save().unwrap());
        records
    }
}

/// The records of a machine that has just been made.
pub(crate) fn all() -> Vec<Record> {
    let whole = Whole::new();
    whole.rig.root.pause();
    whole.save()
}

pub(crate) fn records(bytes: &[u8]) {
    if let Ok(records) = decode(bytes) {
        let again = encode(&records).unwrap();
        assert_eq!(decode(&again).as_ref(), Ok(&records));
    }
    let whole = Whole::new();
    whole.rig.root.pause();
    let mut records = whole.save();
    let mut input = Input::new(bytes);
    if bend(&mut records, &mut input).is_none() {
        return;
    }
    drop(whole);
    let whole = Whole::new();
    let mut reader = RecordReader::new(records);
    for device in &whole.rest {
        let _ = reader.restore(device.as_ref());
    }
    if whole.rig.root.restore(&mut reader).is_ok() {
        // It can be worked with, and be saved.
        whole.rig.root.resume();
        for queue in 0..4 {
            whole.rig.poke(0x3000 + 4 * queue, queue, 2);
        }
        whole.rig.root.pause();
        whole.save();
    }
}

/// Changes one record: some bytes of it, or all.
fn bend(records: &mut [Record], input: &mut Input) -> Option<()> {
    let which = usize::from(input.u8()?) % records.len();
    let record = records.get_mut(which)?;
    record.version = record.version.wrapping_add(u32::from(input.u8()? / 64));
    if input.u8()? & 1 == 0 {
        record.body = input.rest().to_vec();
        return Some(());
    }
    while let (Some(at), Some(value)) = (input.u16(), input.u8()) {
        let len = record.body.len().max(1);
        if let Some(byte) = record.body.get_mut(usize::from(at) % len) {
            *byte = value;
        }
    }
    Some(())
}
