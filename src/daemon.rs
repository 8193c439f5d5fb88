//! Going to the background (`--fork`) and the file with the process number (`--pid-file`).
//!
//! ```text
//!   parent: fork ── waits on a pipe ───────────────────────┐ exit 0
//!   child:  └─ opens, binds, starts threads ─ announce ────┘ new session, stdio to /dev/null, serves
//! ```
//!
//! Until it is ready the child has the parent's terminal: it prints its own lines and errors there, and a Ctrl-C
//! ends both. Where it ends before it is ready, the parent ends with its status.
//! A leaf file: the only `unsafe` is fork(2).
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions, setsid, waitpid};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

/// What is left of the wish to tell somebody that clients can connect.
#[derive(Debug)]
#[must_use = "the parent waits for the announcement"]
pub(crate) struct Ready {
    /// The background process's end of the pipe, and whether it keeps stderr.
    parent: Option<(OwnedFd, bool)>,
    /// Nobody is to be told.
    silent: bool,
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
/// child its stderr, for logs.
///
/// # Errors
/// The process has threads already (they would be missing in the child), or the operating system refuses.
pub(crate) fn fork(keep_stderr: bool) -> Result<Forked> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("no pipe for --fork")?;
    match split()? {
        None => {
            drop(reader);
            Ok(Forked::Child(Ready { parent: Some((writer, keep_stderr)), silent: false }))
        }
        Some(child) => {
            drop(writer);
            wait_for(reader, child).map(Forked::Parent)
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
    io::stdout().flush().ok();
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

fn wait_for(reader: OwnedFd, child: Pid) -> Result<ExitCode> {
    let mut word = [0; 1];
    if matches!(File::from(reader).read(&mut word), Ok(1)) {
        return Ok(ExitCode::SUCCESS);
    }
    // The pipe was closed unused: the child has ended or is about to, and has said why.
    let status = loop {
        match waitpid(Some(child), WaitOptions::empty()) {
            Err(Errno::INTR) => {}
            other => break other.context("cannot learn how the server ended")?,
        }
    };
    match status.map(|(_, status)| (status.exit_status(), status.terminating_signal())) {
        Some((Some(code), _)) if code != 0 => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
        Some((_, Some(signal))) => bail!("the server was ended by signal {signal} before it was ready"),
        _ => bail!("the server ended before it was ready"),
    }
}

impl Ready {
    /// For a process that stays where it is.
    pub(crate) fn foreground() -> Self {
        Ready { parent: None, silent: false }
    }

    /// For one that takes over from another, whose lines have been printed.
    pub(crate) fn silent() -> Self {
        Ready { parent: None, silent: true }
    }

    /// Prints the lines for people and scripts on stdout; then a background process leaves its terminal and lets
    /// its parent go. May be called with threads running.
    ///
    /// # Errors
    /// The background process cannot leave its terminal, or its parent is gone.
    pub(crate) fn announce(self, lines: &[String]) -> Result<()> {
        if self.silent {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        for line in lines {
            // Whoever started us may not want to hear it.
            if writeln!(out, "{line}").is_err() {
                break;
            }
        }
        out.flush().ok();
        let Some((parent, keep_stderr)) = self.parent else { return Ok(()) };
        leave_terminal(keep_stderr)?;
        // Last, so that whoever waits for the end of our output finds it.
        File::from(parent).write_all(b"R").context("whoever started the server is gone")
    }
}

/// A file with our process number, removed when dropped.
#[derive(Debug)]
pub(crate) struct PidFile {
    path: PathBuf,
    content: String,
}

impl PidFile {
    /// Writes the file; readers see the old one or the whole new one. After a fork, in the child.
    ///
    /// # Errors
    /// One line that names the path.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).with_context(|| format!("--pid-file {}", path.display()))?;
        let content = format!("{}\n", std::process::id());
        let cannot = || format!("{}: cannot write the process number there", path.display());
        // A rename would replace what is there, and nobody wants to lose /dev/null, or an image.
        match path.metadata() {
            Ok(there) if !there.is_file() => {
                bail!("{}: not an ordinary file; give --pid-file another name", path.display())
            }
            Ok(there) => check_old(&path, there.len())?,
            Err(_) => {}
        }
        let mut new = path.clone().into_os_string();
        new.push(format!(".{}", std::process::id()));
        let new = PathBuf::from(new);
        let written = std::fs::write(&new, &content).and_then(|()| std::fs::rename(&new, &path));
        if written.is_err() {
            // The first error is the one to tell.
            let _ = std::fs::remove_file(&new);
        }
        written.with_context(cannot)?;
        Ok(PidFile { path, content })
    }
}

/// Refuses to replace what is no process number, or the one of a server that runs.
fn check_old(path: &Path, len: u64) -> Result<()> {
    let text = if len <= 32 { std::fs::read_to_string(path).unwrap_or_default() } else { String::from("?") };
    let number = text.trim();
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        bail!("{}: exists and holds no process number; give --pid-file another name", path.display());
    }
    let name = std::fs::read_to_string(format!("/proc/{number}/comm")).unwrap_or_default();
    if !number.is_empty()
        && name.trim_end() == env!("CARGO_PKG_NAME")
        && number != std::process::id().to_string()
    {
        bail!("{}: process {number} runs with it; give --pid-file another name", path.display());
    }
    Ok(())
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // A successor may have put its own number there.
        if std::fs::read_to_string(&self.path).is_ok_and(|content| content == self.content) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_comes_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pid");
        std::fs::write(&path, "99999999\n").unwrap();
        let file = PidFile::create(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_successors_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pid");
        let file = PidFile::create(&path).unwrap();
        std::fs::write(&path, "1\n").unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn what_is_no_process_number_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        for content in ["precious\n".to_owned(), "12 34".to_owned(), "7".repeat(100)] {
            std::fs::write(&path, &content).unwrap();
            let error = format!("{:#}", PidFile::create(&path).unwrap_err());
            assert!(error.contains("holds no process number"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
        std::fs::write(&path, "").unwrap();
        drop(PidFile::create(&path).unwrap());
    }

    #[test]
    fn a_folder_that_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("no/x.pid"), folder.path().to_owned(), "/dev/null".into()] {
            let error = format!("{:#}", PidFile::create(&path).unwrap_err());
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn no_fork_among_threads() {
        let (done, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        let error = fork(false).unwrap_err();
        assert!(format!("{error}").contains("threads"), "{error}");
        drop(done);
        assert!(other.join().unwrap().is_err());
    }
}
