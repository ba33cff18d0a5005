//! Entropy: every buffer comes back full, and not of zeroes.

use std::sync::Arc;

use crate::testing::driver::{Buffer, Driver};
use crate::testing::guest::{Guest, Memory};
use crate::testing::suspendable::Bench;
use crate::virtio::device::VirtioDevice;
use crate::virtio::rng::Rng;

#[derive(Default)]
pub(super) struct RngBench {
    asked: Vec<(u16, u64, u32)>,
}

impl Bench for RngBench {
    fn new() -> Option<Self> {
        Some(Self::default())
    }

    fn device(&mut self, _: &Arc<Memory>) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new("rng0").unwrap())
    }

    fn submit(&mut self, guest: &Guest, driver: &mut Driver) {
        while driver.room(0) >= 2 {
            let len = 32 + 500 * self.asked.len() as u32;
            let address = driver.allocate(len);
            guest.memory.write(address, &vec![0; len as usize]);
            let buffer = |address, len| Buffer {
                address,
                len,
                device_writes: true,
            };
            let head = driver.add(guest, 0, &[buffer(address, 16), buffer(address + 16, len - 16)]);
            self.asked.push((head, address, len));
        }
        driver.kick(guest, 0);
    }

    fn complete(&mut self, guest: &Guest, driver: &mut Driver) {
        while !self.asked.is_empty() {
            let (head, len) = driver.wait(guest, 0);
            self.answered(guest, head, len);
        }
    }

    fn forget(&mut self) {
        self.asked.clear();
    }

    fn queue_was_reset(&mut self, guest: &Guest, driver: &mut Driver, _: u16) {
        while let Some((head, len)) = driver.poll(guest, 0) {
            self.answered(guest, head, len);
        }
        self.asked.clear();
    }
}

impl RngBench {
    fn answered(&mut self, guest: &Guest, head: u16, len: u32) {
        let at = self.asked.iter().position(|asked| asked.0 == head).unwrap();
        let (_, address, wanted) = self.asked.swap_remove(at);
        assert_eq!(len, wanted);
        for at in [0, u64::from(wanted) - 16] {
            assert_ne!(guest.memory.read(address + at, 16), [0; 16]);
        }
    }
}

/// Orders to reset a queue that make no sense do nothing; a queue that cannot work is refused when it is enabled again.
#[test]
fn senseless_resets_of_a_queue_are_ignored_and_a_bad_queue_is_refused() {
    const SELECT: u64 = 0x16;
    const ENABLE: u64 = 0x1c;
    const RESET: u64 = 0x3a;
    let memory = Memory::new();
    let guest = Guest::new(memory.clone(), Box::new(Rng::new("rng0").unwrap()));
    let mut bench = RngBench::default();
    let mut driver = Driver::probe(&guest, u64::MAX);
    let at = driver.common;
    let write = |offset, value, len| guest.write(at + offset, value, len);
    // Not the value, not the width, not a queue that there is.
    for (value, len) in [(0, 2), (2, 2), (0xffff, 2), (1, 1), (1, 4)] {
        write(RESET, value, len);
        assert_eq!(guest.read(at + ENABLE, 2), 1, "{value} of {len} bytes");
    }
    for index in [1, 9, 0xffff] {
        write(SELECT, index, 2);
        write(RESET, 1, 2);
    }
    bench.submit(&guest, &mut driver);
    bench.complete(&guest, &mut driver);
    // Twice, and what is no order to enable it.
    driver.reset_queue(&guest, 0);
    driver.reset_queue(&guest, 0);
    write(ENABLE, 0, 2);
    write(ENABLE, 2, 2);
    assert_eq!((guest.read(at + ENABLE, 2), driver.status(&guest)), (0, 0xf));
    driver.add_queue(&guest, 0);
    bench.submit(&guest, &mut driver);
    bench.complete(&guest, &mut driver);
    // Rings that are not in memory.
    driver.reset_queue(&guest, 0);
    write(0x24, 0xffff_ffff, 4);
    write(ENABLE, 1, 2);
    assert_eq!(
        driver.status(&guest) & 0x40,
        0x40,
        "it does not say that it needs a reset"
    );
    // A reset of the device forgets all of it.
    let mut driver = Driver::probe(&guest, u64::MAX);
    bench.submit(&guest, &mut driver);
    bench.complete(&guest, &mut driver);
}
