//! A server in the eyes of a process that watches over it: what it has told, that it has ended, and a way to tell it to
//! end. Whether it is a child of the watcher or not.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};

use super::signals::{Heard, Signals};
use super::supervise::Told;

/// How soon the end of a server that is no child is noticed; that of a child is heard at once.
const LOOK: Duration = Duration::from_millis(200);

/// A server that is watched.
pub(super) struct Watched {
    pid: Pid,
    /// None where it has ended already.
    handle: Option<OwnedFd>,
    /// Its words; the end of them is its end.
    pipe: File,
    said: Vec<u8>,
    /// A child of this process.
    child: bool,
}

/// How a server ended.
pub(super) struct Ended {
    pub(super) pid: i32,
    /// Its own, where it was a child.
    pub(super) code: ExitCode,
    /// It had been told to.
    pub(super) stop: bool,
}

impl Watched {
    /// The server of this number, which speaks through `pipe`.
    pub(super) fn new(pid: Pid, pipe: OwnedFd, child: bool) -> Result<Self> {
        rustix::io::ioctl_fionbio(&pipe, true).context("cannot watch the server")?;
        Ok(Watched { pid, handle: handle_of(pid)?, pipe: File::from(pipe), said: Vec::new(), child })
    }

    /// Its number as a process.
    pub(super) fn number(&self) -> i32 {
        self.pid.as_raw_pid()
    }

    /// What it has told so far.
    pub(super) fn told(&self) -> Told {
        Told::from(&self.said)
    }

    /// Takes in what it has told. False once it has ended.
    pub(super) fn hear(&mut self) -> Result<bool> {
        loop {
            let mut words = [0; 64];
            match self.pipe.read(&mut words) {
                Ok(0) => return Ok(false),
                Ok(count) => self.said.extend_from_slice(&words[..count]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("cannot hear the server"),
            }
        }
    }

    /// Waits until it says something, it ends, or `other` does.
    pub(super) fn wait_beside(&self, other: &OwnedFd) -> Result<()> {
        let mut both =
            [PollFd::new(&self.pipe, PollFlags::IN), PollFd::from_borrowed_fd(other.as_fd(), PollFlags::IN)];
        match poll(&mut both, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno).context("cannot watch the server"),
        }
    }

    /// Waits for its end, and passes on what this process is told.
    pub(super) fn until_it_ends(mut self, signals: &Signals) -> Result<(Ended, Told)> {
        let mut stop = false;
        while self.hear()? {
            if signals.wait(LOOK) == Heard::Stop {
                stop = true;
                if let Some(handle) = &self.handle {
                    let _ = pidfd_send_signal(handle, Signal::TERM);
                }
            }
        }
        let status = if self.child { waitpid(Some(self.pid), WaitOptions::empty())? } else { None };
        let code = status.and_then(|(_, status)| status.exit_status());
        let code = code.and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from);
        Ok((Ended { pid: self.pid.as_raw_pid(), code, stop }, self.told()))
    }
}

/// A process to be watched; None where there is none of this number.
pub(super) fn handle_of(pid: Pid) -> Result<Option<OwnedFd>> {
    match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(handle) => Ok(Some(handle)),
        Err(Errno::SRCH) => Ok(None),
        Err(errno) => Err(errno).context("cannot watch a process"),
    }
}

/// Whether a process has ended.
pub(super) fn has_ended(handle: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&now)) == Ok(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::{PipeFlags, pipe_with};
    use std::io::Write;

    #[test]
    // It is waited for, by its number.
    #[allow(clippy::zombie_processes)]
    fn words_and_the_end_of_a_server() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = Pid::from_child(&child);
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut writer = File::from(writer);
        let mut server = Watched::new(pid, reader, true).unwrap();
        assert!(server.hear().unwrap());
        assert_eq!(server.told(), Told::default());
        writer.write_all(b"D\x07\0\0").unwrap();
        assert!(server.hear().unwrap());
        assert_eq!(server.told().device, None);
        writer.write_all(b"\0G").unwrap();
        let handle = handle_of(pid).unwrap().unwrap();
        assert!(!has_ended(&handle));
        child.kill().unwrap();
        server.wait_beside(&handle).unwrap();
        drop(writer);
        let signals = Signals::block().unwrap();
        let (ended, told) = server.until_it_ends(&signals).unwrap();
        signals.restore();
        assert_eq!((told.device, told.gone, ended.stop), (Some(7), true, false));
        assert!(has_ended(&handle));
        assert!(handle_of(pid).unwrap().is_none());
    }
}
