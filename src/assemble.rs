//! From the command line's words to exports: source, layers, name. The one place that knows every backend and layer.
//!
//! The order of the layers is the same whatever the order of the flags. From the source up:
//!
//! ```text
//!   source ─ overlay (--snapshot, --overlay) ─ part (--partition, or --offset and --size) ─ --detect-zeroes
//!          ─ --fault ─ --read-only ─ --throttle of groups ─ --throttle of the export itself
//! ```
//!
//! So an overlay is one of the whole image, and stays of use with another part; zeroes are found before they reach it;
//! a fault hits what clients ask for; and what is refused or fails still counts for the limits.

mod limits;
mod overlay;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use bridge::backend::file::FileOptions;
use bridge::backend::file::{AioMode as FileAio, CacheMode as FileCache, DiscardMode as FileDiscard};
use bridge::backend::image::{ImageAccess, ImageMemory, open_any};
use bridge::backend::memory::MemoryBackend;
use bridge::backend::nbd::NbdBackend;
use bridge::backend::null::NullBackend;
use bridge::layer::{DetectZeroes as DetectLayer, Fault, ReadOnly, Slice, ZeroMode};
use bridge::{Backend, Export, partition};
use tokio::runtime::{Builder, LocalOptions};

use crate::beneath::{Entry, Folder};
use crate::cli::{
    AioMode, CacheMode, DetectZeroes, DiscardMode, ExportArg, Format, Part, Source, SourceArgs, UsageError,
    create,
};
use crate::control;
use limits::Limits;

/// Images that `--create` has made. Dropped before they are kept, it removes them: a start that fails leaves nothing.
#[derive(Debug, Default)]
pub(crate) struct Made(Vec<PathBuf>);

impl Made {
    /// They stay.
    pub(crate) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            // What went wrong before is what to tell.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Opens every source and stacks its layers. The images share `memory`.
///
/// # Errors
/// One line for the first that cannot be served.
pub(crate) fn exports(
    exports: &[ExportArg],
    args: &SourceArgs,
    memory: &ImageMemory,
) -> Result<(Vec<Arc<Export>>, Made)> {
    let limits = Limits::parse(&args.throttles, exports)?;
    let mut made = Made::default();
    let exports = exports.iter().map(|export| assemble(export, args, memory, &limits, &mut made));
    Ok((exports.collect::<Result<_>>()?, made))
}

fn assemble(
    export: &ExportArg,
    all: &SourceArgs,
    memory: &ImageMemory,
    limits: &Limits,
    made: &mut Made,
) -> Result<Arc<Export>> {
    let args = &export.settings(all);
    make(&export.source, args, made)?;
    let mut stack = match &args.overlay {
        None => open(&export.source, args, memory)?,
        Some(overlay) => {
            overlay::refuse_onto_itself(overlay, &export.source)?;
            let base = open(&export.source, &SourceArgs { read_only: true, ..args.clone() }, memory)?;
            overlay::lay(base, overlay, &export.source, args)?
        }
    };
    if let Some(part) = args.part {
        stack = cut(stack, part, &export.source, args)?;
    }
    stack = match args.detect_zeroes {
        DetectZeroes::Off => stack,
        DetectZeroes::On => Box::new(DetectLayer::new(stack, ZeroMode::On)),
        DetectZeroes::Unmap => Box::new(DetectLayer::new(stack, ZeroMode::Unmap)),
    };
    for fault in &args.faults {
        let config = fault.parse().map_err(|error| UsageError::new(format!("--fault: {error}")))?;
        stack = Box::new(Fault::new(stack, config));
    }
    if args.read_only {
        stack = Box::new(ReadOnly::new(stack));
    }
    let (stack, groups) = limits.lay(stack, &export.name)?;
    Ok(Export::throttled(export.name.clone(), export.description.clone(), stack, groups))
}

fn cut(stack: Box<dyn Backend>, part: Part, source: &Source, args: &SourceArgs) -> Result<Box<dyn Backend>> {
    let whole = stack.geometry().size;
    let (start, len) = match part {
        Part::Range { offset, size } => {
            let past =
                |what: &str| UsageError::new(format!("{what} lies past the end of {source} ({whole} bytes)"));
            ensure!(offset <= whole, past(&format!("--offset {offset}")));
            let len = size.unwrap_or(whole - offset);
            ensure!(len <= whole - offset, past(&format!("the end of --size {len}")));
            (offset, len)
        }
        Part::Partition(number) => {
            let sector = sector_of(source, args);
            let found =
                apart(|| partition::find(&*stack, number, sector))?.with_context(|| source.to_string())?;
            (found.start, found.len)
        }
    };
    let block = u64::from(stack.geometry().min_block);
    let whole_blocks = start.is_multiple_of(block) && (len.is_multiple_of(block) || start + len == whole);
    ensure!(
        whole_blocks,
        UsageError::new(format!(
            "{source}: the part from {start} on, of {len} bytes, cannot be served: the source has blocks of {block} \
             bytes; choose an --offset and --size that are multiples of it, or serve all of the source"
        ))
    );
    Ok(Box::new(Slice::new(stack, start, len)))
}

/// The sectors that a source's partition table counts in, in bytes: what the user says, or what a device has. None where
/// nobody tells.
pub(crate) fn sector_of(source: &Source, args: &SourceArgs) -> Option<u32> {
    let Source::Path(path) = source else { return args.sector_size };
    // An image in a device has sectors of its own.
    let is_raw = args.format.is_none_or(|format| format == Format::Raw);
    args.sector_size.or_else(|| if is_raw { bridge::backend::file::logical_sector(path) } else { None })
}

/// Runs a future that reads from sources, on a thread and a runtime of its own: what it leaves there (a ring, buffers) is
/// of no use to the workers.
pub(crate) fn apart<F: Future<Output: Send>>(make: impl FnOnce() -> F + Send) -> Result<F::Output> {
    let run = || {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default());
        Ok(runtime.context("cannot start an event loop")?.block_on(make()))
    };
    std::thread::scope(|scope| {
        scope.spawn(run).join().unwrap_or_else(|_| Err(anyhow!("cannot open the source")))
    })
}

/// Makes the image that is not there yet, where `--create` says so.
fn make(source: &Source, args: &SourceArgs, made: &mut Made) -> Result<()> {
    let (Source::Path(path), Some(size)) = (source, args.create) else { return Ok(()) };
    if std::fs::symlink_metadata(path).is_ok() {
        return Ok(());
    }
    if args.read_only || args.overlay.is_some() {
        bail!("{source}: does not exist, and --create with --read-only would make a disk nobody can fill");
    }
    match args.format {
        None | Some(Format::Raw) => create::create_image(path, size, false)?,
        Some(format) => create::create_empty(path, format, size)?,
    }
    made.0.push(path.clone());
    tracing::info!("{source}: made, {size} bytes");
    Ok(())
}

/// Opens a source as it is, without layers.
///
/// # Errors
/// One line that names it.
pub(crate) fn open(source: &Source, args: &SourceArgs, memory: &ImageMemory) -> Result<Box<dyn Backend>> {
    let path = match source {
        Source::Memory(size) => return Ok(Box::new(MemoryBackend::new(*size))),
        Source::Null(size) => return Ok(Box::new(NullBackend::new(*size))),
        Source::Remote(remote) => {
            return Ok(Box::new(NbdBackend::open(&remote.uri, &args.remote.options(remote))?));
        }
        Source::Path(path) => path,
    };
    let access = ImageAccess {
        any_backing: args.allow_backing.any(),
        data_files: args.data_files.clone(),
        memory: memory.clone(),
        journal: None,
    };
    // Kept until the file is open.
    let entry = args.beneath.as_deref().map(|folder| find_beneath(folder, path)).transpose()?;
    let file = FileOptions { via: entry.as_ref().map(Entry::via), ..file_options(args) };
    open_image(path, args.format, file, access)
}

/// Looks up an image below a folder whose content may be a stranger's.
fn find_beneath(folder: &Path, path: &Path) -> Result<Entry> {
    let root = Folder::root(folder).with_context(|| format!("{}: cannot open it", folder.display()))?;
    let Ok(name) = path.strip_prefix(root.path()) else {
        bail!("{}: is not below {}", path.display(), root.path().display());
    };
    root.file(name).with_context(|| format!("{}: cannot be served", path.display()))
}

/// Opens an image, or any other file. What is answered by an image that is written survives a crash of the process, by a
/// journal in the runtime folder; where that folder cannot be had, the image is served without, and the log says so.
///
/// # Errors
/// One line that names it.
pub(crate) fn open_image(
    path: &Path,
    format: Option<Format>,
    options: FileOptions,
    access: ImageAccess,
) -> Result<Box<dyn Backend>> {
    let journal = control::journal_folder();
    if let Err(error) = &journal {
        tracing::debug!("no journals of images: {error:#}");
    }
    // Where there is none, the open fails there and says why.
    let folder = journal.unwrap_or_else(|_| control::runtime_folder());
    Ok(open_any(path, format, options, &ImageAccess { journal: Some(folder), ..access })?)
}

/// How files are opened, the overlay's as well as images.
fn file_options(args: &SourceArgs) -> FileOptions {
    FileOptions {
        read_only: args.read_only,
        cache: match args.cache {
            CacheMode::Writeback => FileCache::Writeback,
            CacheMode::None => FileCache::None,
            CacheMode::Directsync => FileCache::DirectSync,
            CacheMode::Writethrough => FileCache::WriteThrough,
            CacheMode::Unsafe => FileCache::Unsafe,
        },
        aio: match args.aio {
            AioMode::Auto => FileAio::Auto,
            AioMode::IoUring => FileAio::IoUring,
            AioMode::Threads => FileAio::Threads,
        },
        discard: match args.discard {
            DiscardMode::Unmap => FileDiscard::Unmap,
            DiscardMode::Ignore => FileDiscard::Ignore,
        },
        lock: args.lock,
        via: None,
    }
}
