//! Images that call themselves qcow2: opened, read, written and mapped, or refused.

use ferry_devices::disk::{Disk, DiskFormat, DiskOptions};

use crate::rig::nameless;

/// Requests end here, however large the image says it is.
const REACH: u64 = 4 << 20;

pub(crate) fn image(bytes: &[u8]) {
    let mut file = b"QFI\xfb".to_vec();
    file.extend_from_slice(bytes);
    let (_file, path) = nameless(&file, 0);
    let _ = Disk::find_format(&path);
    for read_only in [true, false] {
        let options = DiskOptions {
            format: Some(DiskFormat::Qcow2),
            read_only,
            ..DiskOptions::new(&path)
        };
        let Ok(disk) = Disk::open(&options) else { continue };
        let end = disk.size().min(REACH);
        let mut data = vec![0; 20_000];
        let middle = (end / 2).next_multiple_of(512);
        for at in [0, middle, disk.size().saturating_sub(20_000)] {
            let _ = disk.read_at(&mut data, at);
            let _ = disk.write_at(&data, at);
        }
        let _ = disk.punch(0, 65536.min(end));
        let _ = disk.write_zeroes_at(middle, 65536.min(end - middle.min(end)));
        let _ = disk.areas(0..end).take(1000).filter(Result::is_err).count();
        let _ = disk.flush();
        let _ = disk.release_lock();
    }
}
