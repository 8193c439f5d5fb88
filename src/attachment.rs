//! What is attached on this host: one small file for each FUSE file, so that `nbdbridge devices` and `nbdbridge detach` find
//! it. The folder is /run/nbdbridge, or $XDG_RUNTIME_DIR/nbdbridge for a user (else /run/user/UID/nbdbridge).
//!
//! The files are hints, and may be missing or old: what is mounted, the kernel knows better.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::fuse::{Made, is_dead};
use crate::os_text::{self, OsText};
use bridge::Geometry;
use rustix::process::{Pid, geteuid};
use serde::{Deserialize, Serialize};

/// Names of these files begin with it.
const PREFIX: &str = "fuse-";

/// One FUSE file, and the loop device that may stand upon it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attachment {
    /// The process that serves it.
    pub(crate) pid: u32,
    /// When that was started, in the clock ticks of /proc/PID/stat: process numbers are used again.
    pub(crate) started: u64,
    /// What it serves, as it was given.
    pub(crate) source: OsText,
    /// The mounted file.
    #[serde(with = "os_text::path")]
    pub(crate) file: PathBuf,
    /// That was made for it.
    pub(crate) made: Option<Made>,
    /// The block device upon it.
    pub(crate) device: Option<PathBuf>,
    /// In bytes.
    pub(crate) size: u64,
    /// Nobody may change anything through it.
    pub(crate) read_only: bool,
}

/// An attachment's file; removed when dropped.
#[derive(Debug)]
pub(crate) struct StateFile(PathBuf);

impl Attachment {
    /// One of this process.
    pub(crate) fn new(
        source: &OsStr,
        file: &Path,
        made: Option<Made>,
        geometry: &Geometry,
        read_only: bool,
    ) -> Self {
        let pid = std::process::id();
        Attachment {
            pid,
            started: started(pid).unwrap_or(0),
            source: source.into(),
            file: file.to_owned(),
            made,
            device: None,
            size: geometry.size,
            read_only,
        }
    }

    /// Writes it down. Where that is not possible, nobody lists it, and nothing else is lost.
    pub(crate) fn save(&self) -> Option<StateFile> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let folder = folder()?;
        let path = folder.join(format!("{PREFIX}{}-{}.json", self.pid, NUMBER.fetch_add(1, Relaxed)));
        let save = || {
            fs::create_dir_all(&folder)?;
            // Whole or not at all: somebody may be reading.
            let half = path.with_extension("new");
            fs::write(&half, serde_json::to_vec(self)?)?;
            fs::rename(&half, &path)
        };
        match save() {
            Ok(()) => Some(StateFile(path)),
            Err(error) => {
                tracing::info!(
                    "{}: cannot be written, so that `nbdbridge devices` does not see it: {error}",
                    path.display()
                );
                None
            }
        }
    }

    /// All that are written down, with their files. Those of dead processes only while something is left of them: a dead
    /// mount, or the file that was made for it.
    pub(crate) fn all() -> Vec<(Attachment, PathBuf)> {
        let Some(Ok(files)) = folder().map(fs::read_dir) else { return Vec::new() };
        let mut all: Vec<_> = files
            .flatten()
            .filter(|file| {
                let name = file.file_name();
                name.to_str().is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(".json"))
            })
            .filter_map(|file| {
                let attachment = serde_json::from_slice(&fs::read(file.path()).ok()?).ok()?;
                Some((attachment, file.path()))
            })
            .collect();
        all.retain(|(attachment, path): &(Attachment, _)| {
            let is_left = |made: Made| made.is_left(&attachment.file);
            let keep =
                attachment.is_alive() || is_dead(&attachment.file) || attachment.made.is_some_and(is_left);
            if !keep {
                // At worst it stays.
                let _ = fs::remove_file(path);
            }
            keep
        });
        all.sort_by(|(one, _): &(Attachment, _), (other, _)| one.file.cmp(&other.file));
        all
    }

    /// Removes what its process, which is dead, has left once nothing is mounted there any more: the file, and the folder
    /// that `attach` made for that; and `note`, in which this was written down.
    pub(crate) fn forget(&self, note: &Path) {
        if let Some(made) = self.made {
            made.remove(&self.file);
        }
        if let Some(parent) = self.file.parent().filter(|parent| parent.starts_with("/run/nbdbridge/")) {
            // Only an empty one goes.
            let _ = fs::remove_dir(parent);
        }
        // At worst it stays.
        let _ = fs::remove_file(note);
    }

    /// Whether its process is there.
    pub(crate) fn is_alive(&self) -> bool {
        started(self.pid).is_some_and(|started| started == self.started)
    }

    /// Its process, while that is there.
    pub(crate) fn process(&self) -> Option<Pid> {
        self.is_alive().then(|| i32::try_from(self.pid).ok().and_then(Pid::from_raw)).flatten()
    }
}

impl Drop for StateFile {
    fn drop(&mut self) {
        // At worst it stays, and is told apart by its process.
        let _ = fs::remove_file(&self.0);
    }
}

/// Where the files are; None for a user for whom no session has made a place.
pub(crate) fn folder() -> Option<PathBuf> {
    if geteuid().is_root() {
        return Some(PathBuf::from("/run/nbdbridge"));
    }
    let told = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !folder.is_empty()).map(PathBuf::from);
    let of_user =
        || Some(PathBuf::from(format!("/run/user/{}", geteuid().as_raw()))).filter(|path| path.is_dir());
    Some(told.or_else(of_user)?.join("nbdbridge"))
}

/// When a process was started, in clock ticks (proc_pid_stat(5), field 22); None for one that is gone or only waits to be
/// buried.
pub(crate) fn started(pid: u32) -> Option<u64> {
    // The name of a program need not be UTF-8.
    let stat = String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/stat")).ok()?).into_owned();
    // The second field is a name in parentheses, and may hold anything.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X") { None } else { fields.nth(18)?.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_told_apart_by_their_start() {
        let geometry = Geometry {
            version: 0,
            size: 7,
            min_block: 1,
            preferred_block: 4096,
            capabilities: bridge::Capabilities::NONE,
        };
        let mine = Attachment::new(OsStr::new("mem:7"), Path::new("/x"), None, &geometry, true);
        assert!(mine.is_alive() && mine.process().is_some() && mine.started > 0);
        let earlier = Attachment { started: mine.started - 1, ..mine.clone() };
        assert!(!earlier.is_alive() && earlier.process().is_none());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let id = child.id();
        while started(id).is_some() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(child.wait().unwrap().success(), "it was not buried yet, and counted as gone");
        let upon_it = Attachment { device: Some("/dev/loop7".into()), ..mine.clone() };
        let text = serde_json::to_string(&upon_it).unwrap();
        let back: Attachment = serde_json::from_str(&text).unwrap();
        assert_eq!(back.device.as_deref(), Some(Path::new("/dev/loop7")));
        assert_eq!(Attachment { device: None, ..back }, mine);
    }
}
