//! `nbdbridge create`: makes an empty raw image.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use bridge::OpenError;
use clap::Args;
use rustix::fs::{FallocateFlags, fallocate};

use super::values::{self, Format};
use crate::size;

/// What to make.
#[derive(Debug, Args)]
#[command(after_help = "SIZE takes K, M, G and T (powers of 1024), as in 512M or 1.5T.")]
pub(crate) struct CreateArgs {
    /// Path of the new image; it must not exist
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,

    /// Size of the disk
    #[arg(value_name = "SIZE", value_parser = size::parse)]
    pub(crate) size: u64,

    /// Image format; only raw in this version
    #[arg(short, long, value_name = "FORMAT", default_value = "raw", value_parser = values::parse_format,
          hide_default_value = true)]
    pub(crate) format: Format,

    /// Reserve the whole space now; without it, space is taken as the disk is written
    #[arg(long)]
    pub(crate) allocate: bool,
}

/// Makes the image, and says so.
pub(crate) fn run(args: &CreateArgs) -> Result<()> {
    let Format::Raw = args.format;
    create_image(&args.path, args.size, args.allocate)?;
    let size = size::human(args.size);
    // The image is made, whether or not somebody listens.
    let _ = writeln!(io::stdout(), "{}: raw image, {size} ({} bytes)", args.path.display(), args.size);
    Ok(())
}

/// Makes a raw image of `size` bytes where there is nothing yet. What cannot be finished is removed.
///
/// # Errors
/// One line that names the path: it exists, its folder does not, no permission, no room.
pub(crate) fn create_image(path: &Path, size: u64, allocate: bool) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|error| open_error(path, error))?;
    let sized = set_size(&file, size, allocate);
    if sized.is_err() {
        // The size's error is the one to tell.
        let _ = std::fs::remove_file(path);
    }
    sized.with_context(|| format!("{}: cannot make it {} long", path.display(), size::human(size)))
}

fn set_size(file: &File, size: u64, allocate: bool) -> io::Result<()> {
    if allocate && size > 0 {
        fallocate(file, FallocateFlags::empty(), 0, size)?;
    }
    file.set_len(size)?;
    // The name must survive a crash as much as what is later flushed into it.
    file.sync_all()
}

fn open_error(path: &Path, error: io::Error) -> anyhow::Error {
    match error.kind() {
        io::ErrorKind::AlreadyExists => OpenError::Exists(path.to_owned()).into(),
        io::ErrorKind::NotFound => {
            let folder =
                path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
            anyhow!("{}: its folder {} does not exist; make it first", path.display(), folder.display())
        }
        _ => OpenError::Os { path: path.to_owned(), action: "cannot make it", source: error }.into(),
    }
}
