//! Opening and creating: what the path leads to, whether it may be used, and what it can do.

use std::fs::{File, FileType};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::fast::Fast;
use super::flush::FlushGate;

use super::zero::Refused;
use super::{AioMode, CacheMode, Disk, FileOptions, Kind, lock};
use crate::ranges::RangeLocks;
use crate::{Capabilities, Geometry, OpenError, buffer, sys};

/// Bounds of the preferred block in bytes.
const MIN_PREFERRED: u32 = 4096;
const MAX_PREFERRED: u32 = 64 << 10;

/// The alignment of O_DIRECT where nothing tells it: enough for every file system.
const DIRECT_FALLBACK: u32 = 4096;

/// File systems in memory, by statfs(2)'s type (linux/magic.h).
const TMPFS_MAGIC: i64 = 0x0102_1994;
const RAMFS_MAGIC: i64 = 0x8584_58f6;

type Result<T> = std::result::Result<T, OpenError>;

/// Whether a file ends for good where it ends now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    Fixed,
    /// It grows by being written to.
    Open,
}

/// The size of a file that grows: the most that the kernel can address, in whole blocks of any alignment.
const OPEN_SIZE: u64 = i64::MAX.cast_unsigned() & !(MAX_PREFERRED as u64 - 1);

pub(super) fn open(path: &Path, options: &FileOptions, extent: Extent) -> Result<Disk> {
    let via = options.via.as_deref().unwrap_or(path);
    // Before opening: to open a device of another kind may do something, and a fifo waits for its other end.
    let metadata = std::fs::metadata(via).map_err(|error| open_error(path, "cannot look at it", error))?;
    refuse_other_kinds(path, metadata.file_type())?;
    if options.aio == AioMode::IoUring {
        require_ring(path)?;
    }

    // Through the page cache first: O_DIRECT is asked for where it is known to mean something.
    let cached = open_file(path, via, options.read_only, OFlags::empty())?;
    let metadata = cached.metadata().map_err(|error| os(path, "cannot look at it", error))?;
    refuse_other_kinds(path, metadata.file_type())?;
    let kind = kind_of(path, &cached, &metadata)?;
    if matches!(kind, Kind::Device(_)) && !options.read_only {
        refuse_read_only_device(path, &cached)?;
    }
    let more = if options.cache.direct() && kind != Kind::Memory { OFlags::DIRECT } else { OFlags::empty() };
    let (file, cached) = if more.contains(OFlags::DIRECT) {
        (open_again(path, via, options.read_only, more, &metadata)?, Some(cached))
    } else {
        (cached, None)
    };
    let writes_durably = !options.read_only && kind != Kind::Memory && options.cache != CacheMode::Unsafe;
    let durable = match writes_durably {
        true => Some(open_again(path, via, false, more, &metadata)?),
        false => None,
    };
    let direct = match cached {
        Some(_) => Some(direct_alignment(path, &file, kind)?),
        None => None,
    };
    if options.lock {
        lock::lock_image(&file, path, options.read_only)?;
    }
    if options.cache == CacheMode::Unsafe && !options.read_only {
        tracing::warn!(path = %path.display(), "cache mode unsafe: flushes are ignored, a crash of this host loses data");
    }
    let mut geometry = geometry(path, &file, kind, options, direct)?;
    let open_ended = extent == Extent::Open;
    if open_ended {
        geometry.size = OPEN_SIZE;
    }
    Ok(Disk {
        options: options.clone(),
        fast: Fast::new(kind, options, direct.is_some()),
        ranges: RangeLocks::new(u64::from(geometry.preferred_block)),
        file: Arc::new(file),
        cached: cached.map(Arc::new),
        durable: durable.map(Arc::new),
        kind,
        size: AtomicU64::new(geometry.size),
        version: AtomicU64::new(0),
        open_ended,
        seen_length: AtomicU64::new(0),
        opened: geometry,
        direct,
        gate: FlushGate::new(path),
        refused: Refused::default(),
    })
}

/// Makes a new raw image of `size` bytes, all of it a hole.
///
/// # Errors
/// `Exists` where there is something already; no image is left behind after any error.
pub fn create(path: impl AsRef<Path>, size: u64) -> Result<()> {
    let path = path.as_ref();
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let file = match rustix::fs::open(path, flags, mode) {
        Ok(file) => file,
        Err(Errno::EXIST) => return Err(OpenError::Exists(path.to_owned())),
        Err(errno) => return Err(os(path, "cannot create it", errno.into())),
    };
    rustix::fs::ftruncate(&file, size).map_err(|errno| {
        let _ = std::fs::remove_file(path);
        match errno {
            Errno::FBIG | Errno::INVAL => unsupported(
                path,
                format!("{size} bytes are more than this file system allows a file; choose less"),
            ),
            errno => os(path, "cannot give it its size", errno.into()),
        }
    })
}

fn open_file(path: &Path, via: &Path, read_only: bool, more: OFlags) -> Result<File> {
    // O_NONBLOCK keeps the open itself from waiting; for I/O on files and block devices it would mean nothing
    // certain, and is cleared again.
    let access = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let flags = access | OFlags::CLOEXEC | OFlags::NONBLOCK | more;
    let file = rustix::fs::open(via, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::ACCESS | Errno::PERM => permission(path, read_only),
        Errno::ROFS => unsupported(path, "is on a read-only file system; serve it with --read-only".into()),
        Errno::TXTBSY => {
            unsupported(path, "is in use as a program or swap file; serve it with --read-only".into())
        }
        Errno::NOMEDIUM => unsupported(path, "has no medium in it; insert one".into()),
        Errno::INVAL if more.contains(OFlags::DIRECT) => no_direct(path),
        errno => open_error(path, "cannot open it", errno.into()),
    })?;
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|errno| os(path, "cannot set it up", errno.into()))?;
    rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK)
        .map_err(|errno| os(path, "cannot set it up", errno.into()))?;
    Ok(file.into())
}

/// Opens another descriptor of the file that `first` describes.
fn open_again(
    path: &Path,
    via: &Path,
    read_only: bool,
    more: OFlags,
    first: &std::fs::Metadata,
) -> Result<File> {
    let file = open_file(path, via, read_only, more)?;
    let second = file.metadata().map_err(|error| os(path, "cannot look at it", error))?;
    if (first.dev(), first.ino()) != (second.dev(), second.ino()) {
        return Err(unsupported(path, "was replaced while it was opened; try again".into()));
    }
    Ok(file)
}

fn refuse_other_kinds(path: &Path, kind: FileType) -> Result<()> {
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a pipe"
    } else if kind.is_socket() {
        "a socket"
    } else if kind.is_char_device() {
        "a character device"
    } else {
        "a special file"
    };
    Err(OpenError::NotADisk { path: path.to_owned(), what })
}

fn kind_of(path: &Path, file: &File, metadata: &std::fs::Metadata) -> Result<Kind> {
    if metadata.file_type().is_block_device() {
        let sector = rustix::fs::ioctl_blksszget(file)
            .map_err(|errno| os(path, "cannot learn its sector size", errno.into()))?;
        return Ok(Kind::Device(sector.next_power_of_two().max(512)));
    }
    let fs =
        rustix::fs::fstatfs(file).map_err(|errno| os(path, "cannot learn its file system", errno.into()))?;
    // The type's width differs between architectures.
    #[allow(clippy::useless_conversion, clippy::unnecessary_cast)]
    let magic = fs.f_type as i64;
    Ok(if magic == TMPFS_MAGIC || magic == RAMFS_MAGIC { Kind::Memory } else { Kind::Regular })
}

/// Returns the logical sector of the block device at `path`, in bytes; None for anything else.
pub fn logical_sector(path: &Path) -> Option<u32> {
    let is_device = std::fs::metadata(path).is_ok_and(|found| found.file_type().is_block_device());
    let file = is_device.then(|| File::open(path).ok())?;
    rustix::fs::ioctl_blksszget(file?).ok()
}

fn refuse_read_only_device(path: &Path, file: &File) -> Result<()> {
    match sys::device_read_only(file) {
        Ok(true) => Err(unsupported(path, "is a read-only device; serve it with --read-only".into())),
        _ => Ok(()),
    }
}

fn geometry(
    path: &Path,
    file: &File,
    kind: Kind,
    options: &FileOptions,
    direct: Option<u64>,
) -> Result<Geometry> {
    let metadata = file.metadata().map_err(|error| os(path, "cannot look at it", error))?;
    let (size, block) = match kind {
        Kind::Device(sector) => {
            let size =
                sys::device_size(file).map_err(|errno| os(path, "cannot learn its size", errno.into()))?;
            (size, rustix::fs::ioctl_blkpbszget(file).unwrap_or(sector))
        }
        Kind::Regular | Kind::Memory => {
            (metadata.len(), u32::try_from(metadata.blksize()).unwrap_or(MAX_PREFERRED))
        }
    };
    let align = direct.and_then(|align| u32::try_from(align).ok()).unwrap_or(1);
    let preferred = block.max(align).clamp(MIN_PREFERRED, MAX_PREFERRED);
    let preferred_block =
        if preferred.is_power_of_two() { preferred } else { preferred.next_power_of_two() / 2 };

    let mut capabilities = Capabilities::FLUSH | Capabilities::CACHE | Capabilities::MULTI_CONN;
    capabilities = if options.read_only {
        capabilities | Capabilities::READ_ONLY
    } else {
        capabilities
            | Capabilities::FUA
            | Capabilities::TRIM
            | Capabilities::WRITE_ZEROES
            | Capabilities::FAST_ZERO
    };
    if !options.read_only && !matches!(kind, Kind::Device(_)) {
        capabilities = capabilities | Capabilities::GROW | Capabilities::SHRINK | Capabilities::ALLOCATE;
    }
    if matches!(kind, Kind::Device(_)) && sys::device_rotational(file).unwrap_or(false) {
        capabilities = capabilities | Capabilities::ROTATIONAL;
    }
    if direct.is_none() && !matches!(kind, Kind::Device(_)) {
        capabilities = capabilities | Capabilities::FILE_RANGE;
    }
    Ok(Geometry { version: 0, size, min_block: 1, preferred_block, capabilities })
}

/// What O_DIRECT demands of offsets and lengths, in bytes.
fn direct_alignment(path: &Path, file: &File, kind: Kind) -> Result<u64> {
    let fallback = match kind {
        Kind::Device(sector) => (sector, sector),
        Kind::Regular | Kind::Memory => (DIRECT_FALLBACK, DIRECT_FALLBACK),
    };
    let (memory, offset) = match rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
        Ok(stat) if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => {
            (stat.stx_dio_mem_align, stat.stx_dio_offset_align)
        }
        _ => fallback,
    };
    if memory == 0 || offset == 0 {
        return Err(no_direct(path));
    }
    if memory as usize > buffer::ALIGNMENT || !offset.is_power_of_two() || offset > MAX_PREFERRED {
        return Err(unsupported(
            path,
            format!(
                "O_DIRECT needs an alignment of {offset} bytes (memory: {memory}); serve it with --cache writeback"
            ),
        ));
    }
    Ok(u64::from(offset))
}

fn require_ring(path: &Path) -> Result<()> {
    crate::uring::allowed().map_err(|error| {
        unsupported(
            path,
            format!("io_uring is not allowed here ({error}); serve with --aio auto, or allow it (sysctl kernel.io_uring_disabled, the container's seccomp profile)"),
        )
    })
}

fn open_error(path: &Path, action: &'static str, error: std::io::Error) -> OpenError {
    match Errno::from_io_error(&error) {
        Some(Errno::NOENT) => OpenError::NotFound(path.to_owned()),
        Some(Errno::ACCESS) => {
            OpenError::Permission { path: path.to_owned(), how: "(a folder on the way forbids it)", hint: "" }
        }
        _ => os(path, action, error),
    }
}

fn permission(path: &Path, read_only: bool) -> OpenError {
    let path = path.to_owned();
    if read_only {
        return OpenError::Permission { path, how: "for reading", hint: "" };
    }
    let readable = File::open(&path).is_ok();
    let hint = if readable { " (it can be read: serve it with --read-only)" } else { "" };
    OpenError::Permission { path, how: "for writing", hint }
}

fn no_direct(path: &Path) -> OpenError {
    unsupported(path, "cannot be opened with O_DIRECT; serve it with --cache writeback".into())
}

fn unsupported(path: &Path, reason: String) -> OpenError {
    OpenError::Unsupported { path: path.to_owned(), reason }
}

fn os(path: &Path, action: &'static str, source: std::io::Error) -> OpenError {
    OpenError::Os { path: path.to_owned(), action, error: source }
}
