//! What an image is, told from its header: also for one that cannot be served.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::ImageAccess;
use super::chain::follow;
use super::header::{self, Header};
use super::probe::{ImageFormat, probe};
use crate::OpenError;

/// What an image is.
#[derive(Clone, Debug)]
pub struct Description {
    /// Its format.
    pub format: ImageFormat,
    /// Size of the disk in bytes, where the header tells.
    pub size: Option<u64>,
    /// Bytes of storage that its own file takes.
    pub allocated: u64,
    /// Length of its own file in bytes.
    pub length: u64,
    /// For qcow2: its version, 2 or 3.
    pub version: Option<u32>,
    /// For qcow2: the size of a cluster in bytes.
    pub cluster_size: Option<u64>,
    /// For qcow2: bits of a refcount.
    pub refcount_bits: Option<u32>,
    /// For qcow2: what is special about it.
    pub features: Vec<&'static str>,
    /// The file with the data, where it is another.
    pub data_file: Option<PathBuf>,
    /// The images below it, top down.
    pub chain: Vec<ChainLink>,
}

/// An image below another one.
#[derive(Clone, Debug)]
pub struct ChainLink {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
}

/// Describes the image at `path`. It takes no locks and opens nothing but the headers.
///
/// # Errors
/// One line: it cannot be read, or its header makes no sense.
pub fn describe(
    path: &Path,
    format: Option<ImageFormat>,
    any_backing: bool,
) -> Result<Description, OpenError> {
    let format = match format {
        Some(format) => format,
        None => probe(path)?,
    };
    let metadata = std::fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => OpenError::NotFound(path.to_owned()),
        _ => OpenError::Os { path: path.to_owned(), action: "cannot look at it", error: source },
    })?;
    let header = if format == ImageFormat::Qcow2 { Some(header::load(path)?) } else { None };
    let access = ImageAccess { any_backing, ..ImageAccess::default() };
    // What keeps it from being opened is said by whoever opens it.
    let layers = follow(path, format, &access, true).unwrap_or_default();
    Ok(Description {
        format,
        size: header.as_ref().map(|header| header.size),
        allocated: metadata.blocks() * 512,
        length: metadata.len(),
        version: header.as_ref().map(|header| header.version),
        cluster_size: header.as_ref().map(Header::cluster_size),
        refcount_bits: header.as_ref().map(|header| 1 << header.refcount_order),
        features: header.as_ref().map(Header::features).unwrap_or_default(),
        data_file: layers.first().and_then(|layer| layer.data_file.clone()),
        chain: layers
            .into_iter()
            .skip(1)
            .map(|layer| ChainLink { path: layer.path, format: layer.format })
            .collect(),
    })
}
