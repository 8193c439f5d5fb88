//! FILE, the mount point: an existing regular file that is mounted over, or a name that is made and removed again; and
//! what an earlier server that was killed has left there.

use std::fs::{File, FileType, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::mount::{self, Unmounted};
use super::mounts::Mounted;
use crate::attachment::Attachment;

/// More mounts than that on one path are not cleared.
const MAX_DEAD: usize = 16;

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
    fn of(found: &Metadata) -> Self {
        Made { device: found.dev(), inode: found.ino() }
    }

    /// Whether it is what is seen at `path`, with nothing mounted over it, and nobody has put anything there.
    pub(crate) fn is_left(self, path: &Path) -> bool {
        let found = std::fs::symlink_metadata(path);
        found.is_ok_and(|found| Made::of(&found) == self && found.is_file() && found.len() == 0)
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
    /// Finds or makes the file. Whatever dead mount was there has been cleared ([`clear_dead`]).
    ///
    /// # Errors
    /// One line: a folder, a device, a folder that is not there, no permission.
    pub(super) fn prepare(file: &Path) -> Result<Self> {
        let (path, made) = match File::create_new(file) {
            Ok(_) => (resolve(file)?, true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => (resolve(file)?, false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                bail!("{}: its folder does not exist; make it first", file.display())
            }
            Err(error) => return Err(error).with_context(|| format!("{}: cannot make it", file.display())),
        };
        let found = std::fs::symlink_metadata(&path)
            .with_context(|| format!("{}: cannot look at it", path.display()))?;
        refuse_other_kinds(&path, found.file_type())?;
        let made = made.then(|| Made::of(&found));
        Ok(Point { path, mode: found.mode() & 0o7777, uid: found.uid(), gid: found.gid(), made })
    }

    /// The file, where it was made for this and goes with it.
    pub(super) fn made(&self) -> Option<Made> {
        self.made
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
        let dead = is_dead(file);
        let Ok(path) = resolve(file) else { return Ok(()) };
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

/// Whether a path leads into a FUSE file system whose server is gone.
pub(crate) fn is_dead(path: &Path) -> bool {
    rustix::fs::stat(path).is_err_and(|errno| matches!(errno, Errno::NOTCONN | Errno::CONNABORTED))
}

/// The absolute path without symbolic links; works on a dead mount, too.
pub(crate) fn resolve(file: &Path) -> Result<PathBuf> {
    let failed = || format!("{}: cannot find it", file.display());
    let is_link = std::fs::symlink_metadata(file).is_ok_and(|found| found.is_symlink());
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

    #[test]
    fn a_made_file_goes_and_a_found_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        drop(Point::prepare(&path).unwrap());
        assert!(!path.exists(), "made and removed");
        let point = Point::prepare(&path).unwrap();
        std::fs::write(&path, "something").unwrap();
        drop(point);
        assert!(path.exists(), "somebody has put something there");
        drop(Point::prepare(&path).unwrap());
        assert!(path.exists(), "it was there before");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert_eq!(Point::prepare(&link).unwrap().path, path.canonicalize().unwrap());
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
            let error = format!("{:#}", Point::prepare(path).unwrap_err());
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
