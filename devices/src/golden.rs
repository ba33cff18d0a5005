//! Saved states of every version there ever was, which this program must still read.
//!
//! A new version of a record gets a new file, made by running the test with FERRY_WRITE_GOLDEN=1; a file that is
//! there is never changed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::bus::BusDevice;
use crate::console_io::ConsoleInput;
use crate::legacy::acpi_pm::AcpiPm;
use crate::legacy::rtc::Rtc;
use crate::legacy::serial::Serial;
use crate::pci::access::ConfigPorts;
use crate::records;
use crate::state::Stateful;
use crate::testing::driver::Driver;
use crate::testing::guest::{Guest, Memory};
use crate::testing::{HandClock, Line, Requests};
use crate::virtio::balloon::Balloon;
use crate::virtio::console::Console;
use crate::virtio::device::VirtioDevice;
use crate::virtio::rng::Rng;

/// Restores the file's record into `device` and returns it saved again. Where the file is missing it is made from
/// `worked`, a device with something to tell.
fn load(file: &str, worked: &dyn Stateful, device: &dyn Stateful) -> bool {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("golden")
        .join(file);
    if std::env::var_os("FERRY_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, records::encode(&[worked.save().unwrap()]).unwrap()).unwrap();
    }
    let golden = records::decode(&std::fs::read(&path).unwrap()).unwrap();
    device.restore(&golden[0]).unwrap();
    let again = device.save().unwrap();
    // The same version must come back the same; of an older one it is enough that it was read.
    again.version != golden[0].version || again == golden[0]
}

#[test]
fn the_devices_of_every_pc() {
    let clock = || Arc::new(HandClock::at(Duration::from_secs(1_795_268_756)));
    let requests = || Arc::new(Requests::default());
    let line = || Arc::new(Line::default());

    let serial = || Serial::new(0, line(), Box::new(std::io::sink()));
    let worked = serial();
    worked.write(1, &[5]);
    worked.push(&[b'x'; 100]);
    assert!(load("serial-1.records", &worked, &serial()));

    let rtc = || Rtc::new(clock());
    let worked = rtc();
    for (port, value) in [(0, 0x0b), (1, 0x82), (0, 0), (1, 0x11)] {
        worked.write(port, &[value]);
    }
    assert!(load("rtc-1.records", &worked, &rtc()));

    let pm = || AcpiPm::new(clock(), line(), requests());
    let worked = pm();
    worked.write(2, &[0, 1]);
    worked.press_power_button();
    assert!(load("acpi-pm-1.records", &worked, &pm()));
}

fn virtio(file: &str, memory: &Arc<Memory>, device: &dyn Fn() -> Box<dyn VirtioDevice>) {
    let worked = Guest::new(memory.clone(), device());
    let mut driver = Driver::probe(&worked, u64::MAX);
    worked.write(driver.device + 4, 7, 4);
    driver.allocate(1);
    worked.root.pause();
    let fresh = Guest::new(memory.clone(), device());
    assert!(load(file, &*worked.function, &*fresh.function), "{file}");
}

#[test]
fn the_pci_bus_and_virtio_devices() {
    let memory = Memory::new();
    virtio("virtio-rng-1.records", &memory, &|| {
        Box::new(Rng::new("rng0").unwrap())
    });
    virtio("virtio-console-1.records", &memory, &|| {
        let console = Console::new("console0", Box::new(std::io::sink())).unwrap();
        console.input().push(b"waiting");
        Box::new(console)
    });
    virtio("virtio-balloon-1.records", &memory, &|| {
        struct Nowhere;
        impl crate::virtio::balloon::Reclaim for Nowhere {
            fn release(&self, _: std::ops::Range<u64>) -> std::io::Result<()> {
                Ok(())
            }
        }
        let balloon = Balloon::new("balloon0", memory.ram.clone(), Arc::new(Nowhere)).unwrap();
        balloon.control().set_target_bytes(1 << 20);
        Box::new(balloon)
    });
    let guest = Guest::new(memory.clone(), Box::new(Rng::new("rng0").unwrap()));
    let ports = || ConfigPorts::new(guest.root.clone(), Arc::new(Requests::default()));
    let worked = ports();
    worked.write(0, &0x8000_0800u32.to_le_bytes());
    assert!(load("pci-ports-1.records", &worked, &ports()));
}
