//! A guest whose driver does anything: descriptors, rings and registers of one virtio device, written in any order.

use ferry_devices::console_io::ConsoleInput as _;
use ferry_devices::virtio::device::VirtioDevice;

use crate::input::Input;
use crate::rig::{self, HIGH, HIGH_START, LOW, Outside, Rig};

const STATUS: u64 = 0x14;
const QUEUE_RESET: u64 = 0x3a;
const VERSION_1: u64 = 1 << 32;
const RING_RESET: u64 = 1 << 40;
const NOTIFY: u64 = 0x3000;
const BAR_LEN: u64 = 0x1_0000;
const QUEUE_SIZE: u64 = 16;
/// Rings are here, a page each; buffers behind them.
const RINGS: u64 = 0x1_0000;
const PER_QUEUE: u64 = 0x3000;
const BUFFERS: u64 = 0x4_0000;
const MOST_QUEUES: u64 = 5;

pub(crate) fn block(bytes: &[u8]) {
    let (how, bytes) = bytes.split_first().unwrap_or((&0, &[]));
    attack(rig::block(*how), rig::memory(), Outside::default(), bytes);
}

pub(crate) fn net(bytes: &[u8]) {
    let mut outside = Outside::default();
    attack(rig::net(&mut outside), rig::memory(), outside, bytes);
}

pub(crate) fn rng(bytes: &[u8]) {
    attack(rig::rng(), rig::memory(), Outside::default(), bytes);
}

pub(crate) fn console(bytes: &[u8]) {
    let mut outside = Outside::default();
    attack(rig::console(&mut outside), rig::memory(), outside, bytes);
}

pub(crate) fn balloon(bytes: &[u8]) {
    let (mut outside, ram) = (Outside::default(), rig::memory());
    attack(rig::balloon(&ram, &mut outside), ram, outside, bytes);
}

fn attack(device: Box<dyn VirtioDevice>, ram: ferry_devices::ram::Ram, outside: Outside, bytes: &[u8]) {
    let rig = Rig::new(ram, vec![device]);
    let mut input = Input::new(bytes);
    probe(
        &rig,
        input
            .u32()
            .map_or(u64::MAX, |features| u64::from(features) | VERSION_1 | RING_RESET),
    );
    while act(&rig, &outside, &mut input).is_some() {}
    // Whatever happened, it can be stopped, saved, and used by a driver that behaves.
    rig.root.pause();
    rig.root.save().unwrap();
    rig.root.resume();
    probe(&rig, u64::MAX);
    rig.poke(NOTIFY, 0, 2);
    rig.root.pause();
}

/// Resets the device, agrees on features, and enables every queue.
fn probe(rig: &Rig, wanted: u64) {
    for (offset, value) in [(STATUS, 0), (STATUS, 1), (STATUS, 3)] {
        rig.poke(offset, value, 1);
    }
    for half in 0..2 {
        rig.poke(0, half, 4);
        let offered = rig.peek(4, 4);
        rig.poke(8, half, 4);
        rig.poke(0xc, offered & wanted >> (32 * half) & 0xffff_ffff, 4);
    }
    rig.poke(STATUS, 0xb, 1);
    let queues = rig.peek(0x12, 2).min(MOST_QUEUES);
    for queue in 0..queues {
        enable(rig, queue);
    }
    rig.poke(STATUS, 0xf, 1);
}

fn enable(rig: &Rig, queue: u64) {
    rig.poke(0x16, queue, 2);
    rig.poke(0x18, QUEUE_SIZE, 2);
    let rings = RINGS + queue * PER_QUEUE;
    for (at, ring) in [(0x20, 0), (0x28, 0x1000), (0x30, 0x2000)] {
        rig.poke(at, rings + ring, 4);
        rig.poke(at + 4, 0, 4);
    }
    rig.poke(0x1c, 1, 2);
    // A ring of nothing.
    rig.store(rings + 0x1000, &[0; 4 + 2 * QUEUE_SIZE as usize]);
}

/// Buffers, the borders of memory, the hole, the rings themselves, and anywhere.
fn address(input: &mut Input) -> Option<u64> {
    let near = u64::from(input.u16()?);
    Some(match input.u8()? % 8 {
        0..4 => BUFFERS + near,
        4 => LOW - 0x1000 + near % 0x2000,
        5 => HIGH_START + HIGH - 0x1000 + near % 0x2000,
        6 => RINGS + near,
        _ => input.u64()?,
    })
}

fn act(rig: &Rig, outside: &Outside, input: &mut Input) -> Option<()> {
    let (what, queue) = (input.u8()?, u64::from(input.u8()?) % MOST_QUEUES);
    let rings = RINGS + queue * PER_QUEUE;
    match what % 16 {
        0..4 => {
            let slot = u64::from(input.u8()?) % (QUEUE_SIZE + 1);
            let (address, len) = (address(input)?, input.u16()?);
            let (flags, next) = (input.u8()?, input.u8()?);
            // Now and then the upper half of the length is used.
            let len = u32::from(len) << if flags & 0x80 != 0 { 16 } else { 0 };
            let mut descriptor = address.to_le_bytes().to_vec();
            descriptor.extend(len.to_le_bytes());
            descriptor.extend(u16::from(flags % 8).to_le_bytes());
            descriptor.extend(u16::from(next).to_le_bytes());
            rig.store(rings + 16 * slot, &descriptor);
        }
        4 | 5 => {
            let (slot, head) = (u64::from(input.u8()?) % QUEUE_SIZE, u16::from(input.u8()?));
            rig.store(rings + 0x1000 + 4 + 2 * slot, &head.to_le_bytes());
        }
        6 => rig.store(rings + 0x1000 + 2, &input.u16()?.to_le_bytes()),
        7 => rig.store(rings + 0x1000, &u16::from(input.u8()?).to_le_bytes()),
        8 | 9 => rig.poke(NOTIFY + 4 * queue, queue, 2),
        10 => match what >> 4 {
            // One queue alone is taken out of use, and used again.
            1 => {
                rig.poke(0x16, queue, 2);
                rig.poke(QUEUE_RESET, 1, 2);
            }
            2 => enable(rig, queue),
            // All that was asked for is done before the next step.
            _ => {
                rig.root.pause();
                rig.root.resume();
            }
        },
        11 => {
            let at = address(input)?;
            let len = usize::from(input.u8()?) % 64;
            rig.store(at, input.bytes(len));
        }
        12 => {
            let (offset, value) = (u64::from(input.u16()?) % 0x2100, input.u32()?);
            let place = if offset >= 0x100 {
                0x2000 + offset % 0x100
            } else {
                offset % 0x40
            };
            rig.poke(place, u64::from(value), [1, 2, 4, 8][usize::from(what >> 4) % 4]);
        }
        13 => {
            let offset = u64::from(input.u16()?) % BAR_LEN;
            rig.peek(offset, usize::from(what >> 4) % 9);
        }
        14 => probe(
            rig,
            u64::from(input.u32()?) | VERSION_1 | ((queue & 1) * RING_RESET),
        ),
        _ => disturb(outside, what >> 4, input)?,
    }
    Some(())
}

/// What comes from outside while the guest does all that.
fn disturb(outside: &Outside, how: u8, input: &mut Input) -> Option<()> {
    let len = usize::from(input.u16()?);
    let content = input.bytes(len.min(256));
    if let Some(wire) = &outside.wire {
        let mut frame = content.to_vec();
        frame.resize(len % 4096, 0x5a);
        let _ = wire.send(&frame);
        let _ = wire.recv(&mut [0; 16]);
    }
    if let Some(keys) = &outside.keys {
        keys.push(content);
    }
    if let Some(balloon) = &outside.balloon {
        match how % 4 {
            0 => balloon.set_target_bytes(len as u64 * 4096),
            1 => balloon.request_stats(),
            2 => drop(balloon.start_hints()),
            _ => {
                balloon.wrote(len as u64, len as u64);
                balloon.free_pages();
                balloon.end_hints();
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The fear: these steps do nothing, because the driver never agreed on resets of queues. So it was.
    #[test]
    fn a_queue_is_reset_alone_and_used_again() {
        let (rig, outside) = (Rig::new(rig::memory(), vec![rig::rng()]), Outside::default());
        for (agreed, left) in [(0, 1), (RING_RESET, 0)] {
            probe(&rig, VERSION_1 | agreed);
            for (step, enabled) in [(0x1a, left), (0x2a, 1)] {
                act(&rig, &outside, &mut Input::new(&[step, 0])).unwrap();
                assert_eq!((rig.peek(0x1c, 2), rig.peek(STATUS, 1)), (enabled, 0xf));
            }
        }
        rig.root.pause();
    }
}
