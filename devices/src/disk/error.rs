//! What can go wrong with a disk image, each as one sentence that says what to do.

use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("the disk image {} does not exist; create it or correct the path", .0.display())]
    Missing(PathBuf),
    #[error("the disk image {} exists already; remove it or choose another name", .0.display())]
    Exists(PathBuf),
    #[error("{} is {what}, not a disk image; give a file or a block device", path.display())]
    NotAnImage { path: PathBuf, what: &'static str },
    #[error("the disk image {path} is empty; give it a size, for example with `truncate -s 1G {path}`", path = .0.display())]
    Empty(PathBuf),
    #[error(
        "the disk image {} is {len} bytes long, which is not a multiple of {unit}; \
        extend it, for example with `truncate -s {} {}`", path.display(), len.next_multiple_of(*unit), path.display()
    )]
    OddSize { path: PathBuf, len: u64, unit: u64 },
    #[error("the disk image {} may only be read; make it writable or attach it with `readonly`", .0.display())]
    ReadOnly(PathBuf),
    #[error(
        "the disk image {} is in use by another program ({wanted}); stop the other one first",
        path.display()
    )]
    InUse { path: PathBuf, wanted: &'static str },
    #[error("the disk image {} {what}", path.display())]
    Unsupported { path: PathBuf, what: String },
    #[error("the disk image {} was handed over and is not ours to use", .0.display())]
    HandedOver(PathBuf),
    #[error("the disk image {}: {doing}: {source}", path.display())]
    Io {
        path: PathBuf,
        doing: &'static str,
        source: io::Error,
    },
}

impl DiskError {
    pub(crate) fn io(path: &Path, doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, doing, source }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Self::Unsupported {
            path: path.to_owned(),
            what: what.into(),
        }
    }
}
