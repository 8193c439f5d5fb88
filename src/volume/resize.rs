//! Larger volumes, in use or not: the disk, then the device, then the file system. They never shrink.
//!
//! ```text
//!   volume.json: size, pending, grow_fs ─> disk (through its data plane, where there is one) ─> pending is done
//!                                          file system ─> grow_fs is done
//! ```
//!
//! Cut short, the record says what the disk is then, and the file system grows when it is next mounted. So it does where
//! it cannot now: on a kernel whose ublk devices keep their size, and ext4 without CAP_SYS_RESOURCE.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use serde::Serialize;

use super::capture::flush;
use super::options::DiskFormat;
use super::plane::{Life, Plane};
use super::{
    Error, FsKind, Name, Pending, Pool, Progress, Provision, Result, Volume, bounded, disk, private,
};
use crate::size::{NewSize, human};

/// A device follows its image within this time.
const FOLLOWS: Duration = Duration::from_secs(10);

/// What has become of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Resized {
    /// In bytes.
    pub(crate) old_size: u64,
    /// In bytes.
    pub(crate) size: u64,
    /// Why its users see the new size only when it is next mounted; None where they see it.
    pub(crate) later: Option<String>,
}

impl Pool {
    /// Makes a volume larger, whether or not it is in use. The size that it has is no error: what was not done is done.
    ///
    /// # Errors
    /// One line: a smaller size, more than the pool may promise, no space.
    pub(crate) fn resize(&self, name: &Name, size: NewSize, progress: &dyn Progress) -> Result<Resized> {
        self.volume(name)?.resize(size, progress)
    }
}

impl Volume<'_> {
    fn resize(&mut self, size: NewSize, progress: &dyn Progress) -> Result<Resized> {
        let old_size = self.record.size;
        let size = size.after(old_size).map_err(|error| Error::Usage(error.to_string()))?;
        let format = self.own_format()?;
        let refuse = |why: String| Err(Error::Refused(format!("volume `{}`: {why}", self.name)));
        if self.record.options.read_only {
            return refuse("is read-only, and keeps its size".to_owned());
        }
        if size < old_size {
            let old_size = human(old_size);
            return refuse(format!(
                "has {old_size} and never shrinks; make a smaller volume and copy its files"
            ));
        }
        if !size.is_multiple_of(4096) {
            return refuse(format!("{size} bytes are no multiple of 4096"));
        }
        self.record.fs.check_grower()?;
        if let Some(plane) = &self.state()?.plane {
            bounded::check(&plane.device)?;
        }
        let mut fixed = Vec::new();
        if size > old_size {
            self.promise(size)?;
            progress.step("growing the disk");
            let grown = self.grow_disk(format, size);
            self.settle_size(false)?;
            fixed = grown?;
        }
        let later = if self.record.grow_fs {
            progress.step("growing the file system");
            self.grow_fs_now(&fixed, progress)?
        } else {
            fixed.into_iter().next()
        };
        Ok(Resized { old_size, size: self.record.size, later })
    }

    /// Writes down what it is going to be.
    fn promise(&mut self, size: u64) -> Result<()> {
        let from = self.record.size;
        let thick = self.record.options.provision == Provision::Thick;
        let _pool = self.pool.lock()?;
        self.pool.admit(size - from, if thick { size - from } else { 0 })?;
        self.record.pending = Some(Pending::Resize { from });
        self.record.size = size;
        self.record.grow_fs |= self.record.fs != FsKind::None;
        self.save()
    }

    /// Makes the disk larger, durably. Gives a line for each door that keeps its size.
    fn grow_disk(&self, format: DiskFormat, size: u64) -> Result<Vec<String>> {
        let disk = self.own_disk()?;
        if self.record.options.provision == Provision::Thick {
            disk::reserve(&disk, size)?;
        }
        let state = self.state()?;
        let Some(plane) = &state.plane else {
            disk::grow(&disk, format, size)?;
            return Ok(Vec::new());
        };
        if plane.life() == Life::Dead {
            return Err(Error::InUse(format!(
                "volume `{}`: its data plane has died; unmount it, or mount it again, first",
                self.name
            )));
        }
        let served =
            plane.ask().with_context(|| format!("volume `{}`: its data plane does not answer", self.name))?;
        let resized = served.resize(size)?;
        flush(&plane.device)?;
        Ok(resized.fixed)
    }

    /// Ends a resize, whatever came of it: from now on the size is what the disk has. With `again`, a data plane is told
    /// once more: the first time it may not have heard.
    ///
    /// # Errors
    /// One line: the disk cannot be read.
    pub(super) fn settle_size(&mut self, again: bool) -> Result<()> {
        let Some(Pending::Resize { from }) = self.record.pending else { return Ok(()) };
        let wanted = self.record.size;
        // What a data plane has grown may not be in the image yet.
        let now = match self.state()?.plane.as_ref().and_then(Plane::ask) {
            Some(served) if again && served.size < wanted => {
                served.resize(wanted).map_or(served.size, |resized| resized.size)
            }
            Some(served) => served.size,
            None => disk::size(&self.own_disk()?, self.own_format()?)?,
        };
        self.record.size = now.max(from);
        self.record.pending = None;
        self.save()
    }

    /// Grows the file system, or says why that is left to the next mount.
    fn grow_fs_now(&mut self, fixed: &[String], progress: &dyn Progress) -> Result<Option<String>> {
        let mut state = self.state()?;
        let (plane, point) = match (&state.plane, &state.mounted) {
            (Some(plane), Some(point)) => (plane.clone(), point.clone()),
            (Some(plane), None) if plane.is_in_use() => {
                return Ok(Some(format!("its device is in use: {}", plane.describe_use())));
            }
            _ => {
                let device = self.attach(&mut state, false, progress)?;
                let prepared = self.prepare(&device, progress);
                let down = self.take_down(&mut state, false);
                return prepared.and_then(|later| down.map(|()| later));
            }
        };
        if let Some(line) = fixed.first() {
            return Ok(Some(line.clone()));
        }
        if !has_size(&plane.device, self.record.size)? {
            return Ok(Some(format!("{} keeps its size", plane.device.display())));
        }
        match self.record.fs.grow_mounted(&plane.device, &point) {
            Ok(()) => self.fs_has_grown().map(|()| None),
            Err(error) => Ok(Some(error.to_string())),
        }
    }

    /// Grows a file system on an attached device, before it is mounted, where it is to grow. Gives the reason why it stays
    /// as it is: that keeps nobody from using it.
    ///
    /// # Errors
    /// One line: it is damaged.
    pub(super) fn grow_fs_before_mount(
        &mut self,
        device: &Path,
        progress: &dyn Progress,
    ) -> Result<Option<String>> {
        if !self.record.grow_fs {
            return Ok(None);
        }
        progress.step("growing the file system");
        let fs = self.record.fs;
        let grown = if fs.grows_unmounted() {
            fs.grow_unmounted(device)
        } else {
            private::mounted(self, device, |point| fs.grow_mounted(device, point))
        };
        match grown {
            Ok(()) => self.fs_has_grown().map(|()| None),
            Err(error @ Error::Broken(_)) => Err(error),
            Err(error) => Ok(Some(error.to_string())),
        }
    }

    fn fs_has_grown(&mut self) -> Result<()> {
        self.record.grow_fs = false;
        self.save()
    }
}

/// Waits for a device to have so many bytes. False where it does not get them.
fn has_size(device: &Path, size: u64) -> Result<bool> {
    let until = Instant::now() + FOLLOWS;
    loop {
        let now = File::open(device).and_then(|mut file| file.seek(SeekFrom::End(0)));
        if now.with_context(|| format!("{}: cannot learn its size", device.display()))? >= size {
            return Ok(true);
        }
        if Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
