//! Making a volume. Nobody is told of it before all of it is durable; what is cut short is undone by whoever opens the
//! pool next, so that no disk is ever formatted that somebody was given.
//!
//! ```text
//!   pool locked:    room? ─ folder `.new-*` with volume.json ("pending") ─ renamed to its name
//!   volume locked:  disk ─ data plane ─ blank? ─ mkfs ─ root folder ─ data plane ends ─ volume.json ("formatted")
//! ```

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, anyhow};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate};

use super::clone::Original;
use super::filesystem::{Found, probe};
use super::options::DiskFormat;
use super::private;
use super::{
    DoorChoice, Error, FsKind, Name, Options, Pending, Pool, Progress, Provision, Record, Result, Volume,
    disk,
};
use crate::beneath::Folder;
use crate::cli::{Format, create};
use crate::{size, ublk};

/// What has come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Created {
    New,
    /// It was there, with equal options.
    Existed,
}

/// Attempts to make a volume, while others make and remove one of its name.
const ATTEMPTS: u32 = 100;

impl Pool {
    /// Makes a volume, or finds that it is there with equal options; no options at all equal any.
    ///
    /// # Errors
    /// One line; nothing is left of it then.
    pub(crate) fn create(&self, name: &Name, options: &Options, progress: &dyn Progress) -> Result<Created> {
        for _ in 0..ATTEMPTS {
            match self.volume(name) {
                Ok(volume) => return equal(&volume, options),
                Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
            let origin = options.from.as_ref();
            let original = origin.map(|origin| self.original(origin, options)).transpose()?;
            let record = self.plan(options, original.as_ref())?;
            if let Some(mut volume) = self.begin(name, record)? {
                let filled = match &original {
                    Some(original) => volume.fill_from(original, progress),
                    None => volume.fill(progress),
                };
                if filled.is_err() {
                    // The first error is the one to tell; what cannot be undone now is undone later.
                    let _ = volume.undo();
                }
                return filled.map(|()| Created::New);
            }
        }
        Err(anyhow!("volume `{name}`: is made and removed by others all the time").into())
    }

    /// Checks what can be checked before anything is there.
    fn plan(&self, options: &Options, original: Option<&Original<'_>>) -> Result<Record> {
        if options.door == DoorChoice::Ublk && !ublk::is_here() {
            let line = "door=ublk: this host has no ublk (modprobe ublk_drv); door=auto takes what there is";
            return Err(Error::Refused(line.to_owned()));
        }
        if options.source.is_some() {
            // Its size is known once it is attached.
            if let Some(fs) = options.fs {
                self.check_options(fs, options)?;
            }
            let fs = options.fs.unwrap_or(FsKind::Ext4);
            return Ok(Record::new(options.clone(), 0, fs, None));
        }
        if let Some(original) = original {
            self.check_options(original.fs, options)?;
            return Ok(original.plan(options));
        }
        let fs = options.fs.unwrap_or(FsKind::Ext4);
        self.check_options(fs, options)?;
        fs.check_maker()?;
        let size = match options.size {
            Some(size) => size,
            None => self.settings()?.default_size,
        };
        Ok(Record::new(options.clone(), size, fs, Some(options.format.unwrap_or(DiskFormat::Raw))))
    }

    /// Checks what is asked of the file system against what is allowed.
    fn check_options(&self, fs: FsKind, options: &Options) -> Result<()> {
        self.check_mount_options(fs, &options.mount)?;
        fs.check_mkfs_options(&options.mkfs)
    }

    /// Gives the name and the space away. None where somebody else has just done so.
    fn begin(&self, name: &Name, record: Record) -> Result<Option<Volume<'_>>> {
        let _pool = self.lock()?;
        if self.root().kind(name).with_context(|| format!("{name}: cannot look for it"))?.is_some() {
            return Ok(None);
        }
        if record.format.is_some() {
            let now = if record.options.provision == Provision::Thick { record.size } else { 0 };
            self.admit(record.size, now)?;
        }
        let new = format!("{}{name:.200}", super::pool::NEW);
        let cannot = || format!("{}: cannot make it", self.folder().join(&new).display());
        // One that is left there is nobody's: the pool is locked.
        self.root().remove(&new).with_context(cannot)?;
        let make = || -> Result<Folder> {
            let folder = self.root().make_folder(&new).with_context(cannot)?;
            record.write(&folder)?;
            rustix::fs::flock(folder.handle(), FlockOperation::NonBlockingLockExclusive)
                .with_context(cannot)?;
            self.root().rename(&new, self.root(), name).with_context(cannot)?;
            self.root().sync().with_context(cannot)?;
            Ok(folder.renamed(self.folder().join(name)))
        };
        let folder = make().inspect_err(|_| {
            let _ = self.root().remove(&new);
        })?;
        Ok(Some(Volume { pool: self, name: name.clone(), record, folder }))
    }
}

impl Volume<'_> {
    /// Makes all that the record promises.
    fn fill(&mut self, progress: &dyn Progress) -> Result<()> {
        if let Some(format) = self.record.format {
            self.make_disk(format, progress)?;
        }
        let remote = self.record.format.is_none();
        if self.record.fs != FsKind::None || remote {
            let mut state = self.state()?;
            let read_only = remote && self.record.options.read_only;
            let device = self.attach(&mut state, read_only, progress)?;
            let size = state.plane.as_ref().and_then(|plane| plane.ask()).map(|served| served.size);
            if remote {
                self.record.size = size.context("the remote export does not tell its size")?;
            }
            let found = self.find_on_remote(&device)?;
            // Of a remote disk the file system is known only now.
            self.pool.check_options(self.record.fs, &self.record.options)?;
            if !found {
                self.format(&device, progress)?;
            }
            self.take_down(&mut state, false)?;
            if !state.is_nothing() {
                return Err(anyhow!("volume `{}`: its device does not come free", self.name).into());
            }
        }
        self.record.formatted = true;
        self.record.pending = None;
        self.save()
    }

    fn make_disk(&self, format: DiskFormat, progress: &dyn Progress) -> Result<()> {
        let (size, name) = (self.record.size, format.disk_name());
        let shown = self.folder.path().join(name);
        match format {
            DiskFormat::Qcow2 => {
                let via = self.folder.via();
                create::create_empty(&via.join(name), Format::Qcow2, size)
                    .map_err(|error| disk::named(&error, &via, self.folder.path()))?;
            }
            DiskFormat::Raw => {
                let file = self.folder.create(name);
                let file = file.with_context(|| format!("{}: cannot make it", shown.display()))?;
                file.set_len(size).with_context(|| {
                    format!("{}: cannot make it {} long", shown.display(), size::human(size))
                })?;
            }
        }
        self.folder.adopt(name).with_context(|| shown.display().to_string())?;
        let file = self.own_disk()?.open(true).with_context(|| shown.display().to_string())?;
        if self.record.options.provision == Provision::Thick {
            progress.step("reserving space");
            let reserved = reserve(&file, size, progress);
            reserved.with_context(|| format!("{}: cannot reserve {}", shown.display(), size::human(size)))?;
        }
        file.sync_all()
            .and_then(|()| self.folder.sync())
            .with_context(|| format!("{}: cannot flush it", shown.display()))?;
        Ok(())
    }

    /// Whether a remote disk has what is wanted already. A stranger's data is neither used nor formatted.
    fn find_on_remote(&mut self, device: &Path) -> Result<bool> {
        if self.record.format.is_some() {
            return Ok(false);
        }
        let asked = self.record.options.fs;
        if asked == Some(FsKind::None) {
            return Ok(true);
        }
        let source = self.record.options.source.clone().unwrap_or_default();
        match probe(device, self.record.size)? {
            Found::Known(fs) if asked.is_none_or(|asked| asked == fs) => {
                self.record.fs = fs;
                // Nobody knows how it was left.
                self.record.unclean = true;
                Ok(true)
            }
            Found::Known(fs) => Err(Error::Exists(format!(
                "{source}: holds {fs} already; leave fs out to use it, or empty it yourself"
            ))),
            Found::Stranger => Err(Error::Exists(format!(
                "{source}: holds something that is neither ext4, xfs nor btrfs; use it with fs=none, or empty it yourself"
            ))),
            Found::Blank if self.record.options.read_only => {
                Err(Error::Refused(format!("{source}: is empty, and read-only nobody can fill it")))
            }
            Found::Blank => Ok(false),
        }
    }

    /// Makes the file system, and its root folder.
    fn format(&mut self, device: &Path, progress: &dyn Progress) -> Result<()> {
        let fs = self.record.fs;
        fs.check_maker()?;
        self.record.pending = Some(Pending::Create { formatting: true });
        self.save()?;
        progress.step(&format!("making {fs}"));
        let keep_space = self.record.options.provision == Provision::Thick;
        let made = fs.make(device, &self.record.options.mkfs, keep_space);
        made.map_err(|error| self.blame(error))?;
        self.set_root(device)
    }

    /// Makes of the root folder what was asked for.
    pub(super) fn set_root(&self, device: &Path) -> Result<()> {
        let Options { uid, gid, mode, .. } = self.record.options;
        private::mounted(self, device, |root| {
            // e2fsck makes it again when it has need of it; programs that want an empty folder do not like it.
            match fs::remove_dir(root.join("lost+found")) {
                // A copy may have something in it.
                Err(error)
                    if !matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty
                    ) =>
                {
                    return Err(error).context("lost+found: cannot be removed")?;
                }
                _ => {}
            }
            chown(root, uid, gid).context("the root folder's owner")?;
            if let Some(mode) = mode {
                fs::set_permissions(root, PermissionsExt::from_mode(mode))
                    .context("the root folder's mode")?;
            }
            File::open(root).and_then(|root| root.sync_all()).context("the root folder")?;
            Ok(())
        })
    }

    /// Makes it as if there had been nothing.
    pub(super) fn undo(mut self) -> Result<()> {
        let mut state = self.state()?;
        self.take_down(&mut state, true)?;
        self.bury()
    }
}

/// Reserves space for a file, in pieces: a file system that writes zeroes for it takes its time.
fn reserve(file: &File, size: u64, progress: &dyn Progress) -> rustix::io::Result<()> {
    const PIECE: u64 = 256 << 20;
    let mut done = 0;
    while done < size {
        let piece = PIECE.min(size - done);
        fallocate(file, FallocateFlags::empty(), done, piece)?;
        done += piece;
        progress.bytes(done, size);
    }
    Ok(())
}

/// Whether a volume is what is asked for.
fn equal(volume: &Volume<'_>, options: &Options) -> Result<Created> {
    let record = &volume.record;
    // What was changed since is as good as what was asked for then.
    let now = Options {
        size: record.options.size.map(|_| record.size),
        limits: record.limits,
        ..record.options.clone()
    };
    if *options == Options::default() || *options == record.options || *options == now {
        return Ok(Created::Existed);
    }
    let (old, new) = (record.options.pairs(), options.pairs());
    let keys: std::collections::BTreeSet<_> = old.keys().chain(new.keys()).collect();
    let differ: Vec<_> =
        keys.into_iter().filter(|key| old.get(*key) != new.get(*key)).map(String::as_str).collect();
    Err(Error::Exists(format!(
        "volume `{}` exists with other options ({}); remove it, or take another name",
        volume.name,
        differ.join(", ")
    )))
}
