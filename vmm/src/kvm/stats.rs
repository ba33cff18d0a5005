//! What KVM counts of a vCPU (`KVM_GET_STATS_FD`): a file that describes itself, read without disturbing the vCPU.
//!
//! Of its counters one is of use here: how many page faults KVM has mended for the vCPU. While writes are tracked, a write to
//! a protected page is one of them, wherever KVM tracks by protecting (shadow paging; two-dimensional paging without a
//! log of modified pages in the processor). Other faults count too: the first touch of a page. Whoever draws conclusions
//! holds the number against what was found written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use kvm_ioctls::VcpuFd;

use crate::kvm::raw;

/// Faults that put a page where it was missing or protected, and those that were mended without a lock.
const MENDED: [&str; 2] = ["pf_fixed", "pf_fast"];
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
/// KVM has some fifty counters; what says otherwise is not what we know.
const MOST_DESCRIPTORS: u32 = 1000;
const MOST_NAME_BYTES: u32 = 256;

/// The statistics of one vCPU.
pub struct VcpuStats {
    file: File,
    /// Where in the file the numbers are.
    mended_at: Vec<u64>,
}

fn word(bytes: &[u8], at: usize) -> io::Result<u32> {
    let four = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    four.map(u32::from_ne_bytes)
        .ok_or_else(|| io::Error::other("the statistics are cut short"))
}

impl VcpuStats {
    /// An error where KVM has no such statistics or they are not as described.
    pub fn open(vcpu: &VcpuFd) -> io::Result<VcpuStats> {
        let file = File::from(raw::stats_fd(vcpu)?);
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let (name_bytes, count) = (word(&header, 4)?, word(&header, 8)?);
        let (described_at, data_at) = (word(&header, 16)?, word(&header, 20)?);
        if count > MOST_DESCRIPTORS || name_bytes > MOST_NAME_BYTES {
            return Err(io::Error::other("the statistics are in a form that is not known"));
        }
        let each = DESCRIPTOR_BYTES + name_bytes as usize;
        let mut descriptors = vec![0; each * count as usize];
        file.read_exact_at(&mut descriptors, u64::from(described_at))?;
        let mut mended_at = Vec::new();
        for descriptor in descriptors.chunks_exact(each) {
            let name = descriptor.get(DESCRIPTOR_BYTES..).unwrap_or_default();
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            if MENDED.iter().any(|wanted| wanted.as_bytes() == name) {
                mended_at.push(u64::from(data_at) + u64::from(word(descriptor, 8)?));
            }
        }
        if mended_at.is_empty() {
            return Err(io::Error::other("KVM does not count page faults here"));
        }
        Ok(VcpuStats { file, mended_at })
    }

    /// Page faults that KVM has mended for the vCPU since it was made.
    pub fn faults(&self) -> io::Result<u64> {
        let mut sum = 0;
        for at in &self.mended_at {
            let mut number = [0; 8];
            self.file.read_exact_at(&mut number, *at)?;
            sum += u64::from_ne_bytes(number);
        }
        Ok(sum)
    }
}
