//! PCI as a guest meets it, the well-behaved one and the other.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use super::access::{ConfigPorts, RESET_VALUE};
use super::root::PciRoot;
use super::virtio::VirtioPci;
use crate::bus::BusDevice;
use crate::error::DeviceError;
use crate::irq::NotifyBinder;
use crate::records::RecordReader;
use crate::request::MachineRequest;
use crate::state::{StateError, Stateful};
use crate::testing::driver::{Buffer, Driver, QUEUE_SELECT, STATUS};
use crate::testing::guest::{Guest, HIGH_START, LOW, Memory};
use crate::testing::{Messages, Requests};
use crate::virtio::console::Console;
use crate::virtio::device::VirtioDevice;
use crate::virtio::rng::Rng;

const BAR0: u64 = 0x10;
const HOME: u64 = 0xc000_0000;
const NEEDS_RESET: u64 = 0x40;

fn rng() -> Box<dyn VirtioDevice> {
    Box::new(Rng::new("rng0").unwrap())
}

fn guest() -> Guest {
    Guest::new(Memory::new(), rng())
}

/// The device does its work.
fn works(guest: &Guest, driver: &mut Driver) -> bool {
    let address = driver.allocate(64);
    guest.memory.write(address, &[0; 64]);
    driver.add(
        guest,
        0,
        &[Buffer {
            address,
            len: 64,
            device_writes: true,
        }],
    );
    driver.kick(guest, 0);
    driver.wait(guest, 0).1 == 64 && guest.memory.read(address, 64) != [0; 64]
}

fn enabled(guest: &Guest) -> u64 {
    guest.config_write(4, 6, 2);
    guest.config_read(BAR0, 4).into()
}

#[test]
fn a_scan_by_ports_finds_the_bridge_and_the_device_and_nothing_else() {
    let guest = guest();
    let ports = ConfigPorts::new(guest.root.clone(), Arc::new(Requests::default()));
    let mut found = Vec::new();
    for bus in 0..2u32 {
        for devfn in 0..256u32 {
            ports.write(0, &(1 << 31 | bus << 16 | devfn << 8).to_le_bytes());
            let mut id = [0; 4];
            ports.read(4, &mut id);
            if id != [0xff; 4] {
                found.push((bus, devfn, u32::from_le_bytes(id)));
            }
        }
    }
    assert_eq!(found, [(0, 0, 0x0008_1b36), (0, 8, 0x1044_1af4)]);
    // Linux believes in this way only if a host bridge or an Intel device is there.
    ports.write(0, &(1 << 31 | 8u32).to_le_bytes());
    let mut class = [0; 2];
    ports.read(6, &mut class);
    assert_eq!(class, [0, 6]);
    // And if the address register reads back; without its top bit nothing answers.
    ports.write(0, &8u32.to_le_bytes());
    let mut address = [0; 4];
    ports.read(0, &mut address);
    assert_eq!(address, 8u32.to_le_bytes());
    ports.read(4, &mut address);
    assert_eq!(address, [0xff; 4]);
}

#[test]
fn the_ports_state_travels_and_the_reset_port_resets() {
    let guest = guest();
    let requests = Arc::new(Requests::default());
    let ports = ConfigPorts::new(guest.root.clone(), requests.clone());
    ports.write(0, &0x8000_0800u32.to_le_bytes());
    let new = ConfigPorts::new(guest.root.clone(), requests.clone());
    new.restore(&ports.save().unwrap()).unwrap();
    let mut id = [0; 4];
    new.read(4, &mut id);
    assert_eq!(u32::from_le_bytes(id), 0x1044_1af4);
    ports.write(1, &[2]);
    assert_eq!(requests.take(), []);
    ports.write(1, &[RESET_VALUE]);
    assert_eq!(requests.take(), [MachineRequest::Reset]);
}

#[test]
fn a_bar_moves_with_its_device() {
    let guest = guest();
    let mut driver = Driver::probe(&guest, u64::MAX);
    assert!(works(&guest, &mut driver));
    guest.config_write(BAR0, 0xd000_0000, 4);
    assert_eq!(guest.read(HOME + STATUS, 1), 0xff);
    assert_eq!(guest.read(0xd000_0000 + STATUS, 1), 0xf);
    guest.config_write(4, 4, 2);
    assert_eq!(guest.read(0xd000_0000 + STATUS, 1), 0xff);
    guest.config_write(BAR0, HOME as u32, 4);
    guest.config_write(4, 6, 2);
    assert!(works(&guest, &mut driver));
}

#[test]
fn a_bar_on_memory_or_on_ecam_answers_nowhere_and_comes_back() {
    let guest = guest();
    let mut driver = Driver::probe(&guest, u64::MAX);
    // The first 4 GiB end before high memory begins, so only low memory and the border of ECAM can be hit.
    for onto in [0x10_0000u32, LOW as u32 - 0x1_0000, 0xe000_0000] {
        guest.config_write(BAR0, onto, 4);
        let mut data = [0];
        let answers = guest.bus.read(u64::from(onto) + STATUS, &mut data);
        assert_eq!(answers, onto == 0xe000_0000, "{onto:#x}");
        assert_ne!(data, [0xf]);
        assert_eq!(guest.read(HOME + STATUS, 1), 0xff);
        // ECAM itself still works, for else the guest could not undo it.
        guest.config_write(BAR0, HOME as u32, 4);
        assert!(works(&guest, &mut driver));
    }
    assert!(HIGH_START > u64::from(u32::MAX));
}

#[test]
fn of_two_bars_in_one_place_the_first_answers_and_the_other_comes_when_it_leaves() {
    let guest = guest();
    let console = Console::new("console0", Box::new(std::io::sink())).unwrap();
    let ram = guest.memory.ram.clone();
    let no_binder = Arc::new(crate::irq::NoBinder);
    let second = VirtioPci::new(
        2,
        Box::new(console),
        ram,
        Arc::new(Messages::default()),
        no_binder,
    )
    .unwrap();
    guest.root.add(2, Arc::new(second)).unwrap();
    let second = 0xe000_0000 + (2 << 15);
    assert_eq!(enabled(&guest), HOME);
    let other = guest.read(second + BAR0, 4);
    assert_ne!(other, HOME);
    guest.write(second + BAR0, HOME, 4);
    guest.write(second + 4, 6, 2);
    let queues = |at: u64| guest.read(at + 0x12, 2);
    assert_eq!((queues(HOME), queues(other)), (1, 0xffff));
    guest.config_write(BAR0, other as u32, 4);
    assert_eq!((queues(HOME), queues(other)), (2, 1));
}

/// Remembers which addresses are bound.
#[derive(Default)]
struct Bound(Mutex<BTreeSet<u64>>);

impl NotifyBinder for Bound {
    fn bind(&self, address: u64, _: &EventFd) -> Result<(), DeviceError> {
        assert!(self.0.lock().unwrap().insert(address), "bound twice");
        Ok(())
    }
    fn unbind(&self, address: u64, _: &EventFd) {
        assert!(self.0.lock().unwrap().remove(&address), "was not bound");
    }
}

#[test]
fn notifications_are_bound_where_the_bar_is_and_nowhere_else() {
    let memory = Memory::new();
    let bound = Arc::new(Bound::default());
    let bus = Arc::new(crate::bus::Bus::new("memory"));
    let root = PciRoot::new(&bus, Vec::new(), 0xc000_0000..0xe000_0000);
    let console = Console::new("console0", Box::new(std::io::sink())).unwrap();
    let messages = Arc::new(Messages::default());
    let function = VirtioPci::new(1, Box::new(console), memory.ram.clone(), messages, bound.clone()).unwrap();
    root.add(1, Arc::new(function)).unwrap();
    let place = |register| super::root::Place {
        bus: 0,
        slot: 1,
        function: 0,
        register,
    };
    let now = || bound.0.lock().unwrap().iter().copied().collect::<Vec<_>>();
    assert_eq!(now(), [0u64; 0]);
    root.write_config(place(4), &[6, 0]);
    assert_eq!(now(), [HOME + 0x3000, HOME + 0x3004]);
    root.write_config(place(0x10), &0xd000_0000u32.to_le_bytes());
    assert_eq!(now(), [0xd000_3000, 0xd000_3004]);
    root.write_config(place(0x10), &0u32.to_le_bytes());
    assert_eq!(now(), [0u64; 0]);
    root.write_config(place(0x10), &0xc100_0000u32.to_le_bytes());
    drop((root, bus));
    assert_eq!(now(), [0u64; 0]);
}

#[test]
fn features_that_were_not_offered_or_an_old_driver_are_refused() {
    let guest = guest();
    let bar = enabled(&guest);
    for features in [1u64 << 32 | 1 << 5, 1 << 28, 0] {
        for (offset, value, len) in [
            (STATUS, 0, 1),
            (STATUS, 3, 1),
            (8, 0, 4),
            (0xc, features & 0xffff_ffff, 4),
            (8, 1, 4),
            (0xc, features >> 32, 4),
        ] {
            guest.write(bar + offset, value, len);
        }
        guest.write(bar + STATUS, 0xb, 1);
        assert_eq!(guest.read(bar + STATUS, 1), 3, "{features:#x}");
        // Going on regardless starts nothing.
        guest.write(bar + STATUS, 0xf, 1);
        assert_eq!(guest.read(bar + STATUS, 1) & 4, 0);
    }
}

#[test]
fn status_bits_cannot_be_taken_back_and_features_not_changed_afterwards() {
    let guest = guest();
    let mut driver = Driver::probe(&guest, u64::MAX);
    guest.write(driver.common + STATUS, 3, 1);
    assert_eq!(driver.status(&guest), 0xf);
    guest.write(driver.common + 8, 0, 4);
    guest.write(driver.common + 0xc, 0, 4);
    assert_eq!(guest.read(driver.common + 0xc, 4), driver.features & 0xffff_ffff);
    assert!(works(&guest, &mut driver));
}

/// Sets queue 0 up with these values and starts; the status afterwards.
fn start_with(guest: &Guest, size: u64, desc: u64, avail: u64, used: u64) -> u64 {
    let bar = enabled(guest);
    for (offset, value, len) in [
        (STATUS, 0, 1),
        (STATUS, 3, 1),
        (8, 1, 4),
        (0xc, 1, 4),
        (STATUS, 0xb, 1),
        (0x10, 0, 2),
    ] {
        guest.write(bar + offset, value, len);
    }
    for (offset, value, len) in [
        (QUEUE_SELECT, 0, 2),
        (0x18, size, 2),
        (0x20, desc, 8),
        (0x28, avail, 8),
        (0x30, used, 8),
        (0x1c, 1, 2),
    ] {
        guest.write(bar + offset, value, len);
    }
    guest.write(bar + STATUS, 0xf, 1);
    guest.read(bar + STATUS, 1)
}

#[test]
fn a_queue_that_cannot_work_needs_a_reset_and_a_reset_heals() {
    let guest = guest();
    let (desc, avail, used) = (0x10_0000, 0x10_1000, 0x10_2000);
    let end = LOW as u64;
    for (size, desc, avail, used) in [
        (0, desc, avail, used),
        (3, desc, avail, used),
        (128, desc, avail, used),
        (64, desc + 8, avail, used),
        (64, desc, avail + 1, used),
        (64, desc, avail, used + 2),
        (64, end - 64 * 16 + 16, avail, used),
        (64, desc, end - 64, used),
        (64, desc, avail, end - 64),
        (64, 0xc000_0000, avail, used),
        (64, !15, avail, used),
        (64, desc, u64::MAX - 1, used),
        (64, 0, 0, 0),
    ] {
        let status = start_with(&guest, size, desc, avail, used);
        assert_eq!(
            status & NEEDS_RESET,
            NEEDS_RESET,
            "{size} {desc:#x} {avail:#x} {used:#x}"
        );
    }
    assert_eq!(start_with(&guest, 64, end - 64 * 16, avail, used), 0xf);
    let mut driver = Driver::probe(&guest, u64::MAX);
    assert!(works(&guest, &mut driver));
}

#[test]
fn a_ring_that_lies_makes_the_device_ask_for_a_reset() {
    let guest = guest();
    let driver = Driver::probe(&guest, u64::MAX);
    guest.messages.take();
    guest
        .memory
        .write(driver.queues[0].avail + 2, &500u16.to_le_bytes());
    driver.kick(&guest, 0);
    // The driver is told by the configuration interrupt, vector 0, and finds the reason.
    let told = loop {
        if let Some(message) = guest.messages.take().first() {
            break message.data;
        }
        std::thread::yield_now();
    };
    assert_eq!(told, 0x40);
    assert_ne!(u64::from(driver.status(&guest)) & NEEDS_RESET, 0);
    let mut driver = Driver::probe(&guest, u64::MAX);
    assert!(works(&guest, &mut driver));
}

#[test]
fn a_vector_or_queue_that_does_not_exist_reads_back_as_none() {
    let guest = guest();
    let bar = enabled(&guest);
    guest.write(bar + 0x10, 7, 2);
    assert_eq!(guest.read(bar + 0x10, 2), 0xffff);
    guest.write(bar + QUEUE_SELECT, 1, 2);
    assert_eq!(guest.read(bar + 0x18, 2), 0);
    guest.write(bar + 0x1c, 1, 2);
    assert_eq!((guest.read(bar + 0x1c, 2), guest.read(bar + STATUS, 1)), (0, 0));
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    let guest = guest();
    // Memory decoding is off: this is how a driver without access to memory would come in.
    let mut at = u64::from(guest.config_read(0x34, 1));
    while guest.config_read(at + 3, 1) != 5 {
        at = u64::from(guest.config_read(at + 1, 1));
    }
    let access = |offset: u32, len: u32| {
        guest.config_write(at + 8, offset, 4);
        guest.config_write(at + 12, len, 4);
    };
    access(0x12, 2);
    assert_eq!(guest.config_read(at + 16, 4), 1);
    access(STATUS as u32, 1);
    guest.config_write(at + 16, 3, 1);
    assert_eq!(guest.config_read(at + 16, 1), 3);
    // Lengths, BARs and offsets that do not exist do nothing.
    for (offset, len, bar) in [
        (STATUS as u32, 3, 0),
        (STATUS as u32, 1, 4),
        (u32::MAX, 4, 0),
        (STATUS as u32, 0, 0),
    ] {
        access(offset, len);
        guest.config_write(at + 4, bar, 1);
        guest.config_write(at + 16, 0, 4);
        guest.config_read(at + 16, 4);
        guest.config_write(at + 4, 0, 1);
    }
    access(STATUS as u32, 1);
    assert_eq!(guest.config_read(at + 16, 1), 3);
}

#[test]
fn a_state_is_only_saved_at_rest_and_only_restored_where_it_fits() {
    let guest = guest();
    Driver::probe(&guest, u64::MAX);
    let refusal = guest.function.save().unwrap_err();
    assert!(refusal.to_string().contains("pause it first"), "{refusal}");
    guest.root.pause();
    let records = guest.root.save().unwrap();

    let console = Box::new(Console::new("console0", Box::new(std::io::sink())).unwrap());
    let other = Guest::new(Memory::new(), console);
    let refusal = other
        .root
        .restore(&mut RecordReader::new(records.clone()))
        .unwrap_err();
    assert!(
        refusal.to_string().contains("virtio device 3 and not 4"),
        "{refusal}"
    );

    let mut newer = records.clone();
    newer.iter_mut().for_each(|record| record.version = 99);
    let refusal = guest.root.restore(&mut RecordReader::new(newer)).unwrap_err();
    assert!(
        matches!(
            refusal,
            StateError::Version {
                found: 99,
                known: 1,
                ..
            }
        ),
        "{refusal}"
    );
    guest.root.restore(&mut RecordReader::new(records)).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Accesses of any width anywhere: to configuration space by both doors, and to wherever the BAR is.
    #[test]
    fn no_access_breaks_the_bus(accesses in prop::collection::vec(
        (0..4u8, any::<bool>(), 0..0x120u64, prop::collection::vec(any::<u8>(), 0..9)), 1..150)) {
        let guest = guest();
        let requests = Arc::new(Requests::default());
        let ports = ConfigPorts::new(guest.root.clone(), requests);
        guest.config_write(4, 6, 2);
        for (door, is_write, at, mut data) in accesses {
            match (door, is_write) {
                (0, true) => ports.write(at % 10, &data),
                (0, false) => ports.read(at % 10, &mut data),
                (1, true) => drop(guest.bus.write(0xe000_8000 + at, &data)),
                (1, false) => drop(guest.bus.read(0xe000_8000 + at, &mut data)),
                (2, true) => guest.poke(0x8000 + at, &data),
                (2, false) => guest.function.read(0x8000 + at, &mut data),
                (_, true) => guest.poke(at, &data),
                (_, false) => guest.function.read(at, &mut data),
            }
        }
        guest.root.pause();
        let records = guest.root.save().unwrap();
        let new = Guest::new(guest.memory.clone(), rng());
        new.root.restore(&mut RecordReader::new(records.clone())).unwrap();
        prop_assert_eq!(new.root.save().unwrap(), records);
    }
}
