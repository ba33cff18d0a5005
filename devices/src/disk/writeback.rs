//! Has the kernel begin to write what its cache holds of a file.
#![allow(unsafe_code)] // sync_file_range has no safe wrapper.

use std::fs::File;
use std::os::fd::AsRawFd;

/// Returns before it is written, and reports no error: whoever needs it on the medium flushes, and hears of errors there.
pub(crate) fn begin(file: &File) {
    // SAFETY: the descriptor is open for the length of the call, which touches no memory of ours.
    let begun = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    if begun != 0 {
        let error = std::io::Error::last_os_error();
        tracing::debug!("writing back early was refused: {error}");
    }
}
