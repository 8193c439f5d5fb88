//! The few system calls that rustix does not wrap, each as a safe function.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// `F_RDLCK` and `F_WRLCK` of fcntl(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockKind {
    /// Shared.
    Read,
    /// Exclusive.
    Write,
}

/// What cachestat(2) counts in a range, in pages.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct CacheStat {
    /// Pages in the cache.
    pub(crate) cached: u64,
    /// Of these, dirty ones.
    pub(crate) dirty: u64,
    /// Of these, under writeback.
    pub(crate) writeback: u64,
    /// Pages that were in the cache and left it.
    pub(crate) evicted: u64,
    /// Of these, the ones that left it a short while ago.
    pub(crate) recently_evicted: u64,
}

/// Sets an open-file-description lock on one byte, without waiting (`F_OFD_SETLK`, fcntl(2)).
///
/// # Errors
/// AGAIN or ACCESS: somebody else has it locked the other way. INVAL, NOTSUP, NOSYS, NOLCK: no such locks here.
pub(crate) fn lock_byte(fd: impl AsFd, byte: u64, kind: LockKind) -> Result<(), Errno> {
    let lock = flock(byte, kind)?;
    // SAFETY: the descriptor is open while borrowed, and `lock` is a flock that the kernel only reads.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    check(result).map(drop)
}

/// Whether one byte could be locked in this way, not counting locks of this very descriptor (`F_OFD_GETLK`).
///
/// # Errors
/// As [`lock_byte`].
pub(crate) fn could_lock_byte(fd: impl AsFd, byte: u64, kind: LockKind) -> Result<bool, Errno> {
    let mut lock = flock(byte, kind)?;
    // SAFETY: the descriptor is open while borrowed, and `lock` is a flock that the kernel reads and rewrites.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    check(result)?;
    Ok(i32::from(lock.l_type) == libc::F_UNLCK)
}

/// How many pages of a range are in the page cache (cachestat(2), Linux 6.5).
///
/// # Errors
/// NOSYS on an older kernel; PERM where the file is neither ours nor writable by us; OPNOTSUPP.
pub(crate) fn cachestat(fd: impl AsFd, offset: u64, len: u64) -> Result<CacheStat, Errno> {
    /// Not in every libc; the same number on every architecture.
    const SYS_CACHESTAT: libc::c_long = 451;
    let range: [u64; 2] = [offset, len];
    let mut stat = CacheStat::default();
    // SAFETY: the kernel reads a cachestat_range (two u64) and writes a cachestat (five u64), as declared here.
    let result =
        unsafe { libc::syscall(SYS_CACHESTAT, fd.as_fd().as_raw_fd(), range.as_ptr(), &raw mut stat, 0_u32) };
    check(i32::try_from(result).unwrap_or(-1))?;
    Ok(stat)
}

/// The size of this machine's pages in bytes.
pub(crate) fn page_size() -> u64 {
    // SAFETY: no memory is passed.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
}

/// Size of a block device in bytes (`BLKGETSIZE64`, linux/fs.h).
pub(crate) fn device_size(fd: impl AsFd) -> Result<u64, Errno> {
    /// `_IOR(0x12, 114, size_t)`, in which the kernel stores a u64.
    const BLKGETSIZE64: libc::Ioctl = request(rustix::ioctl::opcode::read::<usize>(0x12, 114));
    let mut size = 0_u64;
    // SAFETY: BLKGETSIZE64 stores a u64 through its argument.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETSIZE64, &raw mut size) };
    check(result)?;
    Ok(size)
}

/// Number of the disk that a block device is, or is part of, which the kernel uses once (`BLKGETDISKSEQ`, linux/fs.h).
pub(crate) fn disk_sequence(fd: impl AsFd) -> Result<u64, Errno> {
    const BLKGETDISKSEQ: libc::Ioctl = request(rustix::ioctl::opcode::read::<u64>(0x12, 128));
    let mut number = 0_u64;
    // SAFETY: BLKGETDISKSEQ stores a u64 through its argument.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKGETDISKSEQ, &raw mut number) };
    check(result)?;
    Ok(number)
}

/// Whether a block device refuses writes (`BLKROGET`).
pub(crate) fn device_read_only(fd: impl AsFd) -> Result<bool, Errno> {
    const BLKROGET: libc::Ioctl = request(rustix::ioctl::opcode::none(0x12, 94));
    let mut read_only: libc::c_int = 0;
    // SAFETY: BLKROGET stores an int through its argument.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKROGET, &raw mut read_only) };
    check(result)?;
    Ok(read_only != 0)
}

/// Whether a block device is slow at seeking (`BLKROTATIONAL`).
pub(crate) fn device_rotational(fd: impl AsFd) -> Result<bool, Errno> {
    const BLKROTATIONAL: libc::Ioctl = request(rustix::ioctl::opcode::none(0x12, 126));
    let mut rotational: libc::c_ushort = 0;
    // SAFETY: BLKROTATIONAL stores an unsigned short through its argument.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKROTATIONAL, &raw mut rotational) };
    check(result)?;
    Ok(rotational != 0)
}

/// Tells a block device that a range is not needed (`BLKDISCARD`). Both in bytes, multiples of its sector.
///
/// # Errors
/// OPNOTSUPP where the device has no discard; INVAL for a range that breaks its alignment.
pub(crate) fn device_discard(fd: impl AsFd, offset: u64, len: u64) -> Result<(), Errno> {
    const BLKDISCARD: libc::Ioctl = request(rustix::ioctl::opcode::none(0x12, 119));
    let range: [u64; 2] = [offset, len];
    // SAFETY: BLKDISCARD reads two u64 through its argument.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), BLKDISCARD, range.as_ptr()) };
    check(result).map(drop)
}

/// The C library's type for a request number: it differs in width between libraries.
#[allow(clippy::cast_lossless)]
const fn request(opcode: u32) -> libc::Ioctl {
    opcode as libc::Ioctl
}

fn flock(byte: u64, kind: LockKind) -> Result<libc::flock, Errno> {
    let kind = match kind {
        LockKind::Read => libc::F_RDLCK,
        LockKind::Write => libc::F_WRLCK,
    };
    // SAFETY: flock is a plain C structure of integers, for which all zeroes is a value. (Some architectures
    // have more fields than the ones set below.)
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = libc::c_short::try_from(kind).map_err(|_| Errno::INVAL)?;
    lock.l_whence = libc::c_short::try_from(libc::SEEK_SET).map_err(|_| Errno::INVAL)?;
    lock.l_start = libc::off_t::try_from(byte).map_err(|_| Errno::INVAL)?;
    lock.l_len = 1;
    Ok(lock)
}

fn check(result: libc::c_int) -> Result<libc::c_int, Errno> {
    if result >= 0 { Ok(result) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Makes a system call, as `libc::SYS_io_uring_setup`, fail with EPERM on the calling thread and the threads it starts from
/// now on, as the default seccomp profile of container engines does.
#[cfg(test)]
pub(crate) fn deny_on_this_thread(call: libc::c_long) -> std::io::Result<()> {
    const LOAD_SYSCALL_NUMBER: u16 = 0x20;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let number = u32::try_from(call).unwrap_or(u32::MAX);
    let mut program = [
        op(LOAD_SYSCALL_NUMBER, 0, 0, 0),
        op(JUMP_IF_EQUAL, 0, 1, number),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM.cast_unsigned()),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: no memory is passed.
    let privileges = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    // SAFETY: the filter and its program live until the call returns; the kernel copies them.
    let installed =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) };
    if privileges == 0 && installed == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Gives up root on the calling thread alone.
#[cfg(test)]
pub(crate) fn become_nobody_on_this_thread() -> std::io::Result<()> {
    const NOBODY: libc::uid_t = 65534;
    // SAFETY: no memory is passed. The system call, unlike the function of the C library, is about one thread.
    let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

/// Gives the calling thread, and the processes it starts, mounts of its own.
#[cfg(test)]
pub(crate) fn own_mounts_on_this_thread() -> std::io::Result<()> {
    // SAFETY: no memory is passed, and with CLONE_FS the thread shares no file system state with others.
    let result = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_NEWNS) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
