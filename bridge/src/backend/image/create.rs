//! Making a qcow2 image.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, FormatDriverBuilder};

use super::chain::follow;
use super::host::Host;
use super::names::beside;
use super::probe::{ImageFormat, probe};
use super::{ImageAccess, ImageBackend, ImageOptions, commit, thread};
use crate::backend::file::{FileBackend, FileOptions};
use crate::{Backend, OpenError};

/// What kind of image to make.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// Size of the disk in bytes; None for the backing image's.
    pub size: Option<u64>,
    /// Size of a cluster in bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u32,
    /// The image that shows where this one has nothing: a path as the new image's folder sees it.
    pub backing: Option<PathBuf>,
    /// The backing image's format; None to look.
    pub backing_format: Option<ImageFormat>,
    /// Allow a backing image outside of the new image's folder.
    pub any_backing: bool,
}

/// Makes a qcow2 image where there is nothing yet, and gives its size. What cannot be finished is removed.
///
/// # Errors
/// One line: it exists, its backing image cannot be opened, no room, a size that is too large.
pub fn create(path: &Path, options: &CreateOptions) -> Result<u64, OpenError> {
    let unsupported = |reason: String| OpenError::Unsupported { path: path.to_owned(), reason };
    let file =
        std::fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(|source| match source
            .kind()
        {
            std::io::ErrorKind::AlreadyExists => OpenError::Exists(path.to_owned()),
            _ => OpenError::Os { path: path.to_owned(), action: "cannot make it", error: source },
        })?;
    let made = thread::wait_for(path, async || {
        let backing = match &options.backing {
            Some(name) => Some(look_at(path, name, options)?),
            None => None,
        };
        let size = match (options.size, &backing) {
            (Some(size), _) => size,
            (None, Some(backing)) => backing.size,
            (None, None) => return Err(unsupported("needs a size, or a backing image".into())),
        };
        let size = size
            .checked_next_multiple_of(512)
            .filter(|size| fits(*size, options.cluster_size))
            .ok_or_else(|| {
                let bytes = options.cluster_size;
                unsupported(format!("{size} bytes are too much for clusters of {bytes}; choose larger ones"))
            })?;
        fill(path, size, options, backing).await.map_err(|source| OpenError::Os {
            path: path.to_owned(),
            action: "cannot make it",
            error: source,
        })?;
        // The name must survive a crash as much as what is later flushed into it.
        file.sync_all().map_err(|source| OpenError::Os {
            path: path.to_owned(),
            action: "cannot make it durable",
            error: source,
        })?;
        Ok(size)
    });
    if made.is_err() {
        // What went wrong first is what to tell.
        let _ = std::fs::remove_file(path);
    }
    made
}

struct Backing {
    name: OsString,
    format: ImageFormat,
    size: u64,
}

/// Opens the backing image as it will be opened through the new one.
fn look_at(path: &Path, name: &Path, options: &CreateOptions) -> Result<Backing, OpenError> {
    let found = beside(path, name);
    let format = match options.backing_format {
        Some(format) => format,
        None => probe(&found)?,
    };
    let file = FileOptions { read_only: true, ..FileOptions::default() };
    let folder =
        |path: &Path| std::fs::canonicalize(path).ok().and_then(|whole| whole.parent().map(Path::to_owned));
    let inside = match (folder(path), folder(&found)) {
        (Some(own), Some(other)) => other.starts_with(own),
        _ => true,
    };
    if !inside && !options.any_backing {
        return Err(OpenError::Unsupported {
            path: path.to_owned(),
            reason: format!(
                "its backing file {} lies outside of the image's own folder; --allow-backing any, here and to serve it",
                found.display()
            ),
        });
    }
    let size = if format == ImageFormat::Raw {
        FileBackend::open(&found, &file)?.geometry().size
    } else {
        let access = ImageAccess { any_backing: options.any_backing, ..ImageAccess::default() };
        follow(&found, format, &access, true)?;
        let options = ImageOptions { file, format, access };
        ImageBackend::open(&found, &options)?.geometry().size
    };
    Ok(Backing { name: name.as_os_str().to_owned(), format, size })
}

/// Whether an L1 table of the largest size that qemu takes, 32 MiB, is enough.
fn fits(size: u64, cluster_size: u32) -> bool {
    let cluster = u128::from(cluster_size);
    u128::from(size) <= (32 << 20) / 8 * (cluster / 8) * cluster && size < 1 << 56
}

async fn fill(
    path: &Path,
    size: u64,
    options: &CreateOptions,
    backing: Option<Backing>,
) -> std::io::Result<()> {
    let file = FileBackend::open_container(path, &FileOptions::default()).map_err(std::io::Error::other)?;
    let file: Arc<dyn Backend> = Arc::new(file);
    let host = Host::writable(path, 0, file, 0);
    let mut builder = Qcow2::<Host>::create_builder(host.clone())
        .size(size)
        .cluster_size(usize::try_from(options.cluster_size).unwrap_or(usize::MAX));
    let mut odd_name = None;
    if let Some(Backing { name, format, .. }) = backing {
        // imago takes text; other bytes are put in the place of text of the same length.
        let text = name.into_string().unwrap_or_else(|name| {
            let text = "?".repeat(name.len());
            odd_name = Some(name);
            text
        });
        builder = builder.backing(text, format.name().into());
    }
    // The backing image is no part of this: nothing of it is read.
    let image = builder
        .create_open(imago::DenyImplicitOpenGate::default(), |host| {
            Ok(Qcow2::<Host>::builder(host).backing(None).write(true))
        })
        .await?;
    let image = imago::FormatAccess::new(image);
    image.flush().await?;
    if let Some(name) = odd_name {
        host.keep_backing_name(&name).await?;
    }
    commit::write(&host, &host.kept()).await?;
    host.clear_kept();
    Ok(())
}
