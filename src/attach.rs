//! `nbdbridge attach`: a block device over a source, by the best way that this host has. Here is the one for hosts
//! without ublk: a FUSE file of our own, and a loop device upon it, with direct I/O and without a partition scan.

mod loop_device;

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use bridge::LocalFuture;
use rustix::process::geteuid;
use tokio::sync::watch;

use crate::attachment;
use crate::cli::{FuseArgs, LoopArgs, Source};
use crate::control::Watch;
use crate::door::{Door, Site};
use crate::fuse::{self, FuseDoor};
use crate::helper::{self, Task};

pub(crate) use loop_device::{
    LoopDevice, backing_file, describe_use, detach, in_use, loops_over, tell_size, uses,
};

/// The time between two looks whether a device that is in use has come free: at first, and at most.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
const LOOK_SELDOM: Duration = Duration::from_secs(1);

/// A cut end waits for the device no longer.
const CUT_LIMIT: Duration = Duration::from_millis(500);

/// A system call that waits for this process's own FUSE threads ends within this time, however slow the source is.
const CALL_LIMIT: Duration = Duration::from_secs(60);

/// Names of the folders that the files are in begin with it.
const PREFIX: &str = "attach-";

/// A loop device over a FUSE file. All system calls on either are made by helper processes.
pub(crate) struct LoopDoor {
    /// The device's path.
    device: PathBuf,
    /// The device is still attached, as far as this process knows.
    attached: Cell<bool>,
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
        let path = Folder::path()?;
        let file = path.join(name(&site.args[0].source));
        // Written down before the folder is made, so that whatever a kill leaves is found.
        let note = fuse::note(&file, site)?;
        let folder = Folder::make(path)?;
        let wish = FuseArgs { file, allow_other: false, growable: false, threads: args.threads };
        let file = FuseDoor::open_noted(note, &wish, site).await?;
        match attach_loop(&file, geometry.read_only()).await {
            Ok(device) => Ok(LoopDoor {
                device,
                attached: Cell::new(true),
                file,
                size: RefCell::new(size),
                _folder: folder,
            }),
            Err(error) => {
                // The helper may have been killed between its work and its answer.
                for device in loops_over(file.path()) {
                    detach_from(&device, file.path()).await;
                }
                file.drain().await;
                Err(error)
            }
        }
    }

    /// Tells the kernel each new size.
    async fn follow_size(&self) {
        let mut size = self.size.borrow().clone();
        while size.changed().await.is_ok() {
            let task = Task::LoopSize { device: &self.device, file: self.file.path() };
            if let Err(error) = helper::run_apart(task, CALL_LIMIT).await {
                tracing::warn!("{}: does not take the new size: {error}", self.device.display());
            }
        }
        std::future::pending().await
    }

    /// Lets go of the file; where the device is in use, as soon as it is not. Cancel-safe: what was left half way is done
    /// again, which finds the device as it is.
    async fn detach(&self) {
        if self.attached.get() {
            detach_from(&self.device, self.file.path()).await;
            self.attached.set(false);
        }
    }
}

/// Sets up a loop device over the file, and writes the device down before the helper process may end.
async fn attach_loop(file: &FuseDoor, read_only: bool) -> Result<PathBuf> {
    let path = file.path().to_owned();
    let made = tokio::task::spawn_blocking(move || {
        helper::run_undecided(&Task::LoopAttach { file: &path, read_only }, CALL_LIMIT)
    });
    let (helper, device) = made.await?.map_err(|failure| anyhow!("no loop device: {failure}"))?;
    file.note_device(&device);
    helper.keep().context("no loop device: its helper process was killed")?;
    Ok(device)
}

async fn detach_from(device: &Path, file: &Path) {
    if let Err(error) = helper::run_apart(Task::LoopDetach { device, file }, CALL_LIMIT).await {
        tracing::warn!("{}: cannot detach it: {error}", device.display());
    }
}

impl Drop for LoopDoor {
    /// Undoes a start that another step has cut short. After an end in good order there is nothing left to do.
    fn drop(&mut self) {
        if !self.attached.get() {
            return;
        }
        let task = Task::LoopDetach { device: &self.device, file: self.file.path() };
        if let Err(failure) = helper::run(&task, CALL_LIMIT) {
            tracing::warn!("{}: cannot detach it: {failure}", self.device.display());
        }
    }
}

impl Door for LoopDoor {
    fn watch(&self) -> Watch {
        let mut watch = self.file.watch();
        for place in &mut watch.places {
            place.at = self.device.as_path().into();
        }
        Watch { kind: "attach", ..watch }
    }

    fn lines(&self) -> Vec<OsString> {
        vec![self.device.clone().into()]
    }

    /// Serves until the file is unmounted, or somebody else detaches the device.
    fn serve(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            tokio::select! {
                () = self.file.serve() => {}
                () = self.follow_size() => {}
                () = self.file.until_closed() => {
                    self.attached.set(false);
                    tracing::info!("{}: was detached from outside", self.device.display());
                }
            }
        })
    }

    /// Waits until the device is not mounted, and nobody else has it open.
    fn release(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            let (mut said, mut pause) = (false, LOOK_AGAIN);
            while let Some(uses) = self.look().await {
                if !said {
                    said = true;
                    tracing::warn!(
                        "{}: is in use ({uses}); it ends when it is released, or at the next signal",
                        self.device.display(),
                    );
                }
                tokio::time::sleep(pause).await;
                pause = LOOK_SELDOM.min(pause * 2);
            }
            self.detach().await;
            self.file.release().await;
        })
    }

    fn drain(&self) -> LocalFuture<'_, bool> {
        Box::pin(async {
            self.detach().await;
            self.file.drain().await
        })
    }

    fn cut(&self) -> LocalFuture<'_, ()> {
        Box::pin(async {
            let _ = tokio::time::timeout(CUT_LIMIT, self.detach()).await;
            // It is not waited for once more.
            self.attached.set(false);
            self.file.cut().await;
        })
    }
}

impl LoopDoor {
    /// Words for the device's use; None where it is free.
    async fn look(&self) -> Option<String> {
        if !self.attached.get() {
            return None;
        }
        match helper::run_apart(Task::Uses(&self.device), CALL_LIMIT).await {
            Ok(uses) => Some(String::from_utf8_lossy(&uses).into_owned()).filter(|uses| !uses.is_empty()),
            Err(failure) => {
                tracing::warn!("{}: cannot learn who uses it: {failure}", self.device.display());
                None
            }
        }
    }
}

/// A folder of this process for its files, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn path() -> Result<PathBuf> {
        let Some(parent) = attachment::folder() else { bail!("no folder to mount in") };
        Ok(parent.join(format!("{PREFIX}{}", std::process::id())))
    }

    fn make(path: PathBuf) -> Result<Self> {
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
