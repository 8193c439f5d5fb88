//! FILE, the mount point: an existing regular file that is mounted over, or a name that is made and removed again; and
//! what an earlier server that was killed has left there.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Statx, StatxFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::mount::{self, Unmounted};
use super::mounts::Mounted;
use crate::attachment::Attachment;
use crate::helper::{self, Failure, Task};

/// More mounts than that on one path are not cleared.
const MAX_DEAD: usize = 16;

/// A server that does not answer within this time is stopped, or hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(3);

/// A place to mount at. A file that was made for it is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Point {
    /// Absolute, without symbolic links.
    pub(super) path: PathBuf,
    /// Mode and owner, which the mounted file takes over.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// It was not there before.
    made: Option<Made>,
}

/// A file that we made to mount over, and remove when that is over: by this process, or by one that finds what a killed one
/// has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Made {
    device: u64,
    inode: u64,
}

impl Made {
    fn of(found: &Statx) -> Self {
        Made { device: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor), inode: found.stx_ino }
    }

    /// Whether it is what is seen at `path`, with nothing mounted over it, and nobody has put anything there.
    pub(crate) fn is_left(self, path: &Path) -> bool {
        let found = look(path, AtFlags::SYMLINK_NOFOLLOW);
        found.is_ok_and(|found| Made::of(&found) == self && kind(&found).is_file() && found.stx_size == 0)
    }

    /// Removes it, where that is so.
    pub(crate) fn remove(self, path: &Path) {
        if self.is_left(path) {
            // At worst an empty file stays.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Point {
    /// Finds or makes the file. Whatever dead mount was there has been cleared ([`clear_dead`]). `note` writes down a file that
    /// is about to be made, so that another process can remove it.
    ///
    /// # Errors
    /// One line: a folder, a device, a folder that is not there, no permission.
    pub(super) fn prepare(file: &Path, note: &dyn Fn(Option<Made>)) -> Result<Self> {
        let made = match make(file, note) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("{}: its folder does not exist; make it first", file.display())
            }
            Err(error) => return Err(error).with_context(|| format!("{}: cannot make it", file.display())),
        };
        let path = resolve(file)?;
        let found = look(&path, AtFlags::SYMLINK_NOFOLLOW)
            .with_context(|| format!("{}: cannot look at it", path.display()))?;
        refuse_other_kinds(&path, kind(&found))?;
        let made = made.then(|| Made::of(&found));
        note(made);
        let mode = u32::from(found.stx_mode) & 0o7777;
        Ok(Point { path, mode, uid: found.stx_uid, gid: found.stx_gid, made })
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        if let Some(made) = self.made {
            made.remove(&self.path);
        }
    }
}

/// Clears what a server that was killed has left at FILE: dead mounts, and the file where it was made for them. To be called
/// before SOURCE is opened, which may be the same path.
///
/// # Errors
/// One line: FILE is served by a living server, or has another program's dead mount.
pub(crate) fn clear_dead(file: &Path) -> Result<()> {
    let before = Attachment::all();
    clear_mounts(file)?;
    let Ok(path) = resolve(file) else { return Ok(()) };
    for (attachment, note) in before {
        if attachment.file == path && !attachment.is_alive() {
            attachment.forget(&note);
        }
    }
    Ok(())
}

fn clear_mounts(file: &Path) -> Result<()> {
    for _ in 0..MAX_DEAD {
        let Ok(path) = resolve(file) else { return Ok(()) };
        let dead = is_dead(&path);
        let mounted = Mounted::at(&path).context("cannot learn what is mounted")?;
        match mounted.last() {
            Some(ours) if ours.is_ours() && !dead => {
                bail!(
                    "{}: is served by nbdbridge already; choose another FILE, or end that: nbdbridge detach {}",
                    file.display(),
                    file.display()
                )
            }
            Some(ours) if ours.is_ours() => {
                tracing::warn!("{}: clearing the mount of a server that is gone", path.display());
                unmount_path(&path)?;
            }
            Some(other) if dead && other.is_fuse() => {
                bail!(
                    "{}: has the dead mount of another program ({}); take it away first: umount -l {}",
                    file.display(),
                    other.kind,
                    file.display()
                )
            }
            _ => return Ok(()),
        }
    }
    bail!(
        "{}: more dead mounts than anybody makes; take them away: umount -l {}",
        file.display(),
        file.display()
    )
}

/// Takes a mount away, also one that is in use.
///
/// # Errors
/// One line.
pub(super) fn unmount_path(path: &Path) -> Result<()> {
    match mount::unmount(path, true)? {
        Unmounted::Yes => Ok(()),
        Unmounted::Busy => bail!("{}: is in use; end its users first", path.display()),
    }
}

/// The answer of the server of a mounted file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It answers; perhaps with an error.
    Lives,
    /// It is gone.
    Dead,
    /// It does not answer in time: it is stopped, or hangs.
    Silent,
}

/// Asks the server of a mounted FUSE file whether it is there, for a limited time.
pub(crate) fn ask(path: &Path) -> Answer {
    match helper::run(&Task::Stat(path), ANSWER_LIMIT) {
        Err(Failure::Refused(Some(Errno::NOTCONN | Errno::CONNABORTED), _)) => Answer::Dead,
        Err(Failure::Silent(_) | Failure::GivenUp) => Answer::Silent,
        Ok(_) | Err(Failure::Refused(..) | Failure::NotStarted(_)) => Answer::Lives,
    }
}

/// Whether a FUSE file is mounted at this path whose server is gone.
pub(crate) fn is_dead(path: &Path) -> bool {
    let mounted = Mounted::at(path).unwrap_or_default();
    mounted.last().is_some_and(Mounted::is_fuse) && ask(path) == Answer::Dead
}

/// What is known of a file without asking anybody: the kernel does not wait for a FUSE server.
pub(crate) fn look(path: &Path, flags: AtFlags) -> rustix::io::Result<Statx> {
    let flags = flags | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    rustix::fs::statx(CWD, path, flags, StatxFlags::BASIC_STATS)
}

/// The kind of file that [`look`] has found.
pub(crate) fn kind(found: &Statx) -> FileType {
    FileType::from_raw_mode(found.stx_mode.into())
}

/// Makes the file, without a moment in which it is there and not written down.
fn make(file: &Path, note: &dyn Fn(Option<Made>)) -> io::Result<()> {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mode = Mode::from_raw_mode(0o666);
    let unnamed = rustix::fs::open(folder, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, mode);
    let Ok(unnamed) = unnamed else {
        // Not every file system has files without a name.
        return File::create_new(file).map(drop);
    };
    let found = rustix::fs::statx(&unnamed, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)?;
    note(Some(Made::of(&found)));
    let link = format!("/proc/self/fd/{}", unnamed.as_fd().as_raw_fd());
    match rustix::fs::linkat(CWD, link, CWD, file, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(Errno::EXIST.into()),
        Err(_) => File::create_new(file).map(drop),
    }
}

/// The absolute path without symbolic links; works on a dead mount, too.
pub(crate) fn resolve(file: &Path) -> Result<PathBuf> {
    let failed = || format!("{}: cannot find it", file.display());
    let is_link = look(file, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|found| kind(&found).is_symlink());
    let (folder, name) = match (file.parent(), file.file_name()) {
        (Some(folder), Some(name)) if !is_link => (folder, name),
        _ => return file.canonicalize().with_context(failed),
    };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    Ok(folder.canonicalize().with_context(failed)?.join(name))
}

fn refuse_other_kinds(path: &Path, kind: FileType) -> Result<()> {
    if kind.is_file() {
        return Ok(());
    }
    let what = if kind.is_dir() { "a directory" } else { "not a regular file" };
    bail!("{}: is {what}; give a regular file to mount over, or a new name", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepare(file: &Path) -> Result<Point> {
        Point::prepare(file, &|_| ())
    }

    #[test]
    fn a_made_file_goes_and_a_found_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        drop(prepare(&path).unwrap());
        assert!(!path.exists(), "made and removed");
        let point = prepare(&path).unwrap();
        std::fs::write(&path, "something").unwrap();
        drop(point);
        assert!(path.exists(), "somebody has put something there");
        drop(prepare(&path).unwrap());
        assert!(path.exists(), "it was there before");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(prepare(&link).unwrap().path, path.canonicalize().unwrap());
    }

    #[test]
    fn other_places_are_refused_in_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no/disk");
        for (path, word) in [
            (folder.path(), "a directory"),
            (&missing, "does not exist; make it first"),
            (Path::new("/dev/null"), "not a regular file"),
        ] {
            let error = format!("{:#}", prepare(path).unwrap_err());
            assert!(error.contains(word) && error.contains(path.to_str().unwrap()), "{error}");
            assert_eq!(error.lines().count(), 1);
        }
    }

    #[test]
    fn nothing_dead_is_nothing_to_clear() {
        let folder = tempfile::tempdir().unwrap();
        clear_dead(&folder.path().join("disk")).unwrap();
        clear_dead(&folder.path().join("no/disk")).unwrap();
        assert!(!is_dead(folder.path()));
    }
}
