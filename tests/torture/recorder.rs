//! A disk that remembers: a folder of files (FUSE) that records each write and each sync, so that the power can be cut at
//! any point afterwards. What no sync of its file covers is dropped, kept or torn, sector by sector.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    BackgroundSession, BsdFileFlags, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, TimeOrNow, WriteFlags, spawn_mount,
};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::support::Random;

const SECTOR: usize = 512;

/// Something that happened to a file.
#[derive(Clone)]
enum Event {
    /// With `durable`, this write alone needs no sync.
    Write {
        offset: usize,
        data: Vec<u8>,
        durable: bool,
    },
    Zero {
        offset: usize,
        len: usize,
    },
    Resize(usize),
    /// All before it is durable.
    Sync,
}

#[derive(Default)]
struct Log {
    names: Vec<String>,
    /// As they were when the recording began.
    base: Vec<Vec<u8>>,
    now: Vec<Vec<u8>>,
    /// The number of a file, and what happened to it.
    events: Vec<(usize, Event)>,
    /// Events until the process that makes the next one is killed.
    kill_after: Option<usize>,
    /// It was killed: nothing happens to the files any more.
    frozen: bool,
}

/// The recorded folder; unmounted when dropped.
pub(crate) struct Recorder {
    log: Arc<Mutex<Log>>,
    session: Option<BackgroundSession>,
    folder: TempDir,
}

impl Recorder {
    /// Takes the files of a folder over, and mounts them in another one. None where nothing can be mounted.
    pub(crate) fn new(from: &Path) -> Option<Recorder> {
        let mut log = Log::default();
        for entry in fs::read_dir(from).unwrap().flatten().filter(|entry| entry.path().is_file()) {
            let bytes = fs::read(entry.path()).unwrap();
            log.names.push(entry.file_name().into_string().unwrap());
            log.base.push(bytes.clone());
            log.now.push(bytes);
        }
        let (log, folder) = (Arc::new(Mutex::new(log)), tempfile::tempdir().unwrap());
        let session = spawn_mount(Files(log.clone()), folder.path(), &Config::default()).ok()?;
        Some(Recorder { log, session: Some(session), folder })
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// How many events there have been: the position of what happens next.
    pub(crate) fn position(&self) -> usize {
        lock(&self.log).events.len()
    }

    /// Has the process killed (SIGKILL) that makes the event after `events` more, and that event not happen.
    pub(crate) fn kill_after(&self, events: usize) {
        lock(&self.log).kill_after = Some(events);
    }

    /// Ends that. Returns true if a process was killed.
    pub(crate) fn thaw(&self) -> bool {
        let mut log = lock(&self.log);
        log.kill_after = None;
        std::mem::take(&mut log.frozen)
    }

    /// Writes into a folder what a power cut at this position leaves.
    pub(crate) fn cut(&self, position: usize, random: &mut Random, into: &Path) {
        let log = lock(&self.log);
        let events = &log.events[..position];
        for (number, (name, base)) in log.names.iter().zip(&log.base).enumerate() {
            let mine: Vec<_> =
                events.iter().filter(|(file, _)| *file == number).map(|(_, what)| what).collect();
            let synced = mine.iter().rposition(|what| matches!(what, Event::Sync)).map_or(0, |at| at + 1);
            let mut bytes = base.clone();
            for what in &mine[..synced] {
                apply(&mut bytes, what, &mut |_| true);
            }
            // Each disk has its temper: it may have lost nothing, nearly all, or anything between.
            let kept = random.below(5);
            for what in &mine[synced..] {
                match random.below(4) {
                    _ if matches!(what, Event::Write { durable: true, .. }) => {
                        apply(&mut bytes, what, &mut |_| true);
                    }
                    0 => apply(&mut bytes, what, &mut |_| random.below(2) == 0),
                    _ if random.below(4) < kept => apply(&mut bytes, what, &mut |_| true),
                    _ => {}
                }
            }
            fs::write(into.join(name), bytes).unwrap();
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            let _ = rustix::mount::unmount(self.folder.path(), rustix::mount::UnmountFlags::DETACH);
            drop(session);
        }
    }
}

fn lock(log: &Mutex<Log>) -> MutexGuard<'_, Log> {
    log.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Does to `bytes` what happened, in those sectors that `keeps` names.
fn apply(bytes: &mut Vec<u8>, what: &Event, keeps: &mut dyn FnMut(usize) -> bool) {
    match what {
        Event::Sync => {}
        Event::Resize(size) => {
            if keeps(0) {
                bytes.resize(*size, 0);
            }
        }
        Event::Write { offset, data, .. } => {
            for (at, part) in sectors(*offset, data.len()) {
                if keeps(at) {
                    let end = at + part.len();
                    bytes.resize(bytes.len().max(end), 0);
                    bytes[at..end].copy_from_slice(&data[part]);
                }
            }
        }
        Event::Zero { offset, len } => {
            for (at, part) in sectors(*offset, *len) {
                let end = (at + part.len()).min(bytes.len());
                if keeps(at) && at < end {
                    bytes[at..end].fill(0);
                }
            }
        }
    }
}

/// The parts of a range that lie in one sector each: where, and which bytes of the range.
fn sectors(offset: usize, len: usize) -> impl Iterator<Item = (usize, std::ops::Range<usize>)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let begin = offset + at;
        let count = (SECTOR - begin % SECTOR).min(len - at);
        let part = at..at + count;
        at += count;
        (count > 0).then_some((begin, part))
    })
}

/// The file system: a folder of files that exist already.
struct Files(Arc<Mutex<Log>>);

impl Files {
    fn attributes(ino: INodeNo, size: Option<usize>) -> FileAttr {
        let size = size.map(|size| size as u64);
        FileAttr {
            ino,
            size: size.unwrap_or(0),
            blocks: size.unwrap_or(0).div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if size.is_some() { FileType::RegularFile } else { FileType::Directory },
            perm: if size.is_some() { 0o644 } else { 0o755 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn with<T>(&self, ino: INodeNo, work: impl FnOnce(&mut Log, usize) -> T) -> T {
        work(&mut lock(&self.0), number(ino))
    }

    /// Notes what a process does to a file; an error where it is killed for it.
    fn note(&self, request: &Request, ino: INodeNo, event: Event) -> Result<(), Errno> {
        self.with(ino, |log, file| {
            if log.kill_after == Some(0) {
                // The number may be one of a thread, which stands for its process here.
                let process = Pid::from_raw(i32::try_from(request.pid()).unwrap()).unwrap();
                kill_process(process, Signal::KILL).unwrap();
                (log.kill_after, log.frozen) = (None, true);
            }
            if log.frozen {
                return Err(Errno::EIO);
            }
            log.kill_after = log.kill_after.map(|left| left - 1);
            apply(&mut log.now[file], &event, &mut |_| true);
            log.events.push((file, event));
            Ok(())
        })
    }
}

/// The index of a file; inode 1 is the folder.
fn number(ino: INodeNo) -> usize {
    usize::try_from(ino.0).unwrap() - 2
}

fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap()
}

impl Filesystem for Files {
    fn lookup(&self, _request: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let log = lock(&self.0);
        match log.names.iter().position(|known| OsStr::new(known) == name) {
            Some(file) => {
                let attributes = Self::attributes(INodeNo(file as u64 + 2), Some(log.now[file].len()));
                reply.entry(&Duration::ZERO, &attributes, Generation(0));
            }
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _request: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let size = (ino.0 > 1).then(|| self.with(ino, |log, file| log.now[file].len()));
        reply.attr(&Duration::ZERO, &Self::attributes(ino, size));
    }

    fn setattr(
        &self,
        request: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if let Some(size) = size
            && let Err(errno) = self.note(request, ino, Event::Resize(index(size)))
        {
            return reply.error(errno);
        }
        self.getattr(request, ino, fh, reply);
    }

    fn open(&self, _request: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Past the page cache: each write arrives when it is made.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO);
    }

    fn read(
        &self,
        _request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.with(ino, |log, file| {
            let bytes = &log.now[file];
            let start = index(offset).min(bytes.len());
            reply.data(&bytes[start..(start + size as usize).min(bytes.len())]);
        });
    }

    fn write(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let durable = flags.0 & libc::O_DSYNC != 0;
        match self.note(request, ino, Event::Write { offset: index(offset), data: data.to_vec(), durable }) {
            Ok(()) => reply.written(u32::try_from(data.len()).unwrap()),
            Err(errno) => reply.error(errno),
        }
    }

    fn fsync(&self, request: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        match self.note(request, ino, Event::Sync) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        reply.ok();
    }

    fn fallocate(
        &self,
        request: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (offset, len) = (index(offset), index(length));
        let zeroes = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        if mode & !(zeroes | libc::FALLOC_FL_KEEP_SIZE) != 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        let size = self.with(ino, |log, file| log.now[file].len());
        let grows = mode & libc::FALLOC_FL_KEEP_SIZE == 0 && offset + len > size;
        let events = [
            grows.then_some(Event::Resize(offset + len)),
            (mode & zeroes != 0).then_some(Event::Zero { offset, len }),
        ];
        for event in events.into_iter().flatten() {
            if let Err(errno) = self.note(request, ino, event) {
                return reply.error(errno);
            }
        }
        reply.ok();
    }
}
