//! From the command line's words to exports: source, layers, name. The one place that knows every backend and layer.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use bridge::backend::file::{AioMode as FileAio, CacheMode as FileCache, DiscardMode as FileDiscard};
use bridge::backend::file::{FileBackend, FileOptions};
use bridge::backend::memory::MemoryBackend;
use bridge::backend::nbd::NbdBackend;
use bridge::backend::null::NullBackend;
use bridge::layer::{Fault, ReadOnly, Slice, Throttle, ThrottleConfig};
use bridge::{Backend, Export};

use crate::cli::{
    AioMode, CacheMode, DiscardMode, ExportArg, Format, Source, SourceArgs, UsageError, create,
};

/// Opens every source and stacks its layers, bottom to top: slice, fault, read-only, throttle.
///
/// # Errors
/// One line for the first that cannot be served.
pub(crate) fn exports(exports: &[ExportArg], args: &SourceArgs) -> Result<Vec<Arc<Export>>> {
    let throttle = match &args.throttle {
        Some(text) => text.parse().map_err(|error| UsageError::new(format!("--throttle: {error}")))?,
        None => ThrottleConfig::default(),
    };
    exports.iter().map(|export| assemble(export, args, &throttle)).collect()
}

fn assemble(export: &ExportArg, args: &SourceArgs, throttle: &ThrottleConfig) -> Result<Arc<Export>> {
    let mut stack = open(&export.source, args)?;
    if args.offset > 0 {
        let size = stack.geometry().size;
        ensure!(
            args.offset <= size,
            UsageError::new(format!(
                "--offset {} lies past the end of {} ({size} bytes)",
                args.offset, export.source
            ))
        );
        stack = Box::new(Slice::new(stack, args.offset, size - args.offset));
    }
    for fault in &args.faults {
        let config = fault.parse().map_err(|error| UsageError::new(format!("--fault: {error}")))?;
        stack = Box::new(Fault::new(stack, config));
    }
    if args.read_only {
        stack = Box::new(ReadOnly::new(stack));
    }
    let stack =
        Throttle::new(stack, *throttle).map_err(|error| UsageError::new(format!("--throttle: {error}")))?;
    let stack = Box::new(stack);
    Ok(Export::new(export.name.clone(), export.description.clone(), stack))
}

fn open(source: &Source, args: &SourceArgs) -> Result<Box<dyn Backend>> {
    let path = match source {
        Source::Memory(size) => return Ok(Box::new(MemoryBackend::new(*size))),
        Source::Null(size) => return Ok(Box::new(NullBackend::new(*size))),
        Source::Remote(remote) => {
            return Ok(Box::new(NbdBackend::open(&remote.uri, &args.remote.options(remote))?));
        }
        Source::Path(path) => path,
    };
    let exists = std::fs::symlink_metadata(path).is_ok();
    if let (Some(size), false) = (args.create, exists) {
        if args.read_only {
            bail!(
                "{source}: does not exist, and --create with --read-only would make a disk nobody can fill"
            );
        }
        create::create_image(path, size, false)?;
        tracing::info!("{source}: made, {size} bytes");
    }
    let Format::Raw = args.format;
    let options = FileOptions {
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
    };
    Ok(Box::new(FileBackend::open(path, &options)?))
}
