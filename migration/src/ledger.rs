//! The ledger as files: one small JSON file per crossing, written so that it survives a crash of the host.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::failure::{Cause, Reason};
use crate::handover::{Ledger, LedgerId, MachineId, Record, SessionId};

/// A record is some 400 bytes; a longer file is not ours.
const MAX_RECORD_BYTES: u64 = 64 << 10;

pub struct FileLedger {
    directory: PathBuf,
    id: LedgerId,
}

impl FileLedger {
    /// Opens the ledger in `directory`, or begins one there under the name `fresh`, which must be random.
    pub fn open(directory: &Path, fresh: LedgerId) -> Result<Self, Reason> {
        fs::create_dir_all(directory).map_err(|e| failed("make the directory", directory, &e))?;
        let path = directory.join("ledger.id");
        let id = match fs::read(&path) {
            Ok(bytes) => LedgerId(bytes.as_slice().try_into().map_err(|_| {
                Reason::new(
                    Cause::Ledger,
                    format!("{} is not the name of a ledger", path.display()),
                )
            })?),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                write_durably(directory, &path, &fresh.0)?;
                fresh
            }
            Err(e) => return Err(failed("read", &path, &e)),
        };
        Ok(FileLedger {
            directory: directory.to_path_buf(),
            id,
        })
    }

    fn path(&self, session: SessionId) -> PathBuf {
        self.directory.join(format!("{session}.crossing"))
    }

    /// Every record, for `ferry resolve` without a name.
    pub fn all(&self) -> Result<Vec<Record>, Reason> {
        let listing = fs::read_dir(&self.directory).map_err(|e| failed("list", &self.directory, &e))?;
        let mut records = Vec::new();
        for entry in listing {
            let path = entry.map_err(|e| failed("list", &self.directory, &e))?.path();
            if path.extension().is_some_and(|extension| extension == "crossing") {
                records.extend(load(&path)?);
            }
        }
        Ok(records)
    }

    /// Forgets a crossing that is settled on both sides.
    pub fn forget(&mut self, session: SessionId) -> Result<(), Reason> {
        let path = self.path(session);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(failed("remove", &path, &e)),
            _ => Ok(()),
        }
    }
}

impl Ledger for FileLedger {
    fn id(&self) -> LedgerId {
        self.id
    }

    fn write(&mut self, record: &Record) -> Result<(), Reason> {
        let text = serde_json::to_vec_pretty(record)
            .map_err(|e| Reason::new(Cause::Ledger, format!("the ledger record cannot be written: {e}")))?;
        write_durably(&self.directory, &self.path(record.session), &text)
    }

    fn read(&self, session: SessionId) -> Result<Option<Record>, Reason> {
        load(&self.path(session))
    }

    fn records(&self, machine: MachineId) -> Result<Vec<Record>, Reason> {
        Ok(self
            .all()?
            .into_iter()
            .filter(|record| record.machine == machine)
            .collect())
    }
}

fn load(path: &Path) -> Result<Option<Record>, Reason> {
    let size = match fs::metadata(path) {
        Ok(about) => about.len(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed("look at", path, &e)),
    };
    if size > MAX_RECORD_BYTES {
        return Err(Reason::new(
            Cause::Ledger,
            format!("{} is too long for a record", path.display()),
        ));
    }
    let text = fs::read(path).map_err(|e| failed("read", path, &e))?;
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|e| Reason::new(Cause::Ledger, format!("{} is damaged: {e}", path.display())))
}

/// Beside, synced, renamed, and the directory synced: after a crash there is the old file or the new one.
fn write_durably(directory: &Path, path: &Path, bytes: &[u8]) -> Result<(), Reason> {
    let beside = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|e| failed("write", path, &e))
}

fn failed(verb: &str, path: &Path, error: &std::io::Error) -> Reason {
    Reason::new(
        Cause::Ledger,
        format!("the ledger could not {verb} {}: {error}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Side;
    use crate::handover::{Standing, answer_from_ledger, check_epoch, next_epoch};

    fn record(session: u8, epoch: u64, side: Side, standing: Standing) -> Record {
        Record {
            session: SessionId([session; 16]),
            machine: MachineId([7; 16]),
            epoch,
            side,
            standing,
            peer: Some(LedgerId([9; 16])),
        }
    }

    #[test]
    fn a_ledger_opened_again_is_the_same_ledger_with_the_same_records() {
        let room = tempfile::tempdir().unwrap();
        let mut ledger = FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let kept = record(5, 3, Side::Incoming, Standing::Taken);
        ledger.write(&kept).unwrap();
        let again = FileLedger::open(room.path(), LedgerId([2; 16])).unwrap();
        assert_eq!(again.id(), LedgerId([1; 16]));
        assert_eq!(again.read(kept.session).unwrap(), Some(kept.clone()));
        assert_eq!(again.records(kept.machine).unwrap(), vec![kept]);
        assert_eq!(again.records(MachineId([0; 16])).unwrap(), vec![]);
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_an_absent_one() {
        let room = tempfile::tempdir().unwrap();
        let ledger = FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        fs::write(ledger.path(SessionId([5; 16])), b"{").unwrap();
        assert_eq!(ledger.read(SessionId([5; 16])).unwrap_err().cause, Cause::Ledger);
        assert!(ledger.records(MachineId([7; 16])).is_err());
    }

    #[test]
    fn what_nobody_knows_is_declined_in_writing_before_it_is_said() {
        let room = tempfile::tempdir().unwrap();
        let mut ledger = FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let session = SessionId([5; 16]);
        assert_eq!(
            answer_from_ledger(&mut ledger, session).unwrap(),
            Standing::Declined
        );
        assert_eq!(
            ledger.read(session).unwrap().unwrap().standing,
            Standing::Declined
        );
        let taken = record(6, 1, Side::Incoming, Standing::Taken);
        ledger.write(&taken).unwrap();
        assert_eq!(
            answer_from_ledger(&mut ledger, taken.session).unwrap(),
            Standing::Taken
        );
    }

    #[test]
    fn an_old_copy_of_a_machine_that_left_neither_leaves_again_nor_comes_in() {
        let gone = [record(1, 4, Side::Outgoing, Standing::Gone)];
        assert_eq!(next_epoch(&gone).unwrap_err().cause, Cause::Busy);
        assert!(check_epoch(&gone, 4).is_err());
        assert!(check_epoch(&gone, 5).is_ok());
        let back = [gone[0].clone(), record(2, 5, Side::Incoming, Standing::Taken)];
        assert_eq!(next_epoch(&back).unwrap(), 6);
        assert!(check_epoch(&back, 5).is_err());
        let doubt = [record(3, 6, Side::Outgoing, Standing::GivenAway)];
        assert!(next_epoch(&doubt).is_err());
        assert!(check_epoch(&doubt, 7).is_err());
        let kept = [record(3, 6, Side::Outgoing, Standing::Kept)];
        assert_eq!(next_epoch(&kept).unwrap(), 7);
    }
}
