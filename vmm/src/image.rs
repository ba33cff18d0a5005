//! Reading a disk image that no machine uses, for those who check what a guest wrote to it.

use std::io;
use std::path::Path;

use ferry_devices::disk::{Disk, DiskError, DiskOptions};

/// An image in the format that its first bytes say. It names no further files, and is locked against writers meanwhile.
pub struct ImageReader(Disk);

impl ImageReader {
    pub fn open(path: &Path) -> Result<ImageReader, DiskError> {
        let options = DiskOptions {
            format: None,
            read_only: true,
            ..DiskOptions::new(path)
        };
        Disk::open(&options).map(ImageReader)
    }

    /// What the guest sees of it.
    pub fn size_bytes(&self) -> u64 {
        self.0.size()
    }

    pub fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(data, offset)
    }
}
