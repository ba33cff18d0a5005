//! A file (or bytes) to be put into guest memory. Its length is known, and nothing is read beyond it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use ferry_devices::ram::Ram;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::error::{MachineError, Result};

pub struct Image<'a> {
    /// For messages: "the kernel /boot/vmlinuz".
    name: String,
    source: Source<'a>,
    len: u64,
}

enum Source<'a> {
    Bytes(&'a [u8]),
    File(File),
}

impl<'a> Image<'a> {
    pub fn bytes(what: &str, bytes: &'a [u8]) -> Image<'a> {
        Image {
            name: format!("the {what}"),
            source: Source::Bytes(bytes),
            len: bytes.len() as u64,
        }
    }

    pub fn open(what: &str, path: &Path) -> Result<Image<'static>> {
        let name = format!("the {what} {}", path.display());
        let unreadable = |e: std::io::Error| MachineError::Host(format!("{name} cannot be read: {e}"));
        let file = File::open(path).map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        if !meta.is_file() {
            let kind = if meta.is_dir() {
                "a directory"
            } else {
                "no regular file"
            };
            return Err(MachineError::Host(format!("{name} cannot be read: it is {kind}")));
        }
        Ok(Image {
            name,
            source: Source::File(file),
            len: meta.len(),
        })
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// An error that names the file.
    pub fn refuse(&self, why: &str) -> MachineError {
        MachineError::Host(format!("{} cannot be used: {why}", self.name))
    }

    /// `N` bytes at an offset; None where the file has no such bytes.
    pub fn read<const N: usize>(&self, offset: u64) -> Option<[u8; N]> {
        let mut out = [0u8; N];
        self.read_into(offset, &mut out).then_some(out)
    }

    pub fn read_into(&self, offset: u64, out: &mut [u8]) -> bool {
        let Some(end) = offset
            .checked_add(out.len() as u64)
            .filter(|end| *end <= self.len)
        else {
            return false;
        };
        match &self.source {
            Source::Bytes(bytes) => match bytes.get(offset as usize..end as usize) {
                Some(from) => {
                    out.copy_from_slice(from);
                    true
                }
                None => false,
            },
            Source::File(file) => file.read_exact_at(out, offset).is_ok(),
        }
    }

    /// Copies a part into guest memory, whole or not at all.
    pub fn load(&self, ram: &Ram, at: u64, offset: u64, len: u64) -> Result<()> {
        const CHUNK: usize = 1 << 20;
        let inside = |start: u64, len: u64, end: u64| start.checked_add(len).is_some_and(|e| e <= end);
        if !inside(offset, len, self.len) {
            return Err(self.refuse(&format!(
                "it has only {} bytes, and its headers point to {len} bytes at {offset:#x}; is it cut off?",
                self.len
            )));
        }
        let in_memory = usize::try_from(len).is_ok_and(|len| ram.check_range(GuestAddress(at), len));
        if !in_memory {
            return Err(self.refuse(&format!(
                "it wants {len} bytes at {at:#x}, where the machine has no memory; give it more with --memory"
            )));
        }
        let mut buffer = vec![0u8; CHUNK.min(len as usize)];
        let mut done = 0;
        while done < len {
            let part = buffer.len().min((len - done) as usize);
            let Some(piece) = buffer.get_mut(..part) else {
                break;
            };
            if !self.read_into(offset + done, piece) {
                return Err(self.refuse("reading it failed half-way"));
            }
            ram.write_slice(piece, GuestAddress(at + done))
                .map_err(|e| self.refuse(&format!("copying it into guest memory failed: {e}")))?;
            done += part as u64;
        }
        Ok(())
    }
}
