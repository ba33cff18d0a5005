//! What a qcow2 header asks for, read before anything else is done with the image, so that what cannot be
//! supported is refused with its own sentence.

use std::path::{Path, PathBuf};

use super::error::DiskError;

/// The header lies in the first cluster, and the smallest clusters have 512 bytes.
pub(crate) const HEAD_LEN: u64 = 64 * 1024;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const MAX_BACKING_NAME: usize = 1023;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Qcow2Header {
    pub(crate) version: u32,
    pub(crate) size: u64,
    pub(crate) cluster_size: u64,
    /// Where the table of refcount blocks is, and how long.
    pub(crate) refcount_table: u64,
    pub(crate) refcount_table_clusters: u64,
    pub(crate) backing: Option<Backing>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Backing {
    /// As written in the header; relative to the image's directory.
    pub(crate) name: PathBuf,
    pub(crate) format: Option<String>,
}

pub(crate) fn parse(path: &Path, head: &[u8], write: bool) -> Result<Qcow2Header, DiskError> {
    let refuse = |what: &str| DiskError::unsupported(path, what);
    let damaged = || refuse("has a damaged qcow2 header; repair it with `qemu-img check -r all`");
    let u32_at = |at: usize| head.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
    let u64_at = |at: usize| head.get(at..at + 8)?.try_into().ok().map(u64::from_be_bytes);

    let version = u32_at(4).ok_or_else(damaged)?;
    let bits = u32_at(20).ok_or_else(damaged)?;
    let size = u64_at(24).ok_or_else(damaged)?;
    if !(2..=3).contains(&version) {
        return Err(refuse(
            "is qcow2 of a version other than 2 and 3; convert it with `qemu-img convert -O qcow2`",
        ));
    }
    if !(9..=21).contains(&bits) || size > i64::MAX as u64 {
        return Err(damaged());
    }
    if u32_at(32).ok_or_else(damaged)? != 0 {
        return Err(refuse(
            "is encrypted, which is not supported; decrypt it with `qemu-img convert`",
        ));
    }
    if u32_at(60).ok_or_else(damaged)? != 0 && write {
        return Err(refuse(
            "has internal snapshots, which cannot be kept while writing; remove them with `qemu-img snapshot -d`, \
            or attach it with `readonly`",
        ));
    }
    let (incompatible, autoclear, header_len) = if version == 2 {
        (0, 0, 72)
    } else {
        let len = u32_at(100).ok_or_else(damaged)? as usize;
        (
            u64_at(72).ok_or_else(damaged)?,
            u64_at(88).ok_or_else(damaged)?,
            len,
        )
    };
    refuse_features(incompatible).map_err(refuse)?;
    if autoclear & 1 != 0 && write {
        return Err(refuse(
            "has persistent bitmaps, which would become wrong; remove them with `qemu-img bitmap --remove`, \
            or attach it with `readonly`",
        ));
    }
    let name_at = usize::try_from(u64_at(8).ok_or_else(damaged)?).map_err(|_| damaged())?;
    let backing = if name_at == 0 {
        None
    } else {
        let name_len = u32_at(16).ok_or_else(damaged)? as usize;
        let end = name_at
            .checked_add(name_len)
            .filter(|_| name_len <= MAX_BACKING_NAME);
        let name = end.and_then(|end| head.get(name_at..end)).ok_or_else(damaged)?;
        let name = std::str::from_utf8(name).map_err(|_| damaged())?;
        if name.starts_with("json:") || name.contains("://") {
            return Err(refuse(
                "names a base image that is not a file, which is not supported; copy the base first",
            ));
        }
        let format = extension(head, header_len, BACKING_FORMAT)
            .map(|text| String::from_utf8_lossy(text).into_owned());
        Some(Backing {
            name: name.into(),
            format,
        })
    };
    Ok(Qcow2Header {
        version,
        size,
        cluster_size: 1 << bits,
        refcount_table: u64_at(48).ok_or_else(damaged)?,
        refcount_table_clusters: u32_at(56).ok_or_else(damaged)?.into(),
        backing,
    })
}

fn refuse_features(incompatible: u64) -> Result<(), &'static str> {
    let features = [
        (
            0,
            "was not closed cleanly; repair it with `qemu-img check -r all`",
        ),
        (1, "is marked as corrupt; repair it with `qemu-img check -r all`"),
        (
            2,
            "keeps its data in a second file, which is not supported; convert it with `qemu-img convert -O qcow2`",
        ),
        (
            3,
            "is compressed with something else than zlib, which is not supported; \
            convert it with `qemu-img convert -O qcow2`",
        ),
        (
            4,
            "has extended L2 entries, which are not supported; \
            convert it with `qemu-img convert -O qcow2 -o extended_l2=off`",
        ),
    ];
    match features.iter().find(|(bit, _)| incompatible & (1 << bit) != 0) {
        Some((_, what)) => Err(what),
        None if incompatible >> 5 != 0 => Err(
            "needs a qcow2 feature that is newer than this program; convert it with `qemu-img convert -O qcow2`",
        ),
        None => Ok(()),
    }
}

/// The data of one header extension.
fn extension(head: &[u8], mut at: usize, wanted: u32) -> Option<&[u8]> {
    loop {
        let kind = u32::from_be_bytes(head.get(at..at.checked_add(4)?)?.try_into().ok()?);
        let len = u32::from_be_bytes(head.get(at + 4..at + 8)?.try_into().ok()?) as usize;
        let data = head.get(at + 8..(at + 8).checked_add(len)?)?;
        match kind {
            0 => return None,
            kind if kind == wanted => return Some(data),
            _ => at = (at + 8).checked_add(len.next_multiple_of(8))?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(incompatible: u64) -> Vec<u8> {
        let mut head = vec![0; 512];
        head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        head[20..24].copy_from_slice(&16u32.to_be_bytes());
        head[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        head[72..80].copy_from_slice(&incompatible.to_be_bytes());
        head[100..104].copy_from_slice(&104u32.to_be_bytes());
        head
    }

    fn refused(head: &[u8], write: bool) -> String {
        parse(Path::new("d.qcow2"), head, write).unwrap_err().to_string()
    }

    #[test]
    fn every_limit_has_its_own_sentence() {
        assert!(parse(Path::new("d"), &header(0), true).is_ok());
        let sentences: std::collections::BTreeSet<_> =
            (0..6).map(|bit| refused(&header(1 << bit), false)).collect();
        assert_eq!(sentences.len(), 6);
        let with = |at: usize, value: u8| {
            let mut head = header(0);
            head[at] = value;
            head
        };
        assert!(refused(&with(35, 1), false).contains("encrypted"));
        assert!(refused(&with(63, 2), true).contains("snapshots"));
        assert!(parse(Path::new("d"), &with(63, 2), false).is_ok());
        assert!(refused(&with(95, 1), true).contains("bitmaps"));
        assert!(refused(&with(7, 9), true).contains("version"));
        assert!(refused(&header(0)[..80], true).contains("damaged"));
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(mut head in prop::collection::vec(any::<u8>(), 0..600), fix in any::<bool>()) {
            if fix && head.len() > 104 {
                head[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
                head[20..24].copy_from_slice(&16u32.to_be_bytes());
                head[24..36].fill(0);
                head[60..64].fill(0);
                head[72..80].fill(0);
            }
            let _ = parse(Path::new("d"), &head, true);
        }
    }
}
