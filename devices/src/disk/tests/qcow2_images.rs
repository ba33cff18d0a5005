//! The qcow2 format, against what qemu-img makes and reads.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn a_qcow2_disk_is_its_bytes(steps in steps(SIZE)) {
        let dir = dir();
        let disk = new_disk(dir.path(), DiskFormat::Qcow2, DiskCache::Writeback);
        let mut model = vec![0; disk.size() as usize];
        follows_the_model(&disk, steps, &mut model);
        drop(disk);
        let path = dir.path().join("disk");
        check_qcow2(&path);
        if let Some(bytes) = by_qemu(&path, "qcow2") {
            prop_assert!(bytes == model, "qemu-img reads something else");
        }
    }

    #[test]
    fn a_disk_over_two_bases_is_its_bytes(steps in steps(SIZE), direct in any::<bool>()) {
        let dir = dir();
        let at = |name: &str| dir.path().join(name);
        let text = |name: &str| at(name).to_str().unwrap().to_owned();
        let size = SIZE.next_multiple_of(4096);
        let mut model = vec![0u8; size as usize];
        model[100_000..300_000].fill(0xb1);
        std::fs::write(at("base"), &model).unwrap();
        let made = qemu_img(&["create", "-q", "-f", "qcow2", "-o", "backing_file=base,backing_fmt=raw", &text("middle")]);
        if made.is_none() {
            return Ok(());
        }
        {
            let middle = Disk::open(&options(&at("middle"), DiskFormat::Qcow2)).unwrap();
            middle.write_at(&[0xc2; 200_000], 200_000).unwrap();
            model[200_000..400_000].fill(0xc2);
        }
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", "backing_file=middle,backing_fmt=qcow2", &text("top")]);
        let cache = if direct { DiskCache::Direct } else { DiskCache::Writeback };
        let top = Disk::open(&DiskOptions { cache, ..options(&at("top"), DiskFormat::Qcow2) }).unwrap();
        let base_in_use = Disk::open(&DiskOptions::new(at("base"))).map(drop);
        prop_assert!(base_in_use.is_err(), "a base somebody reads was opened for writing");
        follows_the_model(&top, steps, &mut model);
        drop(top);
        check_qcow2(&at("top"));
        prop_assert!(by_qemu(&at("top"), "qcow2").unwrap() == model, "qemu-img reads something else");
    }
}

#[test]
fn what_qemu_made_we_read_compressed_or_of_version_2() {
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    let text = |name: &str| at(name).to_str().unwrap().to_owned();
    let mut bytes = vec![0u8; 1 << 20];
    bytes[5000..700_000].fill(0x5a);
    std::fs::write(at("raw"), &bytes).unwrap();
    for (name, extra) in [
        ("packed", vec!["-c"]),
        ("old", vec!["-o", "compat=0.10"]),
        ("small", vec!["-o", "cluster_size=4k"]),
    ] {
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2"];
        args.extend(extra);
        let (from, to) = (text("raw"), text(name));
        args.extend([from.as_str(), to.as_str()]);
        if qemu_img(&args).is_none() {
            return;
        }
        let disk = Disk::open(&options(&at(name), DiskFormat::Qcow2)).unwrap();
        assert!(contents(&disk) == bytes, "{name}");
        disk.write_zeroes_at(10_000, 100_000).unwrap();
        disk.punch(200_000, 100_000).unwrap();
        let mut now = bytes.clone();
        now[10_000..110_000].fill(0);
        if name != "old" {
            now[200_000..300_000].fill(0);
        }
        assert!(contents(&disk) == now, "{name}");
        drop(disk);
        check_qcow2(&at(name));
        assert!(by_qemu(&at(name), "qcow2").unwrap() == now, "{name}");
    }
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let dir = dir();
    let refused = |name: &str, option: &str, needle: &str| {
        let path = dir.path().join(name);
        if qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            option,
            path.to_str().unwrap(),
            "1M",
        ])
        .is_some()
        {
            let said = Disk::open(&options(&path, DiskFormat::Qcow2))
                .unwrap_err()
                .to_string();
            assert!(said.contains(needle), "{said}");
        }
    };
    refused("zstd", "compression_type=zstd", "compressed");
    refused("l2", "extended_l2=on", "extended L2");
    refused(
        "ext",
        &format!("data_file={}", dir.path().join("data").display()),
        "second file",
    );
    let path = dir.path().join("snap");
    if qemu_img(&["create", "-q", "-f", "qcow2", path.to_str().unwrap(), "1M"]).is_some() {
        qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]);
        let said = Disk::open(&options(&path, DiskFormat::Qcow2))
            .unwrap_err()
            .to_string();
        assert!(said.contains("snapshots"), "{said}");
        Disk::open(&DiskOptions {
            read_only: true,
            ..options(&path, DiskFormat::Qcow2)
        })
        .unwrap();
    }
}

#[test]
fn a_chain_that_bites_its_tail_is_refused() {
    let dir = dir();
    let path = |name: &str| dir.path().join(name);
    let text = |name: &str| path(name).to_str().unwrap().to_owned();
    if qemu_img(&["create", "-q", "-f", "qcow2", &text("a"), "1M"]).is_none() {
        return;
    }
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "backing_file=a,backing_fmt=qcow2",
        &text("b"),
    ]);
    qemu_img(&[
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "b",
        "-F",
        "qcow2",
        &text("a"),
    ]);
    let said = Disk::open(&options(&path("a"), DiskFormat::Qcow2))
        .unwrap_err()
        .to_string();
    assert!(said.contains("its own base"), "{said}");
    qemu_img(&[
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "gone",
        "-F",
        "qcow2",
        &text("a"),
    ]);
    let said = Disk::open(&options(&path("a"), DiskFormat::Qcow2))
        .unwrap_err()
        .to_string();
    assert!(said.contains("gone") && said.contains("does not exist"), "{said}");
}

#[test]
fn gaps_in_the_reference_counts_are_refused_for_writing_and_not_for_reading() {
    let dir = dir();
    let disk = new_disk(dir.path(), DiskFormat::Qcow2, DiskCache::Writeback);
    drop(disk);
    let path = dir.path().join("disk");
    let mut bytes = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let writable = options(&path, DiskFormat::Qcow2);
    let read_only = DiskOptions {
        read_only: true,
        ..writable.clone()
    };
    // A block behind a gap, and none at all where the image itself lies.
    for damage in [table + 3 * 8, table] {
        let good = bytes[damage..damage + 8].to_vec();
        let bad = if damage == table { 0u64 } else { 0x1_0000 };
        bytes[damage..damage + 8].copy_from_slice(&bad.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let refusal = Disk::open(&writable).unwrap_err().to_string();
        assert!(refusal.contains("gaps in its reference counts"), "{refusal}");
        Disk::open(&read_only).unwrap();
        bytes[damage..damage + 8].copy_from_slice(&good);
    }
    std::fs::write(&path, &bytes).unwrap();
    Disk::open(&writable).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    /// The fear: a damaged image takes the monitor down, or hangs it.
    #[test]
    fn no_damage_to_an_image_makes_us_panic(
        damage in prop::collection::vec((prop_oneof![0usize..120, 0usize..400_000], any::<u8>()), 1..12),
    ) {
        let dir = dir();
        let disk = new_disk(dir.path(), DiskFormat::Qcow2, DiskCache::Writeback);
        disk.write_at(&[1; 200_000], 5).unwrap();
        disk.write_zeroes_at(262_144, 131_072).unwrap();
        drop(disk);
        let path = dir.path().join("disk");
        let mut bytes = std::fs::read(&path).unwrap();
        let len = bytes.len();
        for (at, value) in damage {
            bytes[at % len] = value;
        }
        std::fs::write(&path, bytes).unwrap();
        if let Ok(disk) = Disk::open(&DiskOptions { format: Some(DiskFormat::Qcow2), ..DiskOptions::new(&path) }) {
            let end = disk.size().min(SIZE);
            let mut data = vec![0; 100_000];
            let _ = disk.read_at(&mut data, 0);
            let _ = disk.write_at(&data, 150_000.min(end));
            let _ = disk.punch(0, 65536.min(end));
            let _ = disk.write_zeroes_at(65536.min(end), 65536.min(end));
            let _ = disk.areas(0..end).take(1000).filter(Result::is_err).count();
            let _ = disk.flush();
        }
    }
}
