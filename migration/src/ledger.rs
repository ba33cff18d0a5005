//! The ledger as files: one small file for each side of a crossing, with room for two versions of its record, of
//! which one is always whole.
//!
//! Several processes of a host share its ledger: one may wait for a machine's go-ahead while another answers somebody
//! who asks for a final word. So a record is only overwritten by who has seen its newest version, under a lock on its
//! file: who comes second learns that it was settled meanwhile, and binds itself to nothing.
//!
//! Records that no later question needs ([`is_needed`]) go after a while. Who has read a record keeps its file open: one
//! that was removed since, and perhaps begun anew under the same name, is not mistaken for the one that was read.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::failure::{Cause, Reason, Side};
use crate::handover::{BootId, Ledger, LedgerId, MachineId, Record, SessionId, is_needed};

/// A version of a record, padded: one sector, so that it is written whole or not at all, and in place, because
/// making a file durable takes several times as long as overwriting it, and the machine stands still meanwhile.
const SLOT_BYTES: usize = 512;

/// How long records are kept that nothing needs, for a person who looks.
const KEEP_FOR: Duration = Duration::from_secs(30 * 24 * 3600);
/// How many of them are kept.
const KEEP_MOST: usize = 1000;

pub struct FileLedger {
    directory: PathBuf,
    id: LedgerId,
    boot: Option<BootId>,
    /// The version of each record that was read or written here last.
    seen: RefCell<HashMap<PathBuf, Seen>>,
}

struct Seen {
    count: u64,
    file: File,
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
            boot: boot_id(),
            seen: RefCell::default(),
        })
    }

    fn path(&self, session: SessionId, side: Side) -> PathBuf {
        let side = match side {
            Side::Outgoing => "out",
            Side::Incoming => "in",
        };
        self.directory.join(format!("{session}.{side}.crossing"))
    }

    /// Every record, for `ferry resolve` without a name.
    pub fn all(&self) -> Result<Vec<Record>, Reason> {
        let listing = fs::read_dir(&self.directory).map_err(|e| failed("list", &self.directory, &e))?;
        let mut records = Vec::new();
        for entry in listing {
            let path = entry.map_err(|e| failed("list", &self.directory, &e))?.path();
            if path.extension().is_some_and(|extension| extension == "crossing") {
                records.extend(load(&path)?.map(|record| self.as_it_stands(record)));
            }
        }
        Ok(records)
    }

    fn put(&mut self, record: &Record, durably: bool) -> Result<(), Reason> {
        let path = self.path(record.session, record.side);
        let seen = self.seen.get_mut();
        let Some(Seen { count, file }) = seen.get_mut(&path) else {
            let bytes = [slot(record, 1)?, [0; SLOT_BYTES]].concat();
            let file =
                create_durably(&self.directory, &path, &bytes).map_err(|error| match error.kind() {
                    std::io::ErrorKind::AlreadyExists => settled(record.session),
                    _ => failed("write", &path, &error),
                })?;
            seen.insert(path, Seen { count: 1, file });
            return Ok(());
        };
        file.lock().map_err(|e| failed("lock", &path, &e))?;
        let written = overwrite(file, &path, *count, record, durably);
        file.unlock().map_err(|e| failed("unlock", &path, &e))?;
        *count = written?;
        Ok(())
    }

    /// To a reader in this boot.
    fn as_it_stands(&self, record: Record) -> Record {
        Record {
            standing: record.standing_in(self.boot),
            ..record
        }
    }

    /// Removes records that nothing needs: those older than 30 days, and of the others all but the newest 1000. How many.
    pub fn prune(&self, now: SystemTime) -> Result<usize, Reason> {
        self.prune_to(now, KEEP_FOR, KEEP_MOST)
    }

    fn prune_to(&self, now: SystemTime, keep_for: Duration, keep_most: usize) -> Result<usize, Reason> {
        let listing = fs::read_dir(&self.directory).map_err(|e| failed("list", &self.directory, &e))?;
        let mut records = Vec::new();
        for path in listing.flatten().map(|entry| entry.path()) {
            // One that cannot be read stays, for whoever asks for it to stumble over.
            if path.extension().is_some_and(|extension| extension == "crossing")
                && let Ok(Some(record)) = load(&path)
                && let Ok(written) = fs::metadata(&path).and_then(|metadata| metadata.modified())
            {
                records.push((now.duration_since(written).unwrap_or_default(), path, record));
            }
        }
        let all: Vec<Record> = records
            .iter()
            .map(|(_, _, record)| self.as_it_stands(record.clone()))
            .collect();
        records.retain(|(_, _, record)| !is_needed(&self.as_it_stands(record.clone()), &all));
        records.sort_by_key(|(age, _, _)| *age);
        let old = records
            .iter()
            .enumerate()
            .filter(|(at, (age, _, _))| *at >= keep_most || *age > keep_for);
        Ok(old.filter(|(_, (_, path, record))| remove(path, record)).count())
    }
}

/// Removes a record, unless it has changed since or somebody is just writing it.
fn remove(path: &Path, judged: &Record) -> bool {
    let Ok(file) = File::options().read(true).write(true).open(path) else {
        return false;
    };
    file.try_lock().is_ok()
        && is_there(&file)
        && newest(&file, path).is_ok_and(|(_, _, record)| record == *judged)
        && fs::remove_file(path).is_ok()
}

impl Ledger for FileLedger {
    fn id(&self) -> LedgerId {
        self.id
    }

    fn boot(&self) -> Option<BootId> {
        self.boot
    }

    fn write(&mut self, record: &Record) -> Result<(), Reason> {
        self.put(record, true)
    }

    fn note(&mut self, record: &Record) -> Result<(), Reason> {
        self.put(record, false)
    }

    fn settle(&mut self, session: SessionId, side: Side) -> Result<(), Reason> {
        let path = self.path(session, side);
        match self.seen.get_mut().get(&path) {
            Some(Seen { file, .. }) => file.sync_data().map_err(|e| failed("write", &path, &e)),
            None => Ok(()),
        }
    }

    fn read(&self, session: SessionId, side: Side) -> Result<Option<Record>, Reason> {
        let path = self.path(session, side);
        let mut seen = self.seen.borrow_mut();
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed("open", &path, &e)),
        };
        let (_, count, record) = newest(&file, &path)?;
        seen.insert(path, Seen { count, file });
        Ok(Some(record))
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
    match File::open(path) {
        Ok(file) => newest(&file, path).map(|(_, _, record)| Some(record)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(failed("read", path, &e)),
    }
}

/// The next version, if `count` is the newest. The file must be locked.
fn overwrite(file: &File, path: &Path, count: u64, record: &Record, durably: bool) -> Result<u64, Reason> {
    let (at, newest, _) = newest(file, path)?;
    if newest != count || !is_there(file) {
        return Err(settled(record.session));
    }
    let next = count.saturating_add(1);
    let bytes = slot(record, next)?;
    file.write_all_at(&bytes, ((1 - at) * SLOT_BYTES) as u64)
        .and_then(|()| if durably { file.sync_data() } else { Ok(()) })
        .map_err(|e| failed("write", path, &e))?;
    Ok(next)
}

/// The number of the host's present boot, if it has one.
fn boot_id() -> Option<BootId> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let digits = text.trim().replace('-', "");
    let number = u128::from_str_radix(&digits, 16).ok()?;
    Some(BootId(number.to_be_bytes()))
}

/// Whether an open record still has its name: what was removed does not come back under another inode.
fn is_there(file: &File) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.nlink() > 0)
}

/// One version of a record: checksum, count, length, JSON.
fn slot(record: &Record, count: u64) -> Result<[u8; SLOT_BYTES], Reason> {
    let text = serde_json::to_vec(record)
        .map_err(|e| Reason::new(Cause::Ledger, format!("the ledger record cannot be written: {e}")))?;
    let mut bytes = [0; SLOT_BYTES];
    let (checksum, rest) = bytes.split_at_mut(4);
    let (head, body) = rest.split_at_mut(12);
    let room = body
        .get_mut(..text.len())
        .ok_or_else(|| Reason::new(Cause::Ledger, "the ledger record is too long"))?;
    room.copy_from_slice(&text);
    head[..8].copy_from_slice(&count.to_le_bytes());
    head[8..].copy_from_slice(&(text.len() as u32).to_le_bytes());
    checksum.copy_from_slice(&crc32c::crc32c(rest).to_le_bytes());
    Ok(bytes)
}

fn open_slot(bytes: &[u8]) -> Option<(u64, Record)> {
    let (checksum, rest) = bytes.split_first_chunk::<4>()?;
    if crc32c::crc32c(rest).to_le_bytes() != *checksum {
        return None;
    }
    let (count, rest) = rest.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let text = rest.get(..u32::from_le_bytes(*length) as usize)?;
    Some((u64::from_le_bytes(*count), serde_json::from_slice(text).ok()?))
}

/// The newest whole version: which slot, its count, the record. A slot that was being written when the host
/// crashed is not whole, and the other one counts; a file without any is damage, not absence.
fn newest(file: &File, path: &Path) -> Result<(usize, u64, Record), Reason> {
    let mut bytes = Vec::new();
    let mut from_start = file;
    from_start
        .seek(SeekFrom::Start(0))
        .and_then(|_| from_start.take(2 * SLOT_BYTES as u64).read_to_end(&mut bytes))
        .map_err(|e| failed("read", path, &e))?;
    let whole = bytes.chunks_exact(SLOT_BYTES).enumerate();
    whole
        .filter_map(|(at, slot)| open_slot(slot).map(|(count, record)| (at, count, record)))
        .max_by_key(|(_, count, _)| *count)
        .ok_or_else(|| Reason::new(Cause::Ledger, format!("{} is damaged", path.display())))
}

fn settled(session: SessionId) -> Reason {
    Reason::new(
        Cause::Ledger,
        format!("crossing {session} was settled by another process of this host meanwhile"),
    )
}

/// The same for a file that must not be there yet.
fn create_durably(directory: &Path, path: &Path, bytes: &[u8]) -> std::io::Result<File> {
    // A name of its own: two processes may begin the same record at once, and one of them must lose whole.
    let beside = path.with_extension(format!("{}.new", std::process::id()));
    let mut options = File::options();
    let mut file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let linked = fs::hard_link(&beside, path);
    fs::remove_file(&beside)?;
    linked?;
    File::open(directory)?.sync_all()?;
    Ok(file)
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
    use crate::handover::{
        Arrival, Departure, Standing, answer_from_ledger, check_epoch, next_epoch, settle_returned,
    };

    fn record(session: u8, epoch: u64, side: Side, standing: Standing) -> Record {
        Record {
            session: SessionId([session; 16]),
            machine: MachineId([7; 16]),
            epoch,
            side,
            standing,
            peer: Some(THERE),
            heard: false,
            boot: None,
        }
    }

    const THERE: LedgerId = LedgerId([9; 16]);

    #[test]
    fn who_waited_declines_after_a_crash_of_the_process_and_gives_no_word_after_one_of_the_host() {
        let room = tempfile::tempdir().unwrap();
        let open = || FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let mut before = open();
        let boot = before.boot().unwrap();
        let (one, other, third) = (SessionId([5; 16]), SessionId([6; 16]), SessionId([7; 16]));
        for session in [one, other] {
            Arrival::begin(&mut before, session, MachineId([7; 16]), 3, THERE).unwrap();
        }
        let mut taking = Arrival::begin(&mut before, third, MachineId([8; 16]), 3, THERE).unwrap();
        taking.take(&mut before).unwrap();
        drop(before);

        // The process died.
        let mut again = open();
        assert_eq!(answer_from_ledger(&mut again, one).unwrap(), Standing::Declined);
        assert_eq!(answer_from_ledger(&mut again, third).unwrap(), Standing::Taken);
        let stands = |ledger: &FileLedger, session: SessionId| {
            let all = ledger.all().unwrap();
            all.iter()
                .find(|record| record.session == session)
                .unwrap()
                .standing
        };
        assert_eq!(stands(&again, other), Standing::Declined);

        // The host did.
        let mut later = open();
        later.boot = Some(BootId([9; 16])).filter(|other| *other != boot);
        assert_eq!(answer_from_ledger(&mut later, one).unwrap(), Standing::Declined);
        assert_eq!(answer_from_ledger(&mut later, third).unwrap(), Standing::Taken);
        for _ in 0..2 {
            let silence = answer_from_ledger(&mut later, other).unwrap_err();
            assert!(
                silence.to_string().contains("restarted while it waited"),
                "{silence}"
            );
        }
        assert_eq!(stands(&later, other), Standing::Waiting);
        // And it is not forgotten, or the next answer would be a word.
        let year = Duration::from_secs(400 * 24 * 3600);
        later.prune(SystemTime::now() + year).unwrap();
        assert_eq!(stands(&later, other), Standing::Waiting);
        let mut open_again = open();
        assert_eq!(open_again.prune(SystemTime::now() + year).unwrap(), 1);
        assert_eq!(
            answer_from_ledger(&mut open_again, other).unwrap(),
            Standing::Declined
        );
    }

    #[test]
    fn a_ledger_opened_again_is_the_same_ledger_with_the_same_records() {
        let room = tempfile::tempdir().unwrap();
        let mut ledger = FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let kept = record(5, 3, Side::Incoming, Standing::Taken);
        ledger.write(&kept).unwrap();
        let again = FileLedger::open(room.path(), LedgerId([2; 16])).unwrap();
        assert_eq!(again.id(), LedgerId([1; 16]));
        assert_eq!(
            again.read(kept.session, Side::Incoming).unwrap(),
            Some(kept.clone())
        );
        assert_eq!(again.records(kept.machine).unwrap(), vec![kept]);
        assert_eq!(again.records(MachineId([0; 16])).unwrap(), vec![]);
    }

    #[test]
    fn of_two_processes_that_settle_a_crossing_only_the_first_does() {
        let room = tempfile::tempdir().unwrap();
        let open = || FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let (mut waits, mut asked) = (open(), open());
        let session = SessionId([5; 16]);
        // One waits for the go-ahead, which its record does not show; the other is asked for the final word.
        let built = record(5, 3, Side::Incoming, Standing::Declined);
        waits.write(&built).unwrap();
        assert_eq!(
            answer_from_ledger(&mut asked, session).unwrap(),
            Standing::Declined
        );
        let mut taken = built.clone();
        taken.standing = Standing::Taken;
        let refused = waits.write(&taken).unwrap_err();
        assert_eq!(refused.cause, Cause::Ledger);
        assert!(refused.message.contains("another process"), "{refused}");
        assert_eq!(
            asked.read(session, Side::Incoming).unwrap().unwrap().standing,
            Standing::Declined
        );
        // The other way round: it was taken before the question came.
        let session = SessionId([6; 16]);
        let mut taken = record(6, 4, Side::Incoming, Standing::Declined);
        waits.write(&taken).unwrap();
        taken.standing = Standing::Taken;
        waits.write(&taken).unwrap();
        assert_eq!(answer_from_ledger(&mut asked, session).unwrap(), Standing::Taken);
        // And both at once: who read before the other wrote, does not write.
        let mut third = open();
        third.read(session, Side::Incoming).unwrap();
        waits.write(&taken).unwrap();
        assert!(
            third
                .write(&record(6, 4, Side::Incoming, Standing::Declined))
                .is_err()
        );
        // A record that nobody has begins once.
        let fresh = record(7, 1, Side::Incoming, Standing::Declined);
        waits.write(&fresh).unwrap();
        assert!(asked.write(&fresh).is_err());
        let left = fs::read_dir(room.path()).unwrap().count();
        assert_eq!(left, 4, "three records and the ledger's name");
    }

    #[test]
    fn a_damaged_record_is_an_error_and_not_an_absent_one() {
        let room = tempfile::tempdir().unwrap();
        let ledger = FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        fs::write(ledger.path(SessionId([5; 16]), Side::Incoming), b"{").unwrap();
        assert_eq!(
            ledger.read(SessionId([5; 16]), Side::Incoming).unwrap_err().cause,
            Cause::Ledger
        );
        assert!(ledger.records(MachineId([7; 16])).is_err());
    }

    #[test]
    fn a_version_that_was_being_written_when_the_host_crashed_is_as_if_it_had_not_been() {
        let room = tempfile::tempdir().unwrap();
        let mut ledger = FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let mut now = record(5, 3, Side::Incoming, Standing::Declined);
        ledger.write(&now).unwrap();
        let path = ledger.path(now.session, now.side);
        for standing in [Standing::Taken, Standing::Declined, Standing::Taken] {
            let before = (fs::read(&path).unwrap(), now.clone());
            now.standing = standing;
            ledger.write(&now).unwrap();
            let after = fs::read(&path).unwrap();
            assert_eq!(ledger.read(now.session, now.side).unwrap(), Some(now.clone()));
            // Any part of the new bytes may have reached the disk.
            for torn in (0..after.len()).step_by(7) {
                let mixed = [&after[..torn], &before.0[torn..]].concat();
                fs::write(&path, &mixed).unwrap();
                let read = ledger.read(now.session, now.side).unwrap();
                assert!(
                    read.as_ref() == Some(&before.1) || read.as_ref() == Some(&now),
                    "{torn}"
                );
            }
            fs::write(&path, &after).unwrap();
        }
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
            ledger.read(session, Side::Incoming).unwrap().unwrap().standing,
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
        assert_eq!(check_epoch(&gone, 5).unwrap(), []);
        let back = [gone[0].clone(), record(2, 5, Side::Incoming, Standing::Taken)];
        assert_eq!(next_epoch(&back).unwrap(), 6);
        assert!(check_epoch(&back, 5).is_err());
        let kept = [record(3, 6, Side::Outgoing, Standing::Kept)];
        assert_eq!(next_epoch(&kept).unwrap(), 7);
    }

    #[test]
    fn a_doubt_is_settled_by_the_machine_that_comes_back_and_by_no_old_copy_of_it() {
        let room = tempfile::tempdir().unwrap();
        let open = || FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let (mut ledger, mut doubtful) = (open(), open());
        let doubt = record(3, 6, Side::Outgoing, Standing::GivenAway);
        doubtful.write(&doubt).unwrap();
        let records = ledger.records(doubt.machine).unwrap();
        assert!(next_epoch(&records).is_err());
        assert!(check_epoch(&records, 6).is_err(), "an old copy");
        let settled = check_epoch(&records, 7).unwrap();
        assert_eq!(settled, std::slice::from_ref(&doubt));
        settle_returned(&mut ledger, settled.clone()).unwrap();
        let known = ledger.read(doubt.session, Side::Outgoing).unwrap().unwrap();
        assert_eq!(known.standing, Standing::Gone);
        // The process that still has the copy can neither take it back nor find anything to settle.
        let mut departure = Departure::reopen(&doubt).unwrap();
        assert!(departure.heard(&mut doubtful, THERE, false).is_err());
        assert!(settle_returned(&mut open(), settled).is_err());
        assert_eq!(check_epoch(&[known], 7).unwrap(), []);
    }

    #[test]
    fn only_records_that_nothing_needs_go_and_the_newest_of_them_stay() {
        let room = tempfile::tempdir().unwrap();
        let open = || FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let mut ledger = open();
        let heard = |mut record: Record| {
            record.heard = true;
            record
        };
        let mut unheard = record(2, 2, Side::Incoming, Standing::Taken);
        unheard.peer = Some(LedgerId([3; 16]));
        let needed = [
            record(1, 1, Side::Outgoing, Standing::GivenAway),
            // The other side may still ask.
            unheard,
            // The last word on the machine.
            heard(record(7, 7, Side::Incoming, Standing::Taken)),
        ];
        let needless = [
            record(3, 3, Side::Outgoing, Standing::Gone),
            heard(record(4, 4, Side::Incoming, Standing::Taken)),
            record(5, 8, Side::Outgoing, Standing::Kept),
            record(6, 9, Side::Incoming, Standing::Declined),
        ];
        for record in needed.iter().chain(&needless) {
            ledger.write(record).unwrap();
        }
        let now = SystemTime::now();
        assert_eq!(ledger.prune(now).unwrap(), 0, "all are young and few");
        // The age decides, and the number.
        assert_eq!(ledger.prune_to(now, KEEP_FOR, 3).unwrap(), 1);
        let later = now + KEEP_FOR + Duration::from_secs(60);
        assert_eq!(ledger.prune(later).unwrap(), 3);
        let mut left = ledger.all().unwrap();
        left.sort_by_key(|record| record.epoch);
        assert_eq!(left, needed);
        assert_eq!(next_epoch(&left).unwrap(), 8);
    }

    #[test]
    fn what_was_taken_and_never_heard_of_goes_only_when_the_giver_knows() {
        let taken = record(1, 5, Side::Incoming, Standing::Taken);
        let with_peer = |mut record: Record, peer: LedgerId| {
            record.peer = Some(peer);
            record
        };
        let other = LedgerId([3; 16]);
        let cases = [
            // It left for somebody else, or came from there again: the one who gave it first may ask.
            (
                with_peer(record(2, 6, Side::Outgoing, Standing::Gone), other),
                true,
            ),
            (
                with_peer(record(2, 7, Side::Incoming, Standing::Taken), other),
                true,
            ),
            // It was only offered back, or offered again.
            (record(2, 6, Side::Outgoing, Standing::Kept), true),
            (record(2, 6, Side::Incoming, Standing::Declined), true),
            // It went back, or came again from there.
            (record(2, 6, Side::Outgoing, Standing::Gone), false),
            (record(2, 7, Side::Incoming, Standing::Taken), false),
            // Something older says nothing of it.
            (record(2, 4, Side::Outgoing, Standing::Gone), true),
        ];
        for (later, needed) in cases {
            // The last word on the machine is another's.
            let mut last = record(3, 9, Side::Outgoing, Standing::Gone);
            last.peer = Some(other);
            let all = [taken.clone(), later.clone(), last];
            assert_eq!(is_needed(&taken, &all), needed, "{later:?}");
        }
        // In doubt whether it arrived back there: there it is known that it had left. But this is then the last word here.
        let doubt = record(2, 6, Side::Outgoing, Standing::GivenAway);
        assert!(is_needed(&taken, &[taken.clone(), doubt.clone()]));
        assert!(is_needed(&doubt, &[taken, doubt.clone()]));
    }

    #[test]
    fn a_record_that_was_removed_and_begun_anew_is_not_taken_for_the_one_that_was_read() {
        let room = tempfile::tempdir().unwrap();
        let open = || FileLedger::open(room.path(), LedgerId([1; 16])).unwrap();
        let (mut waits, mut asked) = (open(), open());
        let built = record(5, 3, Side::Incoming, Standing::Declined);
        waits.write(&built).unwrap();
        let later = SystemTime::now() + KEEP_FOR * 2;
        assert_eq!(asked.prune(later).unwrap(), 1);
        let mut taken = built.clone();
        taken.standing = Standing::Taken;
        assert!(waits.write(&taken).is_err(), "it is not there");
        // Another process answers that it never will be taken, in a new file with the same count.
        assert_eq!(
            answer_from_ledger(&mut asked, built.session).unwrap(),
            Standing::Declined
        );
        assert!(waits.write(&taken).is_err(), "it was settled");
    }
}
