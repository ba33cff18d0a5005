//! A disk: what was written is there, after crossings, over every engine and format. The image is closed and opened
//! again at each crossing, as at two hosts.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::disk::{Disk, DiskCache, DiskFormat, DiskLimits, DiskOptions, EngineKind};
use crate::testing::driver::{Buffer, Driver};
use crate::testing::guest::{Guest, Memory};
use crate::testing::suspendable::{self, Bench};
use crate::virtio::block::BlockDevice;
use crate::virtio::device::{VirtioDevice, VirtioKind};

const PIECE: u32 = 24 * 1024;
const PIECES: u64 = 40;

/// Over io_uring where it is, past the page cache.
pub(super) type BlockBench = Over<0>;
type OverThreads = Over<1>;
type OverQcow2 = Over<2>;

pub(super) struct Over<const KIND: u8> {
    dir: tempfile::TempDir,
    disk: Option<Arc<Disk>>,
    /// What pieces of the disk are known to hold: so many bytes of this value.
    known: BTreeMap<u64, u8>,
    asked: Vec<Asked>,
    round: u64,
}

struct Asked {
    queue: u16,
    head: u16,
    status: u64,
    /// What must be at this address when it is answered.
    read: Option<(u64, Vec<u8>)>,
    /// What this piece holds afterwards.
    piece: Option<(u64, u8)>,
}

impl<const KIND: u8> Over<KIND> {
    fn options(&self) -> DiskOptions {
        let defaults = DiskOptions::new(self.dir.path().join("disk"));
        match KIND {
            0 => DiskOptions {
                cache: DiskCache::Direct,
                ..defaults
            },
            1 => DiskOptions {
                engine: EngineKind::Threads,
                cache: DiskCache::Writethrough,
                ..defaults
            },
            _ => DiskOptions {
                format: Some(DiskFormat::Qcow2),
                ..defaults
            },
        }
    }

    fn ask(&mut self, guest: &Guest, driver: &mut Driver, kind: u32, piece: u64) {
        let queue = (piece % 2) as u16;
        if driver.room(queue) < 4 {
            return;
        }
        let header = driver.allocate(17);
        let data = driver.allocate(PIECE);
        let status = header + 16;
        let sector = piece * u64::from(PIECE) / 512;
        let mut bytes = [0; 17];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&sector.to_le_bytes());
        bytes[16] = 0xff;
        guest.memory.write(header, &bytes);
        let buffer = |address, len, device_writes| Buffer {
            address,
            len,
            device_writes,
        };
        let mut buffers = vec![buffer(header, 16, false)];
        let (mut read, mut holds) = (None, None);
        let fill = (self.round % 255 + 1) as u8;
        match kind {
            VIRTIO_BLK_T_OUT => {
                guest.memory.write(data, &vec![fill; PIECE as usize]);
                // Two pieces, the first of an uneven length.
                buffers.extend([
                    buffer(data, 1001, false),
                    buffer(data + 1001, PIECE - 1001, false),
                ]);
                holds = Some((piece, fill));
            }
            VIRTIO_BLK_T_IN => {
                guest.memory.write(data, &vec![0xee; PIECE as usize]);
                buffers.extend([buffer(data, 8192, true), buffer(data + 8192, PIECE - 8192, true)]);
                read = self
                    .known
                    .get(&piece)
                    .map(|fill| (data, vec![*fill; PIECE as usize]));
            }
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let mut range = [0; 16];
                range[..8].copy_from_slice(&sector.to_le_bytes());
                range[8..12].copy_from_slice(&(PIECE / 512).to_le_bytes());
                guest.memory.write(data, &range);
                buffers.push(buffer(data, 16, false));
                holds = Some((piece, 0));
            }
            VIRTIO_BLK_T_GET_ID => {
                buffers.push(buffer(data, 20, true));
                read = Some((data, b"bench\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec()));
            }
            _ => {}
        }
        buffers.push(buffer(status, 1, true));
        // Until it is answered, nobody knows what is there.
        if let Some((piece, _)) = holds {
            self.known.remove(&piece);
        }
        let head = driver.add(guest, queue, &buffers);
        self.asked.push(Asked {
            queue,
            head,
            status,
            read,
            piece: holds,
        });
    }

    fn answered(&mut self, guest: &Guest, queue: u16, head: u16) {
        let place = self
            .asked
            .iter()
            .position(|asked| (asked.queue, asked.head) == (queue, head));
        let Asked {
            status, read, piece, ..
        } = self.asked.remove(place.unwrap());
        assert_eq!(guest.memory.read(status, 1), [0], "a request failed");
        if let Some((address, expected)) = read {
            assert!(
                guest.memory.read(address, expected.len()) == expected,
                "something else was read"
            );
        }
        self.known.extend(piece);
    }

    /// Requests that a limit holds in one queue stay there, in order and under the limit, however often the other queue
    /// is reset.
    fn held_requests_stay() {
        let mut bench = Self::new().unwrap();
        let memory = Memory::new();
        let guest = Guest::new(memory.clone(), bench.device(&memory));
        let mut driver = Driver::probe(&guest, u64::MAX);
        let disk = bench.disk.clone().unwrap();
        let began = Instant::now();
        disk.set_limits(DiskLimits {
            operations_per_sec: NonZeroU64::new(20),
            ..Default::default()
        });
        for piece in (0..PIECES).step_by(2) {
            bench.ask(&guest, &mut driver, VIRTIO_BLK_T_OUT, piece);
        }
        assert_eq!(bench.asked.len() as u64, PIECES / 2);
        driver.kick(&guest, 0);
        for _ in 0..10 {
            driver.reset_queue(&guest, 1);
            driver.add_queue(&guest, 1);
            std::thread::sleep(Duration::from_millis(5));
            let done = disk.stats().writes as f64;
            // A tenth of a second's worth may pass at once, and one more is on its way.
            let most = (began.elapsed().as_secs_f64() + 0.1) * 20.0 + 1.0;
            assert!(done <= most, "{done} requests passed where {most} may");
        }
        if began.elapsed() < Duration::from_millis(500) {
            assert!(disk.stats().writes < PIECES / 2, "nothing was held");
        }
        disk.set_limits(DiskLimits::default());
        bench.round += 1;
        for piece in (1..PIECES).step_by(2) {
            bench.ask(&guest, &mut driver, VIRTIO_BLK_T_OUT, piece);
        }
        driver.kick(&guest, 1);
        bench.complete(&guest, &mut driver);
        for piece in 0..PIECES {
            bench.ask(&guest, &mut driver, VIRTIO_BLK_T_IN, piece);
        }
        driver.kick(&guest, 0);
        driver.kick(&guest, 1);
        bench.complete(&guest, &mut driver);
        assert_eq!(disk.stats().writes, PIECES, "a request was done twice");
    }
}

impl<const KIND: u8> Bench for Over<KIND> {
    fn new() -> Option<Self> {
        let bench = Self {
            dir: tempfile::tempdir().unwrap(),
            disk: None,
            known: BTreeMap::new(),
            asked: Vec::new(),
            round: 0,
        };
        let options = bench.options();
        let format = options.format.unwrap_or(DiskFormat::Raw);
        Disk::create(&options.path, format, PIECES * u64::from(PIECE)).unwrap();
        Some(bench)
    }

    fn device(&mut self, _: &Arc<Memory>) -> Box<dyn VirtioDevice> {
        // As at a crossing with shared storage: the side that stopped gives the image up, the other one takes it.
        if let Some(before) = self.disk.take() {
            before.release_lock().unwrap();
        }
        let disk = Arc::new(Disk::open(&self.options()).unwrap());
        self.disk = Some(disk.clone());
        Box::new(BlockDevice::new("disk0", disk, Some("bench"), 2).unwrap())
    }

    fn submit(&mut self, guest: &Guest, driver: &mut Driver) {
        let asked = self.asked.len();
        for piece in 0..PIECES {
            // A piece that is in flight is left alone: what two do at once at one place has no order.
            if self
                .asked
                .iter()
                .any(|asked| asked.piece.is_some_and(|(busy, _)| busy == piece))
            {
                continue;
            }
            let kind = match (piece * 7 + self.round * 3) % 11 {
                0..=3 => VIRTIO_BLK_T_OUT,
                4..=6 if self.known.contains_key(&piece) => VIRTIO_BLK_T_IN,
                7 => VIRTIO_BLK_T_DISCARD,
                8 => VIRTIO_BLK_T_WRITE_ZEROES,
                9 => VIRTIO_BLK_T_GET_ID,
                _ => VIRTIO_BLK_T_FLUSH,
            };
            // Reads of what an earlier batch still reads are harmless; buffers are not shared while there is room.
            if self.asked.len() - asked < 30 {
                self.ask(guest, driver, kind, piece);
            }
        }
        self.round += 1;
        driver.kick(guest, 0);
        driver.kick(guest, 1);
    }

    fn complete(&mut self, guest: &Guest, driver: &mut Driver) {
        while let Some(queue) = self.asked.first().map(|asked| asked.queue) {
            let (head, _) = driver.wait(guest, queue);
            self.answered(guest, queue, head);
        }
    }

    fn forget(&mut self) {
        self.asked.clear();
        self.known.clear();
    }

    fn queue_was_reset(&mut self, guest: &Guest, driver: &mut Driver, index: u16) {
        while let Some((head, _)) = driver.poll(guest, index) {
            self.answered(guest, index, head);
        }
        self.asked.retain(|asked| asked.queue != index);
    }
}

#[test]
fn a_disk_over_threads_survives_crossings_resets_and_hostile_guests() {
    suspendable::crossings::<OverThreads>(VirtioKind::Block);
    suspendable::resets::<OverThreads>();
    suspendable::queue_resets::<OverThreads>();
    suspendable::queue_resets_beside_requests::<OverThreads>();
    suspendable::queue_resets_not_agreed::<OverThreads>();
    suspendable::writes_tracked::<OverThreads>();
    suspendable::hostile::<OverThreads>("block-threads");
}

#[test]
fn a_disk_over_qcow2_survives_crossings_resets_and_hostile_guests() {
    suspendable::crossings::<OverQcow2>(VirtioKind::Block);
    suspendable::resets::<OverQcow2>();
    suspendable::queue_resets_beside_requests::<OverQcow2>();
    suspendable::writes_tracked::<OverQcow2>();
    suspendable::hostile::<OverQcow2>("block-qcow2");
}

#[test]
fn what_a_limit_holds_in_one_queue_stays_when_the_other_is_reset() {
    BlockBench::held_requests_stay();
    OverThreads::held_requests_stay();
}
