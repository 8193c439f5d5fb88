//! The journal of an open qcow2 image: mapping changes that were answered and are not in the image's file yet, in a
//! file that outlives this process.
//!
//! ```text
//!   allocation, zeroes, trim ──> note (32 bytes, pwrite to shared memory) ──> the request is answered
//!   commit succeeded ──> reset: a new generation, in which the old records count for nothing
//!   next open on this boot ──> pending records ──> replay ──> commit ──> reset
//! ```
//!
//! Layout: two header slots of 4096 bytes, of which the valid one with the higher generation counts; then records of 32
//! bytes. A record's checksum covers the nonce and the generation of the header and the record's index, so that a record
//! of an earlier generation, or one that was written in part, ends the list.
//!
//! The journal guards against the end of the process, not of the host: it belongs to one boot. It does not say whether
//! another program has changed the image since; that is for the caller ([`super::recover`]).

mod header;
mod record;
mod sweep;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

pub(super) use header::Identity;
use header::{HEADER_BYTES, Header};
pub(super) use record::{Change, Record};
use record::{RECORD, RECORD_BYTES, Stamp};

use crate::random::Random;

/// Records of one generation.
const RECORDS: u64 = 64 << 10;

/// Free records below which a commit is due: more than the requests that have passed that check can add.
const RESERVE: u64 = 256;

/// Guest clusters that the records of one generation may cover before a commit is due; bounds the work of a replay.
const MAX_CLUSTERS: u64 = 1 << 20;

/// Where the records begin, and the size of the file, in bytes.
const RECORDS_AT: u64 = 2 * HEADER_BYTES;
const FILE_BYTES: u64 = RECORDS_AT + RECORDS * RECORD_BYTES;

/// Tries to open a file that other processes remove.
const TRIES: usize = 16;

/// The records that were found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Left {
    /// There is no journal of this image from this boot.
    Nothing,
    /// Those of a process that has died; none where it had committed them.
    Records(Vec<Record>),
}

/// How long a journal may stay locked by a process whose image is free, and how often it is tried.
const PATIENCE: Duration = Duration::from_secs(2);
const PAUSE: Duration = Duration::from_millis(5);

/// An open journal. Its file is locked, so that no other process uses it. Dropped without records, it removes the file.
pub(super) struct Journal {
    file: File,
    path: PathBuf,
    header: Header,
    /// The generation that records are added to.
    generation: Cell<u64>,
    /// Records of this generation.
    count: Cell<u64>,
    /// Guest clusters that they cover.
    clusters: Cell<u64>,
    /// That it cannot be written was logged.
    warned: Cell<bool>,
    /// Nothing is noted any more.
    given_up: Cell<bool>,
}

impl Journal {
    /// Opens the journal of an image in `folder`, which exists, with the records that a dead process has left there.
    ///
    /// # Errors
    /// The reason why there is no journal: folder or file cannot be used, there is no space, another process has it open.
    pub(super) fn open(folder: &Path, identity: Identity) -> Result<(Journal, Left), String> {
        let path = folder.join(identity.file_name());
        let directory = open_folder(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        sweep::sweep(&directory, folder);
        Journal::open_in(&directory, &path, identity).map_err(|error| format!("{}: {error}", path.display()))
    }

    fn open_in(directory: &File, path: &Path, identity: Identity) -> io::Result<(Journal, Left)> {
        let file = open_locked(directory, path)?;
        if let Some(header) = Header::read(&file, &identity)? {
            // With its records the file has its space.
            let journal = Journal::new(file, path, header);
            let records = journal.load()?;
            return Ok((journal, Left::Records(records)));
        }
        let header = Header { identity, nonce: Random::any_seed(), generation: 1 };
        let journal = Journal::new(file, path, header);
        // An old journal of the same name belongs to another image, or to another boot. All the space there will be is
        // taken: a full file system is an error here, and not in the middle of a request.
        journal.file.set_len(0)?;
        reserve(&journal.file)?;
        journal.header.write(&journal.file)?;
        Ok((journal, Left::Nothing))
    }

    /// Reads the records that a dead process has left, and changes nothing. `Left::Nothing` also where the journal
    /// cannot be read.
    pub(super) fn peek(folder: &Path, identity: &Identity) -> Left {
        let records = || -> io::Result<Option<Vec<Record>>> {
            let directory = open_folder(folder)?;
            let file = open_existing(&directory, Path::new(&identity.file_name()))?;
            lock(&file)?;
            let Some(header) = Header::read(&file, identity)? else { return Ok(None) };
            load(&file, &header).map(Some)
        };
        records().ok().flatten().map_or(Left::Nothing, Left::Records)
    }

    fn new(file: File, path: &Path, header: Header) -> Journal {
        Journal {
            file,
            path: path.to_owned(),
            generation: Cell::new(header.generation),
            header,
            count: Cell::new(0),
            clusters: Cell::new(0),
            warned: Cell::new(false),
            given_up: Cell::new(false),
        }
    }

    /// Reads the records of this generation, and adds others after them.
    fn load(&self) -> io::Result<Vec<Record>> {
        let header = Header { generation: self.generation.get(), ..self.header.clone() };
        let records = load(&self.file, &header)?;
        self.count.set(records.len() as u64);
        Ok(records)
    }

    /// Adds a record. It survives this process when this returns, unless the journal was given up.
    ///
    /// # Errors
    /// The file's, or that there is no room: the change has to be committed before it is answered then.
    pub(super) fn note(&self, record: Record) -> io::Result<()> {
        if self.given_up.get() {
            return Ok(());
        }
        let index = self.count.get();
        let bytes = record.encode(self.stamp(index)).filter(|_| index < RECORDS);
        let bytes = bytes.ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))?;
        self.file.write_all_at(&bytes, RECORDS_AT + index * RECORD_BYTES)?;
        self.count.set(index + 1);
        self.clusters.set(self.clusters.get().saturating_add(record.count));
        Ok(())
    }

    /// Logs, once, that changes cannot be noted.
    pub(super) fn warn_once(&self, error: &io::Error) {
        if !self.warned.replace(true) {
            let path = self.path.display();
            tracing::warn!(%error, "{path}: cannot be written: changes of its image are committed at once");
        }
    }

    /// Whether a commit is due, so that there is room for more.
    pub(super) fn is_nearly_full(&self) -> bool {
        self.count.get() + RESERVE > RECORDS || self.clusters.get() > MAX_CLUSTERS
    }

    /// Whether there are records that no commit has made needless.
    pub(super) fn has_records(&self) -> bool {
        self.count.get() > 0
    }

    /// Ends the journal: what is noted later is not kept. The image's file has all that the records say. Returns false
    /// if they can neither be removed nor emptied: the next open must not believe them then.
    #[must_use]
    pub(super) fn give_up(&self) -> bool {
        self.given_up.set(true);
        self.count.set(0);
        self.clusters.set(0);
        let emptied = self.file.set_len(0).is_ok();
        std::fs::remove_file(&self.path).is_ok() || emptied
    }

    /// Tells whether the journal was given up.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.get()
    }

    /// Begins a new generation: the image's file has all that the records say.
    ///
    /// # Errors
    /// The file's. The records still count then, until the image's file changes: the journal has to be given up.
    pub(super) fn reset(&self) -> io::Result<()> {
        if self.has_records() {
            let generation = self.generation.get() + 1;
            Header { generation, ..self.header.clone() }.write(&self.file)?;
            self.generation.set(generation);
            self.count.set(0);
            self.clusters.set(0);
        }
        Ok(())
    }

    fn stamp(&self, index: u64) -> Stamp {
        Stamp { nonce: self.header.nonce, generation: self.generation.get(), index }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        // With records it is for the next open. One that was given up is gone, and another file may have its name.
        if !self.has_records() && !self.is_given_up() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Reads the records of a generation.
fn load(file: &File, header: &Header) -> io::Result<Vec<Record>> {
    let mut bytes = vec![0; usize::try_from(FILE_BYTES - RECORDS_AT).map_err(io::Error::other)?];
    file.read_exact_at(&mut bytes, RECORDS_AT)?;
    let stamp = |index| Stamp { nonce: header.nonce, generation: header.generation, index };
    let parts = bytes.as_chunks::<RECORD>().0;
    Ok((0..).zip(parts).map_while(|(index, part)| Record::decode(part, stamp(index))).collect())
}

/// Opens a folder that nobody else can write to.
fn open_folder(folder: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let directory = File::from(rustix::fs::open(folder, flags, Mode::empty())?);
    let found = directory.metadata()?;
    if found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(io::Error::other("the folder belongs to another user, or others may write to it"));
    }
    Ok(directory)
}

/// Opens a file of a folder that is there, is regular and belongs to this user.
fn open_existing(directory: &File, name: &Path) -> io::Result<File> {
    open_with(directory, name, OFlags::empty())
}

fn open_with(directory: &File, name: &Path, more: OFlags) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
    let file = File::from(rustix::fs::openat(directory, name, flags, Mode::RUSR | Mode::WUSR)?);
    let found = file.metadata()?;
    if !found.is_file() || found.uid() != rustix::process::geteuid().as_raw() || found.mode() & 0o077 != 0 {
        return Err(io::Error::other("not a file of this user alone"));
    }
    Ok(file)
}

/// Opens a journal's file, or makes it, and locks it.
fn open_locked(directory: &File, path: &Path) -> io::Result<File> {
    let name = Path::new(path.file_name().unwrap_or_default());
    for _ in 0..TRIES {
        let file = open_with(directory, name, OFlags::CREATE)?;
        lock(&file)?;
        // Between the two calls another process may have removed it.
        if file.metadata()?.nlink() == 1 {
            return Ok(file);
        }
    }
    Err(io::Error::other("other processes keep removing it"))
}

/// Locks a journal. A process that is being killed may have given up the image and not yet the journal.
fn lock(file: &File) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if Instant::now() < until => std::thread::sleep(PAUSE),
            Err(Errno::WOULDBLOCK) => return Err(io::Error::other("another process uses it")),
            locked => return Ok(locked?),
        }
    }
}

fn reserve(file: &File) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, FILE_BYTES) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => {
            let length = file.metadata()?.len();
            let zeroes =
                vec![0; usize::try_from(FILE_BYTES.saturating_sub(length)).map_err(io::Error::other)?];
            file.write_all_at(&zeroes, length)
        }
        Err(errno) => Err(errno.into()),
    }
}
