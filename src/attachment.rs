//! What is attached on this host: one small file for each FUSE file, so that `nbdbridge devices` and `nbdbridge detach` find
//! it. The folder is /run/nbdbridge, or $XDG_RUNTIME_DIR/nbdbridge for a user (else /run/user/UID/nbdbridge).
//!
//! A file is written before anything is made, and removed after everything is gone: whatever a killed process has left is
//! found by it. The files are hints, and may be missing or old: what is mounted, the kernel knows better; those of other users
//! are not believed. Nothing here asks a FUSE server.

use std::cell::{Ref, RefCell};
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::attach::{backing_file, is_attachment, loops_over};
use crate::fuse::{Made, Mounted};
use crate::os_text::{self, OsText};
use crate::trust::Folder;
use bridge::Geometry;
use rustix::process::{Pid, geteuid};
use serde::{Deserialize, Serialize};

/// Names of these files begin with it.
const PREFIX: &str = "fuse-";

/// Names of those that are being written end with it.
const HALF: &str = ".new";

/// One FUSE file, and the loop device that may stand upon it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attachment {
    /// The process that serves it.
    pub(crate) pid: u32,
    /// When that was started, in the clock ticks of /proc/PID/stat: process numbers are used again.
    pub(crate) started: u64,
    /// What it serves, as it was given.
    pub(crate) source: OsText,
    /// The mounted file, or the one that is about to be mounted.
    #[serde(with = "os_text::path")]
    pub(crate) file: PathBuf,
    /// The empty file that was made for it, or is about to be.
    pub(crate) made: Option<Made>,
    /// The device number of the mounted file system, as in `0:52`. None before it is mounted.
    #[serde(default)]
    pub(crate) number: Option<String>,
    /// The block device upon it.
    pub(crate) device: Option<PathBuf>,
    /// In bytes.
    pub(crate) size: u64,
    /// Nobody may change anything through it.
    pub(crate) read_only: bool,
}

/// What is written down of an attachment of this process, in a file that is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Note {
    attachment: RefCell<Attachment>,
    /// None where it cannot be written.
    file: Option<StateFile>,
}

/// An attachment's file; removed when dropped.
#[derive(Debug)]
struct StateFile(PathBuf);

impl Note {
    /// Writes down that `file` is about to be mounted. Where that is not possible nobody lists it, and nothing else is lost.
    pub(crate) fn begin(source: &OsStr, file: &Path, geometry: &Geometry, read_only: bool) -> Self {
        let attachment = Attachment::new(source, file, geometry, read_only);
        Note { file: attachment.save(), attachment: RefCell::new(attachment) }
    }

    /// Changes what is written down, in one step.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Attachment)) {
        let mut attachment = self.attachment.borrow_mut();
        change(&mut attachment);
        if let Some(StateFile(path)) = &self.file
            && let Err(error) = attachment.write(path)
        {
            tracing::info!("{}: cannot be written: {error}", path.display());
        }
    }

    /// What is written down.
    pub(crate) fn attachment(&self) -> Ref<'_, Attachment> {
        self.attachment.borrow()
    }
}

impl Attachment {
    fn new(source: &OsStr, file: &Path, geometry: &Geometry, read_only: bool) -> Self {
        let pid = std::process::id();
        Attachment {
            pid,
            started: started(pid).unwrap_or(0),
            source: source.into(),
            file: file.to_owned(),
            made: None,
            number: None,
            device: None,
            size: geometry.size,
            read_only,
        }
    }

    fn save(&self) -> Option<StateFile> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let folder = folder()?;
        let path = folder.join(format!("{PREFIX}{}-{}.json", self.pid, NUMBER.fetch_add(1, Relaxed)));
        match Folder::make(&folder).and_then(|_| self.write(&path)) {
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

    fn write(&self, path: &Path) -> io::Result<()> {
        // Whole or not at all: somebody may be reading.
        let half = path.with_extension(HALF.trim_start_matches('.'));
        fs::write(&half, serde_json::to_vec(self)?)?;
        fs::rename(&half, path)
    }

    /// All attachments that are written down, with their files. Those of dead processes only while something is left of them:
    /// a mount, a loop device, or the file that was made for the mount.
    pub(crate) fn all() -> Vec<(Attachment, PathBuf)> {
        let (all, refused) = Attachment::all_believed();
        for line in refused {
            tracing::warn!("{line}");
        }
        all
    }

    /// As [`Attachment::all`], with a line for each file, or for the folder, that is not believed: it is another user's, or
    /// no regular file.
    pub(crate) fn all_believed() -> (Vec<(Attachment, PathBuf)>, Vec<String>) {
        let Some(path) = folder() else { return Default::default() };
        let folder = match Folder::open(&path) {
            Ok(folder) => folder,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Default::default(),
            Err(error) => return (Vec::new(), vec![format!("{}: {error}", path.display())]),
        };
        let names = match folder.check().and_then(|()| folder.names()) {
            Ok(names) => names,
            Err(error) => return (Vec::new(), vec![format!("{}: {error}", path.display())]),
        };
        let (mut all, mut refused) = (Vec::new(), Vec::new());
        for name in &names {
            let Some(middle) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) else { continue };
            let note = folder.join(name);
            if middle.strip_suffix(HALF).is_some_and(is_left_half) {
                // Its process was killed while it wrote. At worst it stays.
                let _ = fs::remove_file(&note);
            }
            if !middle.ends_with(".json") {
                continue;
            }
            match folder.read(name) {
                Ok(bytes) => all.extend(serde_json::from_slice(&bytes).ok().map(|found| (found, note))),
                // Its process has ended meanwhile.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => refused.push(format!("{}: {error}", note.display())),
            }
        }
        Attachment::keep_left(&mut all);
        (all, refused)
    }

    /// Forgets attachments of dead processes that nothing is left of.
    fn keep_left(all: &mut Vec<(Attachment, PathBuf)>) {
        // Asked once: a process that ends meanwhile is told apart next time.
        let living: HashMap<PathBuf, PathBuf> = all
            .iter()
            .filter(|(attachment, _)| attachment.is_alive())
            .map(|(attachment, note)| (note.clone(), attachment.file.clone()))
            .collect();
        all.retain_mut(|(attachment, note)| {
            if living.contains_key(note) {
                return true;
            }
            attachment.device = attachment.devices().into_iter().next();
            // What is mounted there now may be a successor's.
            let is_taken = living.values().any(|file| *file == attachment.file);
            let is_left = |made: Made| made.is_left(&attachment.file);
            let keep = attachment.device.is_some()
                || !is_taken && attachment.is_mounted()
                || attachment.made.is_some_and(is_left);
            if !keep {
                attachment.forget(note);
            }
            keep
        });
        all.sort_by(|(one, _), (other, _)| one.file.cmp(&other.file));
    }

    /// The attachment that a loop device belongs to, with its file.
    pub(crate) fn of_device(device: &Path) -> Option<(Attachment, PathBuf)> {
        let backing = backing_file(device)?;
        let is_it = |attachment: &Attachment| {
            attachment.file == backing
                || backing == Path::new("/") && attachment.device.as_deref() == Some(device)
        };
        let mut all = Attachment::all();
        // Asked once for each: a process can end while they are sorted, and an order that changes is a panic.
        all.sort_by_cached_key(|(attachment, _)| !attachment.is_alive());
        let (mut attachment, note) = all.into_iter().find(|(attachment, _)| is_it(attachment))?;
        attachment.device = Some(device.to_owned());
        Some((attachment, note))
    }

    /// The loop devices that stand upon the file. One that was written down counts also where the file was unmounted behind
    /// the device's back.
    pub(crate) fn devices(&self) -> Vec<PathBuf> {
        let mut devices = loops_over(&self.file);
        let known = self.device.clone().filter(|device| !devices.contains(device));
        devices
            .extend(known.filter(|device| backing_file(device).is_some_and(|file| file == Path::new("/"))));
        devices
    }

    /// Whether the file is mounted, as its process sees it; as this one does, where its process is gone.
    pub(crate) fn is_mounted(&self) -> bool {
        let process = match self.is_alive() {
            true => PathBuf::from(format!("/proc/{}", self.pid)),
            false => PathBuf::from("/proc/self"),
        };
        let mounts = Mounted::seen_by(&process).or_else(|_| Mounted::all()).unwrap_or_default();
        let there = mounts.iter().rev().find(|mounted| mounted.point == self.file);
        there.is_some_and(|mounted| {
            mounted.is_ours() && self.number.as_ref().is_none_or(|number| *number == mounted.device)
        })
    }

    /// Removes what its process, which is dead, has left once nothing is mounted there any more: the file, and the folder
    /// that `attach` made for that; and `note`, in which this was written down.
    pub(crate) fn forget(&self, note: &Path) {
        if let Some(made) = self.made {
            made.remove(&self.file);
        }
        if let Some(parent) = self.file.parent().filter(|parent| is_attachment(parent)) {
            // Made by a process that was killed before it could write down the file. Only an empty folder goes.
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

/// Whether a name, `PID-NUMBER`, is that of a process that is gone.
fn is_left_half(name: &str) -> bool {
    let pid = name.split_once('-').and_then(|(pid, _)| pid.parse().ok());
    pid.is_some_and(|pid| started(pid).is_none())
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

/// Whether a process is stopped by a signal or a debugger (proc_pid_stat(5), field 3).
pub(crate) fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').and_then(|(_, fields)| fields.split_ascii_whitespace().next());
    matches!(state, Some("T" | "t"))
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
        let mine = Attachment::new(OsStr::new("mem:7"), Path::new("/x"), &geometry, true);
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
