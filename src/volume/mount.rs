//! Mounting: from a volume's disk to a folder with files, and back. Each step is written down before the next, so that
//! whoever comes after a crash goes on from there.
//!
//! ```text
//!   up:    data plane (found again, or started) ─ check where it was not clean ─ "unclean" ─ mount ─ holder
//!   down:  unmount ─ data plane ends, all is durable ─ "clean"
//! ```

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};

use super::filesystem::{Check, Verdict};
use super::plane::{self, Life, Plane};
use super::private;
use super::runtime::State;
use super::{Error, FsKind, Name, Pool, Progress, Record, Result, Volume, bounded, holders};
use crate::detach::Ended;
use crate::fuse::{self, Mounted, Unmounted};
use crate::helper::{Failure, Task};
use crate::patience::lasts;

/// So long is waited for others to let go of a device: a container that starts has a copy of every mount at first.
const PATIENCE: Duration = Duration::from_secs(2);

/// And so long to close files: a process that was killed takes a moment to, and so does a child between fork and exec.
const FILES_PATIENCE: Duration = Duration::from_millis(500);

/// Of one device at one path, one above the other.
const MOST_MOUNTS: usize = 100;

impl Pool {
    /// Mounts a volume for `holder`, or counts that holder once more. The path is that of the mounted folder; of the block
    /// device, where the volume has no file system. [`Volume::BY_HAND`] is counted once.
    ///
    /// # Errors
    /// One line; nothing is left mounted or attached then that was not before.
    pub(crate) fn mount(&self, name: &Name, holder: &str, progress: &dyn Progress) -> Result<PathBuf> {
        let mut volume = self.volume(name)?;
        let mut state = volume.state()?;
        holders::admit(&state.holders, holder)?;
        let path = volume.bring_up(&mut state, progress)?;
        state.hold(holder);
        volume.save_state(&state)?;
        Ok(path)
    }

    /// Takes one use of `holder`'s away, if he has any; without holders the volume is unmounted, and its data plane ends.
    ///
    /// # Errors
    /// [`Error::InUse`]: a process has files open there; the holder keeps his use. [`Error::Lost`]: the volume is
    /// unmounted, and its last flush failed.
    pub(crate) fn unmount(&self, name: &Name, holder: &str) -> Result<()> {
        let mut volume = self.volume(name)?;
        let mut state = volume.state()?;
        let before = state.clone();
        state.release(holder);
        if state.holders.is_empty() {
            return volume.take_down(&mut state, false);
        }
        if volume.is_stale(&state) {
            let left = std::mem::take(&mut state.holders);
            match volume.take_down(&mut state, false) {
                Err(Error::InUse(_)) => state.holders = left,
                other => {
                    tracing::warn!(
                        "volume `{name}`: nobody has it mounted whom {} uses are counted for",
                        left.len()
                    );
                    return other;
                }
            }
        }
        if state == before { Ok(()) } else { volume.save_state(&state) }
    }

    /// Where a volume is mounted, if it is.
    ///
    /// # Errors
    /// Not found.
    pub(crate) fn path(&self, name: &Name) -> Result<Option<PathBuf>> {
        let fs = Record::read(&self.folder_of(name)?, name)?.fs;
        let state = self.state(name)?;
        Ok(state.mounted.clone().filter(|path| state.is_mounted(fs, path)))
    }
}

impl State {
    /// Whether the device is mounted at this very path now, whatever is written down.
    pub(super) fn is_mounted(&self, fs: FsKind, path: &Path) -> bool {
        let Some(plane) = &self.plane else { return false };
        if fs == FsKind::None {
            return path == plane.device;
        }
        let all = Mounted::at(path).unwrap_or_default();
        all.last().is_some_and(|mounted| Path::new(&mounted.source) == plane.device)
    }
}

impl Volume<'_> {
    /// Whoever mounts it by hand.
    pub(crate) const BY_HAND: &'static str = "by hand";

    /// Mounts the volume, where it is not.
    fn bring_up(&mut self, state: &mut State, progress: &dyn Progress) -> Result<PathBuf> {
        if let Some(path) = self.still_up(state)? {
            return Ok(path);
        }
        if !self.record.formatted {
            return Err(Error::Broken(format!(
                "volume `{}` was never made to the end; remove it",
                self.name
            )));
        }
        self.check_recorded_options()?;
        let read_only = self.record.options.read_only;
        if read_only && (self.record.unclean || self.record.grow_fs || self.record.shares_uuid) {
            self.clean_up(state, progress)?;
        }
        let before = state.plane.clone();
        // Mounted by others, as in a container that has a copy of all mounts, it is whole; and no check may touch it.
        let elsewhere = before.as_ref().is_some_and(Plane::is_in_use);
        let brought = self.attach(state, read_only, progress).and_then(|device| {
            if self.record.fs == FsKind::None {
                return Ok(device);
            }
            if !read_only && !elsewhere {
                if let Some(why) = self.prepare(&device, progress)? {
                    tracing::warn!("volume `{}`: its file system does not grow yet: {why}", self.name);
                }
                self.record.unclean = true;
                self.save()?;
            }
            let point = self.pool.runtime().mount_point(&self.name);
            if self.is_mounted(state, &point) {
                // Whoever mounted it did not live to tell.
                return Ok(point);
            }
            let folder = self.pool.runtime().make_mount_point(&self.name)?;
            self.mount_at(&device, &folder, read_only)?;
            Ok(point)
        });
        match brought {
            Ok(path) => {
                state.mounted = Some(path.clone());
                self.save_state(state)?;
                Ok(path)
            }
            Err(error) => {
                // Others may use what was there before.
                if before.is_none() {
                    // The first error is the one to tell.
                    let _ = self.take_down(state, true);
                }
                Err(self.blame(error))
            }
        }
    }

    /// Where it is mounted already. What is left of a dead data plane is cleared away.
    fn still_up(&mut self, state: &mut State) -> Result<Option<PathBuf>> {
        let Some(plane) = &mut state.plane else { return Ok(None) };
        bounded::check(&plane.device)?;
        if plane.life() == Life::Dead {
            tracing::warn!("volume `{}`: its data plane has died; starting another one", self.name);
            let holders = std::mem::take(&mut state.holders);
            self.take_down(state, true)?;
            state.holders = holders;
            return Ok(None);
        }
        if plane.follow() {
            // It was taken over with what it was started with.
            self.tell_limits(plane)?;
            self.save_state(state)?;
        }
        let there = state.mounted.clone().filter(|path| self.is_mounted(state, path));
        Ok(there)
    }

    /// Whether its device is mounted at this very path.
    pub(super) fn is_mounted(&self, state: &State, path: &Path) -> bool {
        state.is_mounted(self.record.fs, path)
    }

    /// Starts the data plane, where there is none; gives the device.
    pub(super) fn attach(
        &mut self,
        state: &mut State,
        read_only: bool,
        progress: &dyn Progress,
    ) -> Result<PathBuf> {
        if state.plane.as_ref().is_some_and(|plane| plane.read_only != read_only) {
            self.take_down(state, false)?;
        }
        if let Some(plane) = &state.plane {
            bounded::check(&plane.device)?;
            return Ok(plane.device.clone());
        }
        let source = self.source()?;
        let mut plane = None;
        if state.starting {
            // Whoever started it did not live to tell.
            plane = self.find_plane(read_only)?;
        }
        if plane.is_none() {
            progress.step("attaching");
            state.starting = true;
            self.save_state(state)?;
            plane = Some(Plane::start(&self.name, &self.record, self.pool.folder(), &source, read_only)?);
        }
        state.plane = plane;
        state.starting = false;
        self.save_state(state)?;
        state.plane.as_ref().map(|plane| plane.device.clone()).context("no device").map_err(Error::from)
    }

    /// Unmounts and ends all that is there of the volume; `force` although it is in use.
    ///
    /// # Errors
    /// [`Error::InUse`]: a process has files open there. Nothing has changed then. [`Error::Lost`]: it has ended.
    pub(super) fn take_down(&mut self, state: &mut State, force: bool) -> Result<()> {
        // Only who was mounted and is unmounted whole is clean: what was not even looked at stays as unclean as it was. Who
        // unmounted it is not important.
        let mut clean = state.mounted.is_some() && state.plane.is_some() && !force;
        if let Some(plane) = &state.plane {
            bounded::check(&plane.device)?;
        }
        let mut lost = None;
        if self.record.fs != FsKind::None {
            // It may be mounted, and that not be written down yet.
            let path = state.mounted.clone().unwrap_or_else(|| self.pool.runtime().mount_point(&self.name));
            let until = Instant::now() + FILES_PATIENCE;
            let mut unmounted = 0;
            if !force && self.is_mounted(state, &path) {
                lost = self.flush(state, &path)?;
            }
            while self.is_mounted(state, &path) {
                if unmounted > MOST_MOUNTS {
                    return Err(Error::Other(anyhow!(
                        "volume `{}`: {} stays mounted; is another mount above it?",
                        self.name,
                        path.display()
                    )));
                }
                let dead = state.plane.as_ref().is_none_or(|plane| plane.life() == Life::Dead);
                match self.unmount(state, &path, force || dead)? {
                    Unmounted::Yes => {
                        clean &= !dead;
                        unmounted += 1;
                    }
                    Unmounted::Busy if Instant::now() < until => {
                        std::thread::sleep(Duration::from_millis(10));
                    }
                    Unmounted::Busy => {
                        return Err(Error::InUse(format!(
                            "volume `{}` is in use: files in {} are open in {}; end that first",
                            self.name,
                            path.display(),
                            fuse::describe_users(&path, None)
                        )));
                    }
                }
            }
            // At worst an empty folder stays.
            let _ = fs::remove_dir(&path);
        }
        if state.plane.is_none() && state.starting {
            state.plane = self.find_plane(false)?;
        }
        if let Some(plane) = &state.plane {
            let dead = plane.life() == Life::Dead;
            clean &= !dead;
            if !force && !dead && self.record.fs != FsKind::None && lasts(PATIENCE, || plane.is_in_use()) {
                // Somebody else's mount: whoever looks after it has ended it next.
                tracing::warn!("volume `{}`: stays attached, {}", self.name, plane.describe_use());
                state.mounted = None;
                self.save_state(state)?;
                return lost.map_or(Ok(()), |line| Err(Error::Lost(line)));
            }
            let stopped = plane.stop(force).map_err(|error| match plane.is_in_use() {
                true => Error::InUse(format!("volume `{}` is in use: {error:#}", self.name)),
                false => Error::Other(error),
            });
            if let Ended::Lost(line) = stopped? {
                lost = Some(format!("volume `{}`: {line}", self.name));
            }
        }
        if let Ok(source) = self.source() {
            plane::sweep(&source);
        }
        state.detached();
        self.save_state(state)?;
        if let Some(line) = lost.filter(|_| !force) {
            return Err(Error::Lost(line));
        }
        if clean && self.record.unclean {
            self.record.unclean = false;
            if let Err(error) = self.save() {
                // At worst it is checked once more.
                tracing::warn!("volume `{}`: {error}", self.name);
            }
        }
        Ok(())
    }

    /// Writes what is dirty through the data plane. A line where that fails: the volume can be unmounted all the same.
    ///
    /// # Errors
    /// One line: the data plane does not answer. Nothing has changed then.
    fn flush(&self, state: &State, path: &Path) -> Result<Option<String>> {
        let Some(plane) = state.plane.as_ref().filter(|plane| plane.life() != Life::Dead) else {
            return Ok(None);
        };
        match bounded::run(&plane.device, &Task::Flush(path))? {
            Ok(_) | Err(Failure::NotStarted(_)) => Ok(None),
            Err(failure) => Ok(Some(format!(
                "volume `{}`: is unmounted, but its last flush failed: {failure}; what was written since the last one \
                 may be lost",
                self.name
            ))),
        }
    }

    /// Unmounts what is mounted of the data plane's device at a path.
    fn unmount(&self, state: &State, path: &Path, lazily: bool) -> Result<Unmounted> {
        let mounted = Mounted::at(path).context("cannot learn what is mounted")?;
        let (Some(plane), Some(mounted)) = (&state.plane, mounted.last()) else { return Ok(Unmounted::Yes) };
        let task = Task::Unmount { file: path, number: &mounted.device, lazily };
        match bounded::run(&plane.device, &task)? {
            Ok(answer) if answer == b"busy" => Ok(Unmounted::Busy),
            Ok(_) => Ok(Unmounted::Yes),
            Err(failure) => {
                Err(anyhow!("volume `{}`: {} cannot be unmounted: {failure}", self.name, path.display()))?
            }
        }
    }

    /// All that a file system needs before it is mounted: a check where it was not clean, an identity of its own, and
    /// the size of its disk; or why it does not have that yet.
    pub(super) fn prepare(&mut self, device: &Path, progress: &dyn Progress) -> Result<Option<String>> {
        self.refuse_other_devices(device)?;
        self.check_before_mount(device, progress)?;
        self.part_from_original(device)?;
        self.grow_fs_before_mount(device, progress)
    }

    fn check_before_mount(&mut self, device: &Path, progress: &dyn Progress) -> Result<()> {
        if !self.record.unclean {
            return Ok(());
        }
        progress.step("checking the file system");
        let verdict = self.record.fs.check(device, Check::Preen).map_err(|error| match error {
            Error::Broken(line) => Error::Broken(format!(
                "volume `{}` was not unmounted and is damaged: {line}; nbdbridge volume fsck {} --repair",
                self.name, self.name
            )),
            other => other,
        })?;
        if verdict == Verdict::Repaired {
            tracing::warn!("volume `{}`: was not unmounted; its file system was repaired", self.name);
        }
        Ok(())
    }

    /// Replays the log of a volume that is only read from now on.
    pub(super) fn clean_up(&mut self, state: &mut State, progress: &dyn Progress) -> Result<()> {
        let device = self.attach(state, false, progress)?;
        let cleaned = self.prepare(&device, progress).and_then(|_| {
            if self.record.fs == FsKind::None {
                return Ok(());
            }
            private::mounted(self, &device, |_| Ok(()))
        });
        self.record.unclean &= cleaned.is_err();
        let down = self.take_down(state, false);
        cleaned.and(down).and_then(|()| self.save())
    }

    /// A data plane of this volume's that nothing is written down of.
    fn find_plane(&self, read_only: bool) -> Result<Option<Plane>> {
        // Of a remote disk, other volumes may have data planes, too.
        let others = if self.disk().is_some() { Vec::new() } else { self.pool.runtime().devices() };
        Ok(Plane::find(&self.source()?, read_only, &others))
    }

    /// What the data plane serves.
    pub(super) fn source(&self) -> Result<OsString> {
        match (self.disk(), &self.record.options.source) {
            (Some(disk), _) => Ok(disk.into_os_string()),
            (None, Some(uri)) => Ok(uri.into()),
            (None, None) => Err(Error::Broken(format!("volume `{}` has neither disk nor source", self.name))),
        }
    }

    /// Tells the data plane what the record says.
    pub(super) fn tell_limits(&self, plane: &Plane) -> Result<()> {
        let served =
            plane.ask().with_context(|| format!("volume `{}`: its data plane does not answer", self.name))?;
        served.set_limits(&self.record.limits)?;
        Ok(())
    }
}
