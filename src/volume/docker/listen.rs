//! The plugin's socket: systemd's, or one of our own, which is root's alone.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{SocketAddr, UnixListener as StdListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use tokio::net::UnixListener;

use crate::control;
use crate::systemd::{Family, PassedSocket, SocketState};

/// A socket that listens.
#[derive(Debug)]
pub(super) struct Door {
    listener: StdListener,
    path: PathBuf,
    file: Option<SocketFile>,
}

/// A socket's file of our own; removed when dropped.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode: a successor may have put its own there.
    identity: (u64, u64),
}

impl Door {
    /// Takes the socket that was passed in; without one, makes one at `path`.
    ///
    /// # Errors
    /// One line: another daemon listens there, what was passed makes no sense, the operating system refuses.
    pub(super) fn open(path: &Path, passed: Vec<PassedSocket>) -> Result<Self> {
        let mut passed = passed.into_iter();
        match (passed.next(), passed.next()) {
            (None, _) => Door::bind(path),
            (Some(PassedSocket { fd, family: Family::Unix, state: SocketState::Listening, .. }), None) => {
                let listener = StdListener::from(fd);
                let own = listener.local_addr().ok();
                let own = own.as_ref().and_then(SocketAddr::as_pathname).unwrap_or(path).to_owned();
                Ok(Door { listener, path: own, file: None })
            }
            _ => {
                bail!("socket activation: one listening Unix socket is wanted (Accept=no), and nothing else")
            }
        }
    }

    fn bind(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).with_context(|| path.display().to_string())?;
        let cannot = || format!("{}: cannot listen there", path.display());
        let folder = path.parent().unwrap_or(Path::new("/"));
        fs::DirBuilder::new().recursive(true).mode(0o755).create(folder).with_context(cannot)?;
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(cannot),
            Ok(there) if !there.file_type().is_socket() => {
                bail!("{}: exists and is no socket; give --docker-socket another path", path.display())
            }
            Ok(_) => match UnixStream::connect(&path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    tracing::info!("{}: nobody listens there any more; replaced", path.display());
                }
                Ok(_) => bail!("{}: another process listens there; end it first", path.display()),
                Err(error) => return Err(error).with_context(cannot),
            },
        }
        let new = folder.join(format!(".nbdbridge-{}.new", std::process::id()));
        let listener = control::listen(&new, &path).with_context(cannot)?;
        let meta = fs::symlink_metadata(&path).with_context(cannot)?;
        let file = SocketFile { path: path.clone(), identity: (meta.dev(), meta.ino()) };
        Ok(Door { listener, path, file: Some(file) })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Within the event loop.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn listen(self) -> Result<(UnixListener, Option<SocketFile>)> {
        let cannot = || format!("{}: cannot listen there", self.path.display());
        self.listener.set_nonblocking(true).with_context(cannot)?;
        Ok((UnixListener::from_std(self.listener).with_context(cannot)?, self.file))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity) {
            // At worst it stays, and is replaced.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plugins/x.sock");
        let first = Door::open(&path, Vec::new()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let error = Door::open(&path, Vec::new()).unwrap_err().to_string();
        assert!(error.contains("another process listens there"), "{error}");
        // As if it had been killed.
        let Door { listener, file, .. } = first;
        drop(listener);
        let second = Door::open(&path, Vec::new()).unwrap();
        drop(file);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn what_is_no_socket_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        fs::write(&path, "x").unwrap();
        let error = Door::open(&path, Vec::new()).unwrap_err().to_string();
        assert!(error.contains("is no socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"x");
    }
}
