//! The file: what a FUSE thread does with a request. What the fast path answers is answered here; the rest goes, with its
//! answer, to a worker (`slow`). A request whose answer is dropped gets EIO, by fuser.
//!
//! The kernel has checked mode and owner (default_permissions), and EROFS by the mount's flag.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bridge::worker::Workers;
use bridge::{Account, Buffer, Capabilities, Data, Export, Flags, Operation, Request as Asked, Result};
use fuser::{
    BsdFileFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request, TimeOrNow, WriteFlags,
};
use tokio::runtime::Handle;
use tokio::sync::{RwLock, watch};

use super::attributes::{Attributes, Change};
use super::length::Length;
use super::translate::{self, Space, errno};

/// The longest read and write: the most that kernels let through by default.
pub(super) const MAX_BYTES: u32 = 1 << 20;

/// Requests that the kernel sends ahead of their answers (asynchronous I/O). Users who are not root get what
/// /sys/module/fuse/parameters/max_user_bgreq allows.
const MAX_BACKGROUND: u16 = 512;

/// Sizes and space change without the kernel's doing: it is to ask each time.
pub(super) const NO_TIME: Duration = Duration::ZERO;

thread_local! {
    /// Where reads are put together, on each FUSE thread.
    static SCRATCH: RefCell<Buffer> = RefCell::new(Buffer::new(MAX_BYTES as usize));
}

/// An export as a file.
pub(super) struct DiskFile {
    pub(super) export: Arc<Export>,
    pub(super) workers: Arc<Workers>,
    /// Pays for data that waits for storage.
    pub(super) account: Arc<Account>,
    /// Where a FUSE thread waits for that.
    pub(super) runtime: Handle,
    pub(super) attributes: Arc<Attributes>,
    /// Writes past the end make the export longer.
    pub(super) growable: bool,
    /// Keeps requests off while the file becomes shorter.
    pub(super) length: Length,
    /// Held by whoever writes part of a block, and shared by those who write whole ones; see `slow`.
    pub(super) blocks: Arc<RwLock<()>>,
    /// How often the file is open.
    pub(super) opened: watch::Sender<u64>,
}

/// How much of a write there is room for.
enum Room {
    /// So many bytes, within the export.
    Within(usize),
    /// All, once the export has grown.
    Growing,
    None(Errno),
}

impl DiskFile {
    /// The part of a read that lies before the end.
    fn readable(&self, offset: u64, size: u32) -> usize {
        let left = self.export.geometry().size.saturating_sub(offset);
        usize::try_from(left.min(u64::from(size))).unwrap_or(0)
    }

    /// Reads what is there of a range, at once; None where it may have to wait.
    fn fast_read<'a>(
        &self,
        offset: u64,
        size: u32,
        scratch: &'a mut Buffer,
        arrived: Instant,
    ) -> Option<Result<&'a [u8]>> {
        let _steady = self.length.try_hold()?;
        let len = self.readable(offset, size);
        if len == 0 {
            return Some(Ok(&[]));
        }
        if self.has_blocks() {
            return None;
        }
        let asked = Asked::new(Operation::Read, offset, len as u64);
        let buf = scratch.get_mut(..len)?;
        let done = self.export.try_execute(&asked, Data::Into(&mut *buf), arrived)?;
        Some(done.map(|()| &*buf))
    }

    /// Stores data within the export, at once; None where it may have to wait, but for a moment.
    fn fast_write(&self, asked: Asked, data: &[u8], arrived: Instant) -> Option<Result<()>> {
        let _steady = self.length.try_hold()?;
        let honoured = asked.flags == Flags::NONE || self.caps().contains(Capabilities::FUA);
        // It may have become shorter since it was looked at.
        let fits = !self.length.can_shrink() || asked.offset + asked.len <= self.export.geometry().size;
        if !honoured || !fits || self.has_blocks() {
            return None;
        }
        // To copy a large one for a worker costs more than a moment of waiting.
        self.export.try_execute(&asked.with_flags(asked.flags | Flags::PATIENT), Data::From(data), arrived)
    }

    fn room(&self, offset: u64, len: usize) -> Room {
        let end = offset.saturating_add(len as u64);
        let left = self.export.geometry().size.saturating_sub(offset);
        if len as u64 <= left {
            Room::Within(len)
        } else if self.growable {
            if i64::try_from(end).is_ok() { Room::Growing } else { Room::None(Errno::EFBIG) }
        } else if left > 0 {
            // As on a full disk: what has room is stored, and the next write is told.
            Room::Within(usize::try_from(left).unwrap_or(len))
        } else {
            Room::None(Errno::ENOSPC)
        }
    }

    /// Whether requests have to be made to fit the export's blocks, which is the slow path's work.
    fn has_blocks(&self) -> bool {
        self.export.geometry().min_block > 1
    }

    pub(super) fn caps(&self) -> Capabilities {
        self.export.geometry().capabilities
    }
}

impl Filesystem for DiskFile {
    fn init(&mut self, _request: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Each is used where the kernel has it.
        let _ = config.add_capabilities(InitFlags::FUSE_ASYNC_DIO);
        let _ = config.set_max_write(MAX_BYTES);
        let _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn open(&self, _request: &Request, _ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY && self.export.geometry().read_only() {
            return reply.error(Errno::EROFS);
        }
        let how = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_NOFLUSH;
        self.opened.send_modify(|count| *count += 1);
        reply.opened(FileHandle(0), how);
    }

    fn release(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        self.opened.send_modify(|count| *count = count.saturating_sub(1));
        reply.ok();
    }

    fn read(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let arrived = Instant::now();
        SCRATCH.with_borrow_mut(|scratch| match self.fast_read(offset, size, scratch, arrived) {
            Some(Ok(data)) => reply.data(data),
            Some(Err(error)) => reply.error(errno(&error)),
            None => self.slow_read(offset, size, reply, arrived),
        });
    }

    fn write(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let arrived = Instant::now();
        // O_SYNC has this bit, too; and RWF_DSYNC arrives as it.
        let durable = if flags.0 & libc::O_DSYNC != 0 { Flags::FUA } else { Flags::NONE };
        let (len, grow) = match self.room(offset, data.len()) {
            Room::Within(len) => (len, false),
            Room::Growing => (data.len(), true),
            Room::None(errno) => return reply.error(errno),
        };
        let data = &data[..len];
        let asked = Asked::new(Operation::Write, offset, len as u64).with_flags(durable);
        let done = if grow { None } else { self.fast_write(asked, data, arrived) };
        match done {
            Some(Ok(())) => reply.written(u32::try_from(len).unwrap_or(0)),
            Some(Err(error)) => reply.error(errno(&error)),
            None => self.slow_write(asked, data, grow, reply, arrived),
        }
    }

    fn fsync(&self, _request: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let caps = self.caps();
        if caps.contains(Capabilities::READ_ONLY) || !caps.contains(Capabilities::FLUSH) {
            return reply.ok();
        }
        self.slow_done(Asked::flush(), reply);
    }

    fn fallocate(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let Some((space, keep_size)) = translate::fallocate_mode(mode) else {
            return reply.error(Errno::EOPNOTSUPP);
        };
        let geometry = self.export.geometry();
        let end = offset.saturating_add(length);
        if !keep_size && end > geometry.size && !self.growable {
            return reply.error(Errno::ENOSPC);
        }
        if space != Space::Allocate && !geometry.capabilities.contains(Capabilities::WRITE_ZEROES) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        self.slow_space(space, offset, end, keep_size, reply);
    }

    fn lseek(
        &self,
        _request: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return reply.error(Errno::EINVAL),
        };
        match u64::try_from(offset) {
            Ok(offset) if offset < self.export.geometry().size => self.slow_seek(offset, data, reply),
            _ => reply.error(Errno::ENXIO),
        }
    }

    fn getattr(&self, _request: &Request, _ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes.now(&self.export) {
            Some(attributes) => reply.attr(&NO_TIME, &attributes),
            None => self.slow_attributes(reply),
        }
    }

    fn setattr(
        &self,
        _request: &Request,
        _ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let now = self.export.geometry().size;
        // Where it can shrink, another request may have made it shorter meanwhile: then it is the slow path that finds out.
        let new_size = size.filter(|size| *size != now || self.length.can_shrink());
        if new_size.is_some_and(|size| if size < now { !self.length.can_shrink() } else { !self.growable }) {
            // The export keeps its size, or grows; also where a program opens with O_TRUNC.
            return reply.error(Errno::EPERM);
        }
        let time = |time| match time {
            TimeOrNow::SpecificTime(time) => time,
            TimeOrNow::Now => SystemTime::now(),
        };
        let change = Change { mode, uid, gid, atime: atime.map(time), mtime: mtime.map(time) };
        match (new_size, self.attributes.now(&self.export)) {
            (None, Some(_)) => {
                self.attributes.change(change);
                self.getattr(_request, _ino, _fh, reply);
            }
            _ => self.slow_change(change, new_size, reply),
        }
    }

    fn statfs(&self, _request: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        const BLOCK: u32 = 4096;
        let blocks = self.export.geometry().size.div_ceil(u64::from(BLOCK));
        reply.statfs(blocks, 0, 0, 1, 0, BLOCK, 255, BLOCK);
    }
}
