//! Work on the device of a data plane, which may be stopped at any moment (`kill -STOP`, a debugger, a frozen cgroup): the
//! kernel then lets no system call on the device return. So other processes make those calls, and are left behind when the
//! data plane has been stopped for a while; the command says which process it is, and ends.

use std::cell::Cell;
use std::io;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::anyhow;
use rustix::process::{Pid, Signal, kill_process};

use super::{Error, Result, plane};
use crate::attachment::is_stopped;
use crate::helper::{self, Failure, Task};

/// A data plane that is stopped for longer is not waited for.
const STOPPED_LIMIT: Duration = Duration::from_secs(5);

/// Between two looks at it.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// A system call on a data plane that runs ends within this time: a mount may have a long log to replay.
const CALL_LIMIT: Duration = Duration::from_secs(600);

/// The patience with a process that may be stopped.
pub(super) struct Patience<F> {
    is_stopped: F,
    since: Cell<Option<Instant>>,
}

impl<F: Fn() -> bool> Patience<F> {
    pub(super) fn new(is_stopped: F) -> Self {
        Patience { is_stopped, since: Cell::new(None) }
    }

    /// Returns whether the process has been stopped for too long. Asked again and again.
    pub(super) fn is_over(&self) -> bool {
        let since = (self.is_stopped)().then(|| self.since.get().unwrap_or_else(Instant::now));
        self.since.set(since);
        since.is_some_and(|since| since.elapsed() >= STOPPED_LIMIT)
    }
}

/// The patience with the data plane of a device.
fn patience(device: &Path) -> Patience<impl Fn() -> bool> {
    Patience::new(|| stopped(device).is_some())
}

/// Returns the process that serves a device, where it is stopped.
pub(super) fn stopped(device: &Path) -> Option<u32> {
    plane::server(device).map(|server| server.pid).filter(|pid| is_stopped(*pid))
}

/// Refuses to work on the device of a data plane that is stopped.
///
/// # Errors
/// One line that names the process, and the way out.
pub(super) fn check(device: &Path) -> Result<()> {
    // It may be stopped for a moment, as by somebody who looks at it.
    let until = Instant::now() + Duration::from_secs(1);
    while stopped(device).is_some() {
        if Instant::now() >= until {
            return Err(gave_up(device));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Has a helper process do a task on a device, or on what is mounted of it. The inner error is that of the task.
///
/// # Errors
/// One line: the data plane is stopped, or does not answer.
pub(super) fn run(device: &Path, task: &Task<'_>) -> Result<std::result::Result<Vec<u8>, Failure>> {
    let patience = patience(device);
    match helper::run_unless(task, CALL_LIMIT, &|| patience.is_over()) {
        Err(Failure::GivenUp) => Err(gave_up(device)),
        Err(failure @ Failure::Silent(_)) => {
            Err(Error::Other(anyhow!("{}: {failure}; look at the log of its data plane", device.display())))
        }
        other => Ok(other),
    }
}

/// As [`run`], where any error of the task is one of the caller's.
///
/// # Errors
/// One line that begins with the device.
pub(super) fn done(device: &Path, task: &Task<'_>) -> Result<Vec<u8>> {
    Ok(run(device, task)?.map_err(|failure| anyhow!("{}: {failure}", device.display()))?)
}

/// Runs a program that works on a device to its end.
///
/// # Errors
/// The inner one: it cannot be started. The outer one: the data plane is stopped; the program is killed.
pub(super) fn output(device: &Path, command: &mut Command) -> Result<io::Result<Output>> {
    let patience = patience(device);
    output_unless(command, &|| patience.is_over()).ok_or_else(|| gave_up(device))
}

/// Runs a program to its end. None where `gives_up` says so meanwhile, which is asked several times a second: then the
/// program is killed, and not waited for.
pub(super) fn output_unless(
    command: &mut Command,
    gives_up: &dyn Fn() -> bool,
) -> Option<io::Result<Output>> {
    let child = match command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
        Ok(child) => child,
        Err(error) => return Some(Err(error)),
    };
    let pid = Pid::from_child(&child);
    let (ended, end) = channel();
    std::thread::spawn(move || ended.send(child.wait_with_output()));
    loop {
        match end.recv_timeout(LOOK_AGAIN) {
            Ok(output) => return Some(output),
            Err(RecvTimeoutError::Timeout) if gives_up() => {
                // At worst it has ended meanwhile, and the thread has not told yet.
                let _ = kill_process(pid, Signal::KILL);
                return None;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Some(Err(io::Error::other("nobody waits for it"))),
        }
    }
}

fn gave_up(device: &Path) -> Error {
    let shown = device.display();
    Error::Other(match stopped(device) {
        Some(pid) => anyhow!(
            "{shown}: process {pid}, which serves it, is stopped; let it go on (kill -CONT {pid}), or end it: kill -9 {pid}"
        ),
        None => anyhow!("{shown}: the process that serves it was stopped; try again"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_serves_is_waited_for() {
        let device = Path::new("/dev/null");
        check(device).unwrap();
        let output =
            output(device, Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"])).unwrap();
        let output = output.unwrap();
        assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(output.status.code(), Some(3));
        assert!(super::output(device, &mut Command::new("/no/such/program")).unwrap().is_err());
    }
}
