//! A small virtio-net driver for tests: it lays out rings in guest memory and uses them as a guest would.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::ram::Ram;
use crate::virtio::device::{Activation, ActiveQueue, VirtioDevice, VirtioInterrupt};

pub(super) const RAM_BYTES: usize = 16 << 20;
const QUEUE_SPACING: u64 = 0x10000;
const BUFFERS: u64 = 0x40_0000;
const WRITE: u16 = 2;
const NEXT: u16 = 1;

#[derive(Default)]
pub(super) struct Interrupts {
    pub(super) queues: [AtomicU64; 16],
    pub(super) config: AtomicU64,
    pub(super) needs_reset: AtomicU64,
}

impl VirtioInterrupt for Interrupts {
    fn queue(&self, index: u16) {
        self.queues[usize::from(index)].fetch_add(1, Ordering::SeqCst);
    }
    fn config_changed(&self) {
        self.config.fetch_add(1, Ordering::SeqCst);
    }
    fn needs_reset(&self) {
        self.needs_reset.fetch_add(1, Ordering::SeqCst);
    }
}

pub(super) struct Ring {
    pub(super) base: u64,
    pub(super) size: u16,
    next_descriptor: u16,
    avail: u16,
    seen: u16,
    kick: EventFd,
}

impl Ring {
    pub(super) fn table(&self) -> u64 {
        self.base
    }
    pub(super) fn avail_ring(&self) -> u64 {
        self.base + 0x4000
    }
    pub(super) fn used_ring(&self) -> u64 {
        self.base + 0x8000
    }
}

pub(super) struct Driver {
    pub(super) ram: Ram,
    pub(super) rings: Vec<Ring>,
    pub(super) interrupts: Arc<Interrupts>,
    features: u64,
    next_buffer: u64,
}

pub(super) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < end, "waited in vain: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The kernel does not take up again by itself what has a time limit, whatever the signal was for.
pub(super) fn uninterrupted<T>(mut call: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Driver {
    pub(super) fn new(sizes: &[u16], features: u64) -> Self {
        let ram = Ram::from_ranges(&[(GuestAddress(0), RAM_BYTES)]).unwrap();
        let rings = sizes
            .iter()
            .enumerate()
            .map(|(index, size)| Ring {
                base: QUEUE_SPACING * (index as u64 + 1),
                size: *size,
                next_descriptor: 0,
                avail: 0,
                seen: 0,
                kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            })
            .collect();
        Self {
            ram,
            rings,
            interrupts: Arc::default(),
            features,
            next_buffer: BUFFERS,
        }
    }

    pub(super) fn has(&self, bit: u32) -> bool {
        self.features & (1 << bit) != 0
    }

    /// Fresh queues at position zero.
    pub(super) fn queues(&self) -> Vec<(u16, Queue)> {
        let one = |(index, ring): (usize, &Ring)| {
            let mut queue = Queue::new(ring.size).unwrap();
            queue.set_size(ring.size);
            queue.set_desc_table_address(Some(ring.table() as u32), Some(0));
            queue.set_avail_ring_address(Some(ring.avail_ring() as u32), Some(0));
            queue.set_used_ring_address(Some(ring.used_ring() as u32), Some(0));
            queue.set_event_idx(self.has(29));
            queue.set_ready(true);
            (index as u16, queue)
        };
        self.rings.iter().enumerate().map(one).collect()
    }

    pub(super) fn start(&self, device: &mut impl VirtioDevice, queues: Vec<(u16, Queue)>) {
        let mut queues: Vec<ActiveQueue> = queues
            .into_iter()
            .map(|(index, queue)| ActiveQueue {
                index,
                queue,
                kick: self.rings[usize::from(index)].kick.try_clone().unwrap(),
            })
            .collect();
        queues.sort_by_key(|queue| queue.index);
        device
            .start(Activation {
                ram: self.ram.clone(),
                features: self.features,
                queues,
                interrupt: self.interrupts.clone(),
            })
            .unwrap();
        for ring in &self.rings {
            ring.kick.write(1).unwrap();
        }
    }

    pub(super) fn kick(&self, queue: usize) {
        self.rings[queue].kick.write(1).unwrap();
    }

    /// A fresh buffer, page aligned or not as it comes.
    pub(super) fn allocate(&mut self, len: usize) -> u64 {
        if self.next_buffer + len as u64 > RAM_BYTES as u64 {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer += len as u64 + 6;
        at
    }

    /// Makes a chain available, without a kick; returns its head.
    pub(super) fn offer(&mut self, queue: usize, pieces: &[(u64, u32, bool)]) -> u16 {
        let ring = &mut self.rings[queue];
        let head = ring.next_descriptor;
        for (position, (address, len, writable)) in pieces.iter().enumerate() {
            let index = ring.next_descriptor;
            ring.next_descriptor = (index + 1) % ring.size;
            let more = position + 1 < pieces.len();
            let flags = if *writable { WRITE } else { 0 } | if more { NEXT } else { 0 };
            let mut descriptor = [0u8; 16];
            descriptor[..8].copy_from_slice(&address.to_le_bytes());
            descriptor[8..12].copy_from_slice(&len.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            descriptor[14..].copy_from_slice(&ring.next_descriptor.to_le_bytes());
            let at = GuestAddress(ring.table() + u64::from(index) * 16);
            self.ram.write_slice(&descriptor, at).unwrap();
        }
        let slot = GuestAddress(ring.avail_ring() + 4 + u64::from(ring.avail % ring.size) * 2);
        self.ram.write_obj(head, slot).unwrap();
        ring.avail = ring.avail.wrapping_add(1);
        fence(Ordering::SeqCst);
        let index = GuestAddress(ring.avail_ring() + 2);
        self.ram.store(ring.avail, index, Ordering::SeqCst).unwrap();
        head
    }

    /// Gives the device `count` receive buffers of this length in one piece each.
    pub(super) fn give_buffers(&mut self, queue: usize, count: usize, len: usize) {
        for _ in 0..count {
            let at = self.allocate(len);
            self.offer(queue, &[(at, len as u32, true)]);
        }
        self.kick(queue);
    }

    pub(super) fn used_index(&self, queue: usize) -> u16 {
        let at = GuestAddress(self.rings[queue].used_ring() + 2);
        self.ram.load(at, Ordering::SeqCst).unwrap()
    }

    /// The next used chain: first address of its buffers, and how much was written.
    pub(super) fn next_used(&mut self, queue: usize) -> Option<(u64, u32)> {
        if self.used_index(queue) == self.rings[queue].seen {
            return None;
        }
        let ring = &mut self.rings[queue];
        let at = ring.used_ring() + 4 + u64::from(ring.seen % ring.size) * 8;
        ring.seen = ring.seen.wrapping_add(1);
        let id: u32 = self.ram.read_obj(GuestAddress(at)).unwrap();
        let len: u32 = self.ram.read_obj(GuestAddress(at + 4)).unwrap();
        let descriptor = GuestAddress(ring.table() + u64::from(id) * 16);
        Some((self.ram.read_obj(descriptor).unwrap(), len))
    }

    /// The next received frame with its header, put together from its buffers.
    pub(super) fn received(&mut self, queue: usize) -> Option<Vec<u8>> {
        let (at, len) = self.next_used(queue)?;
        let mut frame = vec![0; len as usize];
        self.ram.read_slice(&mut frame, GuestAddress(at)).unwrap();
        let count = u16::from_le_bytes([frame[10], frame[11]]);
        for _ in 1..count {
            let (at, len) = self
                .next_used(queue)
                .expect("all buffers of a frame appear at once");
            let start = frame.len();
            frame.resize(start + len as usize, 0);
            self.ram
                .read_slice(&mut frame[start..], GuestAddress(at))
                .unwrap();
        }
        Some(frame)
    }

    /// The only frame under way, wherever its header lies: all that is used at the moment that anything is.
    pub(super) fn only_frame(&mut self, queue: usize) -> Vec<u8> {
        let seen = self.rings[queue].seen;
        let end = Instant::now() + Duration::from_secs(10);
        let mut index = self.used_index(queue);
        while index == seen {
            assert!(Instant::now() < end, "waited in vain for a frame");
            std::hint::spin_loop();
            index = self.used_index(queue);
        }
        let mut frame = Vec::new();
        for _ in 0..index.wrapping_sub(seen) {
            let (at, len) = self.next_used(queue).unwrap();
            let start = frame.len();
            frame.resize(start + len as usize, 0);
            self.ram
                .read_slice(&mut frame[start..], GuestAddress(at))
                .unwrap();
        }
        let count = u16::from_le_bytes([frame[10], frame[11]]);
        assert_eq!(
            count,
            index.wrapping_sub(seen),
            "all buffers of a frame appear at once"
        );
        frame
    }

    pub(super) fn wait_for_frame(&mut self, queue: usize) -> Vec<u8> {
        let mut frame = None;
        wait_until("a frame for the guest", || {
            frame = self.received(queue);
            frame.is_some()
        });
        frame.unwrap()
    }

    /// Sends bytes (header included) in pieces of these lengths; the last takes the rest.
    pub(super) fn send(&mut self, queue: usize, bytes: &[u8], lengths: &[usize]) {
        let mut pieces = Vec::new();
        let mut rest = bytes;
        for len in lengths.iter().copied().chain([usize::MAX]) {
            let (piece, after) = rest.split_at(len.min(rest.len()));
            rest = after;
            if !piece.is_empty() {
                let at = self.allocate(piece.len());
                self.ram.write_slice(piece, GuestAddress(at)).unwrap();
                pieces.push((at, piece.len() as u32, false));
            }
        }
        if pieces.is_empty() {
            pieces.push((BUFFERS, 0, false));
        }
        self.offer(queue, &pieces);
        self.kick(queue);
    }

    /// Sends a control command and returns the device's answer.
    pub(super) fn command(&mut self, queue: usize, command: &[u8]) -> u8 {
        let at = self.allocate(command.len());
        self.ram.write_slice(command, GuestAddress(at)).unwrap();
        let answer = self.allocate(1);
        self.ram.write_obj(0xffu8, GuestAddress(answer)).unwrap();
        self.offer(
            queue,
            &[
                (at, 2, false),
                (at + 2, command.len() as u32 - 2, false),
                (answer, 1, true),
            ],
        );
        self.kick(queue);
        wait_until("an answer to a command", || self.next_used(queue).is_some());
        self.ram.read_obj(GuestAddress(answer)).unwrap()
    }

    pub(super) fn wait_until_used(&mut self, queue: usize, count: usize) {
        for _ in 0..count {
            wait_until("a used buffer", || self.next_used(queue).is_some());
        }
    }
}
