//! The pool: a folder of volumes. Who may do what at the same time, what is in it, and what of that was cut
//! short. How much more may be in it is `space`'s.
//!
//! Locks (flock(2), on the folders themselves, so that nothing is left of them):
//! - the pool's, for moments: while a name or space is given away;
//! - a volume's, for as long as something is done to it. Whoever has a [`Volume`] has its lock.
//!
//! A volume's lock is taken before the pool's, never after it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use rustix::fs::{FileType, FlockOperation, flock};
use rustix::io::Errno;

use super::options::DiskFormat;
use super::runtime::{Runtime, State};
use super::space::Settings;
use super::{Error, Name, Pending, Record, Result};
use crate::beneath::{Entry, Folder};
use crate::detach;

/// The file that makes a folder a pool. No volume can have this name.
const FILE: &str = ".pool.json";

/// What begins with this is being removed.
pub(super) const GONE: &str = ".gone-";

/// What begins with this has no name yet.
pub(super) const NEW: &str = ".new-";

/// An open pool.
#[derive(Debug)]
pub(crate) struct Pool {
    root: Folder,
    runtime: Runtime,
}

/// A volume that nobody else works on while this is there.
#[derive(Debug)]
pub(crate) struct Volume<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) name: Name,
    pub(crate) record: Record,
    /// The volume's folder, which is locked.
    pub(super) folder: Folder,
}

impl Pool {
    /// Opens a pool, and brings to an end what was cut short there.
    ///
    /// # Errors
    /// One line: it is none, or cannot be read.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let shown = folder.display();
        let root = Folder::root(folder).with_context(|| format!("{shown}: there is no such pool"))?;
        read_settings(&root)?;
        let meta = root.handle().metadata().with_context(|| format!("{shown}: cannot look at it"))?;
        let pool = Pool { runtime: Runtime::new(&meta)?, root };
        pool.converge()?;
        Ok(pool)
    }

    /// Makes a folder a pool, where it is none; one with something in it must be meant.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn make(folder: &Path, not_empty: bool) -> Result<()> {
        let shown = folder.display();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .with_context(|| format!("{shown}: cannot make the folder"))?;
        let cannot = || format!("{shown}: cannot look into it");
        let root = Folder::root(folder).with_context(cannot)?;
        if root.kind(FILE).with_context(cannot)?.is_some() {
            return Ok(());
        }
        if !not_empty && root.names().with_context(cannot)?.iter().any(|name| name != "lost+found") {
            let line = format!(
                "{shown}: is no pool of volumes, and not empty; if it is meant: nbdbridge volume pool --pool {shown} --make"
            );
            return Err(Error::Refused(line));
        }
        write_settings(&root, &Settings::default())
    }

    /// Where it is; absolute, without symbolic links.
    pub(crate) fn folder(&self) -> &Path {
        self.root.path()
    }

    /// The same, open.
    pub(super) fn root(&self) -> &Folder {
        &self.root
    }

    /// What it is set to now: others may have changed it.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn settings(&self) -> Result<Settings> {
        read_settings(&self.root)
    }

    /// Changes that for good.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn change(&self, settings: &Settings) -> Result<()> {
        let _lock = self.lock()?;
        write_settings(&self.root, settings)
    }

    /// Mounts volumes below this folder from now on.
    ///
    /// # Errors
    /// One line: it cannot be made.
    pub(crate) fn set_mount_root(&mut self, folder: &Path) -> Result<()> {
        let made = fs::create_dir_all(folder).and_then(|()| Folder::root(folder));
        let root = made.with_context(|| format!("{}: cannot be mounted in", folder.display()))?;
        self.runtime.set_mount_root(root.path().to_owned());
        Ok(())
    }

    /// The names of all volumes, in their order; the broken ones too.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn names(&self) -> Result<Vec<Name>> {
        let cannot = || format!("{}: cannot look into it", self.folder().display());
        let mut names = Vec::new();
        for name in self.root.names().with_context(cannot)? {
            let Some(name) = name.to_str().and_then(|name| name.parse::<Name>().ok()) else { continue };
            // A link is no volume, and shown as a broken one.
            let kind = self.root.kind(&name).with_context(cannot)?;
            if matches!(kind, Some(FileType::Directory | FileType::Symlink)) {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    /// All volumes, each with what is known of it, or why that cannot be known.
    ///
    /// # Errors
    /// One line, where the pool itself cannot be read.
    pub(crate) fn all(&self) -> Result<Vec<(Name, Result<Record>)>> {
        let read = |name: Name| {
            let record = self.folder_of(&name).and_then(|folder| Record::read(&folder, &name));
            (name, record)
        };
        Ok(self.names()?.into_iter().map(read).collect())
    }

    /// Opens a volume's folder.
    ///
    /// # Errors
    /// Not found; [`Error::Broken`]: a link, another mount, or another user's.
    pub(super) fn folder_of(&self, name: &Name) -> Result<Folder> {
        self.root.folder(name).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.not_found(name),
            _ => Error::Broken(format!(
                "volume `{name}` is broken: {}: {error}",
                self.folder().join(name).display()
            )),
        })
    }

    /// Takes a volume to work on it; waits for whoever does.
    ///
    /// # Errors
    /// Not found, broken.
    pub(crate) fn volume(&self, name: &Name) -> Result<Volume<'_>> {
        let folder = self.lock_volume(name, FlockOperation::LockExclusive)?;
        let folder = folder.ok_or_else(|| anyhow!("volume `{name}` is locked"))?;
        let record = Record::read(&folder, name)?;
        let volume = Volume { pool: self, name: name.clone(), record, folder };
        if volume.record.pending.is_some() {
            // Whoever began it has died since the pool was opened.
            volume.converge()?;
            return self.volume(name);
        }
        Ok(volume)
    }

    /// Locks a volume's folder; None where it is locked and that is not to be waited for.
    pub(super) fn lock_volume(&self, name: &Name, how: FlockOperation) -> Result<Option<Folder>> {
        loop {
            let folder = self.folder_of(name)?;
            let shown = folder.path().display();
            match retry(|| flock(folder.handle(), how)) {
                Err(Errno::WOULDBLOCK) => return Ok(None),
                other => other.with_context(|| format!("{shown}: cannot lock it"))?,
            }
            // It may have been removed, and another made, while we waited.
            let identity = |folder: &Folder| folder.handle().metadata().map(|meta| (meta.dev(), meta.ino()));
            let locked = identity(&folder).with_context(|| shown.to_string())?;
            if self.root.folder(name).and_then(|now| identity(&now)).is_ok_and(|now| now == locked) {
                return Ok(Some(folder));
            }
        }
    }

    pub(super) fn not_found(&self, name: &Name) -> Error {
        Error::NotFound { name: name.clone(), pool: self.folder().to_owned() }
    }

    /// The pool's own lock, until it is dropped.
    pub(super) fn lock(&self) -> Result<Folder> {
        // A descriptor of its own, as the lock is the descriptor's.
        let shown = self.folder().display();
        let folder = self.root.folder(".").with_context(|| shown.to_string())?;
        retry(|| flock(folder.handle(), FlockOperation::LockExclusive))
            .with_context(|| format!("{shown}: cannot lock it"))?;
        Ok(folder)
    }

    /// What is attached and mounted of a volume now.
    pub(crate) fn state(&self, name: &Name) -> Result<State> {
        self.runtime.read(name)
    }

    pub(super) fn runtime(&self) -> &Runtime {
        &self.runtime
    }

    /// Undoes or finishes what was cut short. What somebody works on is left to them, and what fails to the next time.
    fn converge(&self) -> Result<()> {
        self.sweep()?;
        let folder = self.folder();
        detach::sweep(|attachment| attachment.source.as_path().starts_with(folder));
        for (name, record) in self.all()? {
            if let Ok(Record { pending: Some(_), .. }) = record {
                self.converge_one(&name);
            }
        }
        for name in self.runtime.names() {
            let Ok(state) = self.state(&name) else { continue };
            if state.holders.is_empty() && (state.starting || state.plane.is_some()) {
                self.converge_one(&name);
            }
        }
        Ok(())
    }

    fn converge_one(&self, name: &Name) {
        let Ok(Some(folder)) = self.lock_volume(name, FlockOperation::NonBlockingLockExclusive) else {
            return;
        };
        // Now that nobody else can change it.
        let Ok(record) = Record::read(&folder, name) else { return };
        let mut volume = Volume { pool: self, name: name.clone(), record, folder };
        let converged = match volume.record.pending {
            Some(_) => volume.converge(),
            None => volume.let_go(),
        };
        if let Err(error) = converged {
            tracing::warn!("volume `{name}`: {error}");
        }
    }
}

impl Volume<'_> {
    /// Where its disk is; None where that is a remote one.
    pub(crate) fn disk(&self) -> Option<PathBuf> {
        self.record.disk_name().map(|name| self.folder.path().join(name))
    }

    /// Its disk, where it must have one.
    ///
    /// # Errors
    /// It is a remote one, or no regular file.
    pub(super) fn own_disk(&self) -> Result<Entry> {
        let name = self.own_format()?.disk_name();
        let found = self.folder.file(name);
        Ok(found.with_context(|| format!("{}: cannot open it", self.folder.path().join(name).display()))?)
    }

    /// That disk's format.
    ///
    /// # Errors
    /// It is a remote one.
    pub(super) fn own_format(&self) -> Result<DiskFormat> {
        self.record.format.ok_or_else(|| {
            Error::Refused(format!(
                "volume `{}`: its disk is a remote one; its size and copies are the business of whoever serves it",
                self.name
            ))
        })
    }

    /// Writes the record down; it is durable then.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn save(&self) -> Result<()> {
        self.record.write(&self.folder)
    }

    /// Undoes or finishes what was cut short.
    fn converge(mut self) -> Result<()> {
        match &self.record.pending {
            Some(pending @ Pending::Create { .. }) => {
                tracing::warn!(
                    "volume `{}`: was left while {pending}; nobody was given it, and it is removed",
                    self.name
                );
                self.undo()
            }
            Some(pending @ Pending::Snapshot { .. }) => {
                tracing::warn!(
                    "volume `{}`: was left while {pending}; there is none now, or it is whole",
                    self.name
                );
                self.undo_snapshot()
            }
            Some(Pending::Resize { .. }) => self.settle_size(true),
            None => Ok(()),
        }
    }

    /// Ends a data plane that nobody needs any more.
    fn let_go(&mut self) -> Result<()> {
        let mut state = self.state()?;
        let elsewhere =
            state.mounted.is_none() && state.plane.as_ref().is_some_and(|plane| plane.is_in_use());
        let here = self.is_mounted(&state, &self.pool.runtime.mount_point(&self.name));
        if !state.holders.is_empty() || elsewhere && !here {
            return Ok(());
        }
        self.take_down(&mut state, false)
    }

    /// What is attached and mounted of it now.
    pub(crate) fn state(&self) -> Result<State> {
        self.pool.state(&self.name)
    }

    /// Writes that down.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn save_state(&self, state: &State) -> Result<()> {
        self.pool.runtime.write(&self.name, state)
    }
}

fn read_settings(root: &Folder) -> Result<Settings> {
    let (shown, file) = (root.path().display(), root.path().join(FILE));
    let settings = match root.read(FILE) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let line = format!(
                "{shown}: is not a pool of volumes; make one: nbdbridge volume pool --pool {shown} --make"
            );
            return Err(Error::Refused(line));
        }
        other => other.with_context(|| format!("{}: cannot read it", file.display()))?,
    };
    serde_json::from_slice(&settings).map_err(|error| {
        Error::Broken(format!(
            "{}: {error}; remove that file, and set the pool up again: nbdbridge volume pool --make",
            file.display()
        ))
    })
}

fn write_settings(root: &Folder, settings: &Settings) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(settings).context("settings as JSON")?;
    root.write(FILE, &bytes)
        .with_context(|| format!("{}: cannot write it", root.path().join(FILE).display()))?;
    Ok(())
}

/// Again, as long as signals come in between.
fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}
