//! A split virtqueue.

use core::sync::atomic::{AtomicU16, Ordering, fence};

use crate::memory::Memory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Used {
    id: u32,
    length: u32,
}

/// One piece of a request: where, how long, and whether the device writes it.
#[derive(Clone, Copy)]
pub struct Piece {
    pub address: u64,
    pub length: u32,
    pub device_writes: bool,
}

pub struct Queue {
    size: u16,
    index: u16,
    notify: u64,
    event_index: bool,
    descriptors: *mut Descriptor,
    available: *mut u16,
    used: *mut u16,
    free: u16,
    free_count: u16,
    /// The next index that goes to the device, and the one it was told of last.
    next: u16,
    told: u16,
    seen: u16,
}

impl Queue {
    pub fn new(size: u16, index: u16, notify: u64, event_index: bool, memory: &mut Memory) -> Option<Queue> {
        let n = size as usize;
        // SAFETY: queues are made before any shift begins and kept for good; plain numbers.
        let (descriptors, available, used) = unsafe {
            (
                memory.take_zeroed::<Descriptor>(n)?,
                memory.take_zeroed::<u16>(n + 3)?,
                memory.take_zeroed::<u16>(4 * n + 3)?,
            )
        };
        for (i, descriptor) in descriptors.iter_mut().enumerate() {
            descriptor.next = (i as u16 + 1) % size;
        }
        Some(Queue {
            size,
            index,
            notify,
            event_index,
            descriptors: descriptors.as_mut_ptr(),
            available: available.as_mut_ptr(),
            used: used.as_mut_ptr(),
            free: 0,
            free_count: size,
            next: 0,
            told: 0,
            seen: 0,
        })
    }

    pub fn addresses(&self) -> [u64; 3] {
        [self.descriptors as u64, self.available as u64, self.used as u64]
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    fn descriptor(&mut self, at: u16) -> &mut Descriptor {
        // SAFETY: taken modulo the size; the driver owns free descriptors.
        unsafe { &mut *self.descriptors.add((at % self.size) as usize) }
    }

    fn shared(&self, ring: *mut u16, at: usize) -> &AtomicU16 {
        // SAFETY: `at` is inside the ring; the device shares it, so it is accessed atomically.
        unsafe { AtomicU16::from_ptr(ring.add(at)) }
    }

    /// Queues a request of some pieces; returns its head, or None if there is no room. `kick` tells the device.
    pub fn add(&mut self, pieces: &[Piece]) -> Option<u16> {
        if pieces.is_empty() || pieces.len() > self.free_count as usize {
            return None;
        }
        let head = self.free;
        let mut at = head;
        for (i, piece) in pieces.iter().enumerate() {
            let more = i + 1 < pieces.len();
            let descriptor = self.descriptor(at);
            descriptor.address = piece.address;
            descriptor.length = piece.length;
            descriptor.flags = if piece.device_writes { WRITE } else { 0 } | if more { NEXT } else { 0 };
            at = descriptor.next;
        }
        self.free = at;
        self.free_count -= pieces.len() as u16;
        let slot = (self.next % self.size) as usize;
        self.shared(self.available, 2 + slot)
            .store(head, Ordering::Relaxed);
        self.next = self.next.wrapping_add(1);
        self.shared(self.available, 1).store(self.next, Ordering::Release);
        Some(head)
    }

    /// Tells the device of what was added, if it wants to know.
    pub fn kick(&mut self) {
        if self.told == self.next {
            return;
        }
        fence(Ordering::SeqCst);
        let wanted = if self.event_index {
            let event = self
                .shared(self.used, 2 + 4 * self.size as usize)
                .load(Ordering::Relaxed);
            self.next.wrapping_sub(event).wrapping_sub(1) < self.next.wrapping_sub(self.told)
        } else {
            self.shared(self.used, 0).load(Ordering::Relaxed) & 1 == 0
        };
        self.told = self.next;
        if wanted {
            // SAFETY: the queue's notification register.
            unsafe { (self.notify as *mut u16).write_volatile(self.index) };
        }
    }

    /// Takes back a finished request: its head and how much the device wrote.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let slot = (self.seen % self.size) as usize;
        // SAFETY: inside the used ring; the device has finished with this entry.
        let used = unsafe { (self.used.add(2) as *const Used).add(slot).read_unaligned() };
        self.seen = self.seen.wrapping_add(1);
        let head = (used.id as u16) % self.size;
        let mut at = head;
        self.free_count += 1;
        while self.descriptor(at).flags & NEXT != 0 {
            at = self.descriptor(at).next;
            self.free_count += 1;
        }
        self.descriptor(at).next = self.free;
        self.free = head;
        Some((head, used.length))
    }

    pub fn has_used(&self) -> bool {
        self.shared(self.used, 1).load(Ordering::Acquire) != self.seen
    }

    /// Asks for an interrupt when the next request finishes; true if one already has.
    pub fn listen(&mut self) -> bool {
        if self.event_index {
            self.shared(self.available, 2 + self.size as usize)
                .store(self.seen, Ordering::Relaxed);
        }
        self.shared(self.available, 0).store(0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.has_used()
    }

    /// No interrupts, please, until `listen`.
    pub fn ignore(&mut self) {
        if self.event_index {
            let far = self.seen.wrapping_sub(1);
            self.shared(self.available, 2 + self.size as usize)
                .store(far, Ordering::Relaxed);
        } else {
            self.shared(self.available, 0).store(1, Ordering::Relaxed);
        }
    }
}
