//! Fears about the block device, each with its test, and a small driver to ask it with.

mod hostile;
mod lifecycle;
mod requests;

use std::num::NonZeroU64;
use std::path::Path;
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::disk::tests::{SIZE, contents, dir, skip};
use crate::disk::{CLUSTER_SIZE, DiskFormat, DiskLimits, DiskOptions, EngineKind};
use crate::ram::{PAGE_SIZE, Ram, take_dirty};
use crate::virtio::device::VirtioInterrupt;

/// Guest memory above this is for data; below it are the rings.
const DATA: u64 = 0x10_0000;
const DATA_LEN: u64 = 0x30_0000;
const WAIT: Duration = Duration::from_secs(20);
const ALL_FEATURES: u64 = 1 << VIRTIO_BLK_F_FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE;

fn ram() -> Ram {
    // Regions that touch in the middle of the data, so that buffers lie across the border.
    Ram::from_ranges(&[(GuestAddress(0), 0x20_0000), (GuestAddress(0x20_0000), 0x20_0000)]).unwrap()
}

#[derive(Default)]
struct Interrupts {
    seen: Mutex<(u64, bool)>,
    changed: Condvar,
}

impl Interrupts {
    fn needs_reset_seen(&self) -> bool {
        self.seen.lock().unwrap().1
    }

    /// Waits for a further interrupt after `before`; false after a long time without.
    fn wait(&self, before: u64, deadline: Instant) -> bool {
        let seen = self.seen.lock().unwrap();
        let left = deadline.saturating_duration_since(Instant::now());
        let (seen, _) = self
            .changed
            .wait_timeout_while(seen, left, |seen| seen.0 == before)
            .unwrap();
        seen.0 != before
    }

    fn count(&self) -> u64 {
        self.seen.lock().unwrap().0
    }
}

impl VirtioInterrupt for Interrupts {
    fn queue(&self, _: u16) {
        self.seen.lock().unwrap().0 += 1;
        self.changed.notify_all();
    }

    fn config_changed(&self) {}

    fn needs_reset(&self) {
        let mut seen = self.seen.lock().unwrap();
        *seen = (seen.0 + 1, true);
        self.changed.notify_all();
    }
}

/// The guest's side of one queue.
struct Driver {
    ram: Ram,
    base: u64,
    kick: EventFd,
    free: Vec<u16>,
    chains: std::collections::HashMap<u16, (Vec<u16>, u64)>,
    next_avail: u16,
    seen_used: u16,
    next_status: u64,
}

const SIZE_OF_QUEUE: u16 = QUEUE_SIZE;

impl Driver {
    fn new(ram: &Ram, index: u16) -> Self {
        Self {
            ram: ram.clone(),
            base: u64::from(index) * 0x8000,
            kick: EventFd::new(EFD_NONBLOCK).unwrap(),
            free: (0..SIZE_OF_QUEUE).rev().collect(),
            chains: Default::default(),
            next_avail: 0,
            seen_used: 0,
            next_status: 0,
        }
    }

    fn table(&self) -> u64 {
        self.base
    }

    fn avail(&self) -> u64 {
        self.base + 0x2000
    }

    fn used(&self) -> u64 {
        self.base + 0x4000
    }

    fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(SIZE_OF_QUEUE).unwrap();
        queue.set_size(SIZE_OF_QUEUE);
        queue.set_desc_table_address(Some(self.table() as u32), Some(0));
        queue.set_avail_ring_address(Some(self.avail() as u32), Some(0));
        queue.set_used_ring_address(Some(self.used() as u32), Some(0));
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.ram));
        queue
    }

    fn descriptor(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.ram
            .write_slice(&bytes, GuestAddress(self.table() + u64::from(index) * 16))
            .unwrap();
    }

    /// Puts a chain on the queue without a kick; returns its head.
    fn put(&mut self, pieces: &[(u64, u32, bool)]) -> u16 {
        let indexes: Vec<u16> = pieces
            .iter()
            .map(|_| self.free.pop().expect("driver has room"))
            .collect();
        for (n, (address, len, writable)) in pieces.iter().enumerate() {
            let next = indexes.get(n + 1).copied();
            let mut flags = if *writable { VRING_DESC_F_WRITE as u16 } else { 0 };
            flags |= next.map_or(0, |_| VRING_DESC_F_NEXT as u16);
            self.descriptor(indexes[n], *address, *len, flags, next.unwrap_or(0));
        }
        let status = pieces
            .last()
            .map_or(0, |(address, len, _)| address + u64::from(*len) - 1);
        let head = indexes[0];
        self.chains.insert(head, (indexes, status));
        self.publish(head);
        head
    }

    fn publish(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % SIZE_OF_QUEUE);
        self.ram
            .write_obj(head, GuestAddress(self.avail() + 4 + slot * 2))
            .unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        std::sync::atomic::fence(Ordering::SeqCst);
        self.ram
            .store(self.next_avail, GuestAddress(self.avail() + 2), Ordering::SeqCst)
            .unwrap();
    }

    fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Puts a request of the usual shape: header, data in two pieces, status.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32)], writable: bool) -> u16 {
        // Headers and statuses have places of their own, so that requests in flight do not share any.
        let place = 0x8_0000 + (self.base / 0x8000) * 0x2_0000 + (self.next_status % 2048) * 32;
        self.next_status += 1;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.ram.write_slice(&header, GuestAddress(place)).unwrap();
        self.ram.write_obj(0xffu8, GuestAddress(place + 16)).unwrap();
        let mut pieces = vec![(place, 16, false)];
        pieces.extend(data.iter().map(|(address, len)| (*address, *len, writable)));
        pieces.push((place + 16, 1, true));
        self.put(&pieces)
    }

    /// What was answered since the last time: head, length, status.
    fn answers(&mut self) -> Vec<(u16, u32, u8)> {
        let mut answers = Vec::new();
        loop {
            let used_idx: u16 = self
                .ram
                .load(GuestAddress(self.used() + 2), Ordering::SeqCst)
                .unwrap();
            while self.seen_used != used_idx {
                let at = self.used() + 4 + u64::from(self.seen_used % SIZE_OF_QUEUE) * 8;
                let head = self.ram.read_obj::<u32>(GuestAddress(at)).unwrap() as u16;
                let len: u32 = self.ram.read_obj(GuestAddress(at + 4)).unwrap();
                self.seen_used = self.seen_used.wrapping_add(1);
                let (indexes, status) = self
                    .chains
                    .remove(&head)
                    .expect("an answer to what was asked, once");
                self.free.extend(indexes);
                answers.push((head, len, self.ram.read_obj(GuestAddress(status)).unwrap()));
            }
            // With event indexes: tell me of the next one. It may have come before the device read this.
            let used_event = GuestAddress(self.avail() + 4 + u64::from(SIZE_OF_QUEUE) * 2);
            self.ram
                .store(self.seen_used, used_event, Ordering::SeqCst)
                .unwrap();
            std::sync::atomic::fence(Ordering::SeqCst);
            let now: u16 = self
                .ram
                .load(GuestAddress(self.used() + 2), Ordering::SeqCst)
                .unwrap();
            if now == self.seen_used {
                return answers;
            }
        }
    }

    fn outstanding(&self) -> usize {
        self.chains.len()
    }
}

/// A machine of one disk: memory, device, drivers.
struct Rig {
    ram: Ram,
    disk: Arc<Disk>,
    device: BlockDevice,
    interrupts: Arc<Interrupts>,
    drivers: Vec<Driver>,
    features: u64,
    /// Queues while stopped.
    stopped: Vec<(u16, Queue)>,
}

impl Rig {
    fn new(options: &DiskOptions, queues: u16, features: u64) -> Self {
        let disk = Arc::new(Disk::open(options).unwrap());
        let ram = ram();
        let drivers: Vec<_> = (0..queues).map(|index| Driver::new(&ram, index)).collect();
        let event_idx = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let stopped = drivers
            .iter()
            .zip(0..)
            .map(|(driver, index)| (index, driver.queue(event_idx)))
            .collect();
        let mut rig = Self {
            device: BlockDevice::new("disk0", Arc::clone(&disk), Some("serial-1"), queues).unwrap(),
            ram,
            disk,
            interrupts: Arc::default(),
            drivers,
            features,
            stopped,
        };
        rig.start();
        rig
    }

    fn start(&mut self) {
        let event_idx = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let kick = |index: u16| self.drivers[usize::from(index)].kick.try_clone().unwrap();
        let mut queues: Vec<_> = self
            .stopped
            .drain(..)
            .map(|(index, mut queue)| {
                queue.set_event_idx(event_idx);
                ActiveQueue {
                    kick: kick(index),
                    index,
                    queue,
                }
            })
            .collect();
        queues.sort_by_key(|queue| queue.index);
        let interrupt: Arc<dyn VirtioInterrupt> = Arc::clone(&self.interrupts) as _;
        let work = Activation {
            ram: self.ram.clone(),
            features: self.features,
            queues,
            interrupt,
        };
        self.device.start(work).unwrap();
        self.drivers.iter().for_each(Driver::kick);
    }

    fn stop(&mut self) {
        self.stopped = self.device.stop();
        assert_eq!(self.stopped.len(), self.drivers.len(), "every queue comes back");
    }

    /// Kicks and waits until everything is answered on every queue.
    fn finish(&mut self) -> Vec<(u16, u32, u8)> {
        self.drivers.iter().for_each(Driver::kick);
        self.wait_for_all()
    }

    fn wait_for_all(&mut self) -> Vec<(u16, u32, u8)> {
        let deadline = Instant::now() + WAIT;
        let mut all = Vec::new();
        loop {
            let before = self.interrupts.count();
            all.extend(self.drivers.iter_mut().flat_map(Driver::answers));
            if self.drivers.iter().all(|driver| driver.outstanding() == 0) {
                return all;
            }
            assert!(
                self.interrupts.wait(before, deadline),
                "no answer and no interrupt"
            );
        }
    }

    /// One request, all the way.
    fn ask(&mut self, kind: u32, sector: u64, data: &[(u64, u32)], writable: bool) -> (u32, u8) {
        self.drivers[0].request(kind, sector, data, writable);
        let answers = self.finish();
        assert_eq!(answers.len(), 1);
        (answers[0].1, answers[0].2)
    }

    fn read(&mut self, offset: u64, len: u32) -> (Vec<u8>, u8) {
        let (written, status) = self.ask(VIRTIO_BLK_T_IN, offset / 512, &[(DATA, len)], true);
        let mut data = vec![0; len as usize];
        self.ram.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert!(status != 0 || written == len + 1);
        (data, status)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> u8 {
        self.ram.write_slice(data, GuestAddress(DATA)).unwrap();
        self.ask(
            VIRTIO_BLK_T_OUT,
            offset / 512,
            &[(DATA, data.len() as u32)],
            false,
        )
        .1
    }

    fn config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        self.device.read_config(offset, &mut data);
        data
    }
}

fn image(dir: &Path, format: DiskFormat) -> DiskOptions {
    let path = dir.join("disk");
    if !path.exists() {
        Disk::create(&path, format, SIZE.next_multiple_of(4096)).unwrap();
    }
    DiskOptions {
        format: Some(format),
        ..DiskOptions::new(path)
    }
}
