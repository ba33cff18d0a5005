//! The runtime directory: one folder per machine with its lock, sockets and logs. A machine is alive while its process
//! holds the lock on its pid file; nothing else counts, so a killed process leaves no ghost and a reused process id
//! cannot be taken for a machine.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

use crate::lifecycle::State;
use crate::name::Name;

const PID: &str = "pid";
const END: &str = "end.json";
/// A Unix socket's path has at most this many bytes.
const SOCKET_PATH_LIMIT: usize = 107;
/// Somebody who looks whether a machine is alive holds its lock for an instant; a claim waits that out.
const LOOKERS_PATIENCE: u32 = 20;
const LOOKERS_STEP: Duration = Duration::from_millis(10);

#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    #[error(
        "a machine named {name} runs already (process {pid}); stop it with `ferry stop {name}` or take another name"
    )]
    Taken { name: Name, pid: u32 },
    #[error("there is no machine named {name}; `ferry list` shows those that run")]
    Unknown { name: Name },
    #[error(
        "the machine {name} does not run any more ({end}); `ferry logs {name}` shows what it said, `ferry kill {name}` removes it"
    )]
    Dead { name: Name, end: String },
    #[error("could not {doing}: {error}; choose another place with --runtime-dir")]
    Files { doing: String, error: io::Error },
    #[error("{0}")]
    Place(String),
}

/// `.doing("make the folder x")` on an I/O result.
trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, RunDirError>;
}

impl<T> Doing<T> for io::Result<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T, RunDirError> {
        self.map_err(|error| RunDirError::Files { doing: what(), error })
    }
}

/// The directory that holds the machines' folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base(PathBuf);

/// What the runtime directory knows of one machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub name: Name,
    pub dir: PathBuf,
    /// The process that runs it; None when it is dead.
    pub pid: Option<u32>,
}

impl Base {
    /// The place that was asked for, or else the user's own: /run/ferry for root, $XDG_RUNTIME_DIR/ferry for others.
    pub fn find(asked: Option<&Path>) -> Result<Base, RunDirError> {
        if let Some(path) = asked {
            let path = std::path::absolute(path).doing(|| format!("find {}", path.display()))?;
            return Ok(Base(path));
        }
        if rustix::process::geteuid().is_root() {
            return Ok(Base("/run/ferry".into()));
        }
        match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty()) {
            Some(dir) => Ok(Base(PathBuf::from(dir).join("ferry"))),
            None => Err(RunDirError::Place(
                "there is no runtime directory: XDG_RUNTIME_DIR is not set; name a folder with --runtime-dir"
                    .into(),
            )),
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where that is kept which must survive a restart of the host: ledgers and reports. The standard places have
    /// their counterparts on disk; a folder that was named holds it itself.
    pub fn state_dir(&self) -> PathBuf {
        if let Some(dir) = std::env::var_os("FERRY_STATE_DIR").filter(|dir| !dir.is_empty()) {
            return dir.into();
        }
        if self.0 == Path::new("/run/ferry") {
            return "/var/lib/ferry".into();
        }
        let standard = std::env::var_os("XDG_RUNTIME_DIR").map(|dir| PathBuf::from(dir).join("ferry"));
        if standard.as_ref() == Some(&self.0)
            && let Some(home) = std::env::var_os("HOME")
        {
            let state = std::env::var_os("XDG_STATE_HOME").filter(|dir| !dir.is_empty());
            return state
                .map_or_else(|| PathBuf::from(home).join(".local/state"), PathBuf::from)
                .join("ferry");
        }
        self.0.join(".state")
    }

    /// Every machine with a folder here, the dead ones too, by name.
    pub fn entries(&self) -> Result<Vec<Entry>, RunDirError> {
        let reading = || format!("read the runtime directory {}", self.0.display());
        let folder = match fs::read_dir(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.doing(reading)?,
        };
        let mut entries = Vec::new();
        for item in folder {
            let name = item.doing(reading)?.file_name();
            if let Some(Ok(name)) = name.to_str().map(str::parse)
                && let Some(entry) = self.entry(&name)?
            {
                entries.push(entry);
            }
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// A machine that runs, or the sentence that says why there is none.
    pub fn alive(&self, name: &Name) -> Result<Entry, RunDirError> {
        match self.entry(name)? {
            Some(entry) if entry.pid.is_some() => Ok(entry),
            Some(entry) => Err(RunDirError::Dead {
                name: name.clone(),
                end: entry.end(),
            }),
            None => Err(RunDirError::Unknown { name: name.clone() }),
        }
    }

    pub fn entry(&self, name: &Name) -> Result<Option<Entry>, RunDirError> {
        let dir = self.0.join(name.as_str());
        let mut file = match File::open(dir.join(PID)) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(None);
            }
            other => other.doing(|| format!("look into {}", dir.display()))?,
        };
        let held = flock(&file, FlockOperation::NonBlockingLockShared).is_err();
        let pid = if held { Some(read_pid(&mut file)) } else { None };
        Ok(Some(Entry {
            name: name.clone(),
            dir,
            pid,
        }))
    }

    /// Takes a name for this process. A dead machine's folder is emptied and used again.
    pub fn claim(&self, name: &Name) -> Result<RunDir, RunDirError> {
        let dir = self.0.join(name.as_str());
        let longest = dir.join("control.sock");
        if longest.as_os_str().len() > SOCKET_PATH_LIMIT {
            return Err(RunDirError::Place(format!(
                "{} is too long for the path of a socket ({SOCKET_PATH_LIMIT} bytes); give a shorter --runtime-dir or name",
                longest.display()
            )));
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.0)
            .doing(|| format!("make the runtime directory {}", self.0.display()))?;
        for _ in 0..LOOKERS_PATIENCE {
            if let Some(claimed) = self.try_claim(name, &dir)? {
                return Ok(claimed);
            }
            std::thread::sleep(LOOKERS_STEP);
        }
        let pid = self.entry(name)?.and_then(|e| e.pid).unwrap_or_default();
        Err(RunDirError::Taken {
            name: name.clone(),
            pid,
        })
    }

    /// None: somebody holds the lock, or the folder was removed under our hands.
    fn try_claim(&self, name: &Name, dir: &Path) -> Result<Option<RunDir>, RunDirError> {
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let meta = fs::symlink_metadata(dir).doing(|| format!("look at {}", dir.display()))?;
                if !meta.is_dir() || meta.uid() != rustix::process::geteuid().as_raw() {
                    return Err(RunDirError::Place(format!(
                        "{} is not a folder of this user; remove it or choose another place with --runtime-dir",
                        dir.display()
                    )));
                }
            }
            other => other.doing(|| format!("make the folder {}", dir.display()))?,
        }
        let path = dir.join(PID);
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path);
        let mut file = match opened {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.doing(|| format!("make {}", path.display()))?,
        };
        if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        // Whoever ended may have removed the folder between our open and our lock.
        let ours = file
            .metadata()
            .doing(|| format!("look at {}", path.display()))?
            .ino();
        if fs::metadata(&path).map(|m| m.ino()).ok() != Some(ours) {
            return Ok(None);
        }
        let claimed = RunDir {
            name: name.clone(),
            path: dir.to_owned(),
            keep: false,
            _lock: file,
        };
        claimed.remove_files(|file| file != PID);
        file = claimed
            ._lock
            .try_clone()
            .doing(|| format!("write {}", path.display()))?;
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .doing(|| format!("write {}", path.display()))?;
        Ok(Some(claimed))
    }

    /// Removes what a dead machine left. A living one is not touched.
    pub fn bury(&self, name: &Name) -> Result<(), RunDirError> {
        self.claim(name).map(drop)
    }
}

fn read_pid(file: &mut File) -> u32 {
    let mut text = String::new();
    let _ = file.take(32).read_to_string(&mut text);
    text.trim().parse().unwrap_or_default()
}

impl Entry {
    pub fn control_socket(&self) -> PathBuf {
        control_socket(&self.dir)
    }

    pub fn console_socket(&self) -> PathBuf {
        console_socket(&self.dir)
    }

    pub fn log(&self) -> PathBuf {
        log(&self.dir)
    }

    pub fn serial_log(&self) -> PathBuf {
        serial_log(&self.dir)
    }

    /// How a dead machine ended, as far as is known.
    pub fn end(&self) -> String {
        let text = fs::read_to_string(self.dir.join(END)).unwrap_or_default();
        match serde_json::from_str::<State>(&text) {
            Ok(state) => state.to_string(),
            Err(_) => "its process died without a word".to_owned(),
        }
    }
}

fn control_socket(dir: &Path) -> PathBuf {
    dir.join("control.sock")
}

fn console_socket(dir: &Path) -> PathBuf {
    dir.join("console.sock")
}

fn log(dir: &Path) -> PathBuf {
    dir.join("log")
}

fn serial_log(dir: &Path) -> PathBuf {
    dir.join("serial.log")
}

/// A machine's folder, held by its process. Dropping it removes the folder unless the end is worth keeping.
#[derive(Debug)]
pub struct RunDir {
    name: Name,
    path: PathBuf,
    keep: bool,
    _lock: File,
}

impl RunDir {
    /// The directory that this folder is in.
    pub fn base(&self) -> Base {
        Base(self.path.parent().unwrap_or(&self.path).to_owned())
    }

    pub fn name(&self) -> &Name {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn control_socket(&self) -> PathBuf {
        control_socket(&self.path)
    }

    pub fn console_socket(&self) -> PathBuf {
        console_socket(&self.path)
    }

    pub fn log(&self) -> PathBuf {
        log(&self.path)
    }

    pub fn serial_log(&self) -> PathBuf {
        serial_log(&self.path)
    }

    pub fn write_config(&self, config: &impl Serialize) -> Result<(), RunDirError> {
        let path = self.path.join("config.json");
        let text = serde_json::to_vec_pretty(config).map_err(io::Error::other);
        text.and_then(|text| fs::write(&path, text))
            .doing(|| format!("write {}", path.display()))
    }

    /// Leaves the logs and the reason behind for `ferry logs`; only the sockets go.
    pub fn keep(&mut self, end: &State) {
        self.keep = true;
        if let Ok(text) = serde_json::to_vec(end) {
            let _ = fs::write(self.path.join(END), text);
        }
    }

    fn remove_files(&self, which: impl Fn(&str) -> bool) {
        let Ok(folder) = fs::read_dir(&self.path) else {
            return;
        };
        for item in folder.flatten() {
            if item.file_name().to_str().is_some_and(&which) {
                let _ = fs::remove_file(item.path());
            }
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        if self.keep {
            let is_socket = |file: &str| {
                fs::symlink_metadata(self.path.join(file)).is_ok_and(|m| m.file_type().is_socket())
            };
            self.remove_files(is_socket);
        } else {
            // The pid file goes last: from then on somebody else may move in, and their files are not ours.
            self.remove_files(|file| file != PID);
            let _ = fs::remove_file(self.path.join(PID));
            let _ = fs::remove_dir(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> (tempfile::TempDir, Base) {
        let dir = tempfile::tempdir().unwrap();
        let base = Base::find(Some(&dir.path().join("deep/ferry"))).unwrap();
        (dir, base)
    }

    fn name(text: &str) -> Name {
        text.parse().unwrap()
    }

    #[test]
    fn one_name_is_one_machine_and_a_released_name_leaves_nothing() {
        let (_keep, base) = base();
        let first = base.claim(&name("web")).unwrap();
        fs::write(first.control_socket(), "").unwrap();
        let refused = base.claim(&name("web")).unwrap_err().to_string();
        assert!(
            refused.contains("runs already") && refused.contains(&std::process::id().to_string()),
            "{refused}"
        );
        let seen = base.alive(&name("web")).unwrap();
        assert_eq!(seen.pid, Some(std::process::id()));
        drop(first);
        assert!(!seen.dir.exists());
        assert!(matches!(
            base.alive(&name("web")),
            Err(RunDirError::Unknown { .. })
        ));
        base.claim(&name("web")).unwrap();
    }

    #[test]
    fn a_dead_machines_folder_is_seen_as_dead_and_used_again_empty() {
        let (_keep, base) = base();
        let dir = base.path().join("web");
        fs::create_dir_all(&dir).unwrap();
        // The process id of a living process: only the lock counts.
        fs::write(dir.join(PID), "1\n").unwrap();
        fs::write(dir.join("serial.log"), "old").unwrap();
        assert_eq!(base.entries().unwrap()[0].pid, None);
        let dead = base.alive(&name("web")).unwrap_err().to_string();
        assert!(dead.contains("died without a word"), "{dead}");
        let claimed = base.claim(&name("web")).unwrap();
        assert!(!claimed.serial_log().exists());
        assert_eq!(base.alive(&name("web")).unwrap().pid, Some(std::process::id()));
    }

    #[test]
    fn a_kept_end_is_told_and_buried() {
        let (_keep, base) = base();
        let mut claimed = base.claim(&name("web")).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(claimed.control_socket()).unwrap();
        fs::write(claimed.log(), "what happened").unwrap();
        claimed.keep(&State::Failed {
            message: "triple fault".into(),
        });
        drop(claimed);
        let entry = base.entry(&name("web")).unwrap().unwrap();
        assert_eq!(entry.end(), "failed: triple fault");
        assert!(entry.log().exists() && !entry.control_socket().exists());
        base.bury(&name("web")).unwrap();
        assert!(!entry.dir.exists());
    }

    #[test]
    fn two_who_claim_at_once_never_both_win() {
        let (_keep, base) = base();
        fs::create_dir_all(base.path()).unwrap();
        for _ in 0..100 {
            let winners: Vec<bool> = std::thread::scope(|scope| {
                let claims: Vec<_> = (0..2)
                    .map(|_| scope.spawn(|| base.try_claim(&name("web"), &base.path().join("web")).unwrap()))
                    .collect();
                let held: Vec<_> = claims.into_iter().map(|c| c.join().unwrap()).collect();
                held.iter().map(Option::is_some).collect()
            });
            assert_eq!(winners.iter().filter(|won| **won).count(), 1, "{winners:?}");
        }
    }

    #[test]
    fn places_that_cannot_be_written_or_are_not_ours_are_refused_in_a_sentence() {
        let (keep, base) = base();
        fs::write(keep.path().join("file"), "").unwrap();
        let file = Base::find(Some(&keep.path().join("file"))).unwrap();
        let refused = file.claim(&name("web")).unwrap_err().to_string();
        assert!(refused.contains("--runtime-dir"), "{refused}");
        fs::create_dir_all(base.path()).unwrap();
        std::os::unix::fs::symlink("/tmp", base.path().join("web")).unwrap();
        assert!(
            base.claim(&name("web"))
                .unwrap_err()
                .to_string()
                .contains("not a folder of this user")
        );
        let long = Base::find(Some(&keep.path().join("x".repeat(100)))).unwrap();
        assert!(
            long.claim(&name("web"))
                .unwrap_err()
                .to_string()
                .contains("too long")
        );
    }
}
