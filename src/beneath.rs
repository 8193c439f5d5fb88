//! Folders whose content may come from somebody else, as a copied volume does: what is opened below one is reached from
//! its descriptor by openat2(2), across no symbolic link and no mount, and belongs to the folder's owner.
//!
//! ```text
//!   Folder::root(path)     the only path that is looked up; the caller vouches for it
//!      │ folder(name)      openat2(RESOLVE_BENEATH | NO_SYMLINKS | NO_MAGICLINKS | NO_XDEV), checked: folder, owner
//!      │ file(name)        the same with O_PATH, checked: regular file, owner; only then opened
//!   Entry::open            through /proc/self/fd: the file that was checked
//! ```
//!
//! Nothing that is not a regular file is ever opened, so that no open waits for the other end of a FIFO or acts on a
//! device.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// How names below a folder are looked up.
const BELOW: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// The longest small file, in bytes.
const MAX_SMALL: u64 = 1 << 20;

/// An open folder.
#[derive(Debug)]
pub(crate) struct Folder {
    handle: File,
    /// Where it is, for people.
    path: PathBuf,
    /// The user who owns it and all that is used below it.
    owner: u32,
}

/// A regular file that was checked and is not open yet.
#[derive(Debug)]
pub(crate) struct Entry {
    handle: File,
    path: PathBuf,
}

impl Folder {
    /// Opens a folder that the caller vouches for. Its owner becomes that of all below it.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn root(path: &Path) -> io::Result<Self> {
        // Links on the way are the caller's own; the result is looked up once more, without any.
        let path = path.canonicalize()?;
        let flags = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let handle = open(CWD, path.as_os_str(), OFlags::RDONLY | OFlags::DIRECTORY, flags)?;
        let owner = handle.metadata()?.uid();
        Ok(Folder { handle, path, owner })
    }

    /// Where the folder is, for people.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// A path by which this process reaches the folder whatever becomes of its name; as long as this is open.
    pub(crate) fn via(&self) -> PathBuf {
        via(&self.handle)
    }

    /// The descriptor, to lock it.
    pub(crate) fn handle(&self) -> &File {
        &self.handle
    }

    /// Opens the folder `name` in this one.
    ///
    /// # Errors
    /// It does not exist, is a link or another mount, or belongs to another user.
    pub(crate) fn folder(&self, name: impl AsRef<Path>) -> io::Result<Folder> {
        let folder = self.any_folder(name.as_ref())?;
        folder.check_owner(&folder.handle.metadata()?)?;
        Ok(folder)
    }

    /// The same, whoever owns it: to remove what is in it.
    fn any_folder(&self, name: &Path) -> io::Result<Folder> {
        let opened = open(&self.handle, name.as_os_str(), OFlags::RDONLY | OFlags::DIRECTORY, BELOW);
        let handle = opened.map_err(|error| explain(error, "folder"))?;
        Ok(Folder { handle, path: self.path.join(name), owner: self.owner })
    }

    /// Looks up the regular file `name`, which may be in a folder below this one.
    ///
    /// # Errors
    /// It does not exist, is something else, is reached by a link or another mount, or belongs to another user.
    pub(crate) fn file(&self, name: impl AsRef<Path>) -> io::Result<Entry> {
        let name = name.as_ref();
        let opened = open(&self.handle, name.as_os_str(), OFlags::PATH | OFlags::NOFOLLOW, BELOW);
        let handle = opened.map_err(|error| explain(error, "regular file"))?;
        let found = handle.metadata()?;
        if found.is_symlink() {
            // The last part of a name, with these flags, is opened as the link itself.
            return Err(explain(Errno::LOOP.into(), "regular file"));
        }
        if !found.is_file() {
            return Err(io::Error::other("is no regular file"));
        }
        self.check_owner(&found)?;
        Ok(Entry { handle, path: self.path.join(name) })
    }

    /// Makes the file `name`, which belongs to the folder's owner.
    ///
    /// # Errors
    /// There is something of that name; the operating system's.
    pub(crate) fn create(&self, name: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat2(&self.handle, name.as_ref(), flags, mode, BELOW)?;
        self.give_to_owner(file.as_fd())?;
        Ok(file.into())
    }

    /// Makes the folder `name`, where there is none, and opens it.
    ///
    /// # Errors
    /// As for [`Folder::folder`].
    pub(crate) fn make_folder(&self, name: impl AsRef<Path>) -> io::Result<Folder> {
        match rustix::fs::mkdirat(&self.handle, name.as_ref(), Mode::RWXU) {
            Ok(()) => {
                let folder = self.any_folder(name.as_ref())?;
                self.give_to_owner(folder.handle.as_fd())?;
                Ok(folder)
            }
            Err(Errno::EXIST) => self.folder(name),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Reads the small file `name`.
    ///
    /// # Errors
    /// As for [`Folder::file`]; the operating system's.
    pub(crate) fn read(&self, name: impl AsRef<Path>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = self.file(name)?.open(false)?;
        io::Read::read_to_end(&mut io::Read::take(file, MAX_SMALL), &mut bytes)?;
        Ok(bytes)
    }

    /// Replaces the small file `name`: old or new after a crash, and nothing between; durable when this returns.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = format!(".{name}.new");
        let written = (|| {
            // One that is left there, of whatever kind.
            self.remove(&new)?;
            let mut file = self.create(&new)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            self.rename(&new, self, name)
        })();
        if written.is_err() {
            // The first error is the one to tell.
            let _ = self.remove(&new);
        }
        written?;
        self.sync()
    }

    /// Renames `from` in this folder to `to` in the other one.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn rename(
        &self,
        from: impl AsRef<Path>,
        folder: &Folder,
        to: impl AsRef<Path>,
    ) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.handle, from.as_ref(), &folder.handle, to.as_ref())?)
    }

    /// This folder, which has another name now.
    pub(crate) fn renamed(self, path: PathBuf) -> Self {
        Folder { path, ..self }
    }

    /// Gives the file `name`, which this process has just made by [`Folder::via`], to the folder's owner.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn adopt(&self, name: impl AsRef<Path>) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = open(&self.handle, name.as_ref().as_os_str(), flags, BELOW)?;
        self.give_to_owner(&file)
    }

    /// Makes the names in this folder durable.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.handle.sync_all()
    }

    /// The kind of what `name` is; None where there is nothing.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn kind(&self, name: impl AsRef<Path>) -> io::Result<Option<FileType>> {
        match rustix::fs::statat(&self.handle, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(FileType::from_raw_mode(found.st_mode))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The names in this folder.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn names(&self) -> io::Result<Vec<OsString>> {
        names(&self.handle)
    }

    /// Removes `name` with all that is below it. What is not there is no error; a link is removed, not followed, and what
    /// is mounted there stays.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn remove(&self, name: impl AsRef<Path>) -> io::Result<()> {
        let name = name.as_ref();
        let removed = match self.kind(name)? {
            None => return Ok(()),
            Some(FileType::Directory) => {
                let folder = self.any_folder(name)?;
                for inner in folder.names()? {
                    folder.remove(inner)?;
                }
                rustix::fs::unlinkat(&self.handle, name, AtFlags::REMOVEDIR)
            }
            Some(_) => rustix::fs::unlinkat(&self.handle, name, AtFlags::empty()),
        };
        match removed {
            Err(Errno::NOENT) => Ok(()),
            other => Ok(other?),
        }
    }

    fn check_owner(&self, found: &Metadata) -> io::Result<()> {
        if found.uid() == self.owner {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "belongs to user {}, and the folder above to user {}; chown it where you trust its content",
            found.uid(),
            self.owner
        )))
    }

    fn give_to_owner(&self, made: impl AsFd) -> io::Result<()> {
        if rustix::process::geteuid().as_raw() == self.owner {
            return Ok(());
        }
        Ok(rustix::fs::fchown(made, Some(rustix::fs::Uid::from_raw(self.owner)), None)?)
    }
}

impl Entry {
    /// Opens the file.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn open(&self, write: bool) -> io::Result<File> {
        File::options().read(true).write(write).open(self.via())
    }

    /// A path by which this process reaches the file, as long as this is there.
    pub(crate) fn via(&self) -> PathBuf {
        via(&self.handle)
    }

    /// Where the file is, for people.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file's metadata.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn metadata(&self) -> io::Result<Metadata> {
        self.handle.metadata()
    }
}

fn via(handle: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", handle.as_raw_fd()))
}

fn open(folder: impl AsFd, name: &OsStr, flags: OFlags, resolve: ResolveFlags) -> io::Result<File> {
    loop {
        match rustix::fs::openat2(&folder, name, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            Err(Errno::INTR | Errno::AGAIN) => {}
            other => return Ok(other?.into()),
        }
    }
}

/// Words for what openat2(2) alone refuses.
fn explain(error: io::Error, wanted: &str) -> io::Error {
    match Errno::from_io_error(&error) {
        Some(Errno::LOOP) => {
            io::Error::other(format!("is no {wanted}: a symbolic link, and here none is followed"))
        }
        Some(Errno::NOTDIR) => io::Error::other(format!("is no {wanted}")),
        Some(Errno::XDEV) => {
            io::Error::other("another file system is mounted there, and here none is entered")
        }
        Some(Errno::NOSYS) => io::Error::other("this kernel has no openat2(2): Linux 5.6 has"),
        _ => error,
    }
}

/// Returns the names in an open folder, without `.` and `..`.
///
/// # Errors
/// The operating system's.
pub(crate) fn names(folder: impl AsFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_regular_files_of_the_owner_are_reached() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("pool");
        fs::create_dir_all(path.join("a/b")).unwrap();
        fs::write(home.path().join("secret"), "secret").unwrap();
        fs::write(path.join("a/b/file"), "data").unwrap();
        symlink(home.path().join("secret"), path.join("a/link")).unwrap();
        symlink("b", path.join("a/inner")).unwrap();
        symlink("/proc/self/root", path.join("magic")).unwrap();
        rustix::fs::mknodat(CWD, path.join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let root = Folder::root(&path).unwrap();
        assert_eq!(root.read("a/b/file").unwrap(), b"data");
        for (name, why) in [
            ("a/link", "symbolic link"),
            ("a/inner/file", "symbolic link"),
            ("magic", "symbolic link"),
            ("fifo", "is no regular file"),
            ("a", "is no regular file"),
            ("a/b/file/x", "is no regular file"),
            ("../secret", "mounted there"),
            ("/etc/passwd", "mounted there"),
            ("none", "No such file"),
        ] {
            let error = root.file(name).unwrap_err().to_string();
            assert!(error.contains(why), "{name}: {error}");
        }
        for name in ["a/inner", "magic", "a/b/file", "fifo", ".."] {
            assert!(root.folder(name).is_err(), "{name}");
        }
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(path.join("a/b/file"), Some(7), None).unwrap();
            let error = root.file("a/b/file").unwrap_err().to_string();
            assert!(error.contains("belongs to user 7"), "{error}");
            // In a folder of another user, what is made is his.
            std::os::unix::fs::chown(path.join("a"), Some(7), None).unwrap();
            let his = Folder::root(&path.join("a")).unwrap();
            his.write("new", b"x").unwrap();
            assert_eq!(his.read("new").unwrap(), b"x");
            his.make_folder("inside").unwrap();
            his.folder("inside").unwrap();
            std::os::unix::fs::chown(path.join("a"), Some(0), None).unwrap();
        }
    }

    #[test]
    fn what_is_written_and_removed_stays_inside() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("pool");
        fs::create_dir_all(path.join("a/b/c")).unwrap();
        let secret = home.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        symlink(&secret, path.join(".record.new")).unwrap();
        symlink(&secret, path.join("record")).unwrap();
        symlink(home.path(), path.join("a/b/out")).unwrap();
        let root = Folder::root(&path).unwrap();
        root.write("record", b"mine").unwrap();
        assert_eq!(
            (root.read("record").unwrap(), fs::read(&secret).unwrap()),
            (b"mine".to_vec(), b"secret".to_vec())
        );
        assert!(root.create("record").is_err());
        root.remove("a").unwrap();
        root.remove("a").unwrap();
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        assert_eq!(root.names().unwrap(), ["record"]);
        assert_eq!(root.kind("record").unwrap(), Some(FileType::RegularFile));
    }
}
