//! Going to the background (`--fork`), and the announcement that the server is ready.
//!
//! ```text
//!   parent: fork ── waits on a pipe ───────────────────────┐ exit 0
//!   child:  └─ opens, binds, starts threads ─ announce ────┘ new session, stdio to /dev/null, serves
//! ```
//!
//! Until it is ready the child has the parent's terminal: it prints its own lines and errors there, and a Ctrl-C
//! ends both. Where it ends before it is ready, the parent ends with its status.
//! A signal to the parent is passed on to the child, and the parent ends by it when the child has ended.
//! A leaf file: the only `unsafe` is fork(2) and the C library's signal sets.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, getpid, kill_process, setsid, waitpid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use crate::output;
use crate::pid_file::PidFile;
use crate::systemd;

/// A server that is not ready by then never will be: to check a large image may take minutes.
const START_LIMIT_SECONDS: i64 = 900;

/// Tells scripts, the service manager and the waiting parent process that clients can connect.
#[derive(Debug)]
#[must_use = "the parent waits for the announcement"]
pub(crate) struct Ready {
    /// The background process's end of the pipe, and whether it keeps stderr.
    parent: Option<(OwnedFd, bool)>,
    /// Prints nothing and writes no file.
    silent: bool,
    /// The file that gets the process number.
    pid_file: Option<Rc<PidFile>>,
}

/// Who returns from [`fork`].
#[derive(Debug)]
pub(crate) enum Forked {
    /// The process that was started; its work is done, and this is its exit status.
    Parent(ExitCode),
    /// The process that serves.
    Child(Ready),
}

/// Splits the process in two; the parent returns when the child is ready or has ended. `keep_stderr` leaves the
/// child its stderr, for logs. `clean_up` is told the number of a child that was killed before it was ready.
///
/// # Errors
/// The process has threads already (they would be missing in the child), or the operating system refuses.
pub(crate) fn fork(keep_stderr: bool, clean_up: impl FnOnce(u32)) -> Result<Forked> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("no pipe for --fork")?;
    let signals = Signals::hold().context("cannot hold signals for --fork")?;
    match split()? {
        None => {
            drop(reader);
            drop(signals);
            Ok(Forked::Child(Ready { parent: Some((writer, keep_stderr)), silent: false, pid_file: None }))
        }
        Some(child) => {
            drop(writer);
            wait_for(reader, child, &signals, clean_up).map(Forked::Parent)
        }
    }
}

/// Splits the process in two. The parent gets the child's number.
///
/// # Errors
/// The process has threads already (they would be missing in the child), or the operating system refuses.
pub(crate) fn split() -> Result<Option<Pid>> {
    let tasks = std::fs::read_dir("/proc/self/task").context("cannot count the threads")?;
    // io_uring's workers run nothing of ours, and a child has none of them.
    let worker = |folder: &Path| {
        std::fs::read_to_string(folder.join("comm")).is_ok_and(|name| name.starts_with("iou-wrk-"))
    };
    let threads = tasks.flatten().filter(|task| !worker(&task.path())).count();
    if threads != 1 {
        bail!("a process must be split before it has threads, and there are {threads}");
    }
    // What waits in the buffer would be printed by both.
    output::flush();
    systemd::before_fork();
    // SAFETY: the process has one thread (checked above), so that the child starts with no lock held elsewhere
    // and may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()).context("cannot fork"),
        child => Ok(Pid::from_raw(child)),
    }
}

/// Leaves session and terminal.
///
/// # Errors
/// The operating system's.
pub(crate) fn leave_terminal(keep_stderr: bool) -> Result<()> {
    setsid().context("cannot leave the session")?;
    let null = File::options().read(true).write(true).open("/dev/null").context("cannot open /dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    if !keep_stderr {
        dup2_stderr(&null)?;
    }
    Ok(())
}

fn wait_for(reader: OwnedFd, child: Pid, signals: &Signals, clean_up: impl FnOnce(u32)) -> Result<ExitCode> {
    let limit = Timespec { tv_sec: START_LIMIT_SECONDS, tv_nsec: 0 };
    let mut told = None;
    let said = loop {
        let mut fds = [PollFd::new(&reader, PollFlags::IN), PollFd::new(&signals.fd, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error).context("cannot wait for the server"),
            Ok(0) => break false,
            Ok(_) => {}
        }
        let is_said = !fds[0].revents().is_empty();
        if let Some(signal) = signals.next() {
            told = Some(signal);
            // At worst it has ended meanwhile.
            let _ = kill_process(child, signal);
        }
        if is_said {
            break true;
        }
    };
    if !said {
        // At worst it has ended meanwhile.
        let _ = kill_process(child, Signal::KILL);
        bail!("the server was not ready within {START_LIMIT_SECONDS} s, and was killed");
    }
    let mut word = [0; 1];
    let ready = matches!(File::from(reader).read(&mut word), Ok(1));
    if ready && told.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    // The pipe was closed unused, and the child has said why; or it has been told to end.
    let status = loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            other => break other.context("cannot learn how the server ended")?,
        }
    };
    let status = status.map(|(_, status)| (status.exit_status(), status.terminating_signal()));
    if let Some((_, Some(_))) = status {
        clean_up(child.as_raw_nonzero().get().unsigned_abs());
    }
    if let Some(signal) = told {
        signals.die_of(signal);
    }
    match status {
        Some((Some(code), _)) if code != 0 => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
        Some((_, Some(signal))) => bail!("the server was ended by signal {signal} before it was ready"),
        _ => bail!("the server ended before it was ready"),
    }
}

/// The signals that end a process, held back while a server starts: who tells its parent tells the server, also in the moment
/// in which it becomes ready. Dropped, they are as they were.
struct Signals {
    fd: OwnedFd,
    before: libc::sigset_t,
}

impl Signals {
    fn hold() -> io::Result<Self> {
        // SAFETY: sigset_t is a plain C structure, for which all zeroes is a value; each call writes into one of ours, and
        // the descriptor is new.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut before: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
                libc::sigaddset(&raw mut set, signal.as_raw());
            }
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = OwnedFd::from_raw_fd(fd);
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, &raw mut before) != 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Signals { fd, before })
        }
    }

    /// Takes the one that came first.
    fn next(&self) -> Option<Signal> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        rustix::io::read(&self.fd, &mut info).ok()?;
        // ssi_signo comes first (signalfd(2)).
        let number = u32::from_ne_bytes(*info.first_chunk()?);
        Signal::from_named_raw(i32::try_from(number).ok()?)
    }

    /// Ends this process by a signal, as if it had never been held.
    fn die_of(&self, signal: Signal) {
        self.restore();
        let _ = kill_process(getpid(), signal);
    }

    fn restore(&self) {
        // SAFETY: the set is read.
        unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        self.restore();
    }
}

impl Ready {
    /// Announces a server that stays in the foreground.
    pub(crate) fn foreground() -> Self {
        Ready { parent: None, silent: false, pid_file: None }
    }

    /// Announces a server that takes over from another one, whose lines have been printed.
    pub(crate) fn silent() -> Self {
        Ready { parent: None, silent: true, pid_file: None }
    }

    /// Writes `pid_file` with the announcement.
    pub(crate) fn with_pid_file(self, pid_file: Rc<PidFile>) -> Self {
        Ready { pid_file: Some(pid_file), ..self }
    }

    /// Returns the file that gets the process number. It is removed when the last owner drops it.
    pub(crate) fn pid_file(&self) -> Option<Rc<PidFile>> {
        self.pid_file.clone()
    }

    /// Writes the pid file and prints `lines` on stdout; then a background process leaves its terminal and lets its
    /// parent end. The doors are open: a script that sees any of this can connect. May be called with threads running.
    /// `must_print` says that the lines are the command's result, which whoever started it cannot do without.
    ///
    /// # Errors
    /// The pid file cannot be written, the lines cannot be printed although they must be, the background process cannot
    /// leave its terminal, or its parent is gone.
    pub(crate) fn announce(self, lines: &[OsString], must_print: bool) -> Result<()> {
        // First: a script that has read a line may look for the file at once.
        if let Some(pid_file) = &self.pid_file {
            pid_file.publish()?;
        }
        if !self.silent
            && let Err(error) = output::places(lines)
        {
            if must_print {
                return Err(error);
            }
            tracing::warn!("{error:#}");
        }
        if let Some((_, keep_stderr)) = &self.parent {
            leave_terminal(*keep_stderr)?;
        }
        // Without a service manager this does nothing, and one that does not listen is no reason to end.
        let _ = systemd::notify("READY=1");
        match self.parent {
            // Last, so that whoever waits for the end of our output finds it.
            Some((parent, _)) => {
                File::from(parent).write_all(b"R").context("whoever started the server is gone")
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_fork_among_threads() {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        let error = fork(false, |_| ()).unwrap_err();
        assert!(format!("{error}").contains("threads"), "{error}");
        drop(done);
        assert!(other.join().unwrap().is_err());
    }
}
