//! `nbdbridge attach`: a block device over a source, by the best way that this host has. Here is the one for hosts
//! without ublk: a FUSE file of our own, and a loop device upon it, with direct I/O and without a partition scan.

mod loop_device;

use std::cell::RefCell;
use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bridge::LocalFuture;
use rustix::process::geteuid;
use tokio::sync::watch;

use crate::attachment;
use crate::cli::{FuseArgs, LoopArgs, Source};
use crate::control::Watch;
use crate::door::{Door, Site};
use crate::fuse::FuseDoor;

use loop_device::LoopDevice;
pub(crate) use loop_device::{backing_file, describe_use, detach as detach_loop, in_use};

/// How often to look whether a device that is in use has come free.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// Names of the folders that the files are in begin with it.
const PREFIX: &str = "attach-";

/// A loop device over a FUSE file.
pub(crate) struct LoopDoor {
    device: LoopDevice,
    file: FuseDoor,
    /// Changes of the export's size.
    size: RefCell<watch::Receiver<u64>>,
    /// The folder that the file is in; dropped after it.
    _folder: Folder,
}

impl LoopDoor {
    /// Mounts the first export in a folder of our own, and sets up a loop device over that.
    ///
    /// # Errors
    /// One line: not root, no FUSE, no loop devices.
    pub(crate) async fn open(args: &LoopArgs, site: &Site<'_>) -> Result<Self> {
        ensure!(
            geteuid().is_root(),
            "only root can attach block devices; as a user, have a file instead: nbdbridge fuse SOURCE FILE"
        );
        let export = site.exports.first().context("there is no export")?;
        let size = export.watch_size();
        let geometry = export.geometry();
        ensure!(
            geometry.size >= 512,
            "{}: of {} bytes no block device can be made; it has sectors of 512",
            site.args[0].source,
            geometry.size
        );
        if geometry.size % 512 != 0 {
            tracing::warn!(
                "a block device has whole sectors: the last {} bytes are left out",
                geometry.size % 512
            );
        }
        let folder = Folder::make()?;
        let file = folder.0.join(name(&site.args[0].source));
        let wish = FuseArgs { file, allow_other: false, growable: false, threads: args.threads };
        let file = FuseDoor::open(&wish, site).await?;
        let path = file.path().to_owned();
        let read_only = geometry.read_only();
        // The kernel opens the file and asks it, which this thread must not wait for.
        let device = tokio::task::spawn_blocking(move || LoopDevice::attach(&path, read_only)).await?;
        let device = match device {
            Ok(device) => device,
            Err(error) => {
                file.drain().await;
                return Err(error);
            }
        };
        file.note_device(device.path());
        Ok(LoopDoor { device, file, size: RefCell::new(size), _folder: folder })
    }

    /// Tells the kernel each new size.
    async fn follow_size(&self) {
        let mut size = self.size.borrow().clone();
        while size.changed().await.is_ok() {
            let (device, file) = (self.device.path().to_owned(), self.file.path().to_owned());
            let told = tokio::task::spawn_blocking(move || loop_device::tell_size(&device, &file)).await;
            if let Ok(Err(error)) = told {
                tracing::warn!("{}: does not take the new size: {error}", self.device.path().display());
            }
        }
        std::future::pending().await
    }
}

impl Door for LoopDoor {
    fn watch(&self) -> Watch {
        let mut watch = self.file.watch();
        for place in &mut watch.places {
            place.at = self.device.path().into();
        }
        Watch { kind: "attach", ..watch }
    }

    fn lines(&self) -> Vec<OsString> {
        vec![self.device.path().into()]
    }

    fn serve(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            tokio::select! {
                () = self.file.serve() => {}
                () = self.follow_size() => {}
            }
        })
    }

    /// Waits until the device is not mounted, and nobody else has it open.
    fn release(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            let path = self.device.path();
            let mut said = false;
            while in_use(path) {
                if !said {
                    said = true;
                    tracing::warn!(
                        "{}: is in use ({}); it ends when it is released, or at the next signal",
                        path.display(),
                        loop_device::describe_use(path)
                    );
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            self.device.detach();
            self.file.release().await;
        })
    }

    fn drain(&self) -> LocalFuture<'_, bool> {
        Box::pin(async {
            self.device.detach();
            self.file.drain().await
        })
    }

    fn cut(&self) -> LocalFuture<'_, ()> {
        self.device.detach();
        self.file.cut()
    }
}

/// A folder of this process for its files, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self> {
        let Some(parent) = attachment::folder() else { bail!("no folder to mount in") };
        let path = parent.join(format!("{PREFIX}{}", std::process::id()));
        // One that is left of a process with the same number is taken over.
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.with_context(|| format!("{}: cannot make it", path.display()))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // At worst it stays.
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// Whether a folder is one of these, by its name.
pub(crate) fn is_attachment(folder: &Path) -> bool {
    let name = folder.file_name().unwrap_or_default();
    folder.parent() == attachment::folder().as_deref()
        && name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
}

/// What `losetup` shows as the file's name: the image's.
fn name(source: &Source) -> PathBuf {
    let name = match source {
        Source::Path(path) => path.file_name().map(Path::new),
        _ => None,
    };
    name.unwrap_or(Path::new("disk")).to_owned()
}
