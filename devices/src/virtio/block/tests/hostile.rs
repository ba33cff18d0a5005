//! A guest can write anything anywhere.

use super::requests::put_range;
use super::*;

#[test]
fn requests_that_make_no_sense_get_their_status_and_the_machine_lives() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    let sectors = rig.disk.size() / 512;
    let (ioerr, unsupp) = (VIRTIO_BLK_S_IOERR as u8, VIRTIO_BLK_S_UNSUPP as u8);
    let ask =
        |rig: &mut Rig, kind, sector, data: &[(u64, u32)], writable| rig.ask(kind, sector, data, writable).1;
    let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
    assert_eq!(
        ask(&mut rig, read, sectors, &[(DATA, 512)], true),
        ioerr,
        "past the end"
    );
    assert_eq!(
        ask(&mut rig, read, sectors - 1, &[(DATA, 1024)], true),
        ioerr,
        "across the end"
    );
    assert_eq!(
        ask(&mut rig, read, u64::MAX, &[(DATA, 512)], true),
        ioerr,
        "sector that overflows"
    );
    assert_eq!(
        ask(&mut rig, read, u64::MAX / 512, &[(DATA, 1024)], true),
        ioerr,
        "end that overflows"
    );
    assert_eq!(ask(&mut rig, read, 0, &[], true), ioerr, "nothing to read");
    assert_eq!(ask(&mut rig, write, 0, &[], false), ioerr, "nothing to write");
    assert_eq!(
        ask(&mut rig, read, 0, &[(DATA, 100)], true),
        ioerr,
        "part of a sector"
    );
    assert_eq!(
        ask(&mut rig, read, 0, &[(DATA, 512)], false),
        ioerr,
        "a read into what may only be read"
    );
    assert_eq!(
        ask(&mut rig, write, 0, &[(DATA, 512)], true),
        ioerr,
        "a write from what may only be written"
    );
    assert_eq!(
        ask(&mut rig, read, 0, &[(1 << 40, 512)], true),
        ioerr,
        "data outside memory"
    );
    assert_eq!(
        ask(&mut rig, write, 0, &[(DATA + DATA_LEN - 256, 512)], false),
        ioerr,
        "data across the end of memory"
    );
    assert_eq!(
        ask(&mut rig, write, 0, &[(u64::MAX - 100, 512)], false),
        ioerr,
        "data around the end of addresses"
    );
    assert_eq!(
        ask(&mut rig, read, 0, &[(DATA, u32::MAX - 511 - 17)], true),
        ioerr,
        "far too much"
    );
    assert_eq!(
        ask(&mut rig, 77, 0, &[(DATA, 512)], true),
        unsupp,
        "an unknown kind"
    );
    assert_eq!(
        ask(&mut rig, VIRTIO_BLK_T_SCSI_CMD, 0, &[(DATA, 512)], true),
        unsupp
    );
    assert_eq!(
        ask(&mut rig, VIRTIO_BLK_T_SECURE_ERASE, 0, &[(DATA, 512)], false),
        unsupp
    );
    assert_eq!(
        ask(&mut rig, VIRTIO_BLK_T_GET_ID, 0, &[(1 << 40, 20)], true),
        ioerr
    );
    assert_eq!(
        ask(&mut rig, VIRTIO_BLK_T_GET_ID, 0, &[], true),
        0,
        "an id of no bytes"
    );
    for (sector, n, flags, status) in [
        (0, 1 << 21 | 1, 0, ioerr),
        (sectors, 1, 0, ioerr),
        (u64::MAX, u32::MAX, 0, ioerr),
        (0, 8, 1, unsupp),
        (0, 0, 0, 0),
    ] {
        put_range(&rig.ram, DATA, sector, n, flags);
        assert_eq!(
            ask(&mut rig, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 16)], false),
            status,
            "{sector} {n} {flags}"
        );
    }
    put_range(&rig.ram, DATA, 0, 8, 2);
    assert_eq!(
        ask(&mut rig, VIRTIO_BLK_T_WRITE_ZEROES, 0, &[(DATA, 16)], false),
        unsupp
    );
    assert_eq!(
        ask(&mut rig, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 15)], false),
        ioerr
    );
    assert_eq!(
        ask(&mut rig, VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 33 * 16)], false),
        ioerr,
        "too many ranges"
    );
    assert_eq!(
        ask(&mut rig, VIRTIO_BLK_T_DISCARD, 0, &[(1 << 40, 16)], false),
        ioerr
    );
    // After all of this it is a disk like any other, and nothing of it reached the image.
    assert!(contents(&rig.disk).iter().all(|b| *b == 0));
    assert_eq!(rig.write(512, &[5; 512]), 0);
    assert_eq!(rig.read(512, 512), (vec![5; 512], 0));
    assert!(!rig.interrupts.needs_reset_seen());
}

/// Header and status may be cut anywhere and lie beside data in one buffer.
#[test]
fn any_layout_of_a_request_is_understood() {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    let at = DATA + 0x1000;
    let mut bytes = vec![0; 16 + 512];
    bytes[0] = VIRTIO_BLK_T_OUT as u8;
    bytes[8] = 3;
    bytes[16..].fill(0x77);
    rig.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
    rig.drivers[0].put(&[
        (at, 5, false),
        (at + 5, 0, false),
        (at + 5, 100, false),
        (at + 105, 423, false),
        (at + 600, 1, true),
    ]);
    assert_eq!(rig.finish()[0].2, 0);
    rig.ram
        .write_slice(&[VIRTIO_BLK_T_IN as u8], GuestAddress(at))
        .unwrap();
    rig.drivers[0].put(&[(at, 16, false), (at + 1000, 511, true), (at + 1511, 2, true)]);
    let (_, written, status) = rig.finish()[0];
    assert_eq!((written, status), (513, 0));
    let mut seen = [0; 512];
    rig.ram.read_slice(&mut seen, GuestAddress(at + 1000)).unwrap();
    assert_eq!(seen, [0x77; 512]);
}

fn breaks(name: &str, put: impl FnOnce(&mut Driver)) {
    let dir = dir();
    let mut rig = Rig::new(&image(dir.path(), DiskFormat::Raw), 1, ALL_FEATURES);
    put(&mut rig.drivers[0]);
    rig.drivers[0].kick();
    let deadline = Instant::now() + WAIT;
    while !rig.interrupts.needs_reset_seen() {
        assert!(Instant::now() < deadline, "{name}: neither an answer nor a reset");
        std::thread::sleep(Duration::from_micros(200));
    }
    // The driver resets the device; a new driver finds a disk.
    rig.stop();
    rig.device.reset();
    rig.drivers[0] = Driver::new(&rig.ram, 0);
    rig.ram.write_slice(&[0; 0x8000], GuestAddress(0)).unwrap();
    rig.stopped = vec![(0, rig.drivers[0].queue(false))];
    rig.interrupts = Arc::default();
    rig.start();
    assert_eq!(rig.write(0, &[1; 512]), 0, "{name}");
    assert!(!rig.interrupts.needs_reset_seen(), "{name}");
}

#[test]
fn a_request_without_a_place_for_an_answer_asks_for_a_reset() {
    breaks("no status", |driver| {
        driver.put(&[(DATA, 16, false)]);
    });
    breaks("status of no length", |driver| {
        driver.put(&[(DATA, 16, false), (DATA + 100, 1, false)]);
    });
    breaks("status outside memory", |driver| {
        driver.put(&[(DATA, 16, false), (1 << 40, 1, true)]);
    });
    breaks("status around the end of addresses", |driver| {
        driver.put(&[(DATA, 16, false), (u64::MAX - 5, 5, true)]);
    });
    breaks("a loop", |driver| {
        driver.descriptor(0, DATA, 16, VRING_DESC_F_NEXT as u16, 1);
        driver.descriptor(1, DATA, 512, VRING_DESC_F_NEXT as u16, 0);
        driver.publish(0);
    });
    breaks("a next that does not exist", |driver| {
        driver.descriptor(0, DATA, 16, VRING_DESC_F_NEXT as u16, 9999);
        driver.publish(0);
    });
    breaks("a head that does not exist", |driver| driver.publish(9999));
    breaks("an available index that runs away", |driver| {
        driver
            .ram
            .write_obj(5000u16, GuestAddress(driver.avail() + 2))
            .unwrap();
    });
    breaks("an indirect table of no sense", |driver| {
        driver.descriptor(0, DATA, 17, 4, 0);
        driver.publish(0);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// The fear: a ring of garbage makes the thread panic, hang, or reach outside of memory and disk. Whatever is in
    /// the rings, the device can be stopped, hands its queue back, and serves the next driver.
    #[test]
    fn no_ring_makes_the_device_panic_or_hang(
        descriptors in prop::collection::vec(
            (
                prop_oneof![4 => DATA..DATA + DATA_LEN, 1 => any::<u64>(), 1 => DATA + DATA_LEN - 600..DATA + DATA_LEN + 600, 1 => 0..0x8000u64],
                prop_oneof![4 => 0u32..2048, 1 => any::<u32>(), 1 => Just(16), 1 => Just(1), 2 => Just(512)],
                0u16..8,
                prop_oneof![4 => 0u16..16, 1 => any::<u16>()],
            ), 16),
        heads in prop::collection::vec(prop_oneof![9 => 0u16..16, 1 => any::<u16>()], 1..20),
        headers in prop::collection::vec((0u32..16, prop_oneof![0u64..20_000, any::<u64>()]), 40),
        runaway in prop::option::weighted(0.05, any::<u16>()),
        threads in any::<bool>(),
    ) {
        let dir = dir();
        let engine = if threads { EngineKind::Threads } else { EngineKind::Auto };
        let mut rig = Rig::new(&DiskOptions { engine, ..image(dir.path(), DiskFormat::Raw) }, 1, ALL_FEATURES);
        for (n, (kind, sector)) in headers.iter().enumerate() {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            // Headers lie where descriptors often point.
            let at = descriptors[n % 16].0.clamp(DATA, DATA + DATA_LEN - 16);
            rig.ram.write_slice(&header, GuestAddress(at)).unwrap();
        }
        for (n, (address, len, flags, next)) in descriptors.iter().enumerate() {
            rig.drivers[0].descriptor(n as u16, *address, *len, *flags, *next);
        }
        for head in heads {
            rig.drivers[0].publish(head);
        }
        if let Some(index) = runaway {
            rig.ram.write_obj(index, GuestAddress(rig.drivers[0].avail() + 2)).unwrap();
        }
        rig.drivers[0].kick();
        std::thread::sleep(Duration::from_millis(1));
        rig.stop();
        rig.device.reset();
        rig.drivers[0] = Driver::new(&rig.ram, 0);
        rig.ram.write_slice(&[0; 0x8000], GuestAddress(0)).unwrap();
        rig.stopped = vec![(0, rig.drivers[0].queue(false))];
        rig.interrupts = Arc::default();
        rig.start();
        prop_assert_eq!(rig.write(0, &[1; 512]), 0);
    }

    #[test]
    fn configuration_takes_any_access(offset in prop_oneof![0u64..80, any::<u64>()], data in prop::collection::vec(any::<u8>(), 0..20)) {
        let dir = dir();
        let disk = Arc::new(Disk::open(&image(dir.path(), DiskFormat::Raw)).unwrap());
        let mut device = BlockDevice::new("disk0", disk, None, 1).unwrap();
        let whole = |device: &BlockDevice| {
            let mut all = [0; 64];
            device.read_config(0, &mut all);
            all
        };
        let before = whole(&device);
        device.write_config(offset, &data);
        let mut after = whole(&device);
        // Only write-back can have changed.
        after[32] = before[32];
        prop_assert_eq!(before, after);
        let mut read = data.clone();
        device.read_config(offset, &mut read);
    }

    #[test]
    fn no_saved_state_makes_restore_panic(body in prop::collection::vec(any::<u8>(), 0..200), version in 0u32..3) {
        let dir = dir();
        let disk = Arc::new(Disk::open(&image(dir.path(), DiskFormat::Raw)).unwrap());
        let mut device = BlockDevice::new("disk0", disk, None, 1).unwrap();
        let restored = device.restore(&DeviceState { version, body });
        prop_assert!(restored.is_err());
    }
}
