//! A file system that holds still for a moment, so that a copy of its disk is whole (FIFREEZE, FITHAW).
//!
//! ```text
//!   snapshot ── spawns ──> guard: opens the mount point, syncs, freezes, says F ── waits ──> thaws, says T or L
//!             ── pipe ───────────────────────────────────────────────^
//!                        closed: thaw asked for, or whoever asked is dead       after the limit: thaw as well
//! ```
//!
//! The guard is a process of its own, in a session of its own and deaf to signals that ask it to end: whatever becomes
//! of the one that copies (a panic, kill -9, a copy that takes too long), it thaws. Should both be killed at once, the
//! next opening of the pool does ([`thaw_left`]).
//! A leaf file: the only `unsafe` is ioctl(2) and signal(2).
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// `_IOWR('X', 119, int)` and `_IOWR('X', 120, int)` of linux/fs.h.
const FIFREEZE: libc::Ioctl = request(rustix::ioctl::opcode::read_write::<libc::c_int>(b'X', 119));
const FITHAW: libc::Ioctl = request(rustix::ioctl::opcode::read_write::<libc::c_int>(b'X', 120));

/// Before it freezes, a file system writes what is dirty: storage that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(120);

/// What the guard says: it is frozen; it was thawed when that was asked for; it was thawed because the limit was over.
const FROZEN: u8 = b'F';
const THAWED: u8 = b'T';
const LATE: u8 = b'L';
/// Before a line that says why it is not frozen.
const REFUSED: u8 = b'E';

/// A file system that nobody can write to, until this is dropped, or the limit is over.
#[derive(Debug)]
pub(crate) struct Frozen {
    guard: Child,
    words: PipeReader,
    /// Closing it asks for the thaw.
    ask: Option<PipeWriter>,
    limit: Duration,
}

impl Frozen {
    /// Freezes the file system that is mounted at `point`, for at most `limit`. What is dirty is written first.
    ///
    /// # Errors
    /// One line: it cannot be frozen, or is frozen already.
    pub(crate) fn freeze(point: &Path, limit: Duration) -> Result<Self> {
        let (theirs, ask) = io::pipe().context("no pipe for the guard")?;
        let (words, their_words) = io::pipe().context("no pipe for the guard")?;
        let guard = Command::new("/proc/self/exe")
            .arg(GUARD_COMMAND)
            .arg(point)
            .arg(limit.as_millis().to_string())
            .current_dir("/")
            .stdin(theirs)
            .stdout(their_words)
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start the guard of a frozen file system")?;
        let mut frozen = Frozen { guard, words, ask: Some(ask), limit };
        match frozen.next_word(PATIENCE)? {
            Some(FROZEN) => Ok(frozen),
            Some(REFUSED) => {
                let mut line = String::new();
                // Whatever it said.
                let _ = frozen.words.read_to_string(&mut line);
                Err(anyhow!("{}: {}", point.display(), line.trim()))
            }
            Some(_) => bail!("{}: the guard ended before the file system was frozen", point.display()),
            None => {
                // It thaws as soon as it can. Waiting for it could take for ever.
                frozen.ask = None;
                bail!(
                    "{}: its dirty data is not written within {} s; try again when it is less busy",
                    point.display(),
                    PATIENCE.as_secs()
                )
            }
        }
    }

    /// Whether it is still frozen.
    ///
    /// # Errors
    /// One line: it is not, because the limit is over.
    pub(crate) fn check(&mut self) -> Result<()> {
        match self.next_word(Duration::ZERO)? {
            None => Ok(()),
            Some(_) => Err(self.late()),
        }
    }

    /// Thaws it.
    ///
    /// # Errors
    /// One line: it was thawed before, because the limit was over. What was copied may be torn.
    pub(crate) fn thaw(mut self) -> Result<()> {
        self.ask = None;
        match self.next_word(PATIENCE)? {
            Some(THAWED) => Ok(()),
            _ => Err(self.late()),
        }
    }

    fn late(&self) -> anyhow::Error {
        anyhow!(
            "the copy was not done within {:?}, for which writers may be held up; unmount the volume, allow more \
             (--freeze-limit), or have the pool on a file system with reflinks (xfs, btrfs)",
            self.limit
        )
    }

    /// What the guard says within this time. At its end without a word: a zero.
    fn next_word(&mut self, patience: Duration) -> Result<Option<u8>> {
        if !readable(&self.words, patience)? {
            return Ok(None);
        }
        let mut word = [0];
        let count = self.words.read(&mut word).context("the guard of the frozen file system")?;
        Ok(Some(if count == 0 { 0 } else { word[0] }))
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.ask = None;
        // It ends at once, unless it waits for storage: that is not waited for.
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(self.guard.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// The hidden command of the guard: `nbdbridge GUARD_COMMAND POINT MILLISECONDS`.
pub(crate) const GUARD_COMMAND: &str = "guard-frozen";

/// The guard's life. Its standard input is the pipe that is closed when it is to thaw.
///
/// # Errors
/// That of writing to whoever started it.
pub(crate) fn guard(point: &Path, limit: Duration) -> Result<()> {
    // The terminal's Ctrl-C, and a service manager that ends all processes of a service, are for the one that copies.
    let _ = rustix::process::setsid();
    for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP, libc::SIGTERM] {
        // SAFETY: ignoring a signal runs no code of ours; this process has no handler for it.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // A pipe to whoever started it, and no words for people.
    #[allow(clippy::disallowed_methods)]
    let mut out = io::stdout();
    let folder = match File::open(point).map_err(|error| error.to_string()).and_then(|folder| {
        // Less is left to be written while everybody waits.
        rustix::fs::syncfs(&folder).map_err(|errno| io::Error::from(errno).to_string())?;
        freeze_soon(&folder).map_err(explain)?;
        Ok(folder)
    }) {
        Ok(folder) => folder,
        Err(why) => {
            out.write_all(&[REFUSED])?;
            writeln!(out, "{why}")?;
            return Ok(());
        }
    };
    let told = out.write_all(&[FROZEN]).and_then(|()| out.flush());
    let asked = told.is_ok() && readable(&io::stdin(), limit).unwrap_or(true);
    thaw(&folder).context("cannot thaw it")?;
    out.write_all(&[if asked { THAWED } else { LATE }]).and_then(|()| out.flush()).context("nobody listens")
}

/// Thaws what was left frozen by processes that were killed. True where it was.
///
/// # Errors
/// The operating system's.
pub(crate) fn thaw_left(point: &Path) -> io::Result<bool> {
    match thaw(&File::open(point)?) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn explain(errno: Errno) -> String {
    match errno {
        Errno::BUSY => "is frozen already; thaw it first: fsfreeze --unfreeze".to_owned(),
        Errno::OPNOTSUPP => "this file system cannot be frozen; unmount it first".to_owned(),
        errno => format!("cannot be frozen: {}", io::Error::from(errno)),
    }
}

/// Freezes it; where the guard of a copy that was just interrupted is about to thaw it, after that.
fn freeze_soon(folder: &File) -> Result<(), Errno> {
    let until = Instant::now() + Duration::from_secs(3);
    loop {
        match freeze(folder) {
            Err(Errno::BUSY) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            other => return other,
        }
    }
}

fn freeze(folder: &File) -> Result<(), Errno> {
    ioctl(folder, FIFREEZE)
}

fn thaw(folder: &File) -> Result<(), Errno> {
    ioctl(folder, FITHAW)
}

fn ioctl(file: &File, request: libc::Ioctl) -> Result<(), Errno> {
    // SAFETY: both requests take no memory: their argument is not looked at.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, 0) };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO))
}

/// The C library's type for a request number: it differs in width between libraries.
#[allow(clippy::cast_lossless)]
const fn request(opcode: u32) -> libc::Ioctl {
    opcode as libc::Ioctl
}

/// Waits until there is something to read, or nobody is left to write it.
fn readable(file: &impl AsFd, patience: Duration) -> io::Result<bool> {
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let limit = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&limit)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_requests_are_the_kernels() {
        assert_eq!(FIFREEZE & 0xffff_ffff, 0xc004_5877);
        assert_eq!(FITHAW & 0xffff_ffff, 0xc004_5878);
    }

    #[test]
    fn what_is_not_frozen_need_not_be_thawed() {
        let folder = tempfile::tempdir().unwrap();
        // Without the right to it the kernel does not say.
        match thaw_left(folder.path()) {
            Ok(thawed) => assert!(!thawed),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
        }
        assert!(thaw_left(&folder.path().join("none")).is_err());
        assert!(explain(Errno::BUSY).contains("frozen already"));
        assert!(explain(Errno::PERM).contains("not permitted"));
    }

    #[test]
    fn a_pipe_tells_when_it_is_closed() {
        let (reader, writer) = io::pipe().unwrap();
        assert!(!readable(&reader, Duration::from_millis(1)).unwrap());
        drop(writer);
        assert!(readable(&reader, Duration::from_secs(60)).unwrap());
    }
}
