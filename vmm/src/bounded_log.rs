//! A log file that cannot fill the disk, which for a runtime directory is memory.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// At its limit it becomes FILE.1 and begins anew.
#[derive(Debug)]
pub struct BoundedLog {
    path: PathBuf,
    file: File,
    written: u64,
    limit_bytes: u64,
}

impl BoundedLog {
    pub fn create(path: &Path, limit_bytes: u64) -> io::Result<BoundedLog> {
        let file = open_log(path)?;
        Ok(BoundedLog {
            path: path.to_owned(),
            file,
            written: 0,
            limit_bytes,
        })
    }
}

fn open_log(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

impl io::Write for BoundedLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.written + bytes.len() as u64 > self.limit_bytes && self.written > 0 {
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            fs::rename(&self.path, old)?;
            self.file = open_log(&self.path)?;
            self.written = 0;
        }
        let count = self.file.write(bytes)?;
        self.written += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_log_keeps_its_newest_lines_within_its_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = BoundedLog::create(&path, 1000).unwrap();
        for n in 0..100 {
            writeln!(log, "line {n:04} {}", "x".repeat(30)).unwrap();
        }
        assert!(fs::metadata(&path).unwrap().len() <= 1000);
        assert!(fs::read_to_string(&path).unwrap().contains("line 0099"));
        assert!(fs::metadata(dir.path().join("log.1")).unwrap().len() <= 1000);
    }
}
