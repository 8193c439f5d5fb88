//! Disk images in formats of their own: qcow2 for reading and writing, with backing chains and external data files, and
//! VMDK for reading. What clusters mean is crate `imago`'s; when its metadata reaches the file, and all data, is ours.
//!
//! ```text
//!   open ──> probe (format) ──> chain (follows names, opens files) ──> Parts
//!   try_read / try_write / file_range ──> map (guest cluster -> place) ──> file backend's fast path
//!   all else ──job──> engine thread: engine, write, discard, status ──> imago ──> host (metadata kept back) ──> commit
//!   raw without -f ──> guard (the first sector may not become another format)
//!   create, describe: for the command line
//! ```

mod chain;
mod checks;
mod commit;
mod create;
mod damage;
mod describe;
mod discard;
mod engine;
mod guard;
mod header;
mod host;
mod journal;
mod map;
mod memory;
mod names;
mod notes;
mod places;
mod probe;
mod recover;
mod refcounts;
mod snapshots;
mod status;
mod tables;
#[cfg(test)]
mod tests;
mod thread;
mod vmdk;
mod write;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Release};
use std::sync::{Arc, OnceLock};

use imago::FormatAccess;

use super::file::{FileBackend, FileOptions};
use crate::{
    Backend, Buffer, Capabilities, Depth, Extent, Flags, Geometry, LocalFuture, OpenError, RangeOrHole,
    Result,
};
use host::Host;
use journal::Journal;
use map::{Map, Place};
use memory::Tables;
use thread::EngineThread;

pub use create::{CreateOptions, create};
pub use describe::{ChainLink, Description, describe};
pub use memory::ImageMemory;
pub use probe::{ImageFormat, probe};

/// Bounds of the preferred block in bytes.
const MIN_PREFERRED: u64 = 4096;
const MAX_PREFERRED: u64 = 64 << 10;

/// Unit of the map for formats without clusters, in bytes.
const OTHER_CLUSTER: u64 = 64 << 10;

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// How its files are opened and used.
    pub file: FileOptions,
    /// Its format.
    pub format: ImageFormat,
    /// Which files its names may lead to, and the memory that it may use.
    pub access: ImageAccess,
}

/// The files and the memory that an image may use. The default suits an image that nobody vouches for.
#[derive(Clone, Debug, Default)]
pub struct ImageAccess {
    /// Follow names that lead out of the image's own folder, and write to any data file that the image names.
    pub any_backing: bool,
    /// External data files that may be written because an image names them.
    pub data_files: Vec<PathBuf>,
    /// The memory that its tables and compressed clusters take.
    pub memory: ImageMemory,
    /// The folder of journals, which exists and belongs to this user alone: in it, mapping changes that were answered
    /// survive this process. None for no journals.
    pub journal: Option<PathBuf>,
}

/// Opens an image of any format, raw ones included. Without a `format` it is told from the first sector; what is taken
/// for raw then may not be made into something else by writing there.
///
/// # Errors
/// One line for a person, see [`OpenError`].
pub fn open_any(
    path: &Path,
    format: Option<ImageFormat>,
    file: FileOptions,
    access: &ImageAccess,
) -> std::result::Result<Box<dyn Backend>, OpenError> {
    let probed = format.is_none();
    let format = match format {
        Some(format) => format,
        None => probe(path)?,
    };
    if format != ImageFormat::Raw {
        return Ok(Box::new(ImageBackend::open(
            path,
            &ImageOptions { file, format, access: access.clone() },
        )?));
    }
    let raw = FileBackend::open(path, &file)?;
    if probed && !file.read_only {
        return Ok(Box::new(guard::Guard::new(raw, path)));
    }
    Ok(Box::new(raw))
}

/// An open image. Dropped, it commits what is not in its file yet and gives up its locks.
pub struct ImageBackend {
    shared: Arc<Shared>,
    engine: EngineThread,
}

/// What an opened image consists of; the engine is made of it.
struct Parts {
    image: FormatAccess<Host>,
    options: FileOptions,
    top: Host,
    data_file: Option<Host>,
    cluster: u64,
    version: u32,
    backing: Option<u64>,
    data_descriptor: Option<Arc<File>>,
    /// Bytes of the largest cluster of the chain.
    largest_cluster: u64,
    tables: Tables,
    journal: Option<Journal>,
    /// Why there is no journal.
    loss: Option<String>,
}

/// What workers and the engine share.
struct Shared {
    map: Map,
    files: Vec<Arc<dyn Backend>>,
    /// The file that new clusters are in, where its length can be looked up.
    data_descriptor: Option<Arc<File>>,
    /// The files that are written, by their numbers.
    written: Vec<u8>,
    /// As it was opened.
    opened: Geometry,
    size: AtomicU64,
    version: AtomicU64,
    /// The metadata has changed since the last commit.
    dirty: AtomicBool,
    /// Why writes that are answered and not flushed do not survive this process; not set where they do.
    loss: OnceLock<String>,
}

impl Shared {
    fn size(&self) -> u64 {
        self.size.load(Acquire)
    }

    fn set_size(&self, size: u64) {
        self.size.store(size, Release);
        self.version.fetch_add(1, AcqRel);
    }

    /// Notes that answered writes do not survive this process from now on.
    fn note_loss(&self, reason: String) {
        // The first reason stays.
        if self.loss.set(reason).is_ok() {
            self.version.fetch_add(1, AcqRel);
        }
    }

    /// Makes the data that was written before durable.
    async fn flush_files(&self) -> Result<()> {
        for number in &self.written {
            self.files[usize::from(*number)].flush().await?;
        }
        Ok(())
    }
}

impl ImageBackend {
    /// Opens an image with its whole chain. It waits for storage, as every open may.
    ///
    /// # Errors
    /// One line for a person, see [`OpenError`].
    pub fn open(path: impl AsRef<Path>, options: &ImageOptions) -> std::result::Result<Self, OpenError> {
        let path = path.as_ref();
        let (parts, files) = thread::wait_for(path, async || chain::open(path, options).await)?;
        Ok(ImageBackend::assemble(parts, files))
    }

    fn assemble(parts: Parts, files: Vec<Arc<dyn Backend>>) -> Self {
        let size = parts.image.size();
        let mut written = Vec::new();
        if !parts.options.read_only {
            written.extend(parts.data_file.iter().map(Host::number));
            written.push(parts.top.number());
        }
        let shared = Arc::new(Shared {
            map: Map::new(parts.cluster.trailing_zeros(), size),
            opened: geometry(&parts, &files, size),
            data_descriptor: parts.data_descriptor.clone(),
            files,
            written,
            size: AtomicU64::new(size),
            version: AtomicU64::new(0),
            // Opening may have changed the header: flags that no writer may leave as they were.
            dirty: AtomicBool::new(parts.top.kept_bytes() > 0),
            loss: parts.loss.clone().map_or_else(OnceLock::new, OnceLock::from),
        });
        ImageBackend { engine: EngineThread::new(parts, shared.clone()), shared }
    }
}

fn geometry(parts: &Parts, files: &[Arc<dyn Backend>], size: u64) -> Geometry {
    let mut capabilities = Capabilities::FLUSH | Capabilities::CACHE | Capabilities::MULTI_CONN;
    capabilities = if parts.options.read_only {
        capabilities | Capabilities::READ_ONLY
    } else {
        capabilities
            | Capabilities::FUA
            | Capabilities::TRIM
            | Capabilities::WRITE_ZEROES
            | Capabilities::GROW
    };
    // Version 2 has no clusters that are zero by a flag.
    if !parts.options.read_only && parts.version >= 3 {
        capabilities = capabilities | Capabilities::FAST_ZERO;
    }
    let each = |bit: Capabilities| files.iter().any(|file| file.geometry().capabilities.contains(bit));
    for bit in [Capabilities::FILE_RANGE, Capabilities::ROTATIONAL] {
        if each(bit) {
            capabilities = capabilities | bit;
        }
    }
    // Only over a backing image part of a cluster costs as much as all of it. A client pads its writes to this size.
    let preferred = if parts.backing.is_some() { parts.cluster } else { 0 };
    let preferred = preferred.clamp(MIN_PREFERRED, MAX_PREFERRED);
    Geometry {
        version: 0,
        size,
        min_block: 1,
        preferred_block: u32::try_from(preferred).unwrap_or(4096),
        capabilities,
    }
}

impl std::fmt::Debug for ImageBackend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageBackend").field("size", &self.shared.size()).finish_non_exhaustive()
    }
}

impl Backend for ImageBackend {
    #[inline]
    fn geometry(&self) -> Geometry {
        // In this order the size is at least as new as the version.
        let version = self.shared.version.load(Acquire);
        let mut capabilities = self.shared.opened.capabilities;
        if self.shared.loss.get().is_some() {
            capabilities = capabilities | Capabilities::VOLATILE;
        }
        Geometry { version, size: self.shared.size(), capabilities, ..self.shared.opened }
    }

    #[inline]
    fn try_read(&self, offset: u64, buf: &mut [u8], _flags: Flags) -> Option<Result<()>> {
        let inside = self.shared.map.enter(offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let (place, count) = inside.run(offset + done as u64, (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + engine::index(count)];
            done += part.len();
            match place {
                Place::Zero => part.fill(0),
                Place::File { file, offset, .. } => {
                    match self.shared.files.get(usize::from(file))?.try_read(offset, part, Flags::NONE)? {
                        Ok(()) => {}
                        failed => return Some(failed),
                    }
                }
            }
        }
        Some(Ok(()))
    }

    #[inline]
    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        // Durable only together with the mapping, which may be new.
        if flags.contains(Flags::FUA) {
            return None;
        }
        let inside = self.shared.map.enter(offset, data.len() as u64)?;
        let mut done = 0;
        while done < data.len() {
            let (place, count) = inside.run(offset + done as u64, (data.len() - done) as u64)?;
            let Place::File { file, offset, writable: true } = place else { return None };
            let part = &data[done..done + engine::index(count)];
            done += part.len();
            match self.shared.files.get(usize::from(file))?.try_write(offset, part, flags)? {
                Ok(()) => {}
                failed => return Some(failed),
            }
        }
        Some(Ok(()))
    }

    /// What the peer is sent is what lies there when it is sent: a range that is discarded in between, and whose space
    /// is used again for another part of the same disk, shows that part.
    fn file_range(&self, offset: u64, len: u64, flags: Flags) -> Option<RangeOrHole> {
        let inside = self.shared.map.enter(offset, len)?;
        let (place, count) = inside.run(offset, len)?;
        let whole = flags.contains(Flags::WHOLE);
        if whole && count < len {
            return None;
        }
        match place {
            Place::Zero => (!whole).then_some(RangeOrHole::Hole(count)),
            Place::File { file, offset, .. } => {
                self.shared.files.get(usize::from(file))?.file_range(offset, count, flags)
            }
        }
    }

    /// Cancel-safe, as all that the engine does: it goes on.
    fn read(&self, offset: u64, buf: Buffer, _flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        Box::pin(self.engine.run(move |engine| async move { engine.read(offset, buf).await }))
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.engine.run(move |engine| async move { engine.write(offset, data, flags).await }))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        if self.shared.dirty.load(Acquire) {
            return Box::pin(self.engine.run(|engine| async move { engine.flush().await }));
        }
        Box::pin(self.shared.flush_files())
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.engine.run(move |engine| async move { engine.trim(offset, len, flags).await }))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.engine.run(move |engine| async move { engine.write_zeroes(offset, len, flags).await }))
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.engine.run(move |engine| async move { engine.cache(offset, len).await }))
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(self.engine.run(move |engine| async move { engine.block_status(offset, len, flags).await }))
    }

    fn allocation_depth(&self, offset: u64, len: u64, _flags: Flags) -> LocalFuture<'_, Result<Vec<Depth>>> {
        Box::pin(self.engine.run(move |engine| async move { engine.allocation_depth(offset, len).await }))
    }

    fn loss_after_crash(&self) -> Option<String> {
        self.shared.loss.get().cloned()
    }

    fn grow(&self, size: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.engine.run(move |engine| async move { engine.grow(size).await }))
    }

    fn allocated(&self) -> Option<u64> {
        let mut bytes = 0;
        for number in &self.shared.written {
            bytes += self.shared.files[usize::from(*number)].allocated()?;
        }
        (!self.shared.written.is_empty()).then_some(bytes)
    }
}
