//! The kinds of disk that are tortured: how each is made, served, and looked at in the end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nbd_proto::ReplyStyle;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

use super::model::Model;
use super::support::{Server, text};

/// Of every disk, in bytes.
pub(crate) const SIZE: usize = 16 << 20;

#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    Raw,
    /// With these options of qemu-img.
    Qcow2(&'static str),
    /// qcow2 over a raw image of zeroes.
    Backed,
    /// qcow2 with its data in a file of their own.
    DataFile,
    /// `--overlay FILE` over a raw image.
    Overlay,
    /// Another server's raw image, over one that lives on.
    Proxy,
}

impl Kind {
    pub(crate) fn name(self) -> String {
        format!("{self:?}")
    }
}

pub(crate) struct Disk {
    kind: Kind,
    folder: PathBuf,
    /// Removed in the end.
    _own: Option<TempDir>,
    /// The runtime folder of its servers, which follow each other.
    control: TempDir,
    upstream: Option<Server>,
}

impl Disk {
    /// A new disk in a folder of its own.
    pub(crate) fn new(kind: Kind) -> Disk {
        let folder = tempfile::tempdir().unwrap();
        let disk = Disk::within(kind, folder.path());
        Disk { _own: Some(folder), ..disk }
    }

    /// The disk that is in this folder.
    pub(crate) fn at(kind: Kind, folder: &Path) -> Disk {
        Disk {
            kind,
            folder: folder.to_owned(),
            _own: None,
            control: tempfile::tempdir().unwrap(),
            upstream: None,
        }
    }

    /// A new disk in this folder, in the place of one that was there.
    pub(crate) fn within(kind: Kind, folder: &Path) -> Disk {
        let mut disk = Disk::at(kind, folder);
        for name in ["raw", "image", "data", "overlay"] {
            let _ = fs::remove_file(disk.path(name));
        }
        File::create(disk.path("raw")).unwrap().set_len(SIZE as u64).unwrap();
        let size = SIZE.to_string();
        // Names within images are relative: the whole folder may be put elsewhere.
        let create = |options: &[&str], size: &[&str]| {
            let args = [&["create", "-q", "-f", "qcow2"], options, &["image"], size].concat();
            assert!(disk.qemu_img(&args).status.success());
        };
        match kind {
            Kind::Qcow2(options) => create(&["-o", options], &[&size]),
            Kind::Backed => create(&["-b", "raw", "-F", "raw"], &[]),
            Kind::DataFile => create(&["-o", "data_file=data"], &[&size]),
            Kind::Proxy => disk.upstream = Some(Server::serve(&[text(&disk.path("raw")), "-f", "raw"])),
            Kind::Raw | Kind::Overlay => {}
        }
        disk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Serves it.
    pub(crate) fn start(&self) -> Server {
        self.try_start().unwrap_or_else(|log| panic!("it did not start: {log}"))
    }

    /// The folder of its servers' control sockets.
    pub(crate) fn control(&self) -> &Path {
        self.control.path()
    }

    /// Serves it, or gives the log of a server that did not start.
    pub(crate) fn try_start(&self) -> Result<Server, String> {
        let (raw, image, overlay) = (self.path("raw"), self.path("image"), self.path("overlay"));
        let data = self.path("data");
        let uri = self.upstream.as_ref().map(|server| server.uri(""));
        let args: Vec<&str> = match self.kind {
            Kind::Raw => vec![text(&raw), "-f", "raw"],
            Kind::Qcow2(_) | Kind::Backed => vec![text(&image), "-f", "qcow2"],
            Kind::DataFile => vec![text(&image), "-f", "qcow2", "--data-file", text(&data)],
            Kind::Overlay => vec![text(&raw), "-f", "raw", "--overlay", text(&overlay)],
            Kind::Proxy => vec![uri.as_deref().unwrap()],
        };
        Server::try_serve_in(self.control.path(), &args)
    }

    /// The image of the kinds that are qcow2.
    fn image(&self) -> Option<&'static str> {
        match self.kind {
            Kind::Qcow2(_) | Kind::Backed | Kind::DataFile => Some("image"),
            Kind::Overlay => Some("overlay"),
            Kind::Raw | Kind::Proxy => None,
        }
    }

    /// All that it holds, read through a server.
    pub(crate) fn read_all(&self) -> Vec<u8> {
        let server = self.start();
        let mut client = server.client(ReplyStyle::Structured);
        let bytes = (0..SIZE as u64 >> 20).flat_map(|part| client.read(part << 20, 1 << 20)).collect();
        drop(client);
        server.stop();
        bytes
    }

    /// All that it holds, read by qemu-img, which must find the image in order but for clusters that leaked.
    pub(crate) fn convert(&self) -> Vec<u8> {
        let Some(image) = self.image() else { return fs::read(self.path("raw")).unwrap() };
        let checked = self.qemu_img(&["check", "-q", "-f", "qcow2", image]);
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{:?}: {checked:?}", self.kind);
        let converted = self.qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image, "converted"]);
        assert!(converted.status.success(), "{converted:?}");
        fs::read(self.path("converted")).unwrap()
    }

    /// In the disk's folder: qemu takes a data file's name for relative to its own.
    fn qemu_img(&self, args: &[&str]) -> Output {
        Command::new("qemu-img").args(args).current_dir(&self.folder).output().unwrap()
    }

    /// Holds it against the model once more, ends it in good order, and has qemu-img look at it.
    pub(crate) fn finish(&mut self, model: &mut Model) {
        let server = self.start();
        model.check(&mut server.client(ReplyStyle::Structured));
        server.stop();
        let Some(image) = self.image() else { return };
        let checked = self.qemu_img(&["check", "-q", "-f", "qcow2", image]);
        // 3 is clusters that leaked when a server was killed amid a commit: they harm nobody.
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{:?}: {checked:?}", self.kind);
    }
}

/// A small file system that can be filled; unmounted when dropped.
pub(crate) struct Full {
    folder: TempDir,
}

impl Full {
    /// None where nothing can be mounted here.
    pub(crate) fn new() -> Option<Full> {
        let full = Full { folder: tempfile::tempdir().unwrap() };
        fs::create_dir(full.folder()).unwrap();
        mount("none", full.folder(), "tmpfs", MountFlags::empty(), Some(c"size=24m")).ok()?;
        Some(full)
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.folder.path().join("small")
    }

    /// Leaves so many bytes of it.
    pub(crate) fn fill(&self, left: u64) {
        let room = rustix::fs::statvfs(self.folder()).unwrap();
        let bytes = (room.f_bavail * room.f_frsize).saturating_sub(left);
        fs::write(self.folder().join("ballast"), vec![1; usize::try_from(bytes).unwrap()]).unwrap();
    }

    pub(crate) fn make_room(&self) {
        fs::remove_file(self.folder().join("ballast")).unwrap();
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = unmount(self.folder(), UnmountFlags::DETACH);
    }
}
