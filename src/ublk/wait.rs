//! Waiting for the kernel, with a limit: for nodes to come, for a process to be gone, for a command that may not end.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail, ensure};
use rustix::fs::{Access, AtFlags, CWD, major, minor};
use rustix::io::Errno;

use super::abi::{self, Described, DeviceInfo, Features, State};
use super::command::CommandError;
use super::control::{Control, block_path};

/// How long nodes in /dev may take to come, and an ending device to go.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until the node is there, with the device's number and size. The device is not opened: an open waits where the
/// kernel reads the partition table of a source that does not answer, and a process that waits for its own device cannot
/// end.
///
/// # Errors
/// The node does not come, this user may not read it, or it has another size.
pub(super) fn wait_until_it_works(id: u32, size: u64) -> Result<()> {
    let sized = || {
        node_is_there(id)?;
        let sectors = std::fs::read_to_string(format!("/sys/block/ublkb{id}/size")).unwrap_or_default();
        let found = sectors.trim().parse::<u64>().ok().and_then(|sectors| sectors.checked_mul(abi::SECTOR));
        if found == Some(size) { Ok(()) } else { Err(Errno::NXIO) }
    };
    retry(PATIENCE, sized).map_err(|errno| {
        let path = block_path(id);
        match errno {
            Errno::ACCESS | Errno::PERM => {
                anyhow!("{path}: no permission to read it: its owner is set by contrib/udev's rule")
            }
            _ => anyhow!(errno).context(format!("{path}: does not work")),
        }
    })
}

/// Checks that the node of a device is there, with the device's number, and that this user may read it. It is not opened.
pub(super) fn node_is_there(id: u32) -> Result<(), Errno> {
    let path = block_path(id);
    let numbers = std::fs::read_to_string(format!("/sys/block/ublkb{id}/dev")).unwrap_or_default();
    let there =
        std::fs::metadata(&path).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    let number = format!("{}:{}", major(there.rdev()), minor(there.rdev()));
    if !there.file_type().is_block_device() || number != numbers.trim() {
        return Err(Errno::NOENT);
    }
    rustix::fs::accessat(CWD, &path, Access::READ_OK, AtFlags::EACCESS)
}

/// Whether a device can be taken over as far as is known before anything is opened.
///
/// # Errors
/// One line: it is gone, or somebody serves it.
pub(super) fn check_left(id: u32) -> Result<()> {
    let mut control = Control::open()?;
    let info = control.find(id)?;
    ensure!(
        info.state() != State::Live || !is_alive(info.ublksrv_pid),
        "{}: is served by process {}",
        block_path(id),
        info.ublksrv_pid
    );
    Ok(())
}

/// Waits until the process that had the device is gone and the kernel knows it.
pub(super) fn wait_until_left(control: &mut Control, id: u32) -> Result<DeviceInfo> {
    let until = Instant::now() + PATIENCE;
    loop {
        let info = control.find(id)?;
        ensure!(
            info.features().contains(Features::USER_RECOVERY),
            "{}: was made without --recoverable; `nbdbridge detach` removes it",
            block_path(id)
        );
        match info.state() {
            State::Quiesced | State::FailIo => return Ok(info),
            State::Live if is_alive(info.ublksrv_pid) && Instant::now() >= until => {
                bail!("{}: is served by process {}", block_path(id), info.ublksrv_pid)
            }
            state if Instant::now() >= until => {
                bail!("{}: cannot be taken over while it is {state}", block_path(id))
            }
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// An error that another attempt may not meet.
pub(super) trait MayPass {
    /// Returns whether another attempt can succeed.
    fn may_pass(&self) -> bool;
}

impl MayPass for Errno {
    fn may_pass(&self) -> bool {
        matches!(*self, Errno::NOENT | Errno::ACCESS | Errno::BUSY | Errno::NXIO | Errno::NODEV)
    }
}

impl MayPass for CommandError {
    fn may_pass(&self) -> bool {
        self.errno().is_some_and(|errno| errno.may_pass())
    }
}

/// Tries again what may succeed later.
pub(super) fn retry<T, E: MayPass>(
    patience: Duration,
    mut attempt: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let until = Instant::now() + patience;
    loop {
        match attempt() {
            Err(error) if error.may_pass() && Instant::now() < until => {
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Runs what may not come back, where that hurts nobody.
pub(super) fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> mpsc::Receiver<Result<T>> {
    let (done, result) = mpsc::channel();
    let thread = thread::Builder::new().name("ublk-control".into());
    let failed = done.clone();
    let started = thread.spawn(move || {
        let _ = done.send(work());
    });
    if let Err(error) = started {
        let _ = failed.send(Err(anyhow!(error).context("cannot start a thread")));
    }
    result
}

/// Whether a process of this number exists. The kernel says -1 once it has noticed a server's end.
pub(super) fn is_alive(pid: i32) -> bool {
    let pid = Some(pid).filter(|pid| *pid > 0).and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| !matches!(rustix::process::test_kill_process(pid), Err(Errno::SRCH)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alive() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(is_alive(own));
        // Neither "everybody" nor "my group" is a process.
        assert!(!is_alive(-1) && !is_alive(0) && !is_alive(i32::MAX));
    }
}
