//! Loop devices (linux/loop.h): set up over a file, told a new size, detached.
//! A leaf file: the only `unsafe` is ioctl(2).
#![allow(unsafe_code)]

use std::cell::Cell;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::ublk::openers;

const LOOP_CONTROL: &str = "/dev/loop-control";
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Somebody else may take the free device first; so often it is tried again.
const ATTEMPTS: u32 = 32;

/// struct loop_info64.
#[repr(C)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// struct loop_config, Linux 5.8.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A loop device of ours.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    path: PathBuf,
    attached: Cell<bool>,
}

impl LoopDevice {
    /// Finds a free device and sets it up over `file`: with direct I/O, without a partition scan.
    ///
    /// # Errors
    /// One line: no loop devices here, none is free, the kernel refuses.
    pub(crate) fn attach(file: &Path, read_only: bool) -> Result<Self> {
        let backing = OpenOptions::new().read(true).write(!read_only).open(file);
        let backing = backing.with_context(|| format!("{}: cannot open it", file.display()))?;
        let control = OpenOptions::new().read(true).write(true).open(LOOP_CONTROL);
        let control = control.with_context(|| {
            format!("{LOOP_CONTROL}: this host has no loop devices (modprobe loop), or the container may not use them")
        })?;
        for _ in 0..ATTEMPTS {
            let number = ioctl(&control, LOOP_CTL_GET_FREE, 0).context("no free loop device")?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = open_device(&path, !read_only)?;
            match configure(&device, &backing, read_only) {
                Ok(()) => return Ok(LoopDevice { path, attached: Cell::new(true) }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("{}: cannot set it up", path.display()));
                }
            }
        }
        bail!("every free loop device was taken by somebody else; try again")
    }

    /// The device's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets go of the file; where the device is in use, as soon as it is not. Once only.
    pub(crate) fn detach(&self) {
        if !self.attached.replace(false) {
            return;
        }
        if let Err(error) = detach(&self.path) {
            tracing::warn!("{}: cannot detach it: {error}", self.path.display());
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Lets go of what a loop device stands upon; where it is in use, as soon as it is not.
///
/// # Errors
/// The kernel's. A device that is detached already is no error.
pub(crate) fn detach(path: &Path) -> io::Result<()> {
    let device = File::open(path)?;
    match ioctl(&device, LOOP_CLR_FD, 0) {
        Err(error) if error.raw_os_error() != Some(libc::ENXIO) => Err(error),
        _ => Ok(()),
    }
}

/// The file that a loop device stands upon.
pub(crate) fn backing_file(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let text = fs::read(format!("/sys/block/{name}/loop/backing_file")).ok()?;
    let text = text.strip_suffix(b"\n").unwrap_or(&text);
    Some(PathBuf::from(OsString::from_vec(text.to_vec())))
}

/// Whether somebody would be hurt by the device's end: it is mounted, swapped to, part of another device, or another
/// process has it open.
pub(crate) fn in_use(path: &Path) -> bool {
    is_claimed(path) || !openers(path).is_empty()
}

fn is_claimed(path: &Path) -> bool {
    let alone = OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path);
    alone.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
}

/// Words for that use.
pub(crate) fn describe_use(path: &Path) -> String {
    let mounts = crate::fuse::Mounted::all().unwrap_or_default();
    match mounts.iter().find(|mounted| Path::new(&mounted.source) == path) {
        Some(mounted) => format!("mounted at {}", mounted.point.display()),
        None => match openers(path).into_iter().next() {
            Some(opener) => opener,
            None => "mounted elsewhere, or part of another device".to_owned(),
        },
    }
}

/// Makes a device as large as its file has become.
pub(super) fn tell_size(device: &Path, file: &Path) -> io::Result<()> {
    // The kernel believes the size that it has seen last: let it look.
    fs::metadata(file)?;
    ioctl(&File::open(device)?, LOOP_SET_CAPACITY, 0).map(drop)
}

fn open_device(path: &Path, write: bool) -> Result<File> {
    // The device file of a new device may be made by udev, which takes a moment.
    for _ in 0..20 {
        match OpenOptions::new().read(true).write(write).open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                std::thread::sleep(Duration::from_millis(50));
            }
            opened => return opened.with_context(|| format!("{}: cannot open it", path.display())),
        }
    }
    bail!("{}: the kernel has it, but /dev does not; give the container more loop devices", path.display())
}

fn configure(device: &File, backing: &File, read_only: bool) -> io::Result<()> {
    // SAFETY: the structure is made of integers, for which all zeroes is a value.
    let mut config: LoopConfig = unsafe { std::mem::zeroed() };
    config.fd = u32::try_from(backing.as_raw_fd()).unwrap_or(u32::MAX);
    config.info.flags = LO_FLAGS_DIRECT_IO | if read_only { LO_FLAGS_READ_ONLY } else { 0 };
    // SAFETY: LOOP_CONFIGURE reads a loop_config through its argument, which lives until the call returns.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, &raw const config) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An ioctl that takes a number.
fn ioctl(fd: impl AsFd, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the requests of this file that come here take a number, and touch no memory.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, argument) };
    if result >= 0 { Ok(result) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_are_the_kernels() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }

    #[test]
    fn a_plain_file_is_no_device_in_use() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(!in_use(file.path()));
        assert_eq!(backing_file(file.path()), None);
        assert!(detach(file.path()).is_err());
    }
}
