//! Disk images that are made for a machine that is coming. They go again if it does not come, also when this process is
//! killed: then the next arrival that needs the name clears them away.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use ferry_devices::disk::{Disk, DiskError, DiskFormat};
use ferry_migration::failure::{Cause, Reason};

/// The images of one machine, removed when this is dropped unless they are kept.
#[derive(Default)]
pub(super) struct Images(Vec<Made>);

struct Made {
    path: PathBuf,
    /// Says that the image belongs to nobody yet.
    mark: Option<Mark>,
}

/// A file beside an image that is not complete, locked by the process that fills the image. It names the boot of the host:
/// after a crash of the host itself nobody knows what had reached the disk, and nothing is cleared away.
struct Mark {
    path: PathBuf,
    _locked: File,
}

impl Images {
    /// Makes an empty image. A file that is there already stays, unless a killed receiver left it.
    pub(super) fn make(&mut self, path: &Path, format: DiskFormat, bytes: u64) -> Result<(), Reason> {
        let mark = mark_of(path);
        clear(path, &mark)?;
        if path.exists() {
            return Err(refused(&DiskError::Exists(path.to_owned())));
        }
        let mark = Mark::make(&mark).map_err(|error| cannot_be_made(path, &error))?;
        Disk::create(path, format, bytes).map_err(|error| refused(&error))?;
        self.0.push(Made {
            path: path.to_owned(),
            mark: Some(mark),
        });
        Ok(())
    }

    /// The images are complete, and the right to run the machine may come next: from here on they are precious to
    /// whoever finds them. They still go with this, as long as it is certain that the machine is not here.
    pub(super) fn complete(&mut self) {
        self.0.iter_mut().for_each(|made| made.mark = None);
    }

    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        for Made { path, mark } in self.0.drain(..) {
            if let Err(error) = fs::remove_file(&path) {
                tracing::warn!(
                    "the image {} of a machine that did not come is left behind: {error}",
                    path.display()
                );
            }
            drop(mark);
        }
    }
}

impl Mark {
    fn make(path: &Path) -> io::Result<Mark> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(path)?;
        let mark = Mark {
            path: path.to_owned(),
            _locked: file.try_clone()?,
        };
        file.lock()?;
        file.write_all(this_boot().as_bytes())?;
        Ok(mark)
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!("{} is left behind: {error}", self.path.display());
        }
    }
}

fn mark_of(image: &Path) -> PathBuf {
    let mut name = image.file_name().unwrap_or_default().to_owned();
    name.push(".arriving");
    image.with_file_name(name)
}

fn this_boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

/// Removes an image that a killed receiver left half filled.
fn clear(image: &Path, mark: &Path) -> Result<(), Reason> {
    let mut file = match OpenOptions::new().read(true).write(true).open(mark) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|error| cannot_be_made(image, &error))?,
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let sentence = format!(
                "another machine is just arriving with the disk image {}",
                image.display()
            );
            return Err(Reason::new(Cause::Busy, sentence));
        }
        Err(TryLockError::Error(error)) => return Err(cannot_be_made(image, &error)),
    }
    let mut boot = String::new();
    file.read_to_string(&mut boot)
        .map_err(|error| cannot_be_made(image, &error))?;
    if boot.is_empty() || boot != this_boot() {
        let sentence = format!(
            "the disk image {} may be incomplete: a crossing to this host was cut off by a crash of the host; \
             look at it, then remove it and {}",
            image.display(),
            mark.display()
        );
        return Err(Reason::new(Cause::Busy, sentence));
    }
    tracing::info!(
        "{} is what a killed receiver left and is removed",
        image.display()
    );
    for path in [image, mark] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(cannot_be_made(image, &error));
            }
            _ => {}
        }
    }
    Ok(())
}

fn cannot_be_made(image: &Path, error: &io::Error) -> Reason {
    let sentence = format!("the disk image {} cannot be made: {error}", image.display());
    Reason::new(cause_of(error), sentence)
}

fn refused(error: &DiskError) -> Reason {
    let cause = match error {
        DiskError::Exists(_) => Cause::Busy,
        DiskError::Io { source, .. } => cause_of(source),
        _ => Cause::Data,
    };
    Reason::new(cause, error.to_string())
}

fn cause_of(error: &io::Error) -> Cause {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Cause::NoSpace,
        _ => Cause::Data,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|item| item.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_did_not_come_goes_and_what_was_there_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let mut images = Images::default();
        images.make(&path, DiskFormat::Raw, 1 << 20).unwrap();
        assert_eq!(names(dir.path()), ["disk.img", "disk.img.arriving"]);
        // A second arrival with the same image, at the same time.
        let busy = Images::default()
            .make(&path, DiskFormat::Raw, 1 << 20)
            .unwrap_err();
        assert!(busy.message.contains("just arriving"), "{busy}");
        images.complete();
        assert_eq!(names(dir.path()), ["disk.img"]);
        drop(images);
        assert!(names(dir.path()).is_empty());

        fs::write(&path, "precious").unwrap();
        let exists = Images::default()
            .make(&path, DiskFormat::Raw, 1 << 20)
            .unwrap_err();
        assert!(
            exists.cause == Cause::Busy && exists.message.contains("exists already"),
            "{exists}"
        );
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::remove_file(&path).unwrap();

        let mut images = Images::default();
        images.make(&path, DiskFormat::Qcow2, 1 << 20).unwrap();
        images.complete();
        images.keep();
        assert_eq!(names(dir.path()), ["disk.img"]);
    }

    #[test]
    fn what_a_killed_receiver_left_is_cleared_away_but_not_what_a_crash_of_the_host_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let mark = mark_of(&path);
        fs::write(&path, "half").unwrap();
        fs::write(&mark, this_boot()).unwrap();
        let mut images = Images::default();
        images.make(&path, DiskFormat::Raw, 1 << 20).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 1 << 20);
        drop(images);
        assert!(names(dir.path()).is_empty());

        fs::write(&path, "half").unwrap();
        fs::write(&mark, "another boot").unwrap();
        let refused = Images::default()
            .make(&path, DiskFormat::Raw, 1 << 20)
            .unwrap_err();
        assert!(refused.message.contains("crash of the host"), "{refused}");
        assert_eq!(fs::read(&path).unwrap(), b"half");
    }
}
