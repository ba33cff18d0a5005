//! What must survive a crash of a crossing: who may run which machine, and the reports of what happened.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ferry_migration::handover::LedgerId;
use ferry_migration::ledger::FileLedger;
use ferry_migration::report::Report;

use super::depart::random;
use crate::error::{MachineError, Result};
use crate::name::Name;
use crate::rundir::Base;

/// The ledger of this host (of this runtime directory, where one was named), without records that nothing needs.
pub fn open(base: &Base) -> Result<FileLedger> {
    let ledger = FileLedger::open(&base.state_dir().join("ledger"), LedgerId(random()?))
        .map_err(|error| MachineError::Host(error.to_string()))?;
    if let Err(error) = ledger.prune(SystemTime::now()) {
        tracing::warn!("old records stay in the ledger: {error}");
    }
    Ok(ledger)
}

fn reports(base: &Base) -> PathBuf {
    base.state_dir().join("reports")
}

/// The newest report of a machine, if there is one.
pub fn newest_report(base: &Base, name: &Name) -> Option<PathBuf> {
    let path = reports(base).join(format!("{name}.json"));
    path.exists().then_some(path)
}

/// Puts a report in the place of the kept one of the same crossing: something was added to it.
pub fn amend_report(base: &Base, name: &Name, report: &Report) {
    let Some(path) = newest_report(base, name) else {
        return;
    };
    let amend = || -> std::io::Result<()> {
        let kept: Report = serde_json::from_slice(&std::fs::read(&path)?)?;
        if kept.session == report.session {
            std::fs::write(&path, serde_json::to_vec_pretty(report)?)?;
        }
        Ok(())
    };
    if let Err(error) = amend() {
        tracing::warn!("the report in {} could not be completed: {error}", path.display());
    }
}

/// Keeps a report where `ferry report NAME` finds it, and the one before it. A report that cannot be kept is logged: the
/// crossing happened all the same.
pub(super) fn keep_report(base: &Base, name: &Name, report: &Report) {
    let keep = |dir: &Path| -> std::io::Result<()> {
        std::fs::create_dir_all(dir)?;
        let path = dir.join(format!("{name}.json"));
        let _ = std::fs::rename(&path, dir.join(format!("{name}.previous.json")));
        std::fs::write(&path, serde_json::to_vec_pretty(report)?)
    };
    let dir = reports(base);
    if let Err(error) = keep(&dir) {
        tracing::warn!("the report could not be kept in {}: {error}", dir.display());
    }
}
