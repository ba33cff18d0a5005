//! Modern virtio over PCI: finding a device, agreeing on features, queues with MSI-X.

pub mod balloon;
pub mod block;
pub mod lane;
pub mod net;
pub mod queue;

use core::sync::atomic::{AtomicU8, Ordering, fence};

use crate::cpu;
use crate::memory::Memory;
use crate::pci::Function;
use queue::Queue;

const VENDOR: u16 = 0x1af4;
pub const EVENT_INDEX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;
/// Agreed on and not used, as most drivers do.
const RING_RESET: u64 = 1 << 40;
const NO_VECTOR: u16 = 0xffff;

static NEXT_VECTOR: AtomicU8 = AtomicU8::new(cpu::DEVICE_VECTOR);

/// A region of device registers.
#[derive(Clone, Copy)]
pub struct Registers(u64);

impl Registers {
    fn get<T: Copy>(self, offset: u64) -> T {
        // SAFETY: inside the region that the device's capability named; mapped.
        unsafe { ((self.0 + offset) as *const T).read_volatile() }
    }

    fn set<T: Copy>(self, offset: u64, value: T) {
        // SAFETY: as above.
        unsafe { ((self.0 + offset) as *mut T).write_volatile(value) }
    }
}

pub struct Device {
    common: Registers,
    notify: Registers,
    notify_multiplier: u64,
    pub config: Registers,
    msix_table: Option<Registers>,
    msix_used: u16,
    pub features: u64,
}

/// The n-th virtio device of this kind (1 net, 2 block, 3 console, 4 entropy, 5 balloon).
pub fn find(kind: u16, nth: usize) -> Option<Function> {
    Function::find(VENDOR)
        .filter(|f| [0x1040 + kind, 0x1000 + kind - 1].contains(&f.device_id()))
        .nth(nth)
}

impl Device {
    /// Resets the device and agrees on those of the wanted features that it has.
    pub fn begin(function: Function, wanted: u64) -> Option<Device> {
        function.enable();
        let (mut common, mut notify, mut config, mut msix_table) = (None, None, None, None);
        let mut notify_multiplier = 0;
        for capability in function.capabilities() {
            let word = |n: u32| function.read(capability.at + 4 * n);
            let region = |bar: u32, offset: u32| match function.bar(bar as u8) {
                0 => None,
                base => Some(Registers(base + offset as u64)),
            };
            match (capability.id, word(0) >> 24) {
                (9, 1) => common = common.or(region(word(1) & 0xff, word(2))),
                (9, 2) => {
                    notify = notify.or(region(word(1) & 0xff, word(2)));
                    notify_multiplier = word(4) as u64;
                }
                (9, 4) => config = config.or(region(word(1) & 0xff, word(2))),
                (0x11, _) => {
                    msix_table = region(word(1) & 7, word(1) & !7);
                    function.write(capability.at, word(0) & 0x3fff_ffff | 1 << 31);
                }
                _ => {}
            }
        }
        let common: Registers = common?;
        let mut device = Device {
            common,
            notify: notify?,
            notify_multiplier,
            config: config?,
            msix_table,
            msix_used: 0,
            features: 0,
        };
        common.set(20, 0u8);
        while common.get::<u8>(20) != 0 {
            core::hint::spin_loop();
        }
        common.set(20, 3u8); // acknowledge, driver
        common.set(0, 0u32);
        let low: u32 = common.get(4);
        common.set(0, 1u32);
        let high: u32 = common.get(4);
        device.features = (low as u64 | (high as u64) << 32) & (wanted | VERSION_1 | RING_RESET);
        common.set(8, 0u32);
        common.set(12, device.features as u32);
        common.set(8, 1u32);
        common.set(12, (device.features >> 32) as u32);
        common.set(20, 0xbu8); // features chosen
        (common.get::<u8>(20) & 8 != 0).then_some(device)
    }

    /// Sets up queue `index` with at most `size` entries; its interrupts go to the vCPU with this APIC id.
    pub fn queue(&mut self, index: u16, size: u16, memory: &mut Memory, apic_id: u32) -> Option<Queue> {
        let common = self.common;
        common.set(22, index);
        let size = size.min(common.get::<u16>(24));
        if !size.is_power_of_two() {
            return None;
        }
        let notify = self.notify.0 + common.get::<u16>(30) as u64 * self.notify_multiplier;
        let queue = Queue::new(size, index, notify, self.features & EVENT_INDEX != 0, memory)?;
        let vector = self.vector(apic_id);
        common.set(24, size);
        common.set(26, vector);
        let [descriptors, available, used] = queue.addresses();
        for (at, address) in [(32, descriptors), (40, available), (48, used)] {
            common.set(at, address as u32);
            common.set(at + 4, (address >> 32) as u32);
        }
        common.set(28, 1u16);
        Some(queue)
    }

    /// Lets changes of the configuration interrupt; returns the vector.
    pub fn watch_config(&mut self, apic_id: u32) -> u8 {
        let vector = self.vector(apic_id);
        self.common.set(16, vector);
        NEXT_VECTOR.load(Ordering::Relaxed) - 1
    }

    /// The device may work now.
    pub fn ready(&mut self) {
        fence(Ordering::SeqCst);
        self.common.set(20, 0xfu8);
    }

    /// A new MSI-X entry, sent to a vector of its own.
    fn vector(&mut self, apic_id: u32) -> u16 {
        let Some(table) = self.msix_table else {
            return NO_VECTOR;
        };
        let entry = self.msix_used;
        self.msix_used += 1;
        let at = 16 * entry as u64;
        table.set(at, 0xfee0_0000 | apic_id << 12);
        table.set(at + 4, 0u32);
        table.set(at + 8, NEXT_VECTOR.fetch_add(1, Ordering::Relaxed) as u32);
        table.set(at + 12, 0u32); // not masked
        entry
    }
}
