//! Removing a volume. It is gone at once, by a rename; what is left of its folder goes after that, or, where that was cut
//! short, when the pool is opened next.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use anyhow::Context;
use rustix::fs::{FileType, FlockOperation, flock};

use super::options::DiskFormat;
use super::plane::{self, Plane};
use super::pool::{GONE, NEW};
use super::runtime::State;
use super::{Error, Name, Pool, Result, Volume};
use crate::beneath::Folder;

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
        state.recent.clear();
        match volume.take_down(&mut state, force) {
            // Nobody asks for the data of what is removed.
            Err(Error::Lost(_)) => {}
            other => other?,
        }
        volume.refuse_if_used(&state)?;
        volume.bury()
    }

    fn remove_broken(&self, name: &Name) -> Result<()> {
        let is_link = || self.root().kind(name).is_ok_and(|kind| kind == Some(FileType::Symlink));
        let folder = match self.lock_volume(name, FlockOperation::LockExclusive) {
            // A link in the place of a folder goes, and what it leads to stays.
            Err(Error::Broken(_)) if is_link() => None,
            other => other?,
        };
        let state = self.state(name)?;
        if let Some(path) = &state.mounted {
            crate::fuse::unmount(path, true)?;
        }
        let mut plane = state.plane;
        if plane.is_none() && state.starting {
            // Whoever started it did not live to tell.
            let disks = [DiskFormat::Raw, DiskFormat::Qcow2]
                .map(|format| self.folder().join(name).join(format.disk_name()));
            plane = disks.into_iter().find_map(|disk| Plane::find(&disk.into_os_string(), false, &[]));
        }
        if let Some(plane) = plane {
            // Nobody asks for the data of what is removed.
            let _ = plane.stop(true)?;
        }
        for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
            plane::sweep(self.folder().join(name).join(format.disk_name()).as_os_str());
        }
        self.runtime().write(name, &State::default())?;
        self.bury(name, folder)
    }

    /// Renames a volume's folder, so that there is none any more, and removes it.
    fn bury(&self, name: &Name, _locked: Option<Folder>) -> Result<()> {
        // Another thread may still be at work on the last one of this name.
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Relaxed);
        let gone = format!("{GONE}{name:.200}-{}-{number}", std::process::id());
        let cannot = || format!("{}: cannot remove it", self.folder().join(name).display());
        {
            let _pool = self.lock()?;
            // What another process of our number has left there.
            let _ = self.root().remove(&gone);
            self.root().rename(name, self.root(), &gone).with_context(cannot)?;
            self.root().sync().with_context(cannot)?;
        }
        let removed = self.root().remove(&gone);
        removed.with_context(|| format!("{}: cannot remove it", self.folder().join(&gone).display()))?;
        Ok(())
    }

    /// Removes what was cut short before it had its name, or after it had lost it.
    pub(super) fn sweep(&self) -> Result<()> {
        let names = self.root().names().with_context(|| self.folder().display().to_string())?;
        for name in names {
            let shown = name.to_string_lossy();
            if shown.starts_with(GONE) {
                self.remove_unlocked(&name);
            } else if shown.starts_with(NEW) {
                let _pool = self.lock()?;
                self.remove_unlocked(&name);
            }
        }
        Ok(())
    }

    /// Removes a folder that nobody works on. What cannot be removed stays for the next time.
    fn remove_unlocked(&self, name: &OsStr) {
        let is_free = match self.root().folder(name) {
            Ok(folder) => flock(folder.handle(), FlockOperation::NonBlockingLockExclusive).is_ok(),
            // Nobody works on what is no folder of ours.
            Err(_) => true,
        };
        if is_free {
            let _ = self.root().remove(name);
        }
    }
}

impl Volume<'_> {
    /// Removes its folder; nothing of it is attached.
    pub(super) fn bury(self) -> Result<()> {
        let Volume { pool, name, folder, .. } = self;
        pool.bury(&name, Some(folder))
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
