//! The files that an image consists of, as imago sees them.
//!
//! imago reads and writes metadata through this, and nothing else: the data of guests goes to the file directly
//! ([`super::write`]). What it writes is kept back in memory until [`super::commit`] brings it to the file in an order
//! that no crash can turn into corruption; reads see it at once. What is kept back is in blocks of 512 bytes,
//! since no cluster is smaller: a block of metadata never has data beside it.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use super::header;
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
    /// The block device that it is on, where it cannot grow.
    device: OnceLock<Arc<File>>,
    /// The bytes of one of its tables, and the count of those that are cached.
    tables: OnceLock<(u64, Tables)>,
    /// Its tables contradict each other: nothing that is kept back may go to the file.
    corrupt: AtomicBool,
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
            device: OnceLock::new(),
            tables: OnceLock::new(),
            corrupt: AtomicBool::new(false),
            marks_hidden: AtomicBool::new(false),
            told: AtomicBool::new(false),
            #[cfg(test)]
            at_once: AtomicBool::new(false),
            helper: CommonStorageHelper::default(),
        }))
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

    /// A copy of what is kept back.
    pub(super) fn kept(&self) -> Blocks {
        self.blocks().map(|blocks| blocks.clone()).unwrap_or_default()
    }

    /// Bytes that are kept back, and will be committed.
    pub(super) fn kept_bytes(&self) -> u64 {
        if !self.0.writable {
            return 0;
        }
        self.blocks().map_or(0, |blocks| blocks.len() as u64 * BLOCK)
    }

    #[cfg(test)]
    pub(super) fn write_at_once(&self) {
        self.0.at_once.store(true, Relaxed);
    }

    /// Whether clusters that the file still names may count as free since the last commit.
    pub(super) fn has_freed(&self) -> bool {
        self.0.freed.load(Relaxed) || self.0.moved.load(Relaxed)
    }

    /// The file names nothing that counts as free: a commit has ended.
    pub(super) fn clear_freed(&self) {
        self.0.freed.store(false, Relaxed);
    }

    /// Forgets what is kept back: it is in the file now.
    pub(super) fn clear_kept(&self) {
        self.0.moved.store(false, Relaxed);
        if let Some(mut blocks) = self.blocks() {
            blocks.clear();
        }
        if let Some(mut places) = self.places() {
            places.settle();
        }
    }

    /// Drops what is kept back for a range of whole blocks: what belongs there goes to the file as data.
    pub(super) fn take_back(&self, start: u64, end: u64) {
        if let Some(mut blocks) = self.blocks() {
            let numbers: Vec<u64> =
                blocks.range(start / BLOCK..end / BLOCK).map(|(number, _)| *number).collect();
            for number in numbers {
                blocks.remove(&number);
            }
        }
    }

    /// Counts the tables that imago caches from now on; one fills a `cluster`, in bytes.
    pub(super) fn count_tables(&self, cluster: u64, tables: Tables) {
        // There is one image in a file, which is opened once.
        let _ = self.0.tables.set((cluster, tables));
    }

    /// Has imago open an image that is marked dirty or corrupt.
    pub(super) fn hide_marks(&self) {
        self.0.marks_hidden.store(true, Relaxed);
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

    fn blocks(&self) -> Option<MutexGuard<'_, Blocks>> {
        let kept =
            if self.0.writable { Some(self.0.kept.get_or_init(Mutex::default)) } else { self.0.kept.get() };
        kept.map(|kept| kept.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Keeps whole blocks back, of a file that ends at `end` or later with them; also of a file that is only read, where
    /// they are never committed.
    pub(super) fn keep_blocks(&self, blocks: Blocks, end: u64) {
        self.0.size.fetch_max(end, Relaxed);
        let kept = self.0.kept.get_or_init(Mutex::default);
        kept.lock().unwrap_or_else(PoisonError::into_inner).extend(blocks);
    }

    /// Marks the image as in use, or as closed, in the file and in what is kept back.
    ///
    /// # Errors
    /// The file's.
    pub(super) async fn mark_in_use(&self, in_use: bool) -> io::Result<()> {
        let _filling = self.0.filling.lock().await;
        self.0.in_use.store(in_use, Relaxed);
        if let Some(mut blocks) = self.blocks()
            && let Some(first) = blocks.get_mut(&0)
        {
            header::mark_in_use(&mut first[..], in_use);
        }
        let mut first = self.read_file(0, index(BLOCK)).await?;
        header::mark_in_use(&mut first, in_use);
        self.0.file.write(0, first, Flags::NONE).await.map_err(to_io)
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

    /// The same, with what is kept back in it.
    pub(super) async fn read(&self, offset: u64, len: usize) -> io::Result<Buffer> {
        // First what is kept: a commit meanwhile moves it to the file and forgets it here.
        let end = offset + len as u64;
        let kept: Vec<(u64, Box<BlockBytes>)> = match self.blocks() {
            Some(blocks) => blocks
                .range(offset / BLOCK..end.div_ceil(BLOCK))
                .map(|(number, block)| (*number, block.clone()))
                .collect(),
            None => Vec::new(),
        };
        let mut buf = self.read_file(offset, len).await?;
        for (number, block) in kept {
            let start = number * BLOCK;
            let (from, to) = (start.max(offset), (start + BLOCK).min(end));
            buf[index(from - offset)..index(to - offset)]
                .copy_from_slice(&block[index(from - start)..index(to - start)]);
        }
        Ok(buf)
    }

    /// Keeps bytes back, to be committed.
    async fn keep(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if !self.0.writable {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let end = offset
            .checked_add(bytes.len() as u64)
            .filter(|end| *end <= self.0.file.geometry().size)
            .ok_or_else(|| io::Error::other("a table past the end of all files"))?;
        if self.device_end().is_some_and(|size| end > size) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.is_sound()?;
        let _filling = self.0.filling.lock().await;
        self.note(offset, bytes).await?;
        if offset < BLOCK {
            self.0.moved.store(true, Relaxed);
        }
        let first = offset / BLOCK * BLOCK;
        let mut whole = Vec::new();
        let whole: &[u8] = if first == offset && end.is_multiple_of(BLOCK) {
            bytes
        } else {
            let stop = end.next_multiple_of(BLOCK);
            whole.extend_from_slice(&self.read(first, index(stop - first)).await?);
            whole[index(offset - first)..][..bytes.len()].copy_from_slice(bytes);
            &whole
        };
        #[cfg(test)]
        if self.0.at_once.load(Relaxed) {
            let write = self.0.file.write(first, Buffer::copy_of(whole), Flags::NONE);
            return write.await.map_err(to_io);
        }
        if let Some(mut blocks) = self.blocks() {
            blocks.extend((first / BLOCK..).zip(whole.as_chunks().0.iter().map(|block| Box::new(*block))));
            if self.0.in_use.load(Relaxed)
                && let Some(first) = blocks.get_mut(&0)
            {
                header::mark_in_use(&mut first[..], true);
            }
        }
        if offset < BLOCK { self.note_header().await } else { Ok(()) }
    }

    /// Keeps back the size of the disk, in bytes, as the header is to say it.
    pub(super) async fn keep_size(&self, size: u64) -> io::Result<()> {
        self.keep(header::SIZE_OFFSET, &size.to_be_bytes()).await
    }

    /// Has new tables guarded, before the pointer to them is kept back.
    async fn note(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        if self.places().is_none_or(|places| !places.has_pointers(offset, end)) {
            return Ok(());
        }
        let old = self.read(offset, bytes.len()).await?;
        let noted = self.places().map_or(Ok(()), |mut places| places.note(offset, &old, bytes));
        noted.map_err(|taken| {
            let what = format!("its refcounts give a table's place away, at {taken:#x}");
            self.give_up(&what);
            io::Error::other(what)
        })
    }

    /// The same where tables have moved as a whole.
    async fn note_header(&self) -> io::Result<()> {
        if self.places().is_none() {
            return Ok(());
        }
        let block = self.read(0, index(BLOCK)).await?;
        let Ok(header) = header::parse_numbers(&block) else { return Ok(()) };
        let moved = self.places().map_or(Vec::new(), |mut places| places.note_header(header));
        for (table, mask) in moved {
            // Bounded by what a header may say.
            let bytes = self.read(table.start, index(table.end - table.start)).await?;
            if let Some(mut places) = self.places() {
                places.adopt(&bytes, mask);
            }
        }
        Ok(())
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
        let mut buf = self.read(offset, len).await?;
        if self.0.marks_hidden.load(Relaxed)
            && let Some(at) = header::MARKS_AT.checked_sub(offset)
            && let Some(byte) = buf.get_mut(index(at))
        {
            *byte &= !header::MARKS;
        }
        bufv.copy_from_slice(&buf);
        Ok(())
    }

    // SAFETY: as above.
    async unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; usize::try_from(bufv.len()).map_err(io::Error::other)?];
        bufv.copy_into_slice(&mut bytes);
        self.count_table(offset, bufv.len());
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
