//! A machine comes back to a host that never heard whether it had left: what stands still there in doubt is an old copy,
//! and makes room.

use std::time::{Duration, Instant};

use ferry_migration::failure::{Cause, Reason, Whereabouts};
use ferry_migration::handover::{Ledger as _, MachineId};

use super::ledger;
use crate::control::api::ResolveRequest;
use crate::control::client::Client;
use crate::name::Name;
use crate::rundir::{Base, Entry};

/// How long the old copy's process may take to end.
const ENDING: Duration = Duration::from_secs(15);
const STEP: Duration = Duration::from_millis(10);

/// The process that has a copy of this machine under this name and does not know whether it still is the machine.
pub(super) fn old_copy(base: &Base, name: &Name, machine: MachineId) -> Option<Entry> {
    let entry = base.alive(name).ok()?;
    let session = Client::of(&entry).ok()?.doubt().ok()?.session?;
    let records = ledger::open(base).ok()?.records(machine).ok()?;
    let about_it = records.iter().any(|record| record.session.to_string() == session);
    about_it.then_some(entry)
}

/// Tells that process to look into the ledger, where the engine has written that the machine is gone from here; it ends.
pub(super) fn make_room(base: &Base, name: &Name, machine: MachineId) -> Result<(), Reason> {
    let Some(entry) = old_copy(base, name, machine) else {
        return Ok(());
    };
    let failed = |why: String| {
        let sentence = format!("the copy of {name} that stands still at this host did not end: {why}");
        Reason::new(Cause::Busy, sentence)
    };
    let client = Client::of(&entry).map_err(|error| failed(error.to_string()))?;
    let resolution = client
        .resolve(&ResolveRequest::default())
        .map_err(|error| failed(error.to_string()))?;
    if resolution.whereabouts != Whereabouts::There {
        return Err(failed(resolution.evidence));
    }
    let begun = Instant::now();
    while base.alive(name).is_ok_and(|now| now.pid == entry.pid) {
        if begun.elapsed() > ENDING {
            return Err(failed("its process does not end".to_owned()));
        }
        std::thread::sleep(STEP);
    }
    Ok(())
}
