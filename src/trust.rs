//! Whose files and servers are believed. Folders of run-time state, and what is in them, can be made by others: the names
//! say nothing, the owners do.
//!
//! ```text
//!   Folder::open(path)    no link as the last part; its owner is asked of the descriptor
//!      │ read(name)       openat(2) without links, checked: folder trusted, regular file, owner trusted, small
//!   Folder::make(path)    the same for a folder that this process writes to: ours, and closed to others
//! ```

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, Stat, statat};
use rustix::process::geteuid;

use crate::beneath;

/// The longest file that is read, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Returns whether a user's files and servers are believed: our own, and root's, who can change ours anyway.
pub(crate) fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

/// An open folder of run-time state.
#[derive(Debug)]
pub(crate) struct Folder {
    handle: File,
    path: PathBuf,
    owner: u32,
}

impl Folder {
    /// Opens a folder, whoever owns it.
    ///
    /// # Errors
    /// The operating system's; what is there is a link or no folder.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
        let handle = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        let owner = handle.metadata()?.uid();
        Ok(Folder { handle, path: path.to_owned(), owner })
    }

    /// Makes a folder for this process to write to, or sees to it that the one that is there is ours and closed to others.
    ///
    /// # Errors
    /// It belongs to another user, is a link or no folder; the operating system's.
    pub(crate) fn make(path: &Path) -> io::Result<Self> {
        match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        // What is opened is what is looked at: it may be somebody else's, or a link to what is.
        let folder = Folder::open(path)?;
        if folder.owner != geteuid().as_raw() {
            return Err(io::Error::other(format!("belongs to user {}", folder.owner)));
        }
        if folder.handle.metadata()?.mode() & 0o7777 != 0o700 {
            folder.handle.set_permissions(PermissionsExt::from_mode(0o700))?;
        }
        Ok(folder)
    }

    /// The user who owns the folder.
    pub(crate) fn owner(&self) -> u32 {
        self.owner
    }

    /// The path of `name` in this folder.
    pub(crate) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// The names in this folder.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn names(&self) -> io::Result<Vec<OsString>> {
        beneath::names(&self.handle)
    }

    /// What `name` is: the link itself, where it is one.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn look(&self, name: &OsStr) -> io::Result<Stat> {
        Ok(statat(&self.handle, name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Returns whether what belongs to `uid` in this folder is believed.
    pub(crate) fn trusts(&self, uid: u32) -> bool {
        is_trusted(self.owner) && is_trusted(uid)
    }

    /// Refuses a folder that is not believed.
    ///
    /// # Errors
    /// A line that names the owner.
    pub(crate) fn check(&self) -> io::Result<()> {
        check_owner(self.owner)
    }

    /// Reads a small file that is believed.
    ///
    /// # Errors
    /// The folder or the file belongs to another user, or it is no regular file; the operating system's.
    pub(crate) fn read(&self, name: impl AsRef<OsStr>) -> io::Result<Vec<u8>> {
        // NONBLOCK: no wait for the other end of a FIFO.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&self.handle, name.as_ref(), flags, Mode::empty())?);
        let found = file.metadata()?;
        if !found.is_file() {
            return Err(io::Error::other("is no regular file"));
        }
        self.check()?;
        check_owner(found.uid())?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

fn check_owner(uid: u32) -> io::Result<()> {
    if is_trusted(uid) {
        return Ok(());
    }
    Err(io::Error::other(format!("belongs to user {uid}, and is not believed")))
}

/// Reads a small file by its path, as [`Folder::read`].
///
/// # Errors
/// As for [`Folder::open`] and [`Folder::read`].
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let folder = Folder::open(path.parent().unwrap_or(Path::new("/")))?;
    folder.read(path.file_name().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{chown, symlink};

    /// A user who owns nothing here.
    const STRANGER: u32 = 54_321;

    #[test]
    fn what_is_believed_is_a_file_of_ours() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("state");
        let folder = Folder::make(&path).unwrap();
        std::fs::write(folder.join("note"), "x").unwrap();
        symlink(folder.join("note"), folder.join("link")).unwrap();
        std::fs::create_dir(folder.join("folder")).unwrap();
        let fifo = folder.join("fifo");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert_eq!(folder.read("note").unwrap(), b"x");
        assert_eq!(read(&path.join("note")).unwrap(), b"x");
        for name in ["link", "folder", "fifo", "none"] {
            assert!(folder.read(name).is_err(), "{name}");
        }
        assert!(!folder.trusts(STRANGER) && folder.trusts(0));
        if !geteuid().is_root() {
            eprintln!("SKIP: what_is_believed_is_a_file_of_ours: only root can give files away");
            return;
        }
        chown(folder.join("note"), Some(STRANGER), None).unwrap();
        let error = folder.read("note").unwrap_err().to_string();
        assert!(error.contains("belongs to user 54321"), "{error}");
        chown(folder.join("note"), Some(0), None).unwrap();
        chown(&path, Some(STRANGER), None).unwrap();
        let error = read(&path.join("note")).unwrap_err().to_string();
        assert!(error.contains("belongs to user 54321"), "{error}");
        assert!(Folder::make(&path).is_err() && !Folder::open(&path).unwrap().trusts(0));
    }

    #[test]
    fn a_folder_is_closed_and_no_link() {
        let parent = tempfile::tempdir().unwrap();
        std::fs::set_permissions(parent.path(), PermissionsExt::from_mode(0o777)).unwrap();
        Folder::make(parent.path()).unwrap();
        assert_eq!(parent.path().metadata().unwrap().mode() & 0o7777, 0o700);
        let link = parent.path().join("link");
        symlink(parent.path(), &link).unwrap();
        assert!(Folder::open(&link).is_err() && Folder::make(&link).is_err());
    }
}
