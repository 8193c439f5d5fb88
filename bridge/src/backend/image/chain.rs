//! Opening an image and all that it names: backing images, a data file, extents. Names come from files that nobody
//! vouches for, so that each is looked at before it is followed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};

use super::header::{self, Header};
use super::host::Host;
use super::map::MAX_FILES;
use super::memory::Tables;
use super::names::{self, Policy};
use super::places::{Places, reftable};
use super::probe::{ImageFormat, probe};
use super::recover::{Opened, Subject};
use super::{ImageAccess, ImageOptions, Parts};
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
pub(super) fn follow(
    path: &Path,
    format: ImageFormat,
    access: &ImageAccess,
    read_only: bool,
) -> Result<Vec<Layer>> {
    let mut policy = Policy::new(path, access.any_backing)?;
    let mut layers = vec![layer(path, path, format, &mut policy, (!read_only).then_some(access))?];
    loop {
        let last = &layers[layers.len() - 1];
        let Some(header) = &last.header else { return Ok(layers) };
        let Some(name) = &header.backing else { return Ok(layers) };
        let name = names::parse_backing(name).map_err(|reason| unsupported(&last.path, reason))?;
        let path = policy.admit(&last.path, Path::new(&name.path), "backing file")?;
        let format = match name.format.as_deref().or(header.backing_format.as_deref()) {
            None | Some("") => probe(&path)?,
            Some(format) => format.parse().map_err(|reason| {
                unsupported(&last.path, format!("its backing file {}: {reason}", path.display()))
            })?,
        };
        layers.push(layer(&path, &path, format, &mut policy, None)?);
    }
}

/// The one layer of an image that is opened by `via`, see [`FileOptions::via`].
///
/// # Errors
/// It names another file.
fn alone(path: &Path, via: &Path, options: &ImageOptions) -> Result<Vec<Layer>> {
    let format = options.format;
    let header = if format == ImageFormat::Qcow2 { header::load(via)? } else { Header::default() };
    if header.backing.is_some() || header.external_data() || format == ImageFormat::Vmdk {
        return Err(unsupported(
            path,
            "names another file, and here an image must stand alone; `qemu-img convert -O qcow2` makes one that does"
                .into(),
        ));
    }
    let written = (!options.file.read_only).then_some(&options.access);
    Ok(vec![layer(path, via, format, &mut Policy::new(path, false)?, written)?])
}

/// Looks at one image; `written` tells what its names may lead to where it is one that is written.
fn layer(
    path: &Path,
    via: &Path,
    format: ImageFormat,
    policy: &mut Policy,
    written: Option<&ImageAccess>,
) -> Result<Layer> {
    let mut layer = Layer { path: path.to_owned(), format, header: None, data_file: None };
    if format == ImageFormat::Vmdk && !matches!(probe(path), Ok(ImageFormat::Vmdk)) {
        return Err(unsupported(
            path,
            "is not a vmdk image; without -f its format is told from its content".into(),
        ));
    }
    if format == ImageFormat::Qcow2 {
        let header = header::load(via)?;
        if let Some(reason) = header.refusal(path, written.is_none()) {
            return Err(unsupported(path, reason));
        }
        if header.external_data() {
            layer.data_file = Some(data_file(path, &header, policy, written)?);
        }
        layer.header = Some(header);
    }
    Ok(layer)
}

/// Finds the data file of an image. One that is written has to be allowed by the user, because the image may name
/// any of its neighbours.
fn data_file(
    path: &Path,
    header: &Header,
    policy: &mut Policy,
    written: Option<&ImageAccess>,
) -> Result<PathBuf> {
    let Some(name) = &header.data_file else {
        return Err(unsupported(path, "has an external data file and does not name it".into()));
    };
    let Some(access) = written else { return policy.admit(path, Path::new(name), "data file") };
    let found = policy.admit_allowed(path, Path::new(name), "data file")?;
    let listed = access.data_files.iter().any(|file| names::are_same_file(file, &found));
    if listed || access.any_backing {
        return Ok(found);
    }
    Err(unsupported(
        path,
        format!(
            "would write to its data file {found}; --data-file {found} allows that, where you trust the image, \
             or serve it with --read-only",
            found = found.display()
        ),
    ))
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
    pub(super) fn plain(&mut self, path: &Path) -> Result<Host> {
        let options = FileOptions { read_only: true, ..self.options.file.clone() };
        let file: Arc<dyn Backend> = Arc::new(FileBackend::open(path, &options)?);
        self.add(path, file)
    }

    /// Adds what is open already.
    pub(super) fn add(&mut self, path: &Path, file: Arc<dyn Backend>) -> Result<Host> {
        let number = self.number(path)?;
        self.open.push(file.clone());
        let size = file.geometry().size;
        Ok(Host::read_only(path, number, file, size))
    }

    pub(super) fn any_backing(&self) -> bool {
        self.options.access.any_backing
    }
}

/// Opens the image at `path` with its whole chain: the image as the options say, all else for reading.
///
/// # Errors
/// One line that names the file which could not be opened.
pub(super) async fn open(path: &Path, options: &ImageOptions) -> Result<(Parts, Vec<Arc<dyn Backend>>)> {
    let layers = match &options.file.via {
        Some(via) => alone(path, via, options)?,
        None => follow(path, options.format, &options.access, options.file.read_only)?,
    };
    let tables = hold_tables(&layers, options)?;
    let mut files = Files { options, open: Vec::new(), data_descriptor: None, descriptors: Vec::new() };
    // From the top down, so that the image itself is locked first; then built from the bottom up.
    let mut hosts = Vec::new();
    for (n, layer) in layers.iter().enumerate() {
        let host = match layer.format {
            ImageFormat::Qcow2 => {
                let host = files.container(&layer.path, n == 0)?;
                if let Some(header) = &layer.header {
                    ignore_marks(&host, header);
                }
                host
            }
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
    count_tables(&layers, &hosts, &tables);
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
            Ok(places) => {
                top.guard(places);
                top.count_known(0).map_err(|line| unsupported(path, line))?;
            }
            Err(fault) => {
                let check = format!("`qemu-img check -r all {}` repairs it", path.display());
                return Err(unsupported(path, format!("{fault}; {check}, or serve it with --read-only")));
            }
        }
    }
    for (n, (layer, (host, _))) in layers.iter().zip(&hosts).enumerate() {
        if let Some(found) = &layer.header {
            // Of the image itself it may have changed.
            host.hide_damage(if n == 0 { &header } else { found });
            host.hide_names(found.odd_names.clone());
        }
    }
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
        loss: journal.loss,
    };
    Ok((parts, files.open))
}

/// Has an image read although it is marked dirty or corrupt; [`layer`] has refused one that is written.
fn ignore_marks(host: &Host, header: &Header) {
    if let Some(mark) = header.mark() {
        tracing::warn!(
            "{host}: is marked {mark}, and what is read may be wrong; `qemu-img check -r all {host}` repairs it"
        );
        host.hide_marks();
    }
}

/// Bytes of a cluster of each layer that has clusters.
fn clusters(layers: &[Layer]) -> impl Iterator<Item = u64> {
    layers.iter().filter_map(|layer| layer.header.as_ref().map(Header::cluster_size))
}

/// Counts the tables that stay loaded for the layers, before any is loaded.
///
/// # Errors
/// [`OpenError`] for the first layer whose tables do not fit into what is left of the memory budget.
fn hold_tables(layers: &[Layer], options: &ImageOptions) -> Result<Tables> {
    // A lookup may load one table of each layer.
    let tables = options.access.memory.image(clusters(layers).sum());
    for (n, layer) in layers.iter().enumerate() {
        let Some(header) = &layer.header else { continue };
        let written = n == 0 && !options.file.read_only;
        let reftable = reftable(header);
        let bytes =
            u64::from(header.l1_entries) * 8 + if written { reftable.end - reftable.start } else { 0 };
        tables.hold(bytes).map_err(|line| unsupported(&layer.path, line))?;
    }
    Ok(tables)
}

/// Has the tables counted that are cached for the layers.
fn count_tables(layers: &[Layer], hosts: &[(Host, Option<Host>)], tables: &Tables) {
    for (layer, (host, data)) in layers.iter().zip(hosts) {
        if let Some(header) = &layer.header {
            for file in [host].into_iter().chain(data) {
                file.set_cluster(header.cluster_size());
            }
            host.count_tables(header.cluster_size(), tables.clone());
        }
    }
}

/// Opens the journal of an image that is written, and brings in what dead processes have left in those of all images.
async fn journals(layers: &[Layer], hosts: &[(Host, Option<Host>)], files: &Files<'_>) -> Result<Opened> {
    let mut opened = Opened { journal: None, loss: None, replayed: false };
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
        if error.kind() == std::io::ErrorKind::OutOfMemory {
            return unsupported(&layer.path, error.to_string());
        }
        let check = match layer.format {
            ImageFormat::Qcow2 => format!("; `qemu-img check {}` tells more", layer.path.display()),
            ImageFormat::Raw | ImageFormat::Vmdk => String::new(),
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
            // First what no option changes.
            let image = super::vmdk::open(&layer.path, &host, files).await?;
            if is_top && !files.options.file.read_only {
                return Err(unsupported(
                    &layer.path,
                    "is a vmdk image, which can only be read; serve it with --read-only".into(),
                ));
            }
            Ok(image)
        }
    }
}

pub(super) fn unsupported(path: &Path, reason: String) -> OpenError {
    OpenError::Unsupported { path: path.to_owned(), reason }
}
