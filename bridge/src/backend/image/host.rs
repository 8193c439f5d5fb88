//! The files that an image consists of, as imago sees them.
//!
//! imago reads and writes metadata through this, and nothing else: the data of guests goes to the file directly
//! ([`super::write`]). What it writes is kept back in memory until [`super::commit`] brings it to the file in an order
//! that no crash can turn into corruption; reads see it at once. What is kept back is in blocks of 512 bytes,
//! since no cluster is smaller: a block of metadata never has data beside it.
#![allow(unsafe_code)]

mod kept;
mod marks;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use super::damage::{DAMAGED, Damage};
use super::header;
use super::header::Header;
use super::memory::Tables;
use super::places::Places;
use crate::backend::file::length;
use crate::{Backend, Buffer, Error, ErrorKind, Flags};

/// Unit of what is kept back, in bytes.
pub(super) const BLOCK: u64 = 512;

/// The bytes of one.
pub(super) type BlockBytes = [u8; 512];

/// Blocks that are kept back, by their number.
pub(super) type Blocks = BTreeMap<u64, Box<BlockBytes>>;

/// One file of an image. Clones are the same file.
#[derive(Clone)]
pub(super) struct Host(Arc<Inner>);

struct Inner {
    path: PathBuf,
    /// Its number within the image.
    number: u8,
    file: Arc<dyn Backend>,
    /// Size in bytes, for the formats that go by it.
    size: AtomicU64,
    /// Metadata that has not been committed, or that a journal has and the file does not.
    kept: OnceLock<Mutex<Blocks>>,
    writable: bool,
    /// The image is marked as in use ([`header::IN_USE`]) whatever header is written.
    in_use: AtomicBool,
    /// Held while part of a block is filled in.
    filling: tokio::sync::Mutex<()>,
    /// The header was written: a table may have moved, and left its clusters.
    moved: AtomicBool,
    /// imago has lowered refcounts since the last commit: clusters that it takes for free may still be named by the file.
    freed: AtomicBool,
    /// Where the structures are, of an image that is written.
    places: OnceLock<Mutex<Places>>,
    /// Entries of tables that imago must not see, of an image with tables.
    damage: OnceLock<Damage>,
    /// The block device that it is on, where it cannot grow.
    device: OnceLock<Arc<File>>,
    /// Bytes of memory that what is known of its structures was counted with last.
    known_bytes: AtomicU64,
    /// Bytes of a cluster, where it has clusters.
    cluster: OnceLock<u64>,
    /// The bytes of one of its tables, and the count of those that are cached.
    tables: OnceLock<(u64, Tables)>,
    /// Its tables contradict each other: nothing that is kept back may go to the file.
    corrupt: AtomicBool,
    /// Names in the header that imago must not see, with their bytes.
    hidden_names: OnceLock<Vec<(Range<usize>, Vec<u8>)>>,
    /// imago does not see the header's marks for dirty and corrupt.
    marks_hidden: AtomicBool,
    /// That something is wrong with it has been said.
    told: AtomicBool,
    /// Nothing is kept back: for the test that shows why it is.
    #[cfg(test)]
    at_once: AtomicBool,
    helper: CommonStorageHelper,
}

impl Host {
    /// A file that is only read.
    pub(super) fn read_only(path: &Path, number: u8, file: Arc<dyn Backend>, size: u64) -> Self {
        Host::new(path, number, file, size, false)
    }

    /// A file whose metadata changes.
    pub(super) fn writable(path: &Path, number: u8, file: Arc<dyn Backend>, size: u64) -> Self {
        Host::new(path, number, file, size, true)
    }

    fn new(path: &Path, number: u8, file: Arc<dyn Backend>, size: u64, writable: bool) -> Self {
        Host(Arc::new(Inner {
            path: path.to_owned(),
            number,
            file,
            size: AtomicU64::new(size),
            kept: OnceLock::new(),
            writable,
            in_use: AtomicBool::new(false),
            filling: tokio::sync::Mutex::default(),
            moved: AtomicBool::new(false),
            freed: AtomicBool::new(false),
            places: OnceLock::new(),
            damage: OnceLock::new(),
            device: OnceLock::new(),
            known_bytes: AtomicU64::new(0),
            cluster: OnceLock::new(),
            tables: OnceLock::new(),
            corrupt: AtomicBool::new(false),
            hidden_names: OnceLock::new(),
            marks_hidden: AtomicBool::new(false),
            told: AtomicBool::new(false),
            #[cfg(test)]
            at_once: AtomicBool::new(false),
            helper: CommonStorageHelper::default(),
        }))
    }

    /// Hides entries of the image's tables from imago that it would refuse a whole table for.
    pub(super) fn hide_damage(&self, header: &Header) {
        // There is one image in a file, which is opened once.
        let _ = self.0.damage.set(Damage::new(header, self.0.size.load(Relaxed)));
    }

    /// Has the end of a block device respected; a plain file has none.
    pub(super) fn on_device(self, descriptor: Arc<File>) -> Self {
        if descriptor.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device()) {
            // It was made just now.
            let _ = self.0.device.set(descriptor);
        }
        self
    }

    /// The size of the block device that it is on, in bytes; None for a plain file, which grows.
    pub(super) fn device_end(&self) -> Option<u64> {
        self.0.device.get().map(|device| length(device).unwrap_or(0))
    }

    /// Sets the size of the clusters in the file, in bytes.
    pub(super) fn set_cluster(&self, cluster: u64) {
        // There is one image in a file, which is opened once.
        let _ = self.0.cluster.set(cluster);
    }

    /// Returns the end of the last cluster in the file, which may be there in part, in bytes.
    pub(super) fn end(&self) -> u64 {
        let size = self.0.size.load(Relaxed);
        size.checked_next_multiple_of(self.0.cluster.get().copied().unwrap_or(1)).unwrap_or(size)
    }

    pub(super) fn number(&self) -> u8 {
        self.0.number
    }

    pub(super) fn file(&self) -> &Arc<dyn Backend> {
        &self.0.file
    }

    /// Has structures guarded from now on.
    pub(super) fn guard(&self, places: Places) {
        // There is one image in a file, which is opened once.
        let _ = self.0.places.set(Mutex::new(places));
    }

    /// Where the structures are; None where nothing is written, or nothing is known.
    pub(super) fn places(&self) -> Option<MutexGuard<'_, Places>> {
        self.0.places.get().map(|places| places.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Says in the log, once, that the image is not in order.
    pub(super) fn tell(&self, what: &str) {
        if !self.0.told.swap(true, Relaxed) {
            let path = self.0.path.display();
            // A file of plain bytes has nothing to repair.
            if self.0.tables.get().is_some() {
                tracing::error!(
                    "{path}: the image is corrupt: {what}; `qemu-img check -r all {path}` repairs it"
                );
            } else {
                tracing::error!("{path}: is not as long as the image that names it says: {what}");
            }
        }
    }

    /// Keeps the file as it is from now on: what is kept back may be wrong.
    pub(super) fn give_up(&self, what: &str) {
        self.0.corrupt.store(true, Relaxed);
        self.tell(what);
    }

    /// Whether what is kept back may go to the file.
    pub(super) fn is_sound(&self) -> io::Result<()> {
        if self.0.corrupt.load(Relaxed) {
            return Err(io::Error::other("the image is corrupt, and takes no more changes of its tables"));
        }
        Ok(())
    }

    /// Whether the file is one that metadata is written to.
    pub(super) fn is_written(&self) -> bool {
        self.0.writable
    }

    #[cfg(test)]
    pub(super) fn write_at_once(&self) {
        self.0.at_once.store(true, Relaxed);
    }

    /// Counts the tables that imago caches from now on; one fills a `cluster`, in bytes.
    pub(super) fn count_tables(&self, cluster: u64, tables: Tables) {
        // There is one image in a file, which is opened once.
        let _ = self.0.tables.set((cluster, tables));
    }

    /// Counts the memory of what is known of the structures, with `more` bytes on top.
    ///
    /// # Errors
    /// The end of a line: it is more than all images may hold.
    pub(super) fn count_known(&self, more: u64) -> Result<(), String> {
        match self.0.tables.get() {
            Some((_, tables)) => self.count_growth(more, |bytes| tables.hold(bytes)),
            None => Ok(()),
        }
    }

    /// Counts what has come to be known of the structures, though it is too much.
    fn count_known_anyway(&self) {
        if let Some((_, tables)) = self.0.tables.get() {
            let Ok(()) = self.count_growth::<Infallible>(0, |bytes| {
                tables.hold_more(bytes);
                Ok(())
            });
        }
    }

    fn count_growth<E>(&self, more: u64, count: impl FnOnce(u64) -> Result<(), E>) -> Result<(), E> {
        let places = self.places().map_or(0, |places| places.bytes());
        let bytes = more + places + self.0.damage.get().map_or(0, Damage::bytes);
        let growth = bytes.saturating_sub(self.0.known_bytes.load(Relaxed));
        if growth > 0 {
            count(growth)?;
            self.0.known_bytes.fetch_add(growth, Relaxed);
        }
        Ok(())
    }

    /// Counts what looks like a table.
    fn count_table(&self, offset: u64, len: u64) {
        if let Some((cluster, tables)) = self.0.tables.get()
            && len == *cluster
            && offset.is_multiple_of(*cluster)
        {
            tables.note(len);
        }
    }

    /// Fills a buffer from the file alone; zeroes past its end.
    pub(super) async fn read_file(&self, offset: u64, len: usize) -> io::Result<Buffer> {
        let mut buf = Buffer::new(len);
        let size = self.0.file.geometry().size;
        let inside = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX).min(len);
        if inside == len {
            return self.0.file.read(offset, buf, Flags::NONE).await.map_err(to_io);
        }
        buf.fill(0);
        if inside > 0 {
            let head = self.0.file.read(offset, Buffer::new(inside), Flags::NONE).await.map_err(to_io)?;
            buf[..inside].copy_from_slice(&head);
        }
        Ok(buf)
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Host").field(&self.0.path).finish()
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.path.display().fmt(f)
    }
}

impl Storage for Host {
    fn size(&self) -> io::Result<u64> {
        Ok(self.0.size.load(Relaxed))
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.0.path.clone())
    }

    /// Beside the image that names it, as qemu has it.
    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        Ok(super::names::beside(&self.0.path, relative.as_ref()))
    }

    // SAFETY: nothing is unsafe in here; any alignment is served.
    async unsafe fn pure_readv(&self, mut bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let len = usize::try_from(bufv.len()).map_err(io::Error::other)?;
        self.count_table(offset, bufv.len());
        if offset >= DAMAGED {
            let what = "an entry of its L1 table is damaged";
            self.tell(what);
            return Err(io::Error::other(what));
        }
        let mut buf = self.read(offset, len).await?;
        if let Some(damage) = self.0.damage.get() {
            if let Some(cost) = damage.cost(offset, &buf) {
                // What it names may be known already: the table is read again when caches are dropped.
                self.count_known(cost.saturating_sub(damage.bytes())).map_err(too_much)?;
            }
            damage.sanitise(offset, &mut buf, self.0.writable);
            self.count_known_anyway();
        }
        self.without_marks(offset, &mut buf);
        self.without_names(offset, &mut buf);
        bufv.copy_from_slice(&buf);
        Ok(())
    }

    // SAFETY: as above.
    async unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(bufv.len()).map_err(io::Error::other)?];
        bufv.copy_into_slice(&mut bytes);
        self.count_table(offset, bufv.len());
        self.with_names(offset, &mut bytes);
        if let Some(damage) = self.0.damage.get() {
            damage.restore(offset, &mut bytes);
        }
        self.keep(offset, &bytes).await
    }

    // SAFETY: as above. imago asks for it only past the end of the disk, within its last cluster.
    async unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        if self.places().is_some_and(|places| places.meets(offset, offset.saturating_add(length))) {
            let what = format!("it has data in the place of a table, at {offset:#x}");
            self.tell(&what);
            return Err(io::Error::other(what));
        }
        self.keep(offset, &vec![0; usize::try_from(length).map_err(io::Error::other)?]).await
    }

    /// Nothing: what is kept back goes to the file by a commit alone.
    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    /// Notes that clusters become free. imago calls this before it lowers any refcount of a cluster that was in use, for
    /// whatever reason. There is nothing to wait for: the engine drops no operation, and metadata is kept back.
    async fn settle_writes(&self) -> io::Result<()> {
        self.0.freed.store(true, Relaxed);
        Ok(())
    }

    // SAFETY: there is no cache to drop.
    async unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }

    /// For a data file whose disk grows. It is never made shorter.
    async fn resize(&self, new_size: u64, _prealloc_mode: PreallocateMode) -> io::Result<()> {
        if !self.0.writable {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        self.0.file.grow(new_size).await.map_err(to_io)
    }
}

/// Discards a range of whole clusters, which read as zeroes then.
///
/// The caller holds an exclusive lock on the range, has made the map forget it, and keeps allocations away: nobody has
/// a mapping of it, neither here nor within imago.
pub(super) async fn discard_to_zero(
    image: &imago::FormatAccess<Host>,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    // SAFETY: nobody holds a mapping of the range, as said above.
    unsafe { image.discard_to_zero_unsafe(offset, len) }.await
}

/// The same for version 2 images, without a backing file: the range is no longer mapped.
pub(super) async fn discard_to_backing(
    image: &imago::FormatAccess<Host>,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    // SAFETY: as for `discard_to_zero`.
    unsafe { image.discard_to_backing_unsafe(offset, len) }.await
}

/// Has imago forget all tables that it has cached, after changed ones were kept back.
///
/// The caller keeps allocations away: no table changes in between.
pub(super) async fn drop_caches(image: &imago::FormatAccess<Host>) -> io::Result<()> {
    image.flush().await?;
    // SAFETY: nothing that was cached differs from what is kept back or in the file, where it is read again.
    unsafe { image.invalidate_cache() }.await
}

/// An error of ours for imago that tells that memory is at its limit.
fn too_much(line: String) -> io::Error {
    io::Error::new(io::ErrorKind::OutOfMemory, line)
}

/// An error of ours, for imago; its errno survives.
pub(super) fn to_io(error: Error) -> io::Error {
    match error.errno() {
        Some(errno) => io::Error::from_raw_os_error(errno),
        None => io::Error::other(error.to_string()),
    }
}

/// An error of imago's, for the pipeline.
pub(super) fn from_io(error: &io::Error) -> Error {
    match rustix::io::Errno::from_io_error(error) {
        Some(errno) => Error::from_errno(errno, "image"),
        None => Error::new(ErrorKind::Io, format!("image: {error}")),
    }
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}
