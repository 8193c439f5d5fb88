//! What the doors have in common: a door starts, tells where it is, serves, and ends in good order. How they come and
//! go together is `serve`'s business; what goes through one is its own.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use bridge::worker::Workers;
use bridge::{Export, LocalFuture};

use crate::attach::LoopDoor;
use crate::cli::{DoorArgs, ExportArg, Listen, abstract_name};
use crate::control::Watch;
use crate::fuse::{self, FuseDoor};
use crate::io_flusher;
use crate::net::NetDoor;
use crate::systemd::PassedSocket;
use crate::ublk::{self, UblkDoor};

/// A way to the exports that is open. It is driven on the main thread's event loop; the data path runs elsewhere.
pub(crate) trait Door {
    /// What a person or a script connects to, a line each.
    fn lines(&self) -> Vec<OsString>;

    /// What the control socket tells of it. Asked once, when the door is open.
    fn watch(&self) -> Watch;

    /// Serves until the door ends by itself. Cancel-safe.
    fn serve(&self) -> LocalFuture<'_, ()>;

    /// Waits, still serving, until the end would hurt nobody. Cancel-safe.
    fn release(&self) -> LocalFuture<'_, ()>;

    /// Lets nobody new in, finishes what is in flight, and closes. False where that was not possible.
    fn drain(&self) -> LocalFuture<'_, bool>;

    /// Stops answering at once, as far as the door can, in place of a drain that was dropped. Returns within a second.
    fn cut(&self) -> LocalFuture<'_, ()>;
}

/// What a door is opened upon.
pub(crate) struct Site<'a> {
    /// What it serves.
    pub(crate) exports: &'a [Arc<Export>],
    /// What that was made of, in the same order.
    pub(crate) args: &'a [ExportArg],
    /// Where its slow requests (and connections) run.
    pub(crate) workers: &'a Arc<Workers>,
    /// There is no other door to these exports.
    pub(crate) alone: bool,
    /// How it ends.
    pub(crate) process: &'a crate::cli::ProcessArgs,
    /// Sockets that were passed in, for the door that takes them.
    pub(crate) passed: Vec<PassedSocket>,
}

/// Puts a door's place in order, before the sources are opened: one may be at the same path.
///
/// # Errors
/// One line that says what is in the way.
fn prepare(door: &DoorArgs) -> Result<()> {
    match door {
        DoorArgs::Net(_) | DoorArgs::Loop(_) | DoorArgs::Ublk(_) => Ok(()),
        DoorArgs::Fuse(args) => fuse::clear_dead(&args.file),
    }
}

/// Opens a door. When this returns, whoever comes is served.
///
/// # Errors
/// One line that says what kept it shut.
pub(crate) async fn open(door: &DoorArgs, site: &mut Site<'_>) -> Result<Box<dyn Door>> {
    match door {
        DoorArgs::Net(args) => Ok(Box::new(NetDoor::open(args, site)?)),
        DoorArgs::Fuse(args) => Ok(Box::new(FuseDoor::open(args, site).await?)),
        DoorArgs::Loop(args) => Ok(Box::new(LoopDoor::open(args, site).await?)),
        DoorArgs::Ublk(args) => Ok(Box::new(UblkDoor::open(args, site)?)),
    }
}

/// What the doors want of the process before a source is opened.
///
/// # Errors
/// One line that says why a door cannot be opened, where that is known before anything is touched.
pub(crate) fn before_sources(doors: &[DoorArgs]) -> Result<()> {
    doors.iter().try_for_each(prepare)?;
    if doors.iter().any(|door| door.ublk().is_some()) {
        ublk::before_sources();
    } else if doors.iter().any(DoorArgs::is_local) {
        io_flusher::become_one();
    }
    Ok(())
}

/// What they want once the sources are open, and there are no threads yet.
pub(crate) fn before_threads(doors: &[DoorArgs], pid_file: Option<&Path>) {
    if doors.iter().any(|door| door.ublk().is_some()) {
        let sockets = doors.iter().filter_map(DoorArgs::net).flat_map(|net| &net.listen);
        let sockets = sockets.filter_map(|listen| match listen {
            Listen::Unix(path) if abstract_name(path).is_none() => Some(path.as_path()),
            Listen::Unix(_) | Listen::Tcp { .. } => None,
        });
        let needed: Vec<_> = sockets.chain(pid_file).map(whole).collect();
        ublk::before_threads(&needed);
    }
}

/// A path with its folder resolved, as the kernel names mounts.
fn whole(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let folder = path.parent().and_then(|folder| folder.canonicalize().ok());
    match (folder, path.file_name()) {
        (Some(folder), Some(name)) => folder.join(name),
        _ => path,
    }
}

/// Returns whether a door makes a device or a mount on this host: whoever started the process must learn where it is. A
/// device that is taken over is known, and in use.
pub(crate) fn are_made(doors: &[DoorArgs]) -> bool {
    doors.iter().any(|door| match door {
        DoorArgs::Net(_) => false,
        DoorArgs::Fuse(_) | DoorArgs::Loop(_) => true,
        DoorArgs::Ublk(args) => args.recover.is_none(),
    })
}

/// How long a source may be locked by a process that has died.
pub(crate) fn patience(doors: &[DoorArgs]) -> Duration {
    let recovering = doors.iter().filter_map(DoorArgs::ublk).filter(|ublk| ublk.recover.is_some());
    recovering.map(|ublk| ublk.recover_timeout).max().unwrap_or_default()
}
