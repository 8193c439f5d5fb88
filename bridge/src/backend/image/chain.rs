//! Opening an image and all that it names: backing images, a data file, extents. Names come from files that nobody
//! vouches for, so that each is looked at before it is followed.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::vmdk::Vmdk;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, StorageOpenOptions};

use super::header::{self, Header};
use super::host::Host;
use super::map::MAX_FILES;
use super::memory::{ImageMemory, Tables};
use super::places::Places;
use super::probe::{ImageFormat, probe};
use super::recover::{Opened, Subject};
use super::{ImageOptions, Parts};
use crate::backend::file::{FileBackend, FileOptions, length};
use crate::{Backend, OpenError};

type Result<T> = std::result::Result<T, OpenError>;

/// One image of a chain, as its file says.
#[derive(Debug)]
pub(super) struct Layer {
    pub(super) path: PathBuf,
    pub(super) format: ImageFormat,
    /// For qcow2.
    pub(super) header: Option<Header>,
    pub(super) data_file: Option<PathBuf>,
}

/// Follows the chain from the image at `path` downwards, and opens nothing for good.
///
/// # Errors
/// One line for the first link that is not to be followed.
pub(super) fn follow(path: &Path, format: ImageFormat, any_backing: bool) -> Result<Vec<Layer>> {
    let mut policy = Policy::new(path, any_backing)?;
    let mut layers = vec![layer(path, path, format, &mut policy)?];
    loop {
        let last = &layers[layers.len() - 1];
        let Some(header) = &last.header else { return Ok(layers) };
        let Some(name) = &header.backing else { return Ok(layers) };
        let path = policy.admit(&last.path, name, "backing file")?;
        let format = match header.backing_format.as_deref() {
            None | Some("") => probe(&path)?,
            Some(format) => format.parse().map_err(|reason| {
                unsupported(&last.path, format!("its backing file {}: {reason}", path.display()))
            })?,
        };
        layers.push(layer(&path, &path, format, &mut policy)?);
    }
}

/// The one layer of an image that is opened by `via`, see [`FileOptions::via`].
///
/// # Errors
/// It names another file.
fn alone(path: &Path, via: &Path, format: ImageFormat) -> Result<Vec<Layer>> {
    let header = if format == ImageFormat::Qcow2 { header::load(via)? } else { Header::default() };
    if header.backing.is_some() || header.external_data() || format == ImageFormat::Vmdk {
        return Err(unsupported(
            path,
            "names another file, and here an image must stand alone; `qemu-img convert -O qcow2` makes one that does"
                .into(),
        ));
    }
    Ok(vec![layer(path, via, format, &mut Policy::new(path, false)?)?])
}

fn layer(path: &Path, via: &Path, format: ImageFormat, policy: &mut Policy) -> Result<Layer> {
    let mut layer = Layer { path: path.to_owned(), format, header: None, data_file: None };
    if format == ImageFormat::Vmdk && !matches!(probe(path), Ok(ImageFormat::Vmdk)) {
        return Err(unsupported(
            path,
            "is not a vmdk image; without -f its format is told from its content".into(),
        ));
    }
    if format == ImageFormat::Qcow2 {
        let header = header::load(via)?;
        if let Some(reason) = header.refusal(path) {
            return Err(unsupported(path, reason));
        }
        if header.external_data() {
            let Some(name) = &header.data_file else {
                return Err(unsupported(path, "has an external data file and does not name it".into()));
            };
            layer.data_file = Some(policy.admit(path, name, "data file")?);
        }
        layer.header = Some(header);
    }
    Ok(layer)
}

/// Which files may be opened because an image names them.
struct Policy {
    /// The folder of the first image.
    folder: PathBuf,
    any: bool,
    seen: HashSet<(u64, u64)>,
}

impl Policy {
    fn new(path: &Path, any: bool) -> Result<Self> {
        let whole = canonical(path)?;
        let folder = whole.parent().unwrap_or(Path::new("/")).to_owned();
        let mut policy = Policy { folder, any, seen: HashSet::new() };
        policy.see(&whole);
        Ok(policy)
    }

    /// False for a file that is part of the image already.
    fn see(&mut self, path: &Path) -> bool {
        std::fs::metadata(path).map_or(true, |found| self.seen.insert((found.dev(), found.ino())))
    }

    /// The path that `name` in the image at `image` leads to.
    fn admit(&mut self, image: &Path, name: &str, what: &str) -> Result<PathBuf> {
        let refuse = |reason: String| Err(unsupported(image, reason));
        let plain = name.strip_prefix("file:").unwrap_or(name);
        if plain.starts_with("json:") || plain.split_once(':').is_some_and(|(scheme, _)| is_scheme(scheme)) {
            return refuse(format!("its {what} `{name}` is no path, and only paths are followed"));
        }
        let path = beside(image, Path::new(plain));
        let whole = match canonical(&path) {
            Ok(whole) => whole,
            Err(OpenError::NotFound(path)) => {
                return refuse(format!(
                    "its {what} {} does not exist (`qemu-img rebase` names another)",
                    path.display()
                ));
            }
            Err(error) => return Err(error),
        };
        if !self.any && !whole.starts_with(&self.folder) {
            return refuse(format!(
                "its {what} {} lies outside of the image's own folder; --allow-backing any, where you trust the image",
                whole.display()
            ));
        }
        if !self.see(&whole) {
            return refuse(format!("its {what} {} is part of the chain already: a loop", whole.display()));
        }
        if self.seen.len() > MAX_FILES {
            return refuse(format!(
                "its chain has more than {MAX_FILES} files; `qemu-img commit` shortens it"
            ));
        }
        Ok(whole)
    }
}

/// `nbd`, `https`, `fat+rw`; not `C` and not `./a`.
fn is_scheme(text: &str) -> bool {
    text.len() > 1 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'+' || byte == b'-')
}

/// A path as an image means it: from its own folder.
pub(super) fn beside(image: &Path, name: &Path) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}

fn canonical(path: &Path) -> Result<PathBuf> {
    std::fs::canonicalize(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => OpenError::NotFound(path.to_owned()),
        _ => OpenError::Os { path: path.to_owned(), action: "cannot look at it", error: source },
    })
}

/// The files of an image that are open, in the order of their numbers.
pub(super) struct Files<'a> {
    options: &'a ImageOptions,
    pub(super) open: Vec<Arc<dyn Backend>>,
    /// Of the file that data is written to.
    data_descriptor: Option<Arc<std::fs::File>>,
    /// Of every file, where it is a file with structures.
    descriptors: Vec<Option<Arc<std::fs::File>>>,
}

impl<'a> Files<'a> {
    fn number(&self, path: &Path) -> Result<u8> {
        u8::try_from(self.open.len()).ok().filter(|number| usize::from(*number) < MAX_FILES).ok_or_else(
            || unsupported(path, format!("an image may have {MAX_FILES} files, and this one has more")),
        )
    }

    /// A file that holds a format's structures; `writable` where it is the image itself.
    fn container(&mut self, path: &Path, writable: bool) -> Result<Host> {
        let read_only = !writable || self.options.file.read_only;
        let options = FileOptions { read_only, ..self.options.file.clone() };
        let file = FileBackend::open_container(path, &options)?;
        if !read_only {
            // A data file comes after the image.
            self.data_descriptor = Some(file.file().clone());
        }
        let number = self.number(path)?;
        let descriptor = file.file().clone();
        let size = length(&descriptor).map_err(|source| OpenError::Os {
            path: path.to_owned(),
            action: "cannot learn its size",
            error: source,
        })?;
        self.descriptors.resize(self.open.len(), None);
        self.descriptors.push(Some(file.file().clone()));
        let file: Arc<dyn Backend> = Arc::new(file);
        self.open.push(file.clone());
        Ok(match read_only {
            true => Host::read_only(path, number, file, size),
            false => Host::writable(path, number, file, size).on_device(descriptor),
        })
    }

    /// A file whose bytes are served, and which is only read.
    fn plain(&mut self, path: &Path) -> Result<Host> {
        let options = FileOptions { read_only: true, ..self.options.file.clone() };
        let file: Arc<dyn Backend> = Arc::new(FileBackend::open(path, &options)?);
        let number = self.number(path)?;
        self.open.push(file.clone());
        let size = file.geometry().size;
        Ok(Host::read_only(path, number, file, size))
    }
}

/// Opens the image at `path` with its whole chain: the image as the options say, all else for reading.
///
/// # Errors
/// One line that names the file which could not be opened.
pub(super) async fn open(path: &Path, options: &ImageOptions) -> Result<(Parts, Vec<Arc<dyn Backend>>)> {
    let layers = match &options.file.via {
        Some(via) => alone(path, via, options.format)?,
        None => follow(path, options.format, options.access.any_backing)?,
    };
    let mut files = Files { options, open: Vec::new(), data_descriptor: None, descriptors: Vec::new() };
    // From the top down, so that the image itself is locked first; then built from the bottom up.
    let mut hosts = Vec::new();
    for (n, layer) in layers.iter().enumerate() {
        let host = match layer.format {
            ImageFormat::Qcow2 => files.container(&layer.path, n == 0)?,
            ImageFormat::Raw | ImageFormat::Vmdk => files.plain(&layer.path)?,
        };
        let data = match &layer.data_file {
            Some(path) => Some(files.container(path, n == 0)?),
            None => None,
        };
        hosts.push((host, data));
    }
    let (top, data_file) = hosts[0].clone();
    let mut header = layers[0].header.clone().unwrap_or_default();
    let journal = journals(&layers, &hosts, &files).await?;
    if journal.replayed {
        header = header::load(options.file.via.as_deref().unwrap_or(path))?;
    }
    if header.version != 0 && !options.file.read_only {
        let places = Places::load(&top, &header).await.map_err(|source| OpenError::Os {
            path: path.to_owned(),
            action: "cannot read it",
            error: source,
        })?;
        match places {
            Ok(places) => top.guard(places),
            Err(fault) => {
                let check = format!("`qemu-img check -r all {}` repairs it", path.display());
                return Err(unsupported(path, format!("{fault}; {check}, or serve it with --read-only")));
            }
        }
    }
    let tables = count_tables(&layers, &hosts, &options.access.memory);
    let mut image: Option<FormatAccess<Host>> = None;
    let mut backing = None;
    for ((n, layer), (host, data)) in layers.iter().enumerate().zip(hosts).rev() {
        backing = image.as_ref().map(FormatAccess::size);
        let built = build(layer, host, data, image.take(), n == 0, &mut files).await?;
        image = Some(built);
    }
    let Some(image) = image else { return Err(unsupported(path, "has no image in it".into())) };
    let largest_cluster = clusters(&layers).max().unwrap_or(0);
    let cluster = if header.version == 0 { super::OTHER_CLUSTER } else { header.cluster_size() };
    let parts = Parts {
        image,
        options: options.file.clone(),
        top,
        data_file,
        cluster,
        version: header.version,
        backing,
        data_descriptor: files.data_descriptor,
        largest_cluster,
        tables,
        journal: journal.journal,
    };
    Ok((parts, files.open))
}

/// Bytes of a cluster of each layer that has clusters.
fn clusters(layers: &[Layer]) -> impl Iterator<Item = u64> {
    layers.iter().filter_map(|layer| layer.header.as_ref().map(Header::cluster_size))
}

/// Has the tables counted that are cached for the layers: a lookup may load one of each.
fn count_tables(layers: &[Layer], hosts: &[(Host, Option<Host>)], memory: &ImageMemory) -> Tables {
    let tables = memory.image(clusters(layers).sum());
    for (layer, (host, _)) in layers.iter().zip(hosts) {
        if let Some(header) = &layer.header {
            host.count_tables(header.cluster_size(), tables.clone());
        }
    }
    tables
}

/// Opens the journal of an image that is written, and brings in what dead processes have left in those of all images.
async fn journals(layers: &[Layer], hosts: &[(Host, Option<Host>)], files: &Files<'_>) -> Result<Opened> {
    let mut opened = Opened { journal: None, replayed: false };
    let descriptor = |host: &Host| files.descriptors.get(usize::from(host.number()))?.as_deref();
    for (layer, (host, data_file)) in layers.iter().zip(hosts) {
        let (Some(header), Some(file)) = (&layer.header, descriptor(host)) else { continue };
        let data = data_file.as_ref().and_then(descriptor);
        let subject = Subject { path: &layer.path, header, host, data_file: data_file.as_ref(), file, data };
        let folder = files.options.access.journal.as_deref();
        let done = match host.is_written() {
            true => subject.open_journal(folder).await.map(|journal| opened = journal),
            false => subject.overlay_journal(folder).await,
        };
        done.map_err(|error| OpenError::Os {
            path: layer.path.clone(),
            action: "cannot bring in the journal of a server that died",
            error,
        })?;
    }
    Ok(opened)
}

async fn build(
    layer: &Layer,
    host: Host,
    data: Option<Host>,
    backing: Option<FormatAccess<Host>>,
    is_top: bool,
    files: &mut Files<'_>,
) -> Result<FormatAccess<Host>> {
    let failed = |error: std::io::Error| {
        let check = match layer.format {
            ImageFormat::Qcow2 => format!("; `qemu-img check {}` tells more", layer.path.display()),
            ImageFormat::Raw => String::new(),
            ImageFormat::Vmdk => {
                format!("; `qemu-img convert -O qcow2 {} NEW` makes one that works", layer.path.display())
            }
        };
        unsupported(&layer.path, format!("cannot be opened as {}: {error}{check}", layer.format))
    };
    match layer.format {
        ImageFormat::Qcow2 => {
            let writable = is_top && !files.options.file.read_only;
            let builder = Qcow2::<Host>::builder(host).write(writable).backing(backing).data_file(data);
            builder.open(DenyImplicitOpenGate::default()).await.map(FormatAccess::new).map_err(failed)
        }
        ImageFormat::Raw => Raw::open_image(host, false).await.map(FormatAccess::new).map_err(failed),
        ImageFormat::Vmdk => {
            if is_top && !files.options.file.read_only {
                return Err(unsupported(
                    &layer.path,
                    "is a vmdk image, which can only be read; serve it with --read-only".into(),
                ));
            }
            let mut refusal = None;
            let policy = Policy::new(&layer.path, files.options.access.any_backing)?;
            let gate = Extents { image: &layer.path, files, policy, refusal: &mut refusal };
            let built = Vmdk::<Host>::builder(host).open(gate).await;
            match (built, refusal) {
                (_, Some(refusal)) => Err(refusal),
                (built, None) => built.map(FormatAccess::new).map_err(failed),
            }
        }
    }
}

/// Opens the extents that a VMDK descriptor names.
struct Extents<'a, 'b> {
    image: &'a Path,
    files: &'a mut Files<'b>,
    policy: Policy,
    refusal: &'a mut Option<OpenError>,
}

impl Extents<'_, '_> {
    fn open(&mut self, path: &Path) -> Result<Host> {
        let name = path.to_str().unwrap_or_default();
        let path = self.policy.admit(self.image, name, "extent")?;
        self.files.plain(&path)
    }
}

impl ImplicitOpenGate<Host> for Extents<'_, '_> {
    async fn open_format<F: FormatDriverBuilder<Host>>(
        &mut self,
        _builder: F,
    ) -> std::io::Result<FormatAccess<Host>> {
        Err(std::io::Error::other("an extent with a format of its own"))
    }

    async fn open_storage(&mut self, options: StorageOpenOptions) -> std::io::Result<Host> {
        let path = options.get_filename().unwrap_or(Path::new("")).to_owned();
        self.open(&path).map_err(|error| {
            let text = error.to_string();
            *self.refusal = Some(error);
            std::io::Error::other(text)
        })
    }
}

fn unsupported(path: &Path, reason: String) -> OpenError {
    OpenError::Unsupported { path: path.to_owned(), reason }
}
