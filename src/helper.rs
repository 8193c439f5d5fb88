//! System calls that may wait for a FUSE server, made by a child process with a time limit.
//!
//! A process that serves a FUSE file must not make a system call on that file, or on the loop device above it: when the
//! process is killed during the call, the call waits for an answer that only the process could give, and neither ends. A
//! process that serves nothing must not wait for a server that is stopped. Both start this program once more, with one task.
//!
//! ```text
//!   caller ── /proc/self/exe helper-process TASK ARGUMENT... ──> helper: the system calls
//!          <── stdout: `+` and the result, or `-`, the errno and a line ──
//! ```
//!
//! The tasks themselves are in `tasks`. A helper that does not answer in time is killed, and left behind where the kernel
//! does not let it go: it ends when its system call returns.

mod tasks;

use std::ffi::OsString;
use std::fmt;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

pub(crate) use tasks::run as run_task;

/// The word behind the program's name that makes it a helper.
pub(crate) const COMMAND: &str = "helper-process";

/// The longest answer that is read, in bytes.
const MAX_ANSWER: usize = 64 << 10;

/// Between two looks whether the caller gives up.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// A helper that has closed its output, or was killed, ends within this time.
const LAST_MOMENT: Duration = Duration::from_millis(200);

/// Work for a helper process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Task<'a> {
    /// Asks the server of a file for the file's attributes; answers nothing.
    Stat(&'a Path),
    /// Opens a file for reading, as a program would; answers its length, and fails for all but regular files.
    Open(&'a Path),
    /// Makes durable what was written to a file or a block device, or to the file system of a folder.
    Flush(&'a Path),
    /// Unmounts FILE, where the file system of this device number (`0:52`) is mounted there; answers `busy` or nothing.
    Unmount { file: &'a Path, number: &'a str, lazily: bool },
    /// Sets up a loop device over FILE, answers its path, and takes it down again unless [`Running::keep`] follows.
    LoopAttach { file: &'a Path, read_only: bool },
    /// Detaches a loop device, where it stands upon FILE.
    LoopDetach { device: &'a Path, file: &'a Path },
    /// Makes a loop device as long as FILE, which it stands upon.
    LoopSize { device: &'a Path, file: &'a Path },
    /// Answers a line that says who uses a block device, or nothing.
    Uses(&'a Path),
    /// Reads a part of a file or a block device, of at most [`MAX_PART`] bytes; answers the bytes.
    Read { file: &'a Path, offset: u64, len: usize },
    /// Mounts a device on a folder: the one that has this device and inode number.
    Mount { device: &'a Path, folder: &'a Path, identity: (u64, u64), fs: &'a str, flags: u32, data: &'a str },
}

/// The most bytes that [`Task::Read`] reads.
pub(crate) const MAX_PART: usize = 32 << 10;

/// The reason why a helper has no result.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The helper did not answer within this time.
    Silent(Duration),
    /// Nobody wants to wait for the helper any longer.
    GivenUp,
    /// The system call failed with this number, where there is one.
    Refused(Option<Errno>, String),
    /// There is no helper: the operating system does not start one.
    NotStarted(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Silent(limit) => write!(f, "no answer within {limit:?}"),
            Failure::GivenUp => f.write_str("no answer"),
            Failure::Refused(_, line) => f.write_str(line),
            Failure::NotStarted(error) => write!(f, "cannot start a helper process: {error}"),
        }
    }
}

impl std::error::Error for Failure {}

/// A helper that has answered, and waits for a decision.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    decision: PipeWriter,
}

impl Running {
    /// Lets the helper leave what it has made. Dropped without this, the helper undoes its work.
    ///
    /// # Errors
    /// The helper has ended.
    pub(crate) fn keep(mut self) -> io::Result<()> {
        self.decision.write_all(b"k")?;
        finish(self.child, LAST_MOMENT);
        Ok(())
    }
}

/// Runs a task and waits for its result, for `limit` at most. Blocks meanwhile.
///
/// # Errors
/// [`Failure`].
pub(crate) fn run(task: &Task<'_>, limit: Duration) -> Result<Vec<u8>, Failure> {
    run_unless(task, limit, &|| false)
}

/// As [`run`], but gives up as soon as `gives_up` says so, which is asked several times a second.
///
/// # Errors
/// [`Failure`].
pub(crate) fn run_unless(
    task: &Task<'_>,
    limit: Duration,
    gives_up: &dyn Fn() -> bool,
) -> Result<Vec<u8>, Failure> {
    let (child, decision, answer) = start(task).map_err(Failure::NotStarted)?;
    drop(decision);
    receive(child, &answer, limit, gives_up).map(|(_, result)| result)
}

/// As [`run`], for a task that waits for a decision after its answer.
///
/// # Errors
/// [`Failure`].
pub(crate) fn run_undecided(task: &Task<'_>, limit: Duration) -> Result<(Running, PathBuf), Failure> {
    let (child, decision, answer) = start(task).map_err(Failure::NotStarted)?;
    let (child, result) = receive(child, &answer, limit, &|| false)?;
    Ok((Running { child, decision }, PathBuf::from(OsString::from_vec(result))))
}

/// As [`run`], for an event loop: the wait is on a thread of its own.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn run_apart(task: Task<'_>, limit: Duration) -> Result<Vec<u8>, Failure> {
    let words = task.words();
    let waited = tokio::task::spawn_blocking(move || {
        let (child, decision, answer) = start_words(&words).map_err(Failure::NotStarted)?;
        drop(decision);
        receive(child, &answer, limit, &|| false).map(|(_, result)| result)
    });
    waited.await.unwrap_or_else(|error| Err(Failure::NotStarted(io::Error::other(error))))
}

fn start(task: &Task<'_>) -> io::Result<(Child, PipeWriter, PipeReader)> {
    start_words(&task.words())
}

fn start_words(words: &[OsString]) -> io::Result<(Child, PipeWriter, PipeReader)> {
    reap_left();
    let (their_decision, decision) = io::pipe()?;
    let (answer, their_answer) = io::pipe()?;
    // Neither the caller's output nor its log: whoever reads those to their end must not wait for the helper.
    let child = Command::new("/proc/self/exe")
        .arg(COMMAND)
        .args(words)
        .current_dir("/")
        .stdin(their_decision)
        .stdout(their_answer)
        .stderr(Stdio::null())
        .spawn()?;
    Ok((child, decision, answer))
}

/// Reads one answer: a length in ten digits, and so many bytes.
fn receive(
    child: Child,
    answer: &PipeReader,
    limit: Duration,
    gives_up: &dyn Fn() -> bool,
) -> Result<(Child, Vec<u8>), Failure> {
    let until = Instant::now() + limit;
    let mut bytes = Vec::new();
    loop {
        if let Some(whole) = whole(&bytes) {
            let result = parse(whole);
            return match result {
                Ok(result) => Ok((child, result)),
                Err(failure) => {
                    finish(child, LAST_MOMENT);
                    Err(failure)
                }
            };
        }
        match readable(answer, until.min(Instant::now() + LOOK_AGAIN)) {
            Ok(true) => {}
            Ok(false) if gives_up() => {
                finish(child, Duration::ZERO);
                return Err(Failure::GivenUp);
            }
            Ok(false) if Instant::now() < until => continue,
            Ok(false) => {
                finish(child, Duration::ZERO);
                return Err(Failure::Silent(limit));
            }
            Err(errno) => {
                finish(child, Duration::ZERO);
                return Err(Failure::NotStarted(errno.into()));
            }
        }
        let mut some = [0; 4096];
        let mut pipe = answer;
        match pipe.read(&mut some) {
            Ok(0) | Err(_) => {
                finish(child, LAST_MOMENT);
                return Err(Failure::Refused(None, "the helper process ended without an answer".to_owned()));
            }
            Ok(count) if bytes.len() + count <= MAX_ANSWER => bytes.extend_from_slice(&some[..count]),
            Ok(_) => {
                finish(child, Duration::ZERO);
                return Err(Failure::Refused(None, "the helper process answers too much".to_owned()));
            }
        }
    }
}

/// The answer within what has arrived, once it is complete.
fn whole(bytes: &[u8]) -> Option<&[u8]> {
    let (length, rest) = bytes.split_at_checked(10)?;
    let length: usize = std::str::from_utf8(length).ok()?.trim().parse().ok()?;
    rest.get(..length)
}

fn parse(answer: &[u8]) -> Result<Vec<u8>, Failure> {
    match answer.split_first() {
        Some((b'+', result)) => Ok(result.to_vec()),
        Some((b'-', text)) => {
            let text = String::from_utf8_lossy(text);
            let (errno, line) = text.split_once(' ').unwrap_or(("0", &text));
            let errno = errno.parse().ok().filter(|errno| *errno > 0).map(Errno::from_raw_os_error);
            Err(Failure::Refused(errno, line.to_owned()))
        }
        _ => Err(Failure::Refused(None, "the helper process answers nonsense".to_owned())),
    }
}

/// An answer as it is sent.
fn framed(answer: &[u8]) -> Vec<u8> {
    [format!("{:<10}", answer.len()).as_bytes(), answer].concat()
}

/// Children that the kernel did not let go in time.
static LEFT: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Takes leave of a helper: kills it where it does not end, and never waits for longer than a moment.
fn finish(mut child: Child, patience: Duration) {
    let until = Instant::now() + patience;
    let mut killed = false;
    loop {
        if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
            return;
        }
        if Instant::now() >= until {
            if killed {
                break;
            }
            // At worst it has ended meanwhile.
            let _ = child.kill();
            killed = true;
            std::thread::sleep(Duration::from_millis(5));
            continue;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    if let Ok(mut left) = LEFT.lock() {
        left.push(child);
    }
}

/// Collects the exit status of helpers that have ended after all.
fn reap_left() {
    if let Ok(mut left) = LEFT.lock() {
        left.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }
}

/// Waits until there is something to read; false where there is nothing in time.
fn readable(pipe: &impl AsFd, until: Instant) -> Result<bool, Errno> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let limit = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&limit)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_whole() {
        let sent = framed(b"+/dev/loop7");
        assert_eq!(whole(&sent), Some(&b"+/dev/loop7"[..]));
        for cut in 0..sent.len() {
            assert_eq!(whole(&sent[..cut]), None, "{cut}");
        }
        assert_eq!(parse(b"+x").unwrap(), b"x");
        assert!(matches!(parse(b"-5 no"), Err(Failure::Refused(Some(Errno::IO), line)) if line == "no"));
        assert!(matches!(parse(b"-0 no"), Err(Failure::Refused(None, _))));
        assert!(parse(b"").is_err() && parse(b"?").is_err());
    }

    #[test]
    fn a_helper_that_does_not_answer_is_left() {
        let begun = Instant::now();
        let (answer, _kept) = io::pipe().unwrap();
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = child.id();
        let failure = receive(child, &answer, Duration::from_millis(50), &|| false).unwrap_err();
        assert!(matches!(failure, Failure::Silent(_)), "{failure}");
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let failure = receive(child, &answer, Duration::from_secs(600), &|| true).unwrap_err();
        assert!(matches!(failure, Failure::GivenUp), "{failure}");
        assert!(begun.elapsed() < Duration::from_secs(30));
        let state = || std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
        while state().contains(") S ") {
            std::thread::sleep(Duration::from_millis(5));
        }
        reap_left();
    }
}
