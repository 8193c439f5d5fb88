//! `--snapshot` and `--overlay`: the files behind an overlay.

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bridge::backend::file::{CacheMode, FileBackend, FileOptions};
use bridge::backend::image::probe;
use bridge::layer::Overlay;
use bridge::layer::overlay::{OverlayError, boot_id, kept_bytes, temporary_bytes};
use bridge::{Backend, OpenError};

use super::{apart, file_options};
use crate::cli::{OverlayArg, Source, SourceArgs, UsageError, create};
use crate::size;

/// Where temporary files go when nothing says otherwise: on storage, which /tmp need not be.
const FOLDER: &str = "/var/tmp";

/// Lays the overlay that `args` asks for over a source that was opened read-only.
///
/// # Errors
/// One line that names the file.
pub(super) fn lay(
    base: Box<dyn Backend>,
    overlay: &OverlayArg,
    source: &Source,
    args: &SourceArgs,
) -> Result<Box<dyn Backend>> {
    Ok(Box::new(match overlay {
        OverlayArg::Temporary => temporary(base, source, args)?,
        OverlayArg::Keep(path) => keep(base, path, source, args)?,
    }))
}

/// An overlay in the place of the image that it leaves alone would be the image.
pub(super) fn refuse_onto_itself(overlay: &OverlayArg, source: &Source) -> Result<()> {
    let (OverlayArg::Keep(path), Source::Path(image)) = (overlay, source) else { return Ok(()) };
    let identity = |path: &Path| std::fs::metadata(path).map(|found| (found.dev(), found.ino())).ok();
    if identity(path).is_some_and(|overlay| Some(overlay) == identity(image)) {
        bail!(
            "{}: is the image itself; name another file for --overlay, which need not exist yet",
            path.display()
        );
    }
    Ok(())
}

/// The file has no name from the beginning, or for a moment only: whatever ends this process ends it too.
fn temporary(base: Box<dyn Backend>, source: &Source, args: &SourceArgs) -> Result<Overlay> {
    let folder = std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty());
    let folder = folder.map_or_else(|| PathBuf::from(FOLDER), PathBuf::from);
    let way_out =
        || format!("{}: cannot make a temporary file; set TMPDIR to a folder with room", folder.display());
    let bytes = temporary_bytes(base.geometry().size).with_context(|| source.to_string())?;
    let file = tempfile::tempfile_in(&folder).with_context(way_out)?;
    file.set_len(bytes).with_context(|| {
        format!(
            "{}: no file can be {} long there; set TMPDIR to another folder",
            folder.display(),
            size::human(bytes)
        )
    })?;
    // By its descriptor, since it has no path. Nobody else can open it, so that there is nothing to lock.
    let options = FileOptions { cache: CacheMode::Writeback, lock: false, ..file_options(args) };
    let store =
        FileBackend::open(format!("/proc/self/fd/{}", file.as_raw_fd()), &options).with_context(way_out)?;
    Ok(Overlay::temporary(base, Box::new(store))?)
}

fn keep(base: Box<dyn Backend>, path: &Path, source: &Source, args: &SourceArgs) -> Result<Overlay> {
    let Source::Path(image) = source else {
        bail!(UsageError::new(format!(
            "--overlay needs an image that can be opened again, and {source} cannot"
        )));
    };
    let named = |error: OverlayError| anyhow::Error::new(error).context(path.display().to_string());
    let open = || FileBackend::open(path, &FileOptions { read_only: args.read_only, ..file_options(args) });
    if std::fs::symlink_metadata(path).is_ok() {
        let (store, read_only) = (Box::new(open()?), args.read_only);
        return apart(move || Overlay::open(base, store, boot_id(), read_only))?.map_err(named);
    }
    if args.read_only {
        bail!("{}: does not exist; leave --read-only out once to make it", path.display());
    }
    let name = std::fs::canonicalize(image).with_context(|| image.display().to_string())?;
    let Some(name) = name.to_str() else {
        bail!("{}: the path is not UTF-8, and cannot be written into an overlay", name.display());
    };
    let format = format_name(image, args)?;
    create::create_image(path, kept_bytes(base.geometry().size).map_err(named)?, false)?;
    let made = open().map_err(anyhow::Error::new).and_then(|store| {
        apart(|| Overlay::create(base, Box::new(store), name, format, boot_id()))?.map_err(named)
    });
    if made.is_err() {
        // The first error is the one to tell.
        let _ = std::fs::remove_file(path);
    }
    made
}

/// How qemu calls the format of the base.
fn format_name(image: &Path, args: &SourceArgs) -> Result<&'static str, OpenError> {
    Ok(args.format.map_or_else(|| probe(image), Ok)?.name())
}
