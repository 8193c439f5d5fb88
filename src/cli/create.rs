//! `nbdbridge create`: makes an empty image.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use bridge::OpenError;
use bridge::backend::image::{self, CreateOptions};
use clap::Args;
use rustix::fs::{FallocateFlags, fallocate};

use super::UsageError;
use super::values::{self, AllowBacking, Format};
use crate::output;
use crate::size;

/// What to make.
#[derive(Debug, Args)]
#[command(after_help = "SIZE takes K, M, G and T (powers of 1024), as in 512M or 1.5T.")]
pub(crate) struct CreateArgs {
    /// Path of the new image; it must not exist
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,

    /// Size of the disk; the backing image's where there is one
    #[arg(value_name = "SIZE", value_parser = size::parse, required_unless_present = "backing")]
    pub(crate) size: Option<u64>,

    /// Image format: raw or qcow2
    #[arg(short, long, value_name = "FORMAT", default_value = "raw", value_parser = values::parse_format,
          hide_default_value = true)]
    pub(crate) format: Format,

    /// The image that shows through where the new one has nothing; its path as the new image's folder sees it
    #[arg(short, long, value_name = "PATH")]
    pub(crate) backing: Option<PathBuf>,

    /// The backing image's format; without it, it is told from its first sector
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = values::parse_format, requires = "backing")]
    pub(crate) backing_format: Option<Format>,

    /// Size of a cluster of qcow2, a power of two from 512 to 2M [default: 64K]
    #[arg(long, value_name = "BYTES", value_parser = parse_cluster_size)]
    pub(crate) cluster_size: Option<u32>,

    /// Which backing files an image may name
    #[arg(long, value_name = "WHERE", default_value = "folder")]
    pub(crate) allow_backing: AllowBacking,

    /// Reserve the whole space now; without it, space is taken as the disk is written
    #[arg(long)]
    pub(crate) allocate: bool,
}

/// Clusters that an image has where nobody says otherwise, in bytes.
const CLUSTER_SIZE: u32 = 64 << 10;

fn parse_cluster_size(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    match u32::try_from(bytes) {
        Ok(bytes) if bytes.is_power_of_two() && (512..=2 << 20).contains(&bytes) => Ok(bytes),
        _ => Err("must be a power of two from 512 to 2M".into()),
    }
}

/// Makes the image, and says so.
pub(crate) fn run(args: &CreateArgs) -> Result<()> {
    let bytes = match args.format {
        Format::Raw => {
            if args.backing.is_some() || args.cluster_size.is_some() {
                return Err(
                    UsageError::new("a raw image has neither backing nor clusters; -f qcow2 has").into()
                );
            }
            let size = args.size.unwrap_or(0);
            create_image(&args.path, size, args.allocate)?;
            size
        }
        Format::Qcow2 => {
            if args.allocate {
                let way_out = "--allocate is for raw images; `qemu-img create -f qcow2 -o preallocation=falloc` does it";
                return Err(UsageError::new(way_out).into());
            }
            if args.backing.as_deref().is_some_and(|backing| is_itself(&args.path, backing)) {
                return Err(UsageError::new("an image cannot be its own backing file").into());
            }
            let options = CreateOptions {
                size: args.size,
                cluster_size: args.cluster_size.unwrap_or(CLUSTER_SIZE),
                backing: args.backing.clone(),
                backing_format: args.backing_format,
                any_backing: args.allow_backing.any(),
            };
            image::create(&args.path, &options)?
        }
        Format::Vmdk => return Err(only_read(args.format)),
    };
    let size = size::full(bytes);
    // The image is made, whether or not somebody listens.
    let line = output::plain(&format!("{}: {} image, {size}", args.path.display(), args.format));
    let _ = output::text(&(line + "\n"));
    Ok(())
}

/// Whether a backing file, named as seen from the image's folder, is the image.
fn is_itself(image: &Path, backing: &Path) -> bool {
    let named = image.parent().unwrap_or(Path::new("")).join(backing);
    matches!((std::path::absolute(image), std::path::absolute(named)), (Ok(image), Ok(named)) if image == named)
}

fn only_read(format: Format) -> anyhow::Error {
    UsageError::new(format!("{format} images can be read, not made; -f qcow2 can")).into()
}

/// Makes an empty image of a format that is not raw.
///
/// # Errors
/// One line that names the path, or the format.
pub(crate) fn create_empty(path: &Path, format: Format, size: u64) -> Result<()> {
    if format != Format::Qcow2 {
        return Err(only_read(format));
    }
    let options = CreateOptions {
        size: Some(size),
        cluster_size: CLUSTER_SIZE,
        backing: None,
        backing_format: None,
        any_backing: false,
    };
    Ok(image::create(path, &options).map(drop)?)
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
        _ => OpenError::Os { path: path.to_owned(), action: "cannot make it", error }.into(),
    }
}
