//! Balloon: given and reported pages are given back and empty, statistics arrive, hints say what was hinted.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::ram::PAGE_SIZE;
use crate::testing::driver::{Buffer, Driver};
use crate::testing::guest::{Guest, Memory};
use crate::testing::suspendable::Bench;
use crate::virtio::balloon::{Balloon, BalloonControl, Reclaim};
use crate::virtio::device::VirtioDevice;

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
const HINTS: u16 = 3;
const REPORTING: u16 = 4;
const POISON: u64 = 1 << 4;
const GIVEN: u64 = 5 << 20;
const REPORTED: u64 = 1 << 32;

/// Empties pages behind the devices' back, as punching a hole does.
struct Puncher(Arc<Memory>);

impl Reclaim for Puncher {
    fn release(&self, range: Range<u64>) -> io::Result<()> {
        let zeroes = vec![0; (range.end - range.start) as usize];
        self.0
            .view()
            .write_slice(&zeroes, GuestAddress(range.start))
            .map_err(io::Error::other)
    }
}

#[derive(Default)]
pub(super) struct BalloonBench {
    control: Option<Arc<BalloonControl>>,
    waiting: Vec<u16>,
    empty: Vec<u64>,
    stats_address: Option<u64>,
    told: u64,
}

impl BalloonBench {
    fn control(&self) -> &BalloonControl {
        self.control.as_ref().unwrap()
    }

    fn post_stats(&mut self, guest: &Guest, driver: &mut Driver) {
        self.told += 1;
        let address = *self.stats_address.get_or_insert_with(|| driver.allocate(20));
        let mut bytes = Vec::new();
        for (tag, value) in [(5u16, self.told), (4, 7)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(u64::to_le_bytes(value));
        }
        guest.memory.write(address, &bytes);
        driver.add(
            guest,
            STATS,
            &[Buffer {
                address,
                len: 20,
                device_writes: false,
            }],
        );
        driver.kick(guest, STATS);
    }

    fn hints(&self, guest: &Guest, driver: &mut Driver) {
        assert!(self.control().start_hints());
        let command = guest.read(driver.device + 8, 4) as u32;
        assert!(command > 1);
        let address = driver.allocate(16);
        guest.memory.write(address, &command.to_le_bytes());
        guest.memory.write(address + 4, &0u32.to_le_bytes());
        let say = |at| Buffer {
            address: address + at,
            len: 4,
            device_writes: false,
        };
        let free = Buffer {
            address: GIVEN,
            len: 64 << 10,
            device_writes: true,
        };
        for buffer in [say(0), free, say(4)] {
            driver.add(guest, HINTS, &[buffer]);
        }
        driver.kick(guest, HINTS);
        for _ in 0..3 {
            driver.wait(guest, HINTS);
        }
        assert!(self.control().hints_complete());
        self.control().wrote(GIVEN + 5 * PAGE_SIZE, 1);
        let [(0, low), _] = &self.control().free_pages()[..] else {
            panic!("two regions")
        };
        let first = (GIVEN / PAGE_SIZE) as usize;
        assert_eq!(low[first / 64] >> (first % 64) & 0xf_ffff, 0xffff & !(1 << 5));
        self.control().end_hints();
        assert_eq!(guest.read(driver.device + 8, 4), 1);
    }
}

impl Bench for BalloonBench {
    fn new() -> Option<Self> {
        Some(Self::default())
    }

    fn device(&mut self, memory: &Arc<Memory>) -> Box<dyn VirtioDevice> {
        let balloon =
            Balloon::new("balloon0", memory.ram.clone(), Arc::new(Puncher(memory.clone()))).unwrap();
        self.control = Some(balloon.control());
        Box::new(balloon)
    }

    fn wanted(&self) -> u64 {
        !POISON
    }

    fn submit(&mut self, guest: &Guest, driver: &mut Driver) {
        let pages: Vec<u64> = [0, 1, 2, 9, 4, 33].map(|page| GIVEN + page * PAGE_SIZE).to_vec();
        self.empty = pages.clone();
        if driver.features & 1 << 5 != 0 {
            self.empty.extend((0..16).map(|page| REPORTED + page * PAGE_SIZE));
        }
        self.empty
            .iter()
            .for_each(|page| guest.memory.write(*page, &[0xaa; PAGE_SIZE as usize]));
        let numbers: Vec<u8> = pages
            .iter()
            .flat_map(|page| ((page / PAGE_SIZE) as u32).to_le_bytes())
            .collect();
        let address = driver.allocate(numbers.len() as u32);
        guest.memory.write(address, &numbers);
        let numbers = Buffer {
            address,
            len: numbers.len() as u32,
            device_writes: false,
        };
        let mut request = |queue, buffer| {
            driver.add(guest, queue, &[buffer]);
            driver.kick(guest, queue);
            self.waiting.push(queue);
        };
        request(INFLATE, numbers);
        request(DEFLATE, numbers);
        if self.empty.len() > pages.len() {
            request(
                REPORTING,
                Buffer {
                    address: REPORTED,
                    len: 16 * 4096,
                    device_writes: true,
                },
            );
        }
        if driver.features & 1 << 1 != 0 && self.stats_address.is_none() {
            self.post_stats(guest, driver);
        }
        guest.write(driver.device + 4, pages.len() as u64, 4);
    }

    fn complete(&mut self, guest: &Guest, driver: &mut Driver) {
        for queue in std::mem::take(&mut self.waiting) {
            driver.wait(guest, queue);
        }
        for page in std::mem::take(&mut self.empty) {
            assert!(
                guest
                    .memory
                    .read(page, PAGE_SIZE as usize)
                    .iter()
                    .all(|byte| *byte == 0),
                "{page:#x}"
            );
        }
        assert_eq!(self.control().actual_bytes(), 6 * PAGE_SIZE);
        if self.stats_address.is_some() {
            while self.control().stats().and_then(|stats| stats.total_bytes) != Some(self.told) {
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
            self.control().request_stats();
            driver.wait(guest, STATS);
            self.post_stats(guest, driver);
        }
        if driver.features & 1 << 3 != 0 {
            self.hints(guest, driver);
        }
        self.control().set_target_bytes(1 << 20);
        assert_eq!(guest.read(driver.device, 4), 256);
    }

    fn forget(&mut self) {
        self.waiting.clear();
        self.empty.clear();
        self.stats_address = None;
    }

    fn queue_was_reset(&mut self, guest: &Guest, driver: &mut Driver, index: u16) {
        while driver.poll(guest, index).is_some() {
            self.waiting.retain(|waiting| *waiting != index);
        }
        let unanswered = self.waiting.contains(&index);
        self.waiting.retain(|waiting| *waiting != index);
        match index {
            INFLATE | REPORTING if unanswered => {
                // A request that was not answered was not carried out, and never will be.
                let its = |page: &u64| (*page >= REPORTED) == (index == REPORTING);
                for page in self.empty.iter().filter(|page| its(page)) {
                    assert_eq!(guest.memory.read(*page, 1), [0xaa], "{page:#x}");
                }
                self.empty.retain(|page| !its(page));
            }
            STATS => self.stats_address = None,
            _ => {}
        }
    }
}

#[test]
fn a_guest_that_poisons_free_pages_keeps_them() {
    let mut bench = BalloonBench::default();
    let memory = Memory::new();
    let guest = Guest::new(memory.clone(), bench.device(&memory));
    let mut driver = Driver::probe(&guest, u64::MAX);
    assert!(!bench.control().start_hints());
    memory.write(REPORTED, &[0xaa; 4096]);
    driver.add(
        &guest,
        REPORTING,
        &[Buffer {
            address: REPORTED,
            len: 4096,
            device_writes: true,
        }],
    );
    driver.kick(&guest, REPORTING);
    driver.wait(&guest, REPORTING);
    assert_eq!(memory.read(REPORTED, 4096), [0xaa; 4096]);
}

/// A target that is set while the machine stands still reaches the guest when it goes on, here or at another host.
#[test]
fn a_target_set_during_a_pause_is_told_when_the_machine_goes_on() {
    let mut bench = BalloonBench::default();
    let memory = Memory::new();
    let guest = Guest::new(memory.clone(), bench.device(&memory));
    let driver = Driver::probe(&guest, bench.wanted());
    guest.messages.take();
    guest.root.pause();
    bench.control().set_target_bytes(1 << 20);
    assert_eq!(guest.messages.take(), []);
    guest.root.resume();
    assert_eq!(guest.messages.take().len(), 1, "the guest was not told");
    assert_eq!(guest.read(driver.device, 4), 256);
    guest.root.pause();
    guest.root.resume();
    assert_eq!(guest.messages.take(), [], "nothing has changed");
}
