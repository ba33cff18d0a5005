//! Waiting for a machine's process to be gone.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use ferry_vmm::name::Name;
use ferry_vmm::rundir::Base;

const STEP: Duration = Duration::from_millis(20);

/// False: it still lives after that time.
pub(super) fn wait(base: &Base, name: &Name, limit: Duration) -> Result<bool> {
    let begun = Instant::now();
    while base.entry(name)?.is_some_and(|entry| entry.pid.is_some()) {
        if begun.elapsed() >= limit {
            return Ok(false);
        }
        thread::sleep(STEP);
    }
    Ok(true)
}
