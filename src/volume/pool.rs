//! The pool: a folder of volumes. Who may do what at the same time, what is in it, and what of that was cut
//! short. How much more may be in it is `space`'s.
//!
//! Locks (flock(2), on the folders themselves, so that nothing is left of them):
//! - the pool's, for moments: while a name or space is given away;
//! - a volume's, for as long as something is done to it. Whoever has a [`Volume`] has its lock.
//!
//! A volume's lock is taken before the pool's, never after it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::options::DiskFormat;
use super::runtime::{Runtime, State};
use super::space::Settings;
use super::{Error, Name, Pending, Record, Result, durable};
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
    folder: PathBuf,
    runtime: Runtime,
}

/// A volume that nobody else works on while this is there.
#[derive(Debug)]
pub(crate) struct Volume<'a> {
    pub(crate) pool: &'a Pool,
    pub(crate) name: Name,
    pub(crate) record: Record,
    pub(super) lock: File,
}

impl Pool {
    /// Opens a pool, and brings to an end what was cut short there.
    ///
    /// # Errors
    /// One line: it is none, or cannot be read.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let shown = folder.display();
        let folder = folder.canonicalize().with_context(|| format!("{shown}: there is no such pool"))?;
        read_settings(&folder)?;
        let meta = fs::metadata(&folder).with_context(|| format!("{shown}: cannot look at it"))?;
        let pool = Pool { runtime: Runtime::new(&meta)?, folder };
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
        if folder.join(FILE).exists() {
            return Ok(());
        }
        let mut entries = fs::read_dir(folder).with_context(|| format!("{shown}: cannot look into it"))?;
        let alien =
            |entry: io::Result<fs::DirEntry>| entry.is_ok_and(|entry| entry.file_name() != "lost+found");
        if !not_empty && entries.any(alien) {
            let line = format!(
                "{shown}: is no pool of volumes, and not empty; if it is meant: nbdbridge volume pool --pool {shown} --make"
            );
            return Err(Error::Refused(line));
        }
        write_settings(folder, &Settings::default())
    }

    /// Where it is; absolute, without symbolic links.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// What it is set to now: others may have changed it.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn settings(&self) -> Result<Settings> {
        read_settings(&self.folder)
    }

    /// Changes that for good.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn change(&self, settings: &Settings) -> Result<()> {
        let _lock = self.lock()?;
        write_settings(&self.folder, settings)
    }

    /// Mounts volumes below this folder from now on.
    ///
    /// # Errors
    /// One line: it cannot be made.
    pub(crate) fn set_mount_root(&mut self, folder: &Path) -> Result<()> {
        let made = fs::create_dir_all(folder).and_then(|()| folder.canonicalize());
        let folder = made.with_context(|| format!("{}: cannot be mounted in", folder.display()))?;
        self.runtime.set_mount_root(folder);
        Ok(())
    }

    /// The names of all volumes, in their order; the broken ones too.
    ///
    /// # Errors
    /// One line.
    pub(crate) fn names(&self) -> Result<Vec<Name>> {
        let cannot = || format!("{}: cannot look into it", self.folder.display());
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.folder).with_context(cannot)? {
            let entry = entry.with_context(cannot)?;
            let name = entry.file_name().to_str().and_then(|name| name.parse().ok());
            if let Some(name) = name
                && entry.path().is_dir()
            {
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
            let record = Record::read(&self.path_of(&name), &name);
            (name, record)
        };
        Ok(self.names()?.into_iter().map(read).collect())
    }

    /// A volume's folder.
    pub(crate) fn path_of(&self, name: &Name) -> PathBuf {
        self.folder.join(name)
    }

    /// Takes a volume to work on it; waits for whoever does.
    ///
    /// # Errors
    /// Not found, broken.
    pub(crate) fn volume(&self, name: &Name) -> Result<Volume<'_>> {
        let lock = self.lock_volume(name, FlockOperation::LockExclusive)?;
        let lock = lock.ok_or_else(|| anyhow!("volume `{name}` is locked"))?;
        let record = Record::read(&self.path_of(name), name)?;
        let volume = Volume { pool: self, name: name.clone(), record, lock };
        if volume.record.pending.is_some() {
            // Whoever began it has died since the pool was opened.
            volume.converge()?;
            return self.volume(name);
        }
        Ok(volume)
    }

    /// Locks a volume's folder; None where it is locked and that is not to be waited for.
    pub(super) fn lock_volume(&self, name: &Name, how: FlockOperation) -> Result<Option<File>> {
        let path = self.path_of(name);
        loop {
            let folder = match File::open(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(self.not_found(name)),
                other => other.with_context(|| format!("{}: cannot open it", path.display()))?,
            };
            match retry(|| flock(&folder, how)) {
                Err(Errno::WOULDBLOCK) => return Ok(None),
                other => other.with_context(|| format!("{}: cannot lock it", path.display()))?,
            }
            // It may have been removed, and another made, while we waited.
            let locked = folder.metadata().with_context(|| path.display().to_string())?;
            if fs::metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (locked.dev(), locked.ino())) {
                return Ok(Some(folder));
            }
        }
    }

    pub(super) fn not_found(&self, name: &Name) -> Error {
        Error::NotFound { name: name.clone(), pool: self.folder.clone() }
    }

    /// The pool's own lock, until it is dropped.
    pub(super) fn lock(&self) -> Result<File> {
        let folder = File::open(&self.folder).with_context(|| self.folder.display().to_string())?;
        retry(|| flock(&folder, FlockOperation::LockExclusive))
            .with_context(|| format!("{}: cannot lock it", self.folder.display()))?;
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
        detach::sweep(|attachment| Path::new(&attachment.source).starts_with(folder));
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
        let Ok(Some(lock)) = self.lock_volume(name, FlockOperation::NonBlockingLockExclusive) else { return };
        // Now that nobody else can change it.
        let Ok(record) = Record::read(&self.path_of(name), name) else { return };
        let mut volume = Volume { pool: self, name: name.clone(), record, lock };
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
    /// The volume's folder.
    pub(crate) fn folder(&self) -> PathBuf {
        self.pool.path_of(&self.name)
    }

    /// Its disk; None where that is a remote one.
    pub(crate) fn disk(&self) -> Option<PathBuf> {
        self.record.disk_name().map(|name| self.folder().join(name))
    }

    /// The same, where it must have one.
    ///
    /// # Errors
    /// It is a remote one.
    pub(super) fn own_disk(&self) -> Result<PathBuf> {
        self.own_format().map(|format| self.folder().join(format.disk_name()))
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
        self.record.write(&self.folder())
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

fn read_settings(folder: &Path) -> Result<Settings> {
    let (shown, file) = (folder.display(), folder.join(FILE));
    let settings = match durable::read(&file) {
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

fn write_settings(folder: &Path, settings: &Settings) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(settings).context("settings as JSON")?;
    durable::write(folder, FILE, &bytes)
        .with_context(|| format!("{}: cannot write it", folder.join(FILE).display()))?;
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
