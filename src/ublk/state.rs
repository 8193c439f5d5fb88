//! What is remembered of a device while it exists: a small JSON file for each, `ublk-N.json` in /run/nbdbridge, or below
//! $XDG_RUNTIME_DIR for a user. Its reader is this program: `devices`, `detach`, `--recover`.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::os_text::OsText;
use crate::trust;

/// What the file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The device's number.
    pub(crate) id: u32,
    /// The source, as it was given.
    pub(crate) source: OsText,
    /// The words of the command line behind `ublk`.
    words: Vec<OsText>,
    /// The folder that relative paths among them start from.
    folder: OsText,
    /// Bytes.
    pub(crate) size: u64,
    /// A successor may take the device over.
    pub(crate) recoverable: bool,
    /// The process that serves it.
    pub(crate) pid: u32,
    /// The process that starts it again, where there is one.
    pub(crate) supervisor: Option<u32>,
}

impl Record {
    /// A record for this process.
    pub(crate) fn new(
        source: OsText,
        words: &[OsString],
        recoverable: bool,
        supervisor: Option<u32>,
    ) -> Self {
        let folder = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        Record {
            id: 0,
            source,
            words: words.iter().map(OsText::from).collect(),
            folder: OsText::from(folder),
            size: 0,
            recoverable,
            pid: std::process::id(),
            supervisor,
        }
    }

    /// The same for a device of this number and size.
    pub(super) fn of(self, id: u32, size: u64) -> Self {
        Record { id, size, ..self }
    }

    /// The same with another supervisor.
    pub(super) fn supervised_by(self, process: Pid) -> Self {
        Record { supervisor: Some(process.as_raw_pid().unsigned_abs()), ..self }
    }

    /// The words of the command line, as they were given.
    pub(crate) fn words(&self) -> Vec<OsString> {
        self.words.iter().map(|word| word.as_os_str().to_owned()).collect()
    }

    /// The folder they were given in.
    pub(crate) fn folder(&self) -> PathBuf {
        self.folder.as_path().to_owned()
    }

    /// Writes the file; readers see the old one or the whole new one.
    ///
    /// # Errors
    /// One line that names the path.
    pub(super) fn write(&self) -> Result<()> {
        self.write_in(&folder())
    }

    fn write_in(&self, folder: &Path) -> Result<()> {
        let path = path_in(folder, self.id);
        let new = folder.join(format!(".ublk-{}.{}", self.id, std::process::id()));
        let write = || -> io::Result<()> {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
            // What is left of an earlier process with our number.
            let _ = fs::remove_file(&new);
            let mut file = fs::File::options().write(true).create_new(true).mode(0o600).open(&new)?;
            file.write_all(&serde_json::to_vec(self)?)?;
            fs::rename(&new, &path)
        };
        write().with_context(|| format!("{}: cannot write what the device is", path.display()))
    }
}

/// What is remembered of a device; None where it is not ours.
pub(super) fn read(id: u32) -> Option<Record> {
    read_in(&folder(), id)
}

fn read_in(folder: &Path, id: u32) -> Option<Record> {
    let bytes = trust::read(&path_in(folder, id)).ok()?;
    serde_json::from_slice::<Record>(&bytes).ok().filter(|record| record.id == id)
}

/// The same, for somebody who wants to take it over.
///
/// # Errors
/// One line that says so.
pub(super) fn remembered(id: u32) -> Result<Record> {
    read(id).ok_or_else(|| {
        let path = path_in(&folder(), id);
        anyhow!(
            "nothing is remembered of ublk device {id} ({} is missing); `nbdbridge devices` lists ours",
            path.display()
        )
    })
}

/// Every device that is remembered, by number.
pub(super) fn all() -> Vec<Record> {
    let mut ids: Vec<u32> = fs::read_dir(folder())
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            entry.file_name().to_str()?.strip_prefix("ublk-")?.strip_suffix(".json")?.parse().ok()
        })
        .collect();
    ids.sort_unstable();
    ids.into_iter().filter_map(read).collect()
}

/// Forgets a device.
pub(super) fn remove(id: u32) {
    let _ = fs::remove_file(path_in(&folder(), id));
}

fn path_in(folder: &Path, id: u32) -> PathBuf {
    folder.join(format!("ublk-{id}.json"))
}

/// Where this user's files are.
fn folder() -> PathBuf {
    let base = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(folder) if !folder.is_empty() && !rustix::process::geteuid().is_root() => PathBuf::from(folder),
        _ => PathBuf::from("/run"),
    };
    base.join("nbdbridge")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStringExt;

    #[test]
    fn a_record_survives_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let odd = OsString::from_vec(b"disk\xff.img".to_vec());
        let words = [OsString::from("--read-only"), odd];
        let mut record = Record::new("disk.img".into(), &words, true, Some(7));
        record.id = 3;
        record.write_in(&folder.path().join("new")).unwrap();
        let folder = folder.path().join("new");
        let back = read_in(&folder, 3).unwrap();
        assert_eq!(back, record);
        assert_eq!(back.words(), words);
        assert_eq!(back.folder(), std::env::current_dir().unwrap());
        // Another's file, half a file, none.
        fs::copy(path_in(&folder, 3), path_in(&folder, 4)).unwrap();
        fs::write(path_in(&folder, 5), b"{\"id\":5,").unwrap();
        assert_eq!([4, 5, 6].map(|id| read_in(&folder, id)), [None, None, None]);
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 3);
    }
}
