//! What is attached and mounted now: a small file for each volume in use, below /run (or `NBDBRIDGE_RUNTIME_DIR`), in a
//! folder of its pool. After a reboot what they say is void: each has the boot's id.
//!
//! ```text
//!   /run/nbdbridge/volumes/<pool: device and inode of its folder>/<name>/        where it is mounted
//!                                                                 .state/<name>  this file
//! ```

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use super::{Name, Result, durable};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where the files of one pool are.
#[derive(Debug)]
pub(super) struct Runtime {
    folder: PathBuf,
    mount_root: PathBuf,
    boot_id: String,
}

/// What is attached and mounted of a volume.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct State {
    boot_id: String,
    /// The process that serves it, and the device it serves.
    pub(crate) plane: Option<PlaneState>,
    /// One was about to be started: there may be one that is not known here.
    pub(crate) starting: bool,
    /// Where it is mounted.
    pub(crate) mounted: Option<PathBuf>,
    /// Who uses it, and how often each asked.
    pub(crate) holders: BTreeMap<String, u32>,
}

/// A data plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PlaneState {
    /// The block device that it serves.
    pub(crate) device: PathBuf,
    /// Nobody can write through it.
    pub(crate) read_only: bool,
}

impl Runtime {
    /// For the pool whose folder this is the metadata of.
    pub(super) fn new(pool: &Metadata) -> Result<Self> {
        let folder = crate::control::runtime_folder().join("volumes").join(format!(
            "{:x}-{:x}",
            pool.dev(),
            pool.ino()
        ));
        let boot_id = fs::read_to_string(BOOT_ID).with_context(|| format!("{BOOT_ID}: cannot read it"))?;
        Ok(Runtime { mount_root: folder.clone(), folder, boot_id: boot_id.trim().to_owned() })
    }

    pub(super) fn set_mount_root(&mut self, folder: &Path) {
        self.mount_root = folder.to_owned();
    }

    /// Where a volume is mounted that is not mounted yet.
    pub(super) fn mount_point(&self, name: &Name) -> PathBuf {
        self.mount_root.join(name)
    }

    /// What is known of a volume; nothing where it is not in use.
    pub(super) fn read(&self, name: &Name) -> State {
        let bytes = durable::read(&self.states().join(name));
        let state = bytes.ok().and_then(|bytes| serde_json::from_slice::<State>(&bytes).ok());
        state.filter(|state| state.boot_id == self.boot_id).unwrap_or_default()
    }

    /// Writes it down; readers see the old or the new. A state of nothing has no file.
    ///
    /// # Errors
    /// One line.
    pub(super) fn write(&self, name: &Name, state: &State) -> Result<()> {
        let folder = self.states();
        let path = folder.join(name);
        let state = State { boot_id: self.boot_id.clone(), ..state.clone() };
        let write = || -> io::Result<()> {
            if state == (State { boot_id: self.boot_id.clone(), ..State::default() }) {
                return match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            }
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            // The volume's lock is ours: nobody else has this name for a moment.
            let new = self.folder.join(".new-state").with_extension(std::process::id().to_string());
            fs::write(&new, serde_json::to_vec(&state)?)?;
            fs::rename(&new, &path)
        };
        write().with_context(|| format!("{}: cannot write what is in use", path.display()))?;
        Ok(())
    }

    fn states(&self) -> PathBuf {
        self.folder.join(".state")
    }
}
