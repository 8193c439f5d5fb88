//! Where the control sockets are: a folder that only its owner can enter, with a socket `<pid>.sock` for each process.
//!
//! | who | folder |
//! |---|---|
//! | whoever sets `NBDBRIDGE_RUNTIME_DIR` | that one |
//! | root | `/run/nbdbridge` |
//! | a service of `contrib/systemd` | `/run/nbdbridge-NAME` (by that variable); root looks there too |
//! | a user | `$XDG_RUNTIME_DIR/nbdbridge`, else `/run/user/UID/nbdbridge`, else `/tmp/nbdbridge-UID` |
//!
//! A folder of another user is not used, and a socket at which another user listens is asked nothing; root is shown what
//! such servers say of themselves, and does nothing with it. A process that was killed leaves its socket behind; whoever
//! finds that nobody listens there removes it.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::FileType;

use crate::trust::{self, Folder};

/// The variable that names another folder.
const VARIABLE: &str = "NBDBRIDGE_RUNTIME_DIR";

/// Where processes of this user have their sockets.
pub(crate) fn path() -> PathBuf {
    choose(rustix::process::geteuid().as_raw(), |name| {
        std::env::var_os(name).filter(|value| !value.is_empty())
    })
}

fn choose(uid: u32, variable: impl Fn(&str) -> Option<OsString>) -> PathBuf {
    if let Some(folder) = variable(VARIABLE) {
        return folder.into();
    }
    if uid == 0 {
        return "/run/nbdbridge".into();
    }
    let run = variable("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    let run = run.unwrap_or_else(|| format!("/run/user/{uid}").into());
    if run.is_dir() { run.join("nbdbridge") } else { format!("/tmp/nbdbridge-{uid}").into() }
}

/// A listening control socket; its path is removed when dropped.
#[derive(Debug)]
pub(super) struct OwnSocket {
    path: PathBuf,
}

impl OwnSocket {
    /// Makes this process's socket in `folder`, and that too where it is missing.
    ///
    /// # Errors
    /// One line that names the path.
    pub(super) fn bind(folder: &Path) -> Result<(UnixListener, OwnSocket)> {
        make(folder)?;
        let pid = std::process::id();
        let path = folder.join(format!("{pid}.sock"));
        let cannot = || format!("{}: cannot listen there", path.display());
        if let Err(error) = std::fs::metadata(&path).and_then(|_| UnixStream::connect(&path))
            && (is_nobody_there(&error) || error.kind() == io::ErrorKind::NotFound)
        {
            let listener = listen(&folder.join(format!(".{pid}.new")), &path).with_context(cannot)?;
            return Ok((listener, OwnSocket { path }));
        }
        bail!("{}: another process listens there; set {VARIABLE} to a folder of your own", path.display())
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

/// Listens at `path`, for the owner alone. It has this name only when it has its mode and listens, and is called `new`
/// until then: whoever finds a socket that nobody answers removes it.
///
/// # Errors
/// The operating system's.
pub(crate) fn listen(new: &Path, path: &Path) -> io::Result<UnixListener> {
    // What another process of our number has left there.
    let _ = std::fs::remove_file(new);
    let listener = UnixListener::bind(new)?;
    let named = std::fs::set_permissions(new, PermissionsExt::from_mode(0o600))
        .and_then(|()| listener.set_nonblocking(true))
        .and_then(|()| std::fs::rename(new, path));
    if named.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(new);
    }
    named.map(|()| listener)
}

impl Drop for OwnSocket {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The folder that journals of images are in, made where it is missing.
///
/// # Errors
/// One line that names the folder.
pub(crate) fn journal_folder() -> Result<PathBuf> {
    let folder = path();
    make(&folder)?;
    Ok(folder)
}

/// Makes the folder, or sees to it that it is ours and closed to others.
fn make(folder: &Path) -> Result<()> {
    let advice = || {
        let shown = folder.display();
        format!("{shown}: no folder for sockets; remove it, or set {VARIABLE} to a folder of your own")
    };
    Folder::make(folder).map(drop).with_context(advice)
}

/// A socket's file in a folder.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Found {
    /// The process's number, by the file's name.
    pub(super) pid: u32,
    pub(super) path: PathBuf,
    /// Folder and socket are ours or root's. Else what is said there is not believed.
    pub(super) trusted: bool,
}

/// The sockets in `folder`, in the order of their processes' numbers. Whether anybody listens shows when one connects. A
/// folder of another user is for root alone to look into.
///
/// # Errors
/// One line that names the folder.
pub(super) fn sockets(folder: &Path) -> Result<Vec<Found>> {
    let shown = folder.display();
    let there = match Folder::open(folder) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            bail!("{shown}: no permission; a server is shown to the user who started it, and to root")
        }
        Err(error) => return Err(error).with_context(|| format!("{shown}: cannot look into it")),
    };
    let owner = there.owner();
    ensure!(
        trust::is_trusted(owner) || rustix::process::geteuid().is_root(),
        "{shown}: belongs to user {owner}, so that nothing in it is believed; set {VARIABLE} to a folder of your own"
    );
    let names = there.names().with_context(|| format!("{shown}: cannot look into it"))?;
    let mut sockets: Vec<Found> = names
        .iter()
        .filter_map(|name| {
            let pid = name.to_str()?.strip_suffix(".sock")?.parse().ok()?;
            // A link, which may lead to another server, is none of ours.
            let found = there.look(name).ok()?;
            let is_socket = FileType::from_raw_mode(found.st_mode) == FileType::Socket;
            let trusted = there.trusts(found.st_uid);
            is_socket.then(|| Found { pid, path: there.join(name), trusted })
        })
        .collect();
    sockets.sort();
    Ok(sockets)
}

/// Whether an error of connect(2) says that the process which made the socket is gone.
pub(super) fn is_nobody_there(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::ConnectionRefused
}

/// Removes the socket of a process that is gone.
pub(super) fn remove_stale(path: &Path) {
    tracing::debug!("{}: nobody listens there; removed", path.display());
    // Somebody else may have been quicker.
    let _ = std::fs::remove_file(path);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn who_looks_where() {
        let none = |_: &str| None;
        let set = |name: &'static str, value: &'static str| {
            move |asked: &str| (asked == name).then(|| OsString::from(value))
        };
        assert_eq!(choose(0, none), Path::new("/run/nbdbridge"));
        assert_eq!(choose(0, set("XDG_RUNTIME_DIR", "/tmp")), Path::new("/run/nbdbridge"));
        assert_eq!(choose(7, set("XDG_RUNTIME_DIR", "/tmp")), Path::new("/tmp/nbdbridge"));
        assert_eq!(
            choose(4_000_000_000, set("XDG_RUNTIME_DIR", "tmp")),
            Path::new("/tmp/nbdbridge-4000000000")
        );
        assert_eq!(choose(4_000_000_000, none), Path::new("/tmp/nbdbridge-4000000000"));
        assert_eq!(choose(0, set(VARIABLE, "/x")), Path::new("/x"));
    }

    #[test]
    fn the_socket_is_its_owners_alone_and_goes() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("new");
        let (_listener, socket) = OwnSocket::bind(&folder).unwrap();
        assert_eq!((mode(&folder), mode(socket.path())), (0o700, 0o600));
        let found = Found { pid: std::process::id(), path: socket.path().to_owned(), trusted: true };
        assert_eq!(sockets(&folder).unwrap(), [found]);
        drop(socket);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 0);
    }

    #[test]
    fn an_open_folder_is_closed_and_a_stale_socket_replaced() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path();
        std::fs::set_permissions(folder, PermissionsExt::from_mode(0o777)).unwrap();
        let stale = folder.join(format!("{}.sock", std::process::id()));
        drop(UnixListener::bind(&stale).unwrap());
        let (_listener, _socket) = OwnSocket::bind(folder).unwrap();
        assert_eq!(mode(folder), 0o700);
        UnixStream::connect(&stale).unwrap();
        let error = OwnSocket::bind(folder).unwrap_err().to_string();
        assert!(error.contains("another process listens there"), "{error}");
    }

    #[test]
    fn folders_that_will_not_do() {
        let parent = tempfile::tempdir().unwrap();
        let (link, file) = (parent.path().join("link"), parent.path().join("file"));
        std::os::unix::fs::symlink(parent.path(), &link).unwrap();
        std::fs::write(&file, "").unwrap();
        for folder in [&link, &file, &parent.path().join("no/folder")] {
            let error = format!("{:#}", OwnSocket::bind(folder).unwrap_err());
            assert!(error.contains(folder.to_str().unwrap()), "{error}");
        }
        assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 2);
        assert_eq!(sockets(&parent.path().join("no")).unwrap(), []);
        assert!(sockets(&file).is_err() && sockets(&link).is_err());
    }
}
