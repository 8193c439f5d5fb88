//! The door's life: the file is mounted, served by its threads, and taken away.
//!
//! ```text
//!   open:     FILE found or made ─ mounted ─ handshake ─ threads ─ looked at once, as a program would
//!   release:  unmounted; where it is in use: lazily, and its users have a while to finish
//!   drain:    what is left of them is cut off when the process ends; serve.rs flushes
//! ```
//!
//! All system calls on the mounted file are made by helper processes (see `helper`).

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bridge::{Budget, Capabilities, Export, LocalFuture};
use fuser::{Config, Session, SessionACL};
use tokio::runtime::Handle;
use tokio::sync::{OnceCell, RwLock, watch};

use super::attributes::Attributes;
use super::file::DiskFile;
use super::length::Length;
use super::mount::{self, Unmounted, Wish};
use super::mounts::Mounted;
use super::point::{Point, resolve};
use super::users;
use crate::attachment::Note;
use crate::cli::{FuseArgs, Source, UsageError};
use crate::control::{Place, Watch};
use crate::door::{Door, Site};
use crate::helper::{self, Failure, Task};

/// Bytes that requests which wait for storage may hold, all files of the process together.
const MEMORY_BUDGET: u64 = 256 << 20;

/// Threads by default at most: more do not carry more.
const MAX_THREADS: usize = 4;

/// A file that does not answer a first look within this time is not ready.
const FIRST_LOOK: Duration = Duration::from_secs(10);

/// Unmounting ends within this time; fusermount3 may have to be waited for.
const UNMOUNT_LIMIT: Duration = Duration::from_secs(20);

/// A cut end waits for it no longer.
const CUT_LIMIT: Duration = Duration::from_millis(500);

/// How long a new size may be unknown to `nbdbridge devices`.
const NOTE_AGAIN: Duration = Duration::from_millis(500);

/// An export as a mounted file.
pub(crate) struct FuseDoor {
    /// The name of what it serves.
    export: String,
    point: Point,
    /// The device number of the mounted file system.
    number: String,
    /// Turns true when the last thread has ended: the file is unmounted, and its last user gone.
    ended: watch::Receiver<bool>,
    /// How often the file is open.
    opened: watch::Receiver<u64>,
    /// The file cannot be found under its path any more.
    /// How it was unmounted, or given up. An attempt that is left half way begins anew.
    unmounted: OnceCell<Unmounted>,
    drain_timeout: Duration,
    /// The export's.
    size: watch::Receiver<u64>,
    /// What `nbdbridge devices` finds; dropped last, when nothing is left to be found.
    note: Note,
}

/// Writes down that the first export is about to be mounted at a file.
pub(crate) fn note(file: &Path, site: &Site<'_>) -> Result<Note> {
    let export = site.exports.first().context("there is no export")?;
    let geometry = export.geometry();
    let path = resolve(file).or_else(|_| std::path::absolute(file)).unwrap_or_else(|_| file.to_owned());
    Ok(Note::begin(&shown(&site.args[0].source), &path, &geometry, geometry.read_only()))
}

impl FuseDoor {
    /// Mounts the first export at FILE.
    ///
    /// # Errors
    /// One line: no FUSE here, no permission, FILE is no place to mount at, an export that cannot be a file.
    pub(crate) async fn open(args: &FuseArgs, site: &Site<'_>) -> Result<Self> {
        Self::open_noted(note(&args.file, site)?, args, site).await
    }

    /// As [`FuseDoor::open`], for a file that is written down.
    ///
    /// # Errors
    /// As [`FuseDoor::open`]. Nothing is left of it then.
    pub(crate) async fn open_noted(note: Note, args: &FuseArgs, site: &Site<'_>) -> Result<Self> {
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
        let point = Point::prepare(&args.file, &|made| note.change(|attachment| attachment.made = made))?;
        note.change(|attachment| attachment.file = point.path.clone());
        let source = shown(&site.args[0].source);
        let wish = Wish { source: &source, read_only, allow_other: args.allow_other };
        let device = mount::mount(&point.path, &wish)?;
        let number = number_at(&point.path);
        note.change(|attachment| {
            attachment.number = Some(number.clone()).filter(|number| !number.is_empty())
        });
        let (tell_opened, opened) = watch::channel(0);
        // Without its threads the mount is dead at once, and unmounting it asks nobody.
        let ended = start(device, args, site, export.clone(), &point, tell_opened).inspect_err(|_| {
            // The first error is the one to tell.
            let _ = mount::unmount(&point.path, true);
        })?;
        let door = FuseDoor {
            export: export.name().to_owned(),
            number,
            ended,
            opened,
            unmounted: OnceCell::new(),
            drain_timeout: site.process.drain_timeout,
            size,
            point,
            note,
        };
        if let Err(error) = look_at(&door.point.path, geometry.size).await {
            door.take_away().await;
            return Err(error);
        }
        Ok(door)
    }

    /// Tells `nbdbridge devices` that a block device stands upon the file.
    pub(crate) fn note_device(&self, device: &Path) {
        self.note.change(|attachment| attachment.device = Some(device.to_owned()));
    }

    /// Where the file is: absolute, without symbolic links.
    pub(crate) fn path(&self) -> &Path {
        &self.point.path
    }

    /// Writes the size down as it changes; not more often than a person looks.
    async fn note_sizes(&self) {
        let mut size = self.size.clone();
        while size.changed().await.is_ok() {
            tokio::time::sleep(NOTE_AGAIN).await;
            let now = *size.borrow_and_update();
            self.note.change(|attachment| attachment.size = now);
        }
        std::future::pending().await
    }

    /// Unmounts, lazily where it is in use; says whether it was in use. Cancel-safe: the next call goes on until it is done.
    async fn take_away(&self) -> Unmounted {
        if *self.ended.borrow() {
            return Unmounted::Yes;
        }
        *self.unmounted.get_or_init(|| self.unmount_whole()).await
    }

    async fn unmount_whole(&self) -> Unmounted {
        let unmounted = match self.unmount(false).await {
            Ok(Unmounted::Busy) => {
                if self.note.attachment().device.is_none() {
                    tracing::warn!(
                        "{}: is in use by {}; nobody else can open it from now on, and it ends when they have closed it",
                        self.point.path.display(),
                        users::describe(&self.point.path, Some(&self.number))
                    );
                }
                self.unmount(true).await.map(|_| Unmounted::Busy)
            }
            other => other,
        };
        unmounted.unwrap_or_else(|failure| {
            tracing::warn!("{}: cannot be unmounted: {failure}", self.point.path.display());
            Unmounted::Busy
        })
    }

    async fn unmount(&self, lazily: bool) -> Result<Unmounted, Failure> {
        let task = Task::Unmount { file: &self.point.path, number: &self.number, lazily };
        match helper::run_apart(task, UNMOUNT_LIMIT).await {
            Ok(answer) if answer == b"busy" => Ok(Unmounted::Busy),
            Ok(_) => Ok(Unmounted::Yes),
            // Better than to leave a dead mount: a lazy unmount does not wait for requests.
            Err(Failure::NotStarted(error)) if number_at(&self.point.path) == self.number => {
                tracing::debug!("no helper process: {error}");
                mount::unmount(&self.point.path, true)
                    .map_err(|error| Failure::Refused(None, format!("{error:#}")))
            }
            Err(failure) => Err(failure),
        }
    }

    /// Waits until nobody has the file open any more.
    pub(crate) async fn until_closed(&self) {
        let mut opened = self.opened.clone();
        if opened.wait_for(|count| *count == 0).await.is_err() {
            // The threads have ended, which is another's business.
            std::future::pending::<()>().await;
        }
    }

    async fn until_ended(&self) {
        let mut ended = self.ended.clone();
        // Whoever would tell is gone: that is an end, too.
        let _ = ended.wait_for(|ended| *ended).await;
    }
}

impl Drop for FuseDoor {
    /// Undoes a start that another step has cut short, and takes away what an end has left: a dead mount stays for ever.
    fn drop(&mut self) {
        // Once its threads have ended the number may be another mount's.
        if *self.ended.borrow() || self.number.is_empty() || number_at(&self.point.path) != self.number {
            return;
        }
        let left = if self.unmounted.initialized() {
            // A lazy unmount asks nobody.
            mount::unmount(&self.point.path, true).err().map(|error| format!("{error:#}"))
        } else {
            let task = Task::Unmount { file: &self.point.path, number: &self.number, lazily: true };
            helper::run(&task, UNMOUNT_LIMIT).err().map(|failure| failure.to_string())
        };
        if let Some(failure) = left {
            tracing::warn!("{}: cannot be unmounted: {failure}", self.point.path.display());
        }
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
            self.take_away().await;
            // Those who have it open are served until they close it; also where somebody else has unmounted it lazily.
            let _ = tokio::time::timeout(self.drain_timeout, self.until_ended()).await;
        })
    }

    fn drain(&self) -> LocalFuture<'_, bool> {
        Box::pin(async {
            self.take_away().await;
            // Without users the threads end at once.
            let gone = tokio::time::timeout(Duration::from_millis(500), self.until_ended()).await;
            if gone.is_err() {
                let attachment = self.note.attachment();
                let path = attachment.device.as_ref().unwrap_or(&self.point.path);
                tracing::warn!("{}: still in use: its users get an error from now on", path.display());
            }
            true
        })
    }

    fn cut(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            if tokio::time::timeout(CUT_LIMIT, self.take_away()).await.is_err() {
                // It is not waited for once more.
                let _ = self.unmounted.set(Unmounted::Busy);
            }
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
    opened: watch::Sender<u64>,
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
        opened,
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
pub(crate) fn shown(source: &Source) -> OsString {
    match source {
        Source::Path(path) => std::path::absolute(path).unwrap_or_else(|_| path.clone()).into(),
        other => other.to_string().into(),
    }
}

/// The device number of our file system that is mounted at a path; empty where none is seen there.
fn number_at(path: &Path) -> String {
    let mut mounted = Mounted::at(path).unwrap_or_default();
    mounted.retain(Mounted::is_ours);
    mounted.pop().map(|mounted| mounted.device).unwrap_or_default()
}

/// Opens the file as a program would.
async fn look_at(path: &Path, size: u64) -> Result<()> {
    let shown = path.display();
    match helper::run_apart(Task::Open(path), FIRST_LOOK).await {
        Ok(length) => {
            let length = std::str::from_utf8(&length).ok().and_then(|length| length.parse::<u64>().ok());
            ensure!(
                length.is_some_and(|length| length >= size),
                "{shown}: is mounted, but does not show up there; is it hidden by another mount?"
            );
            Ok(())
        }
        Err(Failure::Silent(_)) => bail!("{shown}: is mounted, but does not answer"),
        Err(failure) => bail!("{shown}: is mounted, but cannot be opened: {failure}"),
    }
}
