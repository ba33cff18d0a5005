//! What every virtio device must pass: crossings with requests in flight, resets in flight, writes that are all
//! tracked, and guests that write garbage.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, FileFailurePersistence, TestRunner};
use virtio_queue::Queue;

use super::driver::{Driver, QUEUE_ENABLE, QUEUE_RESET, QUEUE_SELECT, RING_RESET};
use super::guest::{Guest, Memory};
use crate::error::DeviceError;
use crate::records::{self, RecordReader};
use crate::state::{StateError, Stateful};
use crate::virtio::device::{Activation, DeviceState, VirtioDevice, VirtioKind};

/// A device with its back end, and how to work it.
pub(crate) trait Bench: Sized {
    /// None, with the reason printed, where the host lacks something the device needs.
    fn new() -> Option<Self>;
    /// A device on the bench's back end. Called again for each crossing, after the device before is gone.
    fn device(&mut self, memory: &Arc<Memory>) -> Box<dyn VirtioDevice>;
    /// The features its driver wants, of those that are offered.
    fn wanted(&self) -> u64 {
        u64::MAX
    }
    /// Puts requests into the queues, tells the device, and does not wait.
    fn submit(&mut self, guest: &Guest, driver: &mut Driver);
    /// Waits until every request is answered and looks whether the answers are right. Must hold whatever crossings
    /// happened since they were submitted.
    fn complete(&mut self, guest: &Guest, driver: &mut Driver);
    /// The driver has reset the device: requests in flight are forgotten, done or not.
    fn forget(&mut self);
    /// The driver has reset this queue alone. What was answered on it counts, the rest of it is forgotten, and what was
    /// submitted to other queues is expected as before.
    fn queue_was_reset(&mut self, guest: &Guest, driver: &mut Driver, index: u16);
}

/// Lists every virtio device with its bench. A kind that is missing does not compile.
macro_rules! suspendable_virtio_tests {
    ($($kind:ident => $module:ident: $bench:ty),+ $(,)? $(; not_here_yet: $($later:ident),+)?) => {
        #[allow(dead_code)]
        fn every_kind_is_listed(kind: $crate::virtio::device::VirtioKind) {
            match kind {
                $($crate::virtio::device::VirtioKind::$kind => (),)+
                $($($crate::virtio::device::VirtioKind::$later => (),)+)?
            }
        }

        $(mod $module {
            use $crate::testing::suspendable;
            use $crate::virtio::device::VirtioKind;

            #[test]
            fn survives_crossings_with_requests_in_flight() {
                suspendable::crossings::<$bench>(VirtioKind::$kind);
            }

            #[test]
            fn survives_a_reset_with_requests_in_flight() {
                suspendable::resets::<$bench>();
            }

            #[test]
            fn each_of_its_queues_is_reset_alone() {
                suspendable::queue_resets::<$bench>();
            }

            #[test]
            fn a_queue_that_is_reset_takes_nothing_along_from_the_others() {
                suspendable::queue_resets_beside_requests::<$bench>();
            }

            #[test]
            fn a_driver_without_the_feature_resets_no_queue() {
                suspendable::queue_resets_not_agreed::<$bench>();
            }

            #[test]
            fn all_its_writes_are_tracked() {
                suspendable::writes_tracked::<$bench>();
            }

            #[test]
            fn a_hostile_guest_cannot_break_it() {
                suspendable::hostile::<$bench>(stringify!($module));
            }

            #[test]
            fn a_damaged_state_is_refused_or_harmless() {
                suspendable::damaged_state::<$bench>(stringify!($module));
            }
        })+
    };
}
pub(crate) use suspendable_virtio_tests;

const CROSSINGS: usize = 20;

/// A device that notices when its thread has died.
struct Watched {
    device: Box<dyn VirtioDevice>,
    given: usize,
    died: Arc<AtomicBool>,
}

impl VirtioDevice for Watched {
    fn kind(&self) -> VirtioKind {
        self.device.kind()
    }
    fn name(&self) -> &str {
        self.device.name()
    }
    fn offered_features(&self) -> u64 {
        self.device.offered_features()
    }
    fn queue_sizes(&self) -> Vec<u16> {
        self.device.queue_sizes()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }
    fn start(&mut self, work: Activation) -> Result<(), DeviceError> {
        self.given = work.queues.len();
        self.device.start(work)
    }
    fn stop(&mut self) -> Vec<(u16, Queue)> {
        let queues = self.device.stop();
        if queues.len() != self.given {
            self.died.store(true, Ordering::SeqCst);
        }
        self.given = 0;
        queues
    }
    fn reset(&mut self) {
        self.device.reset();
    }
    fn save(&self) -> Result<DeviceState, StateError> {
        self.device.save()
    }
    fn restore(&mut self, state: &DeviceState) -> Result<(), StateError> {
        self.device.restore(state)
    }
}

fn guest<B: Bench>(bench: &mut B, memory: &Arc<Memory>) -> (Guest, Arc<AtomicBool>) {
    let died = Arc::new(AtomicBool::new(false));
    let watched = Watched {
        device: bench.device(memory),
        given: 0,
        died: died.clone(),
    };
    (Guest::new(memory.clone(), Box::new(watched)), died)
}

/// Pauses, saves, throws the machine away, builds a new one and restores; save again, equal.
fn cross<B: Bench>(bench: &mut B, old: Guest, died: &AtomicBool) -> (Guest, Arc<AtomicBool>) {
    old.root.pause();
    let bytes = records::encode(&old.root.save().unwrap()).unwrap();
    let before = old.memory.contents();
    std::thread::sleep(Duration::from_millis(2));
    assert!(
        before == old.memory.contents(),
        "memory changed while the machine was paused"
    );
    assert!(!died.load(Ordering::SeqCst), "the device's thread died");
    let memory = old.memory.clone();
    let device = Arc::downgrade(&old.function);
    drop(old);
    assert!(device.upgrade().is_none(), "the device outlives its machine");
    let (new, died) = guest(bench, &memory);
    let mut reader = RecordReader::new(records::decode(&bytes).unwrap());
    new.root.restore(&mut reader).unwrap();
    reader.finish().unwrap();
    assert_eq!(
        records::encode(&new.root.save().unwrap()).unwrap(),
        bytes,
        "saved again, the state differs"
    );
    assert!(before == memory.contents(), "restoring changed memory");
    new.root.resume();
    (new, died)
}

pub(crate) fn crossings<B: Bench>(kind: VirtioKind) {
    let Some(mut bench) = B::new() else { return };
    let memory = Memory::new();
    let (mut machine, mut died) = guest(&mut bench, &memory);
    assert_eq!(machine.config_read(2, 2), 0x1040 + u32::from(kind.number()));
    let mut driver = Driver::probe(&machine, bench.wanted());
    for round in 0..CROSSINGS {
        bench.submit(&machine, &mut driver);
        if round % 3 == 1 {
            std::thread::sleep(Duration::from_micros(200 * round as u64));
        }
        (machine, died) = cross(&mut bench, machine, &died);
        if round % 2 == 0 {
            bench.complete(&machine, &mut driver);
            bench.submit(&machine, &mut driver);
            // A pause that goes nowhere.
            machine.root.pause();
            machine.root.pause();
            machine.root.resume();
        }
        bench.complete(&machine, &mut driver);
        assert_eq!(driver.status(&machine), 0xf);
    }
    machine.root.pause();
    assert!(!died.load(Ordering::SeqCst));
    memory.assert_all_writes_tracked();
}

pub(crate) fn resets<B: Bench>() {
    let Some(mut bench) = B::new() else { return };
    let memory = Memory::new();
    let (machine, died) = guest(&mut bench, &memory);
    for round in 0..10 {
        // Features of every kind: all, none, all but those of the ring.
        let wanted = [u64::MAX, 0, !(3 << 28)][round % 3];
        let mut driver = Driver::probe(&machine, wanted & bench.wanted());
        bench.submit(&machine, &mut driver);
        bench.complete(&machine, &mut driver);
        bench.submit(&machine, &mut driver);
        machine.write(driver.common + super::driver::STATUS, 0, 1);
        let before = memory.contents();
        std::thread::sleep(Duration::from_millis(1));
        assert!(before == memory.contents(), "memory changed after a reset");
        bench.forget();
    }
    assert!(!died.load(Ordering::SeqCst));
}

/// Each queue alone, then all one after the other, with a crossing while one is away.
pub(crate) fn queue_resets<B: Bench>() {
    let Some(mut bench) = B::new() else { return };
    let memory = Memory::new();
    let (mut machine, mut died) = guest(&mut bench, &memory);
    let mut driver = Driver::probe(&machine, bench.wanted());
    for round in 0..4 {
        bench.submit(&machine, &mut driver);
        bench.complete(&machine, &mut driver);
        let queues = driver.queues.len() as u16;
        for index in 0..queues {
            driver.reset_queue(&machine, index);
            let before = memory.contents();
            driver.kick(&machine, index);
            std::thread::sleep(Duration::from_millis(1));
            assert!(
                before == memory.contents(),
                "queue {index} is served although it was reset"
            );
            assert_eq!(driver.status(&machine), 0xf, "queue {index}");
            if (round + index) % 2 == 1 {
                (machine, died) = cross(&mut bench, machine, &died);
                assert_eq!(driver.status(&machine), 0xf, "queue {index}");
            }
            driver.add_queue(&machine, index);
            assert_eq!(driver.status(&machine), 0xf, "queue {index}");
        }
        bench.forget();
        bench.submit(&machine, &mut driver);
        bench.complete(&machine, &mut driver);
    }
    assert!(!died.load(Ordering::SeqCst));
}

/// Each queue is reset while requests are in flight on all of them. The fear: requests of its neighbours are lost, or done
/// twice, or what was in flight on the queue itself comes back when it is used again.
pub(crate) fn queue_resets_beside_requests<B: Bench>() {
    let Some(mut bench) = B::new() else { return };
    let memory = Memory::new();
    let (mut machine, mut died) = guest(&mut bench, &memory);
    let mut driver = Driver::probe(&machine, bench.wanted());
    for round in 0..12u64 {
        for index in 0..driver.queues.len() as u16 {
            bench.submit(&machine, &mut driver);
            // Before the device has looked, while it is at work, and when it may have done all.
            std::thread::sleep(Duration::from_micros([0, 30, 100, 400][round as usize % 4]));
            driver.reset_queue(&machine, index);
            bench.queue_was_reset(&machine, &mut driver, index);
            if round % 5 == 4 {
                (machine, died) = cross(&mut bench, machine, &died);
            }
            driver.add_queue(&machine, index);
            bench.complete(&machine, &mut driver);
            assert_eq!(driver.status(&machine), 0xf, "queue {index}");
        }
    }
    machine.root.pause();
    assert!(!died.load(Ordering::SeqCst));
    memory.assert_all_writes_tracked();
}

/// The fear: a queue of a driver that knows nothing of such resets is taken from under it.
pub(crate) fn queue_resets_not_agreed<B: Bench>() {
    let Some(mut bench) = B::new() else { return };
    let memory = Memory::new();
    let (mut machine, mut died) = guest(&mut bench, &memory);
    let mut driver = Driver::probe(&machine, bench.wanted() & !RING_RESET);
    assert_eq!(driver.features & RING_RESET, 0);
    for round in 0..4 {
        for index in 0..driver.queues.len() as u16 {
            bench.submit(&machine, &mut driver);
            machine.write(driver.common + QUEUE_SELECT, u64::from(index), 2);
            machine.write(driver.common + QUEUE_RESET, 1, 2);
            let read = |offset| machine.read(driver.common + offset, 2);
            assert_eq!((read(QUEUE_RESET), read(QUEUE_ENABLE)), (0, 1), "queue {index}");
            // Nor does it open the queue's registers: size, and the address of its descriptors.
            let before = (read(0x18), read(0x20));
            machine.write(driver.common + 0x18, 4, 2);
            machine.write(driver.common + 0x20, 0xdead_0000, 4);
            assert_eq!((read(0x18), read(0x20)), before, "queue {index}");
            if round == 2 {
                (machine, died) = cross(&mut bench, machine, &died);
            }
            bench.complete(&machine, &mut driver);
            assert_eq!(driver.status(&machine), 0xf, "queue {index}");
        }
    }
    assert!(!died.load(Ordering::SeqCst));
}

pub(crate) fn writes_tracked<B: Bench>() {
    let Some(mut bench) = B::new() else { return };
    let memory = Memory::new();
    let (machine, _) = guest(&mut bench, &memory);
    let mut driver = Driver::probe(&machine, bench.wanted());
    let mut pages = 0;
    for _ in 0..20 {
        bench.submit(&machine, &mut driver);
        machine.root.pause();
        pages += memory.assert_all_writes_tracked();
        machine.root.resume();
        bench.complete(&machine, &mut driver);
        machine.root.pause();
        pages += memory.assert_all_writes_tracked();
        machine.root.resume();
    }
    assert!(
        !machine.messages.take().is_empty(),
        "the device never interrupted its driver"
    );
    assert!(pages > 0, "the device wrote nothing, so this test says nothing");
}

/// One thing a hostile guest does.
#[derive(Debug, Clone)]
enum Attack {
    Descriptor {
        queue: usize,
        at: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    Available {
        queue: usize,
        at: u16,
        head: u16,
    },
    AvailableIndex {
        queue: usize,
        index: u16,
    },
    Kick {
        queue: u16,
    },
    Bar {
        offset: u64,
        data: Vec<u8>,
    },
    BarRead {
        offset: u64,
        len: usize,
    },
    Config {
        register: u64,
        value: u32,
        len: usize,
    },
    Settle,
}

fn addresses() -> impl Strategy<Value = u64> {
    prop_oneof![
        // Rings and buffers, the borders of memory, the hole, and nowhere.
        3 => 0x10_0000..0x20_0000u64,
        3 => 0x20_0000..0x60_0000u64,
        1 => 0x5f_f000..0x60_1000u64,
        1 => 0xffff_f000..0x1_0000_1000u64,
        1 => 0xc000_0000..0xe000_1000u64,
        1 => any::<u64>(),
        1 => (u64::MAX - 0x1000)..=u64::MAX,
    ]
}

fn lengths() -> impl Strategy<Value = u32> {
    prop_oneof![4 => 0..5000u32, 1 => Just(16), 1 => Just(u32::MAX), 1 => any::<u32>()]
}

fn attack() -> impl Strategy<Value = Attack> {
    let small = 0..8u16;
    let descriptor = (0..6usize, small.clone(), addresses(), lengths(), 0..8u16, 0..9u16).prop_map(
        |(queue, at, address, len, flags, next)| Attack::Descriptor {
            queue,
            at,
            address,
            len,
            flags,
            next,
        },
    );
    let head = prop_oneof![8 => small.clone(), 1 => any::<u16>()];
    let index = prop_oneof![8 => 0..12u16, 1 => any::<u16>()];
    let bytes = prop::collection::vec(any::<u8>(), 0..9);
    let offset =
        prop_oneof![3 => 0..0x40u64, 1 => 0x2000..0x2040u64, 1 => 0x8000..0x8040u64, 2 => 0..0x1_1000u64];
    prop_oneof![
        6 => descriptor,
        4 => (0..6usize, small, head).prop_map(|(queue, at, head)| Attack::Available { queue, at, head }),
        4 => (0..6usize, index).prop_map(|(queue, index)| Attack::AvailableIndex { queue, index }),
        4 => (0..6u16).prop_map(|queue| Attack::Kick { queue }),
        1 => (offset.clone(), bytes).prop_map(|(offset, data)| Attack::Bar { offset, data }),
        1 => (offset, 0..9usize).prop_map(|(offset, len)| Attack::BarRead { offset, len }),
        1 => (0..0x110u64, any::<u32>(), 0..5usize)
            .prop_map(|(register, value, len)| Attack::Config { register, value, len }),
        1 => Just(Attack::Settle),
    ]
}

fn strike(machine: &Guest, driver: &Driver, attack: &Attack) {
    let queue = |index: usize| &driver.queues[index % driver.queues.len()];
    match attack {
        Attack::Descriptor {
            queue: index,
            at,
            address,
            len,
            flags,
            next,
        } => {
            queue(*index).write_descriptor(machine, *at, *address, *len, *flags, *next);
        }
        Attack::Available {
            queue: index,
            at,
            head,
        } => {
            machine
                .memory
                .write(queue(*index).avail + 4 + 2 * u64::from(*at), &head.to_le_bytes());
        }
        Attack::AvailableIndex {
            queue: index,
            index: value,
        } => {
            machine
                .memory
                .write(queue(*index).avail + 2, &value.to_le_bytes());
        }
        Attack::Kick { queue } => machine.poke(0x3000 + 4 * u64::from(*queue), &[0, 0]),
        Attack::Bar { offset, data } => machine.poke(*offset, data),
        Attack::BarRead { offset, len } => {
            crate::bus::BusDevice::read(&*machine.function, *offset, &mut [0; 8][..*len]);
        }
        Attack::Config { register, value, len } => machine.config_write(*register, *value, *len),
        Attack::Settle => std::thread::sleep(Duration::from_micros(300)),
    }
}

fn runner(name: &str, cases: u32) -> TestRunner {
    let file = FileFailurePersistence::Direct(Box::leak(
        format!(
            "{}/proptest-regressions/virtio-{name}.txt",
            env!("CARGO_MANIFEST_DIR")
        )
        .into_boxed_str(),
    ));
    // A case that fails by waiting is slow to shrink.
    TestRunner::new(Config {
        cases,
        max_shrink_time: 30_000,
        failure_persistence: Some(Box::new(file)),
        ..Config::default()
    })
}

pub(crate) fn hostile<B: Bench>(name: &str) {
    let Some(mut bench) = B::new() else { return };
    let attacks = prop::collection::vec(attack(), 1..60);
    let bench = std::cell::RefCell::new(&mut bench);
    let outcome = runner(name, 60).run(&attacks, |attacks| {
        let bench = &mut **bench.borrow_mut();
        let memory = Memory::new();
        let (machine, died) = guest(bench, &memory);
        let driver = Driver::probe(&machine, bench.wanted());
        for attack in &attacks {
            strike(&machine, &driver, attack);
        }
        // Whatever happened: it can be stopped, and every byte it wrote is tracked.
        machine.root.pause();
        prop_assert!(!died.load(Ordering::SeqCst), "the device's thread died");
        memory.assert_all_writes_tracked();
        machine.root.resume();
        // And a driver that behaves can use the device again.
        machine.config_write(0x10, 0xc000_0000, 4);
        let mut driver = Driver::probe(&machine, bench.wanted());
        bench.forget();
        bench.submit(&machine, &mut driver);
        bench.complete(&machine, &mut driver);
        bench.forget();
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}

pub(crate) fn damaged_state<B: Bench>(name: &str) {
    let Some(mut bench) = B::new() else { return };
    let memory = Memory::new();
    let (machine, _) = guest(&mut bench, &memory);
    let mut driver = Driver::probe(&machine, bench.wanted());
    bench.submit(&machine, &mut driver);
    machine.root.pause();
    let good = machine.function.save().unwrap();
    drop(machine);
    let damage = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4);
    let bench = std::cell::RefCell::new(&mut bench);
    let outcome = runner(&format!("{name}-state"), 60).run(&damage, |damage| {
        let bench = &mut **bench.borrow_mut();
        let mut record = good.clone();
        for (at, value) in damage {
            let at = at.index(record.body.len());
            record.body[at] = value;
        }
        let (machine, died) = guest(bench, &memory);
        if machine.function.restore(&record).is_ok() {
            machine.root.resume();
            (0..6).for_each(|queue| machine.poke(0x3000 + 4 * queue, &[0, 0]));
            std::thread::sleep(Duration::from_micros(200));
            machine.root.pause();
        }
        prop_assert!(!died.load(Ordering::SeqCst), "the device's thread died");
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{error}");
    }
}
