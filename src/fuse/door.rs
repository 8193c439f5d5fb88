//! The door's life: the file is mounted, served by its threads, and taken away.
//!
//! ```text
//!   open:     FILE found or made ─ mounted ─ handshake ─ threads ─ looked at once, as a program would
//!   release:  unmounted; where it is in use: lazily, and its users have a while to finish
//!   drain:    what is left of them is cut off when the process ends; serve.rs flushes
//! ```

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bridge::{Budget, Capabilities, Export, LocalFuture};
use fuser::{Config, Session, SessionACL};
use tokio::runtime::Handle;
use tokio::sync::{RwLock, watch};

use super::attributes::Attributes;
use super::file::DiskFile;
use super::length::Length;
use super::mount::{self, Unmounted, Wish};
use super::point::{Point, unmount_path};
use super::users;
use crate::attachment::{Attachment, StateFile};
use crate::cli::{FuseArgs, Source, UsageError};
use crate::control::{Place, Watch};
use crate::door::{Door, Site};

/// Bytes that requests which wait for storage may hold, all files of the process together.
const MEMORY_BUDGET: u64 = 256 << 20;

/// Threads by default at most: more do not carry more.
const MAX_THREADS: usize = 4;

/// A file that does not answer a first look within this time is not ready.
const FIRST_LOOK: Duration = Duration::from_secs(10);

/// How long a new size may be unknown to `nbdbridge devices`.
const NOTE_AGAIN: Duration = Duration::from_millis(500);

/// An export as a mounted file.
pub(crate) struct FuseDoor {
    /// The name of what it serves.
    export: String,
    point: Point,
    /// Turns true when the last thread has ended: the file is unmounted, and its last user gone.
    ended: watch::Receiver<bool>,
    /// The file cannot be found under its path any more.
    unmounted: Cell<bool>,
    drain_timeout: Duration,
    /// What `nbdbridge devices` finds; gone with the door.
    state: RefCell<Option<StateFile>>,
    attachment: RefCell<Attachment>,
    /// The export's.
    size: watch::Receiver<u64>,
}

impl FuseDoor {
    /// Mounts the first export at FILE.
    ///
    /// # Errors
    /// One line: no FUSE here, no permission, FILE is no place to mount at, an export that cannot be a file.
    pub(crate) async fn open(args: &FuseArgs, site: &Site<'_>) -> Result<Self> {
        let export = site.exports.first().context("there is no export")?.clone();
        let geometry = export.geometry();
        ensure!(
            i64::try_from(geometry.size).is_ok(),
            "{} bytes are more than a file can have (8 EiB); serve it with `nbdbridge net`",
            geometry.size
        );
        let read_only = geometry.read_only();
        if args.growable && (read_only || !geometry.capabilities.contains(Capabilities::GROW)) {
            let why = if read_only { "is read-only" } else { "cannot grow as it is opened here" };
            return Err(
                UsageError::new(format!("--growable: {} {why}; leave it out", site.args[0].source)).into()
            );
        }
        let size = export.watch_size();
        let point = Point::prepare(&args.file)?;
        let source = shown(&site.args[0].source);
        let wish = Wish { source: &source, read_only, allow_other: args.allow_other };
        let device = mount::mount(&point.path, &wish)?;
        let ended = start(device, args, site, export.clone(), &point).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = unmount_path(&point.path);
        })?;
        let attachment = Attachment::new(&source, &point.path, point.made(), &geometry, read_only);
        let door = FuseDoor {
            export: export.name().to_owned(),
            ended,
            unmounted: Cell::new(false),
            drain_timeout: site.process.drain_timeout,
            state: RefCell::new(attachment.save()),
            attachment: RefCell::new(attachment),
            size,
            point,
        };
        if let Err(error) = look_at(&door.point.path, geometry.size).await {
            door.take_away().await;
            return Err(error);
        }
        Ok(door)
    }

    /// Where the file is: absolute, without symbolic links.
    pub(crate) fn path(&self) -> &Path {
        &self.point.path
    }

    /// Tells `nbdbridge devices` that a block device stands upon the file.
    pub(crate) fn note_device(&self, device: &Path) {
        self.note(|attachment| attachment.device = Some(device.to_owned()));
    }

    fn note(&self, change: impl FnOnce(&mut Attachment)) {
        let mut attachment = self.attachment.borrow_mut();
        change(&mut attachment);
        self.state.replace(None);
        self.state.replace(attachment.save());
    }

    /// Writes the size down as it changes; not more often than a person looks.
    async fn note_sizes(&self) {
        let mut size = self.size.clone();
        while size.changed().await.is_ok() {
            tokio::time::sleep(NOTE_AGAIN).await;
            let now = *size.borrow_and_update();
            self.note(|attachment| attachment.size = now);
        }
        std::future::pending().await
    }

    /// Unmounts, lazily where it is in use; says whether it was in use.
    async fn take_away(&self) -> Unmounted {
        if self.unmounted.get() || *self.ended.borrow() {
            return Unmounted::Yes;
        }
        let (path, aloud) = (self.point.path.clone(), self.attachment.borrow().device.is_none());
        // fusermount3 may have to be waited for.
        let done = tokio::task::spawn_blocking(move || take_away(&path, aloud)).await;
        self.unmounted.set(true);
        match done {
            Ok(Ok(unmounted)) => unmounted,
            Ok(Err(error)) => {
                tracing::warn!("{error:#}");
                Unmounted::Busy
            }
            Err(_) => Unmounted::Busy,
        }
    }

    async fn until_ended(&self) {
        let mut ended = self.ended.clone();
        // Whoever would tell is gone: that is an end, too.
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

impl Door for FuseDoor {
    fn watch(&self) -> Watch {
        let places = vec![Place { export: self.export.clone(), at: (&self.point.path).into() }];
        Watch { kind: "fuse", places, clients: None, fixed: None }
    }

    fn lines(&self) -> Vec<OsString> {
        vec![self.point.path.clone().into()]
    }

    /// Until somebody unmounts the file.
    fn serve(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            tokio::select! {
                () = self.until_ended() => {}
                () = self.note_sizes() => {}
            }
            tracing::info!("{}: unmounted", self.point.path.display());
        })
    }

    fn release(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            if self.take_away().await == Unmounted::Busy {
                // Those who have it open are served until they close it.
                let _ = tokio::time::timeout(self.drain_timeout, self.until_ended()).await;
            }
        })
    }

    fn drain(&self) -> LocalFuture<'_, bool> {
        Box::pin(async {
            self.take_away().await;
            // Without users the threads end at once.
            let gone = tokio::time::timeout(Duration::from_millis(500), self.until_ended()).await;
            if gone.is_err() {
                let attachment = self.attachment.borrow();
                let path = attachment.device.as_ref().unwrap_or(&self.point.path);
                tracing::warn!("{}: still in use: its users get an error from now on", path.display());
            }
            true
        })
    }

    fn cut(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            self.take_away().await;
        })
    }
}

/// Starts the threads that serve the file; the channel tells their end.
fn start(
    device: std::os::fd::OwnedFd,
    args: &FuseArgs,
    site: &Site<'_>,
    export: Arc<Export>,
    point: &Point,
) -> Result<watch::Receiver<bool>> {
    let account = Budget::new(MEMORY_BUDGET).open_account().context("no memory for requests")?;
    let threads = args.threads.unwrap_or_else(default_threads).max(1);
    let shrinks =
        args.growable && site.alone && export.geometry().capabilities.contains(Capabilities::SHRINK);
    let file = DiskFile {
        attributes: Arc::new(Attributes::new(point.mode, point.uid, point.gid, &export)),
        export,
        workers: site.workers.clone(),
        account: Arc::new(account),
        runtime: Handle::current(),
        growable: args.growable,
        length: if shrinks { Length::may_shrink() } else { Length::default() },
        blocks: Arc::new(RwLock::new(())),
    };
    let mut config = Config::default();
    config.n_threads = Some(threads);
    config.clone_fd = mount::can_open_device();
    let session = Session::from_fd(file, device, SessionACL::All, config)
        .with_context(|| format!("{}: no understanding with the kernel's FUSE", point.path.display()))?;
    let (tell, ended) = watch::channel(false);
    let path = point.path.clone();
    std::thread::Builder::new()
        .name("fuse".to_owned())
        .spawn(move || {
            if let Err(error) = session.run() {
                tracing::error!("{}: {error}", path.display());
            }
            tell.send_replace(true);
        })
        .context("cannot start the threads of the file")?;
    Ok(ended)
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS)
}

/// What is served, as it is shown to people: a path in full.
fn shown(source: &Source) -> OsString {
    match source {
        Source::Path(path) => std::path::absolute(path).unwrap_or_else(|_| path.clone()).into(),
        other => other.to_string().into(),
    }
}

/// Opens the file as a program would. Not on this thread: where something is wrong, it waits.
async fn look_at(path: &Path, size: u64) -> Result<()> {
    let shown = path.display();
    let path = path.to_owned();
    let look = tokio::task::spawn_blocking(move || File::open(path)?.metadata());
    match tokio::time::timeout(FIRST_LOOK, look).await {
        Ok(Ok(Ok(found))) => {
            ensure!(
                found.is_file() && found.len() >= size,
                "{shown}: is mounted, but does not show up there; is it hidden by another mount?"
            );
            Ok(())
        }
        Ok(Ok(Err(error))) => {
            Err(error).with_context(|| format!("{shown}: is mounted, but cannot be opened"))
        }
        Ok(Err(_)) | Err(_) => bail!("{shown}: is mounted, but does not answer"),
    }
}

fn take_away(path: &Path, aloud: bool) -> Result<Unmounted> {
    let unmounted = mount::unmount(path, false)?;
    if unmounted == Unmounted::Busy {
        if aloud {
            tracing::warn!(
                "{}: is in use by {}; nobody else can open it from now on, and it ends when they have closed it",
                path.display(),
                users::describe(path)
            );
        }
        mount::unmount(path, true)?;
    }
    Ok(unmounted)
}
