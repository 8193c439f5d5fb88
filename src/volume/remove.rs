//! Removing a volume. It is gone at once, by a rename; what is left of its folder goes after that, or, where that was cut
//! short, when the pool is opened next.

use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use anyhow::Context;
use rustix::fs::{FlockOperation, flock};

use super::options::DiskFormat;
use super::plane::{self, Plane};
use super::pool::{GONE, NEW};
use super::runtime::State;
use super::{Error, Name, Pool, Result, Volume, durable};

impl Pool {
    /// Removes a volume with all that is in it. One that is in use only with `force`: its users get errors then; and so one
    /// that is broken.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Broken`]: nothing was removed.
    pub(crate) fn remove(&self, name: &Name, force: bool) -> Result<()> {
        let mut volume = match self.volume(name) {
            Err(error) if force && !matches!(error, Error::NotFound { .. }) => {
                tracing::warn!("volume `{name}`: {error}");
                return self.remove_broken(name);
            }
            Err(Error::Broken(line)) => {
                return Err(Error::Broken(format!(
                    "{line}; put it right, or remove the volume with --force"
                )));
            }
            other => other?,
        };
        let mut state = volume.state()?;
        if !force {
            volume.refuse_if_used(&state)?;
        }
        state.holders.clear();
        match volume.take_down(&mut state, force) {
            // Nobody asks for the data of what is removed.
            Err(Error::Lost(_)) => {}
            other => other?,
        }
        volume.refuse_if_used(&state)?;
        volume.bury()
    }

    fn remove_broken(&self, name: &Name) -> Result<()> {
        let lock = self.lock_volume(name, FlockOperation::LockExclusive)?;
        let state = self.state(name)?;
        if let Some(path) = &state.mounted {
            crate::fuse::unmount(path, true)?;
        }
        let mut plane = state.plane;
        if plane.is_none() && state.starting {
            // Whoever started it did not live to tell.
            let disks = [DiskFormat::Raw, DiskFormat::Qcow2]
                .map(|format| self.path_of(name).join(format.disk_name()));
            plane = disks.into_iter().find_map(|disk| Plane::find(&disk.into_os_string(), false, &[]));
        }
        if let Some(plane) = plane {
            // Nobody asks for the data of what is removed.
            let _ = plane.stop(true)?;
        }
        for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
            plane::sweep(self.path_of(name).join(format.disk_name()).as_os_str());
        }
        self.runtime().write(name, &State::default())?;
        self.bury(name, lock)
    }

    /// Renames a volume's folder, so that there is none any more, and removes it.
    fn bury(&self, name: &Name, _lock: Option<File>) -> Result<()> {
        // Another thread may still be at work on the last one of this name.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let path = self.path_of(name);
        let gone = self.folder().join(format!("{GONE}{name:.200}-{}-{number}", std::process::id()));
        let cannot = || format!("{}: cannot remove it", path.display());
        {
            let _pool = self.lock()?;
            // What another process of our number has left there.
            let _ = fs::remove_dir_all(&gone);
            fs::rename(&path, &gone).with_context(cannot)?;
            durable::sync_folder(self.folder()).with_context(cannot)?;
        }
        fs::remove_dir_all(&gone).with_context(|| format!("{}: cannot remove it", gone.display()))?;
        Ok(())
    }

    /// Removes what was cut short before it had its name, or after it had lost it.
    pub(super) fn sweep(&self) -> Result<()> {
        let entries = fs::read_dir(self.folder()).with_context(|| self.folder().display().to_string())?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(GONE) {
                remove_unlocked(&entry.path());
            } else if name.starts_with(NEW) {
                let _pool = self.lock()?;
                remove_unlocked(&entry.path());
            }
        }
        Ok(())
    }
}

impl Volume<'_> {
    /// Removes its folder; nothing of it is attached.
    pub(super) fn bury(self) -> Result<()> {
        let Volume { pool, name, lock, .. } = self;
        pool.bury(&name, Some(lock))
    }
}

/// Removes a folder that nobody works on. What cannot be removed stays for the next time.
fn remove_unlocked(path: &Path) {
    if let Ok(folder) = File::open(path)
        && flock(&folder, FlockOperation::NonBlockingLockExclusive).is_ok()
    {
        let _ = fs::remove_dir_all(path);
    }
}

/// Who uses it, for people.
pub(super) fn describe(state: &State) -> String {
    const MOST: usize = 3;
    let at = state.mounted.as_ref().map(|path| format!("mounted at {}", path.display()));
    let by = |id: &String| if id == Volume::BY_HAND { id.clone() } else { format!("for {id:.16}") };
    let mut words: Vec<_> = at.into_iter().chain(state.holders.keys().take(MOST).map(by)).collect();
    if state.holders.len() > MOST {
        words.push(format!("{} more", state.holders.len() - MOST));
    }
    words.join(", ")
}
