//! Where the fuzzer begins: inputs that are right, so that it need not find the way in by itself.

use ferry_devices::records::encode;

use crate::{incoming, records};

/// The target and one input for it.
pub type Seed = (&'static str, Vec<u8>);

pub fn seeds() -> Vec<Seed> {
    let mut seeds = Vec::new();
    let proper = incoming::proper();
    seeds.extend(proper.iter().map(|message| ("wire", message.encode())));
    // A whole crossing with both lanes; steps are numbers of proper messages.
    let steps: Vec<u8> = (0..proper.len() as u8).collect();
    seeds.push(("incoming", steps));
    let two_lanes = [0, 1, 2, 0x81, 0x85, 4, 6, 7, 9, 10];
    seeds.push(("incoming", two_lanes.to_vec()));
    // One frame with a zero page, one with a raw page.
    let entry = |encoding: u16, bytes: u32| {
        let mut entry = vec![0; 8];
        entry.extend(1u16.to_le_bytes());
        entry.extend(encoding.to_le_bytes());
        entry.extend(bytes.to_le_bytes());
        entry
    };
    let frame = |encoding: u16, payload: usize| {
        let mut frame = vec![0, 1, 0];
        frame.extend((payload as u16).to_le_bytes());
        frame.extend(entry(encoding, payload as u32));
        frame.extend(vec![7; payload]);
        frame
    };
    for (encoding, payload) in [(0, 0), (1, 8), (2, 4096), (3, 40), (4, 40)] {
        seeds.push(("frames", frame(encoding, payload)));
        let mut conversation = vec![0, 1, 2, 0x81, 0xa0];
        conversation.extend(frame(encoding, payload));
        seeds.push(("incoming", conversation));
    }
    let saved = records::all();
    for which in 0..saved.len() as u8 {
        seeds.push(("records", vec![which, 0, 1, 0, 0, 0x80]));
        let mut whole = vec![which, 0, 0];
        whole.extend_from_slice(&saved[usize::from(which)].body);
        seeds.push(("records", whole));
    }
    seeds.push(("records", encode(&saved).unwrap()));
    for target in ["block", "net", "rng", "console", "balloon"] {
        for queue in 0..5 {
            seeds.push((target, request(target, queue)));
        }
    }
    seeds.push((
        "pci",
        vec![0x4a, 1, 4, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0x42, 1, 0x10, 0],
    ));
    seeds.push(("elf", tiny_elf()));
    let mut setup = vec![0; 0x600];
    setup[0x1f1] = 1;
    setup[0x211] = 1;
    setup[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    setup[0x236] = 1;
    setup[0x238..0x23c].copy_from_slice(&2048u32.to_le_bytes());
    setup[0x264..0x268].copy_from_slice(&0x1000u32.to_le_bytes());
    seeds.push(("bzimage", setup));
    for target in ["block", "net", "rng", "console", "balloon"] {
        for queue in 0..2 {
            seeds.push((target, resets(target, queue)));
        }
    }
    seeds
}

/// Two descriptors in a chain, made available in this queue, with the device told: a header or data to read, room to
/// write into. Steps of `virtio::attack`.
fn request(target: &str, queue: u8) -> Vec<u8> {
    let mut steps = vec![];
    if target == "block" {
        steps.push(queue % 8);
    }
    steps.extend(u32::MAX.to_le_bytes());
    let descriptor = |slot: u8, at: u16, len: u16, flags: u8, next: u8| {
        let mut step = vec![0, queue, slot];
        step.extend(at.to_le_bytes());
        step.push(0);
        step.extend(len.to_le_bytes());
        step.extend([flags, next]);
        step
    };
    // What a block request and a balloon's page number look like.
    steps.extend([
        11, queue, 0x00, 0x10, 0, 16, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0,
    ]);
    steps.extend(descriptor(0, 0x1000, 16, 1, 1));
    steps.extend(descriptor(1, 0x2000, 512, 3, 2));
    steps.extend(descriptor(2, 0x3000, 1, 2, 0));
    steps.extend([4, queue, 0, 0]);
    steps.extend([6, queue, 1, 0]);
    steps.extend([8, queue, 10, queue]);
    steps.extend([0x0f, queue, 64, 0]);
    steps.extend([7; 64]);
    steps.extend([8, queue, 10, queue]);
    steps
}

/// A request, and while it is under way resets of another queue and of its own.
fn resets(target: &str, queue: u8) -> Vec<u8> {
    let mut steps = request(target, queue);
    let other = queue ^ 1;
    steps.extend([6, queue, 2, 0, 8, queue]);
    for reset in [other, queue] {
        steps.extend([0x1a, reset, 8, queue, 0x2a, reset]);
        steps.extend([4, queue, 0, 0, 6, queue, 1, 0, 8, queue]);
    }
    steps.extend([10, queue]);
    steps
}

/// One loaded segment and a PVH note, without the first six bytes.
fn tiny_elf() -> Vec<u8> {
    let mut file = vec![0u8; 0x400];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    for (at, value) in [(16, 2u16), (18, 62), (54, 56), (56, 2)] {
        put(at, &value.to_le_bytes());
    }
    put(32, &64u64.to_le_bytes());
    for (at, kind, offset, place, size) in [
        (64, 1u32, 0x300u64, 0x10_0000u64, 0x100u64),
        (120, 4, 0x200, 0, 20),
    ] {
        put(at, &kind.to_le_bytes());
        for (field, value) in [(8, offset), (24, place), (32, size), (40, size)] {
            put(at + field, &value.to_le_bytes());
        }
    }
    for (at, value) in [(0x200, 4u32), (0x204, 4), (0x208, 18), (0x210, 0x10_0000)] {
        put(at, &value.to_le_bytes());
    }
    put(0x20c, b"Xen\0");
    file.split_off(6)
}
