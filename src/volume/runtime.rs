//! What is attached and mounted now: a small file for each volume in use, below /run (or `NBDBRIDGE_RUNTIME_DIR`), in a
//! folder of its pool. After a reboot what they say is void: each has the boot's id.
//!
//! ```text
//!   /run/nbdbridge/volumes/<pool: device and inode of its folder>/<name>/        where it is mounted
//!                                                                 .state/<name>  this file
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use serde::{Deserialize, Serialize};

use super::plane::Plane;
use super::{Name, Result};
use crate::beneath::Folder;
use crate::os_text;
use crate::trust;

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
    pub(crate) plane: Option<Plane>,
    /// One was about to be started: there may be one that is not known here.
    pub(crate) starting: bool,
    /// Where it is mounted.
    #[serde(with = "os_text::option")]
    pub(crate) mounted: Option<PathBuf>,
    /// Who uses it, and how often each asked.
    pub(crate) holders: BTreeMap<String, u32>,
    /// When the last one came, in seconds since the boot.
    pub(crate) held_at: u64,
    /// Holders that came around then and have not unmounted since.
    pub(super) recent: BTreeSet<String>,
}

/// Makes the folder `name` in `root`, which is made as well.
fn make_point(root: &Path, name: &Path) -> Result<Folder> {
    let point = root.join(name);
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(root);
    let made = made.and_then(|()| Folder::root(root)).and_then(|root| root.make_folder(name));
    Ok(made.with_context(|| format!("{}: cannot be mounted on", point.display()))?)
}

impl State {
    /// Nothing is attached, and nobody holds it.
    pub(super) fn is_nothing(&self) -> bool {
        let kept = State { boot_id: self.boot_id.clone(), held_at: self.held_at, ..State::default() };
        *self == State { recent: self.recent.clone(), ..kept }
    }

    /// All that was attached is gone; who held it still wants to say that he does not any more.
    pub(super) fn detached(&mut self) {
        self.plane = None;
        self.starting = false;
        self.mounted = None;
    }
}

/// A path as the kernel shows it in the list of mounts: without links. The part that is not there yet has none.
fn resolved(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) => resolved(parent).join(name),
        _ => path.to_owned(),
    })
}

impl Runtime {
    /// For the pool whose folder this is the metadata of.
    pub(super) fn new(pool: &Metadata) -> Result<Self> {
        let root = crate::control::runtime_folder().join("volumes");
        let folder = resolved(&root).join(format!("{:x}-{:x}", pool.dev(), pool.ino()));
        let boot_id = fs::read_to_string(BOOT_ID).with_context(|| format!("{BOOT_ID}: cannot read it"))?;
        Ok(Runtime { mount_root: folder.clone(), folder, boot_id: boot_id.trim().to_owned() })
    }

    pub(super) fn set_mount_root(&mut self, folder: PathBuf) {
        self.mount_root = folder;
    }

    /// Where a volume is mounted that is not mounted yet.
    pub(super) fn mount_point(&self, name: &Name) -> PathBuf {
        self.mount_root.join(name)
    }

    /// What is known of a volume; nothing where it is not in use.
    ///
    /// # Errors
    /// One line: it cannot be read. That is not to be taken for a volume that nobody uses.
    pub(super) fn read(&self, name: &Name) -> Result<State> {
        let path = self.states().join(name);
        let state: State = match trust::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(State::default()),
            Err(error) => return Err(anyhow!("{}: cannot read it: {error}", path.display()).into()),
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
                anyhow!("{}: is damaged: {error}; what it tells of must be ended by hand", path.display())
            })?,
        };
        Ok(if state.boot_id == self.boot_id { state } else { State::default() })
    }

    /// Writes it down; readers see the old or the new. A state of nothing has no file. The volume's lock is the caller's.
    ///
    /// # Errors
    /// One line.
    pub(super) fn write(&self, name: &Name, state: &State) -> Result<()> {
        let folder = self.states();
        let path = folder.join(name);
        let state = State { boot_id: self.boot_id.clone(), ..state.clone() };
        let write = || -> io::Result<()> {
            if state.is_nothing() {
                return match fs::remove_file(&path) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    _ => Ok(()),
                };
            }
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
            // A folder of its own, as a name can be as long as a file's may be.
            let half = self.folder.join(".half");
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&half)?;
            fs::write(half.join(name), serde_json::to_vec(&state)?)?;
            fs::rename(half.join(name), &path)
        };
        write().with_context(|| format!("{}: cannot write what is in use", path.display()))?;
        Ok(())
    }

    /// Makes the folder where a volume is mounted, and opens it: no link is followed below the folder for all of them.
    ///
    /// # Errors
    /// One line: it is a link, or something else is mounted there.
    pub(super) fn make_mount_point(&self, name: &Name) -> Result<Folder> {
        make_point(&self.mount_root, name.as_ref())
    }

    /// Makes the folder for mounts that nobody else sees, and opens it.
    ///
    /// # Errors
    /// One line.
    pub(super) fn make_private_point(&self) -> Result<Folder> {
        make_point(&self.folder, Path::new(".private"))
    }

    /// The names of all volumes that something is known of.
    pub(super) fn names(&self) -> Vec<Name> {
        let files = fs::read_dir(self.states()).into_iter().flatten().flatten();
        files.filter_map(|file| file.file_name().to_str()?.parse().ok()).collect()
    }

    /// The devices that are known to be a volume's.
    pub(super) fn devices(&self) -> Vec<PathBuf> {
        let states = self.names().into_iter().filter_map(|name| self.read(&name).ok());
        states.filter_map(|state| Some(state.plane?.device)).collect()
    }

    fn states(&self) -> PathBuf {
        self.folder.join(".state")
    }
}
