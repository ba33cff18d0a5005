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
            let at = self.asked.iter().position(|asked| asked.0 == head).unwrap();
            let (_, address, wanted) = self.asked.swap_remove(at);
            assert_eq!(len, wanted);
            for at in [0, u64::from(wanted) - 16] {
                assert_ne!(guest.memory.read(address + at, 16), [0; 16]);
            }
        }
    }

    fn forget(&mut self) {
        self.asked.clear();
    }
}
