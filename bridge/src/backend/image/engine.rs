//! The engine of an image: one thread that owns imago's object and does all that may wait, or that changes where
//! clusters lie. Every worker's requests come to it; reads and writes of clusters that the map knows do not.
//!
//! ```text
//!   workers ──jobs──> engine thread ──> range lock ──> gate ──> imago (mappings, allocation)
//!      │                                    └──> file (data, with this thread's own io_uring)
//!      └──fast path: map ──> file
//! ```
//!
//! What keeps what apart:
//! - The range lock: data moves under a shared one, mappings change under an exclusive one.
//! - The map: the holder of an exclusive lock makes it forget the range first, and so waits for the fast path.
//! - The structures of the image (`places`): no place is used without a look whether a table is there, and a new table is
//!   written when all writes to where it comes have ended.
//! - The gate: allocations pass it together; a commit, and whatever only frees clusters, passes it alone.
//! - Freed clusters: imago tells the file before it lowers a refcount (`Host::settle_writes`). After that the next
//!   allocation commits first, so that no cluster is used again while the file still names it. Nobody looks for free
//!   clusters (shared `freeing`) while an allocation frees what it replaces (exclusive `freeing`).
//! - The passes: a flush runs a commit of its own, or joins one that began after the flush arrived.
//!
//! imago's futures hold locks across waits, and must not be dropped half-way by a client that leaves: here every one of
//! them is a task of this thread, which polls it to its end whoever waits for it.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Release};

use imago::{FormatAccess, Mapping};
use tokio::sync::{OnceCell, RwLock, Semaphore, SemaphorePermit};

use super::commit;
use super::discard::Trims;
use super::host::{Host, drop_caches, from_io};
use super::journal::Journal;
use super::map::Place;
use super::memory::Tables;
use super::{Parts, Shared};
use crate::backend::file::FileOptions;
use crate::passes::Passes;
use crate::ranges::{Mode, RangeLocks};
use crate::{Buffer, Error, ErrorKind, Flags, Result};

/// Allocations under way at once: each pins a table in imago's cache of 128.
const ALLOCATIONS: usize = 32;

/// Metadata that is kept back at most before it is committed unasked, in bytes.
const KEPT_BYTES: u64 = 16 << 20;

/// What part of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    /// In a file as it is.
    File { file: u8, offset: u64, writable: bool },
    /// Zeroes; `explicit` where this image says so itself.
    Zero { explicit: bool },
    /// Compressed.
    Special,
}

impl Segment {
    /// The same, `skip` bytes further on.
    fn after(self, skip: u64) -> Segment {
        match self {
            Segment::File { file, offset, writable } => {
                Segment::File { file, offset: offset + skip, writable }
            }
            other => other,
        }
    }
}

pub(super) struct Engine {
    pub(super) image: FormatAccess<Host>,
    pub(super) shared: Arc<Shared>,
    pub(super) options: FileOptions,
    /// The file with the metadata, and the one with the data where that is another.
    pub(super) top: Host,
    pub(super) data_file: Option<Host>,
    /// Size of a cluster in bytes.
    pub(super) cluster: u64,
    /// Version of qcow2; 0 for other formats.
    pub(super) version: u32,
    /// Size of the backing image in bytes.
    pub(super) backing: Option<u64>,
    pub(super) ranges: RangeLocks,
    pub(super) gate: RwLock<()>,
    /// Commits that flushes share.
    passes: Passes,
    pub(super) allocations: Semaphore,
    /// The journal of what is not committed; None where there is none.
    pub(super) journal: Option<Journal>,
    /// Set once the image is marked as in use.
    pub(super) marked: OnceCell<()>,
    /// The journal lacks a change: it is committed before it is answered.
    pub(super) must_commit: Cell<bool>,
    /// Held shared by whoever looks for free clusters, exclusively by an allocation that enters its mapping, which may
    /// free what was mapped before.
    pub(super) freeing: RwLock<()>,
    /// Ranges of the disk with an L2 table each; imago lets one allocation at a time change a table. Waiting here instead
    /// of there, an allocation holds nothing that another one needs.
    pub(super) l2_tables: RangeLocks,
    pub(super) trims: Trims,
    /// Places of the file with the metadata that guests' data is being written to.
    pub(super) in_use: RangeLocks,
    /// The length of the file with the data, as it was seen last; it never becomes shorter.
    pub(super) seen_length: Cell<u64>,
    /// Bytes of the largest cluster of the chain.
    largest_cluster: u64,
    pub(super) tables: Tables,
}

impl Engine {
    pub(super) fn new(parts: Parts, shared: Arc<Shared>) -> Rc<Self> {
        Rc::new(Engine {
            image: parts.image,
            shared,
            options: parts.options,
            top: parts.top,
            data_file: parts.data_file,
            cluster: parts.cluster,
            version: parts.version,
            backing: parts.backing,
            ranges: RangeLocks::new(parts.cluster),
            gate: RwLock::default(),
            passes: Passes::default(),
            allocations: Semaphore::new(ALLOCATIONS),
            journal: parts.journal,
            marked: OnceCell::new(),
            must_commit: Cell::new(false),
            freeing: RwLock::default(),
            l2_tables: RangeLocks::new(parts.cluster * (parts.cluster / 8)),
            trims: Trims::default(),
            in_use: RangeLocks::new(parts.cluster),
            seen_length: Cell::new(0),
            largest_cluster: parts.largest_cluster,
            tables: parts.tables,
        })
    }

    pub(super) fn size(&self) -> u64 {
        self.shared.size()
    }

    /// The file that guests' data is in.
    pub(super) fn data(&self) -> &Host {
        self.data_file.as_ref().unwrap_or(&self.top)
    }

    /// What the range begins with, and for how many bytes. The map learns it: the caller holds a lock on the range, which
    /// is one of whole clusters. So all of the first and the last one are looked at, or small requests would teach nothing.
    pub(super) async fn resolve(&self, offset: u64, len: u64) -> Result<(Segment, u64)> {
        let skip = offset % self.cluster;
        let start = offset - skip;
        let end = (offset + len).next_multiple_of(self.cluster).min(self.size());
        match self.look(start, end - start).await {
            Ok((segment, count)) if count > skip => {
                self.learn(start, count, segment);
                Ok((segment.after(skip), (count - skip).min(len)))
            }
            // Parts of a cluster lie in different places of a backing image, or one of them where none can.
            _ => {
                let (segment, count) = self.look(offset, len).await?;
                self.learn(offset, count, segment);
                Ok((segment, count))
            }
        }
    }

    fn learn(&self, offset: u64, count: u64, segment: Segment) {
        match segment {
            Segment::File { file, offset: place, writable } => {
                self.publish(offset, count, Place::File { file, offset: place, writable });
            }
            Segment::Zero { .. } => self.publish(offset, count, Place::Zero),
            Segment::Special => {}
        }
    }

    /// Lets the map know the whole clusters of a run.
    pub(super) fn publish(&self, offset: u64, len: u64, place: Place) {
        let start = offset.next_multiple_of(self.cluster);
        let mut end = offset + len;
        if end < self.size() {
            end -= end % self.cluster;
        }
        if start >= end {
            return;
        }
        let place = match place {
            Place::File { file, offset: at, writable } => {
                Place::File { file, offset: at + (start - offset), writable }
            }
            Place::Zero => Place::Zero,
        };
        self.shared.map.publish(start, end - start, place);
    }

    /// The same without the map.
    pub(super) async fn look(&self, offset: u64, len: u64) -> Result<(Segment, u64)> {
        let (mapping, count) = self.image.get_mapping(offset, len).await.map_err(|error| from_io(&error))?;
        if count == 0 {
            return Err(malformed("it ends before its size"));
        }
        let segment = match mapping {
            Mapping::Raw { storage, offset, writable, .. } => {
                self.check_place(storage, offset, count)?;
                Segment::File { file: storage.number(), offset, writable }
            }
            Mapping::Zero { explicit, .. } => Segment::Zero { explicit },
            Mapping::Special { .. } => Segment::Special,
            _ => return Err(malformed("a mapping of an unknown kind")),
        };
        Ok((segment, count))
    }

    /// Fills the buffer.
    pub(super) async fn read(&self, offset: u64, buf: Buffer) -> Result<Buffer> {
        let _lock = self.ranges.lock(offset, offset + buf.len() as u64, Mode::Shared).await;
        self.read_locked(offset, buf, true).await
    }

    /// The same for whoever holds a lock on the range; whoever is about to change where it lies does not `learn` that.
    pub(super) async fn read_locked(&self, offset: u64, mut buf: Buffer, learn: bool) -> Result<Buffer> {
        let mut at = 0;
        while at < buf.len() {
            let place = offset + at as u64;
            let left = (buf.len() - at) as u64;
            let (segment, count) = match learn {
                true => self.resolve(place, left).await?,
                false => self.look(place, left).await?,
            };
            let part = at..at + index(count);
            at = part.end;
            match segment {
                Segment::File { file, offset, .. } if part == (0..buf.len()) => {
                    return self.file(file).read(offset, buf, Flags::NONE).await;
                }
                Segment::File { file, offset, .. } => {
                    let piece = self.file(file).read(offset, Buffer::new(part.len()), Flags::NONE).await?;
                    buf[part].copy_from_slice(&piece);
                }
                Segment::Zero { .. } => buf[part].fill(0),
                Segment::Special => {
                    let _bytes = self.tables.memory().decompress(self.decompression_bytes()).await;
                    self.image.read(&mut buf[part], place).await.map_err(|error| from_io(&error))?;
                }
            }
        }
        Ok(buf)
    }

    /// Bytes that the decompression of one cluster takes at most: the cluster, and what an entry of a table can name as
    /// its input (twice the cluster), for imago and once more for the file's read.
    fn decompression_bytes(&self) -> u64 {
        5 * self.largest_cluster
    }

    /// Lets a job begin when the tables that it may load have room. For a job that holds no lock yet.
    pub(super) async fn room(&self) -> Option<SemaphorePermit<'_>> {
        let slot = self.tables.slot().await;
        self.make_room().await;
        slot
    }

    /// Drops imago's caches if these are full. For a caller that does not hold the gate.
    pub(super) async fn make_room(&self) {
        if !self.tables.are_full() {
            return;
        }
        let _alone = self.gate.write().await;
        // Another job may have done it.
        if self.tables.are_full() {
            self.tables.reset();
            // A table that is in use stays, and counts again when it is full the next time.
            if let Err(error) = drop_caches(&self.image).await {
                tracing::debug!(%error, "some of an image's cached tables stay");
            }
        }
    }

    pub(super) fn file(&self, number: u8) -> &Arc<dyn crate::Backend> {
        &self.shared.files[usize::from(number)]
    }

    /// Whether all of a range reads as zeroes by its mapping.
    pub(super) async fn is_zero(&self, offset: u64, len: u64) -> Result<bool> {
        let mut at = 0;
        while at < len {
            let (segment, count) = self.look(offset + at, len - at).await?;
            if !matches!(segment, Segment::Zero { .. }) {
                return Ok(false);
            }
            at += count;
        }
        Ok(true)
    }

    /// Whether an allocation could meet clusters that the file still names.
    pub(super) fn has_freed(&self) -> bool {
        self.top.has_freed()
    }

    /// Makes all data durable that was written before this call, and commits the metadata. A commit that others share
    /// counts only where it began after this call.
    pub(super) async fn commit(&self) -> Result<()> {
        let Some(turn) = self.passes.join().await else { return Ok(()) };
        let _alone = self.gate.write().await;
        let pass = turn.begin();
        // Whoever passed the gate alone may have committed meanwhile; writes in place have gone on since.
        if self.dirty() || self.has_freed() {
            self.commit_alone().await?;
        } else {
            self.shared.flush_files().await?;
        }
        pass.succeed();
        Ok(())
    }

    /// Commits the metadata, if there is any, for whoever has passed the gate alone. It is no flush: where there is no
    /// metadata it makes nothing durable.
    pub(super) async fn commit_alone(&self) -> Result<()> {
        if self.dirty() || self.has_freed() || self.top.kept_bytes() > 0 {
            let done = async {
                self.image.flush().await?;
                self.make_way().await;
                commit::commit(&self.top, self.data_file.as_ref()).await
            };
            done.await.map_err(|error: io::Error| from_io(&error))?;
            self.shared.dirty.store(false, Release);
            self.top.clear_freed();
            self.reset_journal().await;
        }
        Ok(())
    }

    /// Commits where much is kept back, or where the journal lacks something.
    pub(super) async fn commit_if_much(&self) -> Result<()> {
        if self.must_commit.get() || self.top.kept_bytes() > KEPT_BYTES.min(self.tables.memory().kept_bytes())
        {
            self.commit().await
        } else {
            Ok(())
        }
    }

    pub(super) fn dirty(&self) -> bool {
        self.shared.dirty.load(Acquire)
    }

    /// Notes that the metadata has changed: before the request that did it is answered.
    pub(super) fn set_dirty(&self) {
        self.shared.dirty.store(true, Release);
    }

    /// Makes every write that was answered before durable.
    pub(super) async fn flush(&self) -> Result<()> {
        if self.dirty() { self.commit().await } else { self.shared.flush_files().await }
    }

    /// Makes the disk larger; what is new reads as zeroes.
    pub(super) async fn grow(&self, size: u64) -> Result<()> {
        let old = self.size();
        // A disk of qcow2 is made of sectors: an odd size is kept for as long as it is served.
        let whole = size
            .checked_next_multiple_of(512)
            .ok_or_else(|| Error::new(ErrorKind::NoSpace, "no image is that large"))?;
        let _lock = self.ranges.lock(0, u64::MAX, Mode::Exclusive).await;
        // What lies past the old end is another thing from now on.
        self.shared.map.forget(0, old);
        // Where the backing image is longer, it must not show.
        let shown = self.backing.unwrap_or(0).min(whole);
        {
            let _alone = self.gate.write().await;
            self.set_dirty();
            self.image.resize_grow(whole, imago::format::PreallocateMode::None).await.map_err(|error| {
                match error.kind() {
                    io::ErrorKind::Unsupported => {
                        Error::new(ErrorKind::NotSupported, format!("the image cannot grow: {error}"))
                    }
                    _ => from_io(&error),
                }
            })?;
            if shown > old {
                // First the L1 table alone: what it leaves is free for new tables only after that. The file gets its
                // new size last, when the zeroes are in it.
                self.top.keep_size(old.next_multiple_of(512)).await.map_err(|error| from_io(&error))?;
            }
            self.commit_alone().await?;
        }
        if shown > old {
            self.hide(old, shown).await?;
            let _alone = self.gate.write().await;
            self.commit_alone().await?;
            self.set_dirty();
            self.top.keep_size(whole).await.map_err(|error| from_io(&error))?;
            self.commit_alone().await?;
        }
        self.shared.set_size(size);
        Ok(())
    }
}

pub(super) fn malformed(what: &str) -> Error {
    Error::new(ErrorKind::Io, format!("the image is malformed: {what}"))
}

pub(super) fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
