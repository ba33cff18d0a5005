//! A virtio driver for tests, which finds and sets up its device the way Linux does.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::guest::Guest;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const PATIENCE: Duration = Duration::from_secs(10);
/// Rings live here, one after the other; buffers behind; the last MiB of low memory is the tests' own.
const RINGS: u64 = 1 << 20;
const BUFFERS: u64 = 2 << 20;
const BUFFERS_END: u64 = 5 << 20;

pub(crate) const STATUS: u64 = 0x14;
pub(crate) const QUEUE_SELECT: u64 = 0x16;
pub(crate) const QUEUE_ENABLE: u64 = 0x1c;
pub(crate) const QUEUE_RESET: u64 = 0x3a;

const VERSION_1: u64 = 1 << 32;
/// The feature that lets a driver reset one queue alone.
pub(crate) const RING_RESET: u64 = 1 << 40;

/// A piece of memory for a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Buffer {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) device_writes: bool,
}

/// The driver's side; belongs to the guest's memory, and so survives a crossing as it is.
pub(crate) struct Driver {
    pub(crate) common: u64,
    pub(crate) notify: u64,
    pub(crate) device: u64,
    notify_stride: u64,
    pub(crate) features: u64,
    pub(crate) queues: Vec<DriverQueue>,
    next_buffer: u64,
}

pub(crate) struct DriverQueue {
    pub(crate) size: u16,
    pub(crate) desc: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    free: Vec<u16>,
    chains: BTreeMap<u16, Vec<u16>>,
    avail_index: u16,
    used_index: u16,
}

impl Driver {
    /// Finds the capabilities, resets, agrees on the wanted features, sets every queue and vector up, and starts.
    pub(crate) fn probe(guest: &Guest, wanted: u64) -> Self {
        guest.config_write(4, 6, 2);
        let mut driver = Self::find(guest);
        driver.set_up(guest, wanted);
        driver
    }

    fn find(guest: &Guest) -> Self {
        let bar = u64::from(guest.config_read(0x10, 4));
        let mut found = BTreeMap::new();
        let (mut stride, mut msix) = (0, 0);
        let mut at = u64::from(guest.config_read(0x34, 1));
        while at != 0 {
            match guest.config_read(at, 1) {
                9 => {
                    let kind = guest.config_read(at + 3, 1);
                    found.insert(kind, bar + u64::from(guest.config_read(at + 8, 4)));
                    if kind == 2 {
                        stride = u64::from(guest.config_read(at + 16, 4));
                    }
                }
                0x11 => msix = at,
                other => panic!("unexpected capability {other:#x}"),
            }
            at = u64::from(guest.config_read(at + 1, 1));
        }
        // MSI-X on, and every vector with a message of its own.
        let vectors = (guest.config_read(msix + 2, 2) & 0x7ff) + 1;
        let table = bar + u64::from(guest.config_read(msix + 4, 4) & !7);
        guest.config_write(msix + 2, 0x8000, 2);
        for vector in 0..u64::from(vectors) {
            guest.write(table + vector * 16, 0xfee0_0000, 4);
            guest.write(table + vector * 16 + 4, 0, 4);
            guest.write(table + vector * 16 + 8, 0x40 + vector, 4);
            guest.write(table + vector * 16 + 12, 0, 4);
        }
        Self {
            common: found[&1],
            notify: found[&2],
            device: found[&4],
            notify_stride: stride,
            features: 0,
            queues: Vec::new(),
            next_buffer: BUFFERS,
        }
    }

    fn set_up(&mut self, guest: &Guest, wanted: u64) {
        let common = |offset, value, len| guest.write(self.common + offset, value, len);
        common(STATUS, 0, 1);
        assert_eq!(guest.read(self.common + STATUS, 1), 0);
        common(STATUS, 1, 1);
        common(STATUS, 3, 1);
        let mut offered = 0;
        for half in 0..2 {
            common(0, half, 4);
            offered |= guest.read(self.common + 4, 4) << (32 * half);
        }
        self.features = offered & (wanted | VERSION_1);
        for half in 0..2 {
            common(8, half, 4);
            common(0xc, self.features >> (32 * half), 4);
        }
        common(STATUS, 0xb, 1);
        assert_eq!(
            guest.read(self.common + STATUS, 1),
            0xb,
            "the device refused the features"
        );
        let count = guest.read(self.common + 0x12, 2);
        let mut ring = RINGS;
        self.queues.clear();
        for index in 0..count {
            common(QUEUE_SELECT, index, 2);
            let size = guest.read(self.common + 0x18, 2);
            let queue = DriverQueue::new(guest, size as u16, &mut ring);
            for (offset, value) in [(0x20, queue.desc), (0x28, queue.avail), (0x30, queue.used)] {
                common(offset, value & 0xffff_ffff, 4);
                common(offset + 4, value >> 32, 4);
            }
            common(0x1a, index + 1, 2);
            assert_eq!(guest.read(self.common + 0x1a, 2), index + 1);
            common(QUEUE_ENABLE, 1, 2);
            self.queues.push(queue);
        }
        assert!(ring <= BUFFERS, "the rings need more room");
        common(0x10, 0, 2);
        common(STATUS, 0xf, 1);
        assert_eq!(
            guest.read(self.common + STATUS, 1),
            0xf,
            "the device did not start"
        );
    }

    /// Takes a queue out of use, as a driver does that changes its size.
    pub(crate) fn reset_queue(&mut self, guest: &Guest, index: u16) {
        let common = |offset, value, len| guest.write(self.common + offset, value, len);
        common(QUEUE_SELECT, u64::from(index), 2);
        common(QUEUE_RESET, 1, 2);
        assert_eq!(
            guest.read(self.common + QUEUE_RESET, 2),
            0,
            "it is still being reset"
        );
        assert_eq!(
            guest.read(self.common + QUEUE_ENABLE, 2),
            0,
            "it is still enabled"
        );
    }

    /// Sets a queue up anew, with empty rings of half its size in the same place.
    pub(crate) fn add_queue(&mut self, guest: &Guest, index: u16) {
        let common = |offset, value, len| guest.write(self.common + offset, value, len);
        common(QUEUE_SELECT, u64::from(index), 2);
        let size = (guest.read(self.common + 0x18, 2) / 2).max(4);
        common(0x18, size, 2);
        let mut ring = self.queues[usize::from(index)].desc;
        let queue = DriverQueue::new(guest, size as u16, &mut ring);
        for (offset, value) in [(0x20, queue.desc), (0x28, queue.avail), (0x30, queue.used)] {
            common(offset, value & 0xffff_ffff, 4);
            common(offset + 4, value >> 32, 4);
        }
        common(0x1a, u64::from(index) + 1, 2);
        common(QUEUE_ENABLE, 1, 2);
        assert_eq!(guest.read(self.common + QUEUE_ENABLE, 2), 1, "it was not enabled");
        self.queues[usize::from(index)] = queue;
    }

    pub(crate) fn status(&self, guest: &Guest) -> u8 {
        guest.read(self.common + STATUS, 1) as u8
    }

    /// Fresh memory for a buffer.
    pub(crate) fn allocate(&mut self, len: u32) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += u64::from(len).next_multiple_of(16);
        if self.next_buffer > BUFFERS_END {
            // Round again: tests do not keep buffers for long.
            self.next_buffer = BUFFERS + u64::from(len).next_multiple_of(16);
            return BUFFERS;
        }
        address
    }

    /// Puts a request into the queue without telling the device.
    pub(crate) fn add(&mut self, guest: &Guest, queue: u16, buffers: &[Buffer]) -> u16 {
        self.queues[usize::from(queue)].add(guest, buffers)
    }

    pub(crate) fn kick(&self, guest: &Guest, queue: u16) {
        guest.write(
            self.notify + u64::from(queue) * self.notify_stride,
            u64::from(queue),
            2,
        );
    }

    /// The next finished request and how much the device says it wrote.
    pub(crate) fn poll(&mut self, guest: &Guest, queue: u16) -> Option<(u16, u32)> {
        self.queues[usize::from(queue)].poll(guest)
    }

    pub(crate) fn wait(&mut self, guest: &Guest, queue: u16) -> (u16, u32) {
        let start = Instant::now();
        loop {
            if let Some(done) = self.poll(guest, queue) {
                return done;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "queue {queue} does not answer, status {:#x}",
                self.status(guest)
            );
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// How many more descriptors the queue has room for.
    pub(crate) fn room(&self, queue: u16) -> usize {
        self.queues[usize::from(queue)].free.len()
    }
}

impl DriverQueue {
    fn new(guest: &Guest, size: u16, ring: &mut u64) -> Self {
        let entries = u64::from(size);
        let desc = ring.next_multiple_of(4096);
        let avail = desc + 16 * entries;
        let used = (avail + 6 + 2 * entries).next_multiple_of(4096);
        *ring = used + 6 + 8 * entries;
        guest.memory.write(desc, &vec![0; (*ring - desc) as usize]);
        let free = (0..size).rev().collect();
        Self {
            size,
            desc,
            avail,
            used,
            free,
            chains: BTreeMap::new(),
            avail_index: 0,
            used_index: 0,
        }
    }

    fn add(&mut self, guest: &Guest, buffers: &[Buffer]) -> u16 {
        let indices: Vec<u16> = buffers
            .iter()
            .map(|_| self.free.pop().expect("the queue is full"))
            .collect();
        for (at, buffer) in buffers.iter().enumerate() {
            let next = indices.get(at + 1);
            let flags = if buffer.device_writes { DESC_WRITE } else { 0 } | next.map_or(0, |_| DESC_NEXT);
            self.write_descriptor(
                guest,
                indices[at],
                buffer.address,
                buffer.len,
                flags,
                *next.unwrap_or(&0),
            );
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        let entry = self.avail + 4 + 2 * u64::from(self.avail_index % self.size);
        guest.memory.write(entry, &head.to_le_bytes());
        self.avail_index = self.avail_index.wrapping_add(1);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        guest
            .memory
            .write(self.avail + 2, &self.avail_index.to_le_bytes());
        head
    }

    pub(crate) fn write_descriptor(
        &self,
        guest: &Guest,
        at: u16,
        address: u64,
        len: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        guest.memory.write(self.desc + 16 * u64::from(at), &bytes);
    }

    fn poll(&mut self, guest: &Guest) -> Option<(u16, u32)> {
        if guest.memory.read_u16(self.used + 2) == self.used_index {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.used_index % self.size);
        let (head, len) = (guest.memory.read_u32(entry), guest.memory.read_u32(entry + 4));
        self.used_index = self.used_index.wrapping_add(1);
        // Ask for an interrupt at the very next one.
        guest.memory.write(
            self.avail + 4 + 2 * u64::from(self.size),
            &self.used_index.to_le_bytes(),
        );
        let head = u16::try_from(head).unwrap();
        self.free.extend(
            self.chains
                .remove(&head)
                .expect("the device answered a request that was not made"),
        );
        Some((head, len))
    }
}
