//! Fears about disk images, each with its test.

mod images;
mod qcow2_images;

use std::path::{Path, PathBuf};
use std::process::Command;

use proptest::prelude::*;

use super::*;

pub(crate) const SIZE: u64 = 3 * 1024 * 1024 + 512 * 9;

pub(crate) fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

pub(crate) fn options(path: &Path, format: DiskFormat) -> DiskOptions {
    DiskOptions {
        format: Some(format),
        ..DiskOptions::new(path)
    }
}

/// A new, empty image of the test size (whole blocks for direct I/O).
pub(crate) fn new_disk(dir: &Path, format: DiskFormat, cache: DiskCache) -> Disk {
    let path = dir.join("disk");
    let size = if cache == DiskCache::Direct {
        SIZE.next_multiple_of(4096)
    } else {
        SIZE
    };
    Disk::create(&path, format, size).unwrap();
    Disk::open(&DiskOptions {
        cache,
        ..options(&path, format)
    })
    .unwrap()
}

pub(crate) fn contents(disk: &Disk) -> Vec<u8> {
    let mut all = vec![0; disk.size() as usize];
    disk.read_at(&mut all, 0).unwrap();
    all
}

/// Runs qemu-img, or says why not and returns nothing.
pub(crate) fn qemu_img(args: &[&str]) -> Option<String> {
    match Command::new("qemu-img").args(args).output() {
        Ok(output) => {
            let text = format!(
                "{}{}",
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
            assert!(output.status.success(), "qemu-img {args:?}: {text}");
            Some(text)
        }
        Err(error) => {
            skip(&format!("qemu-img: {error}"));
            None
        }
    }
}

/// Prints why a test does not run here; fails instead where tests must run.
pub(crate) fn skip(why: &str) {
    assert!(
        std::env::var_os("FERRY_TESTS_MUST_RUN").is_none_or(|v| v != "1"),
        "cannot run here: {why}"
    );
    eprintln!("skipped: {why}");
}

#[derive(Debug, Clone)]
pub(crate) enum Step {
    Write { offset: u64, len: u64, fill: u8 },
    Zero { offset: u64, len: u64 },
    Punch { offset: u64, len: u64 },
    Flush,
    HandOverAndBack,
}

/// Places and lengths that like the borders of blocks and clusters.
pub(crate) fn place(size: u64) -> impl Strategy<Value = (u64, u64)> {
    let offset = prop_oneof![
        0..size,
        (0..size / 4096).prop_map(|n| n * 4096),
        (0..size / 65536).prop_map(|n| n * 65536)
    ];
    let len = prop_oneof![1..70_000u64, Just(4096), Just(65536), Just(262_144)];
    (offset, len).prop_map(move |(offset, len)| (offset, len.min(size - offset)))
}

pub(crate) fn steps(size: u64) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (place(size), 1u8..).prop_map(|((offset, len), fill)| Step::Write { offset, len, fill }),
        2 => place(size).prop_map(|(offset, len)| Step::Zero { offset, len }),
        2 => place(size).prop_map(|(offset, len)| Step::Punch { offset, len }),
        1 => Just(Step::Flush),
        1 => Just(Step::HandOverAndBack),
    ];
    prop::collection::vec(step, 1..40)
}

/// Does the steps on a disk and on plain bytes, and holds them side by side, with the map and the tracker.
pub(crate) fn follows_the_model(disk: &Disk, steps: Vec<Step>, model: &mut [u8]) {
    disk.tracker().start();
    let before = model.to_vec();
    for step in steps {
        match step {
            Step::Write { offset, len, fill } => {
                let data = vec![fill; len as usize];
                disk.write_at(&data, offset).unwrap();
                model[offset as usize..(offset + len) as usize].copy_from_slice(&data);
            }
            Step::Zero { offset, len } => {
                disk.write_zeroes_at(offset, len).unwrap();
                model[offset as usize..(offset + len) as usize].fill(0);
            }
            Step::Punch { offset, len } => {
                disk.punch(offset, len).unwrap();
                model[offset as usize..(offset + len) as usize].fill(0);
            }
            Step::Flush => disk.flush().unwrap(),
            Step::HandOverAndBack => {
                disk.release_lock().unwrap();
                assert!(
                    disk.read_at(&mut [0], 0).is_err(),
                    "an image that was handed over is not ours to read"
                );
                disk.take_lock().unwrap();
            }
        }
    }
    let padded = model.len() as u64;
    assert!(contents(disk) == model, "the disk differs from the model");
    // The map covers the disk without gaps, and what it calls empty is empty.
    let mut at = 0;
    for area in disk.areas(0..u64::MAX) {
        let area = area.unwrap();
        assert_eq!(area.offset, at);
        at += area.len;
        let bytes = &model[area.offset as usize..at as usize];
        assert!(
            area.kind == AreaKind::Data || bytes.iter().all(|b| *b == 0),
            "{area:?} holds data"
        );
    }
    assert_eq!(at, padded);
    // What changed is in the tracker.
    let dirty = disk.tracker().take();
    for (cluster, (old, new)) in before
        .chunks(CLUSTER_SIZE as usize)
        .zip(model.chunks(CLUSTER_SIZE as usize))
        .enumerate()
    {
        let cluster = cluster as u64;
        assert!(
            old == new || dirty.iter().any(|run| run.contains(&cluster)),
            "cluster {cluster} changed unseen"
        );
    }
}

pub(crate) fn check_qcow2(path: &Path) {
    let path = path.to_str().unwrap();
    if let Some(said) = qemu_img(&["check", "-f", "qcow2", path]) {
        assert!(said.contains("No errors were found"), "{said}");
        assert!(!said.contains("leaked"), "{said}");
    }
}

/// The bytes of an image as qemu-img sees them.
pub(crate) fn by_qemu(path: &Path, format: &str) -> Option<Vec<u8>> {
    let raw: PathBuf = path.with_extension("as-raw");
    qemu_img(&[
        "convert",
        "-f",
        format,
        "-O",
        "raw",
        path.to_str().unwrap(),
        raw.to_str().unwrap(),
    ])?;
    Some(std::fs::read(raw).unwrap())
}
