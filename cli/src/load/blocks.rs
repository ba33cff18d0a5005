//! The blocks of a guest's disk, read from its image, and the words in them.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use ferry_vmm::image::ImageReader;

pub(super) const BLOCK: usize = 4096;
pub(super) const CHECKSUM_AT: usize = BLOCK - 4;

pub(super) type Block = [u8; BLOCK];

pub(super) fn word(block: &Block, index: usize) -> u64 {
    let bytes = block.get(8 * index..).and_then(|rest| rest.first_chunk());
    u64::from_le_bytes(bytes.copied().unwrap_or_default())
}

pub(super) fn is_sealed(block: &Block) -> bool {
    let (body, sum) = block.split_at(CHECKSUM_AT);
    crc32c::crc32c(body).to_le_bytes() == *sum
}

/// A raw image or block device, whose length need not be one of a disk; or a qcow2 image.
pub(super) struct Image {
    path: PathBuf,
    kind: Kind,
}

enum Kind {
    Raw(File),
    Qcow2(Box<ImageReader>),
}

impl Image {
    pub(super) fn open(path: &Path) -> Result<Image> {
        let name = path.display();
        let opening = || format!("could not open {name}");
        let mut file = File::open(path).with_context(opening)?;
        let mut magic = [0; 4];
        // One that is shorter has no journal either, which is said when it is looked for.
        let qcow2 = file.read_exact(&mut magic).is_ok() && magic == *b"QFI\xfb";
        let kind = match qcow2 {
            true => Kind::Qcow2(Box::new(ImageReader::open(path).with_context(opening)?)),
            false => Kind::Raw(file),
        };
        Ok(Image {
            path: path.to_owned(),
            kind,
        })
    }

    /// How many blocks the guest has.
    pub(super) fn blocks(&self) -> Result<u64> {
        let bytes = match &self.kind {
            Kind::Qcow2(image) => image.size_bytes(),
            Kind::Raw(file) => {
                let mut end = file;
                end.seek(SeekFrom::End(0))
                    .with_context(|| format!("could not tell the size of {}", self.path.display()))?
            }
        };
        Ok(bytes / BLOCK as u64)
    }

    pub(super) fn read(&self, index: u64) -> Result<Block> {
        let mut block = [0; BLOCK];
        let at = index.saturating_mul(BLOCK as u64);
        let read = match &self.kind {
            Kind::Raw(file) => file.read_exact_at(&mut block, at),
            Kind::Qcow2(image) => image.read_at(&mut block, at),
        };
        read.with_context(|| format!("could not read block {index} of {}", self.path.display()))?;
        Ok(block)
    }
}
