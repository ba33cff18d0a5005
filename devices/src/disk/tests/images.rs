//! Opening, locking and the raw format.

use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

fn refused(options: &DiskOptions) -> String {
    Disk::open(options).unwrap_err().to_string()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn a_raw_disk_is_its_bytes(steps in steps(SIZE), cache in prop_oneof![Just(DiskCache::Writeback), Just(DiskCache::Direct)]) {
        let dir = dir();
        let disk = new_disk(dir.path(), DiskFormat::Raw, cache);
        let mut model = vec![0; disk.size() as usize];
        follows_the_model(&disk, steps, &mut model);
        disk.flush().unwrap();
        drop(disk);
        prop_assert!(std::fs::read(dir.path().join("disk")).unwrap() == model);
    }
}

#[test]
fn a_new_image_takes_no_space_and_zeroing_gives_space_back() {
    let dir = dir();
    let disk = new_disk(dir.path(), DiskFormat::Raw, DiskCache::Writeback);
    let used = || std::fs::metadata(disk.path()).unwrap().blocks() * 512;
    assert!(used() < 65536);
    disk.write_at(&[1; 1 << 20], 0).unwrap();
    disk.flush().unwrap();
    let full = used();
    assert!(full >= 1 << 20);
    disk.write_zeroes_at(0, 1 << 20).unwrap();
    disk.flush().unwrap();
    assert!(used() + (1 << 20) <= full, "{} of {full}", used());
    let kinds: Vec<_> = disk
        .areas(0..disk.size())
        .map(|area| area.unwrap().kind)
        .collect();
    assert_eq!(kinds, [AreaKind::Hole]);
}

#[test]
fn what_cannot_be_a_disk_gets_one_clear_sentence() {
    let dir = dir();
    let at = |name: &str| dir.path().join(name);
    let open = |name: &str| refused(&DiskOptions::new(at(name)));
    assert!(open("nothing").contains("does not exist"));
    std::fs::create_dir(at("dir")).unwrap();
    assert!(open("dir").contains("a directory"));
    std::fs::write(at("empty"), "").unwrap();
    assert!(open("empty").contains("is empty"));
    std::fs::write(at("odd"), [0; 1000]).unwrap();
    assert!(open("odd").contains("truncate -s 1024"), "{}", open("odd"));
    assert!(refused(&DiskOptions::new("/dev/null")).contains("a character device"));
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("fifo"),
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    assert!(open("fifo").contains("a pipe"));
    std::fs::write(at("raw"), [0; 1024]).unwrap();
    assert!(refused(&options(&at("raw"), DiskFormat::Qcow2)).contains("is not a qcow2 image"));
    let made = Disk::create(&at("raw"), DiskFormat::Raw, 512)
        .unwrap_err()
        .to_string();
    assert!(made.contains("exists already"));
    assert!(Disk::create(&at("none"), DiskFormat::Qcow2, 513).is_err() && !at("none").exists());
}

#[test]
fn a_read_only_image_opened_for_writing_gets_one_clear_sentence() {
    // Root ignores permissions; a directory in /proc or a read-only mount does not ignore root.
    let dir = dir();
    let path = dir.path().join("ro");
    std::fs::write(&path, [0; 1024]).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).unwrap();
    let immutable = Command::new("chattr")
        .arg("+i")
        .arg(&path)
        .status()
        .is_ok_and(|status| status.success());
    let answer = Disk::open(&DiskOptions::new(&path)).map(drop);
    let reading = Disk::open(&DiskOptions {
        read_only: true,
        ..DiskOptions::new(&path)
    })
    .map(drop);
    if immutable {
        assert!(
            Command::new("chattr")
                .arg("-i")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
    } else if rustix::process::geteuid().is_root() {
        return skip("root may write to everything here, and chattr +i does not work");
    }
    let said = answer.unwrap_err().to_string();
    assert!(
        said.contains("may only be read") && said.contains("readonly"),
        "{said}"
    );
    reading.unwrap();
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let dir = dir();
    let path = dir.path().join("disk");
    Disk::create(&path, DiskFormat::Raw, 1 << 20).unwrap();
    let reader = DiskOptions {
        read_only: true,
        ..DiskOptions::new(&path)
    };
    let writer = DiskOptions::new(&path);
    let first = Disk::open(&writer).unwrap();
    assert!(refused(&writer).contains("in use by another program"));
    assert!(refused(&reader).contains("being written to"));
    drop(first);
    let (one, two) = (Disk::open(&reader).unwrap(), Disk::open(&reader).unwrap());
    assert!(refused(&writer).contains("in use by another program"));
    assert!(one.write_at(&[0], 0).is_err() && one.punch(0, 512).is_err());
    drop((one, two));
    Disk::open(&writer).unwrap();
}

/// A process that is just being started has duplicates of all files until it becomes its program.
#[test]
fn a_disk_that_is_gone_is_free_whoever_still_has_its_file() {
    let dir = dir();
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let path = dir.path().join(format!("{format:?}"));
        Disk::create(&path, format, 1 << 20).unwrap();
        let options = DiskOptions {
            format: Some(format),
            ..DiskOptions::new(&path)
        };
        let first = Disk::open(&options).unwrap();
        let _duplicate = first.image.file().try_clone().unwrap();
        assert!(refused(&options).contains("in use by another program"));
        drop(first);
        Disk::open(&options).unwrap();
    }
}

#[test]
fn qemu_and_we_keep_out_of_each_others_images() {
    let dir = dir();
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let path = dir.path().join(format!("{format:?}"));
        Disk::create(&path, format, 1 << 20).unwrap();
        let name = if format == DiskFormat::Raw { "raw" } else { "qcow2" };
        // `info` asks for no lock; comparing an image with itself reads it.
        let by_qemu = || {
            let mut compare = Command::new("qemu-img");
            compare
                .args(["compare", "-f", name, "-F", name])
                .args([&path, &path])
                .output()
        };
        let Ok(free) = by_qemu() else {
            return skip("qemu-img is not here");
        };
        assert!(free.status.success());
        let disk = Disk::open(&options(&path, format)).unwrap();
        assert!(
            !by_qemu().unwrap().status.success(),
            "qemu-img opened an image we write to"
        );
        disk.release_lock().unwrap();
        assert!(by_qemu().unwrap().status.success());
        drop(disk);
        let _reader = Disk::open(&DiskOptions {
            read_only: true,
            ..options(&path, format)
        })
        .unwrap();
        assert!(by_qemu().unwrap().status.success(), "two readers");
        let writes = Command::new("qemu-img")
            .args(["resize", "-f", name])
            .arg(&path)
            .arg("2M")
            .output()
            .unwrap();
        assert!(!writes.status.success(), "qemu-img wrote to an image we read");
    }
}

#[test]
fn an_image_passes_between_two_sides_that_share_it() {
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let dir = dir();
        let here = new_disk(dir.path(), format, DiskCache::Writeback);
        let later = DiskOptions {
            ownership: Ownership::Later,
            ..options(here.path(), format)
        };
        let there = Disk::open(&later).unwrap();
        here.write_at(b"before", 70_000).unwrap();
        assert!(there.read_at(&mut [0; 6], 70_000).is_err(), "not ours yet");
        assert!(there.take_lock().unwrap_err().to_string().contains("in use"));
        here.release_lock().unwrap();
        there.take_lock().unwrap();
        let mut seen = [0; 6];
        there.read_at(&mut seen, 70_000).unwrap();
        assert_eq!(&seen, b"before");
        assert!(
            here.write_at(b"after!", 70_000).is_err(),
            "after the hand over this side never writes"
        );
        assert!(here.take_lock().is_err());
        there.write_at(b"behind", 70_000).unwrap();
        there.write_at(&[7; 100], 2 << 20).unwrap();
        there.release_lock().unwrap();
        // The crossing failed: back again, with what the other side wrote.
        here.take_lock().unwrap();
        here.read_at(&mut seen, 70_000).unwrap();
        assert_eq!(&seen, b"behind");
        here.read_at(&mut seen, 2 << 20).unwrap();
        assert_eq!(seen, [7; 6]);
    }
}

/// Opening an image used to throw away what the host had cached of it, and each start began with a cold disk.
#[test]
fn an_image_keeps_the_hosts_cache_when_it_is_opened_and_loses_it_when_another_side_had_it() {
    let dir = dir();
    let disk = new_disk(dir.path(), DiskFormat::Raw, DiskCache::Writeback);
    disk.write_at(&[7; 4096], 0).unwrap();
    disk.release_lock().unwrap();
    // Only clean pages can be dropped, and `release_lock` has dropped nothing.
    let cached = |file: &File| {
        let mut page = [0; 4096];
        let flags = rustix::io::ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(file, &mut [io::IoSliceMut::new(&mut page)], 0, flags) {
            Ok(4096) => Some(true),
            Err(rustix::io::Errno::AGAIN) => Some(false),
            // The file system cannot say.
            _ => None,
        }
    };
    let looker = File::open(disk.path()).unwrap();
    io::copy(&mut File::open(disk.path()).unwrap(), &mut io::sink()).unwrap();
    let Some(before) = cached(&looker) else {
        return println!("skipped: this file system does not say what is cached");
    };
    assert!(before, "the file was just read");
    let opened = Disk::open(&options(disk.path(), DiskFormat::Raw)).unwrap();
    assert_eq!(cached(&looker), Some(true));
    opened.release_lock().unwrap();
    opened.take_lock().unwrap();
    assert_eq!(cached(&looker), Some(false), "another side may have written");
}

#[test]
fn a_guest_that_writes_a_qcow2_header_gets_no_files_of_the_host() {
    let dir = dir();
    let raw = dir.path().join("raw");
    Disk::create(&raw, DiskFormat::Raw, 1 << 20).unwrap();
    let secret = dir.path().join("secret");
    std::fs::write(&secret, [b's'; 65536]).unwrap();
    let evil = dir.path().join("evil");
    let base = format!("backing_file={},backing_fmt=raw", secret.display());
    if qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &base,
        evil.to_str().unwrap(),
        "64k",
    ])
    .is_none()
    {
        return;
    }
    let header = std::fs::read(&evil).unwrap();
    Disk::open(&DiskOptions::new(&raw))
        .unwrap()
        .write_at(&header, 0)
        .unwrap();
    let guessed = DiskOptions {
        format: None,
        ..DiskOptions::new(&raw)
    };
    assert!(refused(&guessed).contains("a guest may have written"));
    assert!(
        Disk::find_format(&raw)
            .unwrap_err()
            .to_string()
            .contains("a guest may have written")
    );
    // Said to be raw it is raw, whatever the guest wrote.
    let disk = Disk::open(&DiskOptions::new(&raw)).unwrap();
    assert_eq!((disk.format(), disk.size()), (DiskFormat::Raw, 1 << 20));
}

#[test]
fn guessing_finds_what_is_there() {
    let dir = dir();
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let path = dir.path().join(format!("{format:?}"));
        Disk::create(&path, format, 1 << 20).unwrap();
        let disk = Disk::open(&DiskOptions {
            format: None,
            ..DiskOptions::new(&path)
        })
        .unwrap();
        assert_eq!((disk.format(), disk.size()), (format, 1 << 20));
        match (format, Disk::find_format(&path)) {
            (DiskFormat::Qcow2, found) => assert_eq!(found.unwrap(), format),
            (DiskFormat::Raw, found) => assert!(found.unwrap_err().to_string().contains("say format=raw")),
        }
    }
}
