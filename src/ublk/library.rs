//! What `UblkCtrl` does for this door: it stops, deletes, resizes and begins to recover devices, and opens them as `UblkDev`.
//!
//! `UblkCtrl` waits without a limit, gives up when a signal comes, prints on stderr, reads a record of its own below
//! /run/ublksrvd, and may tell another error than the kernel's. So its commands run in a child (`apart`), and what opens a
//! device runs on a thread that has descriptors of its own and takes no signals. Never used: `UblkCtrlBuilder`, which
//! deletes a living device that has the number it is to make; `start_dev`, which names the process that calls it, here the
//! child; `configure_queue`, which writes that record.
//! A leaf file: the only `unsafe` is unshare(2).
#![allow(unsafe_code)]

use std::fs;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use libublk::UblkError;
use libublk::ctrl::UblkCtrl;
use libublk::io::UblkDev;
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, accessat};
use rustix::io::Errno;
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};
use rustix::thread::UnshareFlags;

use super::abi::{self, Command, DeviceInfo, SECTOR};
use super::command::{Call, CommandRing};
use super::control::{block_path, character_path};
use super::signals;
use super::wait::{PATIENCE, retry};

/// How often a command is sent again that a signal has interrupted.
const ATTEMPTS: usize = 100;

/// Bytes of a record of libublk at most that is taken for one.
const MAX_RECORD: u64 = 1 << 20;

/// Returns whether `UblkCtrl` sends this command, for this device.
pub(super) fn sends(command: Command, id: u32) -> bool {
    const ITS: [Command; 5] =
        [abi::STOP_DEV, abi::DEL_DEV, abi::DEL_DEV_ASYNC, abi::START_USER_RECOVERY, abi::UPDATE_SIZE];
    ITS.contains(&command) && odd_record(id).is_none()
}

/// Sends a command by `UblkCtrl`, without a limit: in a child whose stderr leads nowhere.
///
/// # Errors
/// The kernel's refusal. Where that is EOPNOTSUPP, it can stand for another: libublk sends what is refused once more, as
/// older kernels want it.
pub(super) fn send(ring: &mut CommandRing, call: &Call) -> Result<(), Errno> {
    let mut done = Err(Errno::AGAIN);
    for _ in 0..ATTEMPTS {
        // A new ring each time: what was interrupted is answered on the last one.
        (done, _) = ring.lend(|| send_once(call))?;
        if done != Err(Errno::AGAIN) {
            break;
        }
    }
    done
}

fn send_once(call: &Call) -> Result<(), Errno> {
    let ctrl = UblkCtrl::new_simple(number(call.id)?).map_err(errno)?;
    let done = match call.command {
        abi::STOP_DEV => ctrl.kill_dev(),
        abi::DEL_DEV => ctrl.del_dev(),
        abi::DEL_DEV_ASYNC => ctrl.del_dev_async(),
        abi::START_USER_RECOVERY => ctrl.start_user_recover(),
        abi::UPDATE_SIZE => ctrl.update_size(call.data * SECTOR),
        _ => return Err(Errno::NOSYS),
    };
    match done {
        // EBUSY is a success there.
        Ok(refused) if refused < 0 => Err(Errno::from_raw_os_error(-refused)),
        Ok(_) => Ok(()),
        Err(error) => Err(errno(error)),
    }
}

/// Opens /dev/ublkcN of a device that this process has made or takes over, once the node is there.
///
/// # Errors
/// The node does not come or cannot be opened, or the kernel has not answered within `limit`.
pub(super) fn open(info: &DeviceInfo, limit: Duration) -> Result<UblkDev> {
    let (id, path) = (info.dev_id, character_path(info.dev_id));
    retry(PATIENCE, || accessat(CWD, &path, Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS))
        .with_context(|| format!("cannot open {path}"))?;
    if let Some(odd) = odd_record(id) {
        return Err(anyhow!("{}: is no record of libublk: remove it", odd.display()));
    }
    let (told, answer) = mpsc::channel();
    let thread = thread::Builder::new().name("ublk-open".into());
    let ask = move || {
        let _ = told.send(describe(id));
    };
    thread.spawn(ask).context("cannot start a thread")?;
    let ctrl = answer
        .recv_timeout(limit)
        .map_err(|_| anyhow!("{}: the kernel has not answered for {limit:?}", block_path(id)))?
        .with_context(|| block_path(id))?;
    ensure!(ctrl.dev_info().dev_id == id, "{}: the kernel describes another device", block_path(id));
    // It tries for three seconds, and calls every failure EACCES.
    let opened = retry(PATIENCE, || UblkDev::new("nbdbridge".into(), |_| Ok(()), &ctrl).map_err(errno));
    opened.with_context(|| format!("cannot open {path}"))
}

/// Asks the kernel about a device, as `UblkDev` wants it. The thread ends with its descriptors: its standard streams lead
/// nowhere, and nobody else's. The answer is not dropped, because its descriptor has a number of that thread.
fn describe(id: u32) -> Result<ManuallyDrop<UblkCtrl>, Errno> {
    signals::block_all();
    // SAFETY: no memory is passed; the thread, which owns none of the process's descriptors, gets copies of them.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES)? };
    silence()?;
    let mut ctrl = Err(Errno::AGAIN);
    for _ in 0..ATTEMPTS {
        (ctrl, _) = CommandRing::default()
            .lend(|| number(id).and_then(|id| UblkCtrl::new_simple(id).map_err(errno)))?;
        if !matches!(ctrl, Err(Errno::AGAIN)) {
            break;
        }
    }
    ctrl.map(ManuallyDrop::new)
}

/// Leads the standard streams nowhere.
pub(super) fn silence() -> Result<(), Errno> {
    let nowhere = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    dup2_stdin(&nowhere)?;
    dup2_stdout(&nowhere)?;
    dup2_stderr(&nowhere)?;
    // In a process that has no others it is one of them itself.
    if nowhere.as_raw_fd() <= 2 {
        std::mem::forget(nowhere);
    }
    Ok(())
}

/// Returns the path of a device's record where libublk must not read it: the folder may be everybody's, and what is no
/// short file could hold the reader up.
fn odd_record(id: u32) -> Option<PathBuf> {
    odd_file(PathBuf::from(format!("{}/{id:04}.json", UblkCtrl::run_dir())))
}

fn odd_file(path: PathBuf) -> Option<PathBuf> {
    let found = fs::symlink_metadata(&path).ok()?;
    (!found.is_file() || found.len() > MAX_RECORD).then_some(path)
}

fn number(id: u32) -> Result<i32, Errno> {
    i32::try_from(id).map_err(|_| Errno::INVAL)
}

fn errno(error: UblkError) -> Errno {
    match error {
        UblkError::UringIOError(errno) | UblkError::OtherError(errno) => Errno::from_raw_os_error(-errno),
        UblkError::IOError(error) => Errno::from_io_error(&error).unwrap_or(Errno::IO),
        UblkError::InvalidVal => Errno::INVAL,
        _ => Errno::IO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_the_kernels() {
        assert_eq!(errno(UblkError::UringIOError(-19)), Errno::NODEV);
        assert_eq!(errno(UblkError::OtherError(-16)), Errno::BUSY);
        assert_eq!(errno(UblkError::IOError(Errno::NOMEM.into())), Errno::NOMEM);
        assert_eq!(errno(UblkError::InvalidVal), Errno::INVAL);
    }

    #[test]
    fn what_is_no_record_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assert_eq!(odd_file(path("missing")), None);
        fs::write(path("record"), "{}").unwrap();
        assert_eq!(odd_file(path("record")), None);
        std::os::unix::fs::symlink("record", path("link")).unwrap();
        assert_eq!(odd_file(path("link")), Some(path("link")));
        fs::File::create(path("large")).unwrap().set_len(MAX_RECORD + 1).unwrap();
        assert_eq!(odd_file(path("large")), Some(path("large")));
    }

    #[test]
    fn a_thread_that_is_silent_silences_no_other() {
        let before = fs::read_link("/proc/self/fd/2").unwrap();
        let there = thread::spawn(|| {
            // SAFETY: as in `describe`.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES).unwrap() };
            silence().unwrap();
            fs::read_link("/proc/thread-self/fd/2").unwrap()
        });
        assert_eq!(there.join().unwrap(), PathBuf::from("/dev/null"));
        assert_eq!(fs::read_link("/proc/self/fd/2").unwrap(), before);
    }
}
