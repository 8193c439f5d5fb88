//! A supervisor can be killed as well: beside each server that has one waits another process, which becomes the
//! supervisor then. It is the server's child, made before the server has threads or sources.
//!
//! ```text
//!   server ──fork──> standby ─┬─ the supervisor dies ─> supervisor of this server and of those after it
//!                             └─ the server dies ─> once the supervisor's next one serves: its own standby; ends
//! ```
//!
//! One that has become the supervisor has no standby itself before its first own server.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, getpid};

use super::abi::{Described, State};
use super::control::{Control, block_path};
use super::memory;
use super::state;
use super::supervise::Supervisor;
use super::watched::{Watched, handle_of, has_ended};
use crate::cli::ServeArgs;
use crate::daemon;
use crate::pid_file::{self, PidFile};

/// Between two looks at what the supervisor makes of a server's end.
const LOOK: Duration = Duration::from_millis(200);

/// Makes the standby of this process, a server whose supervisor is `boss`. The server's end of its pipe joins `pipes`.
///
/// # Errors
/// The operating system's.
pub(super) fn make(
    args: &mut ServeArgs,
    supervisor: &Supervisor,
    boss: Pid,
    pipes: &mut Vec<File>,
) -> Result<()> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("no pipe for the standby")?;
    let server = getpid();
    if daemon::split()?.is_some() {
        pipes.push(File::from(writer));
        return Ok(());
    }
    // The pipes' ends tell of the server's end: nobody else may hold them.
    drop(writer);
    pipes.clear();
    let _ = rustix::thread::set_name(c"nbdbridge-guard");
    let done = daemon::leave_terminal(args.process.verbose > 0 || !args.process.fork)
        .and_then(|()| Watched::new(server, reader, false))
        .and_then(|server| stand_by(args, supervisor, boss, server));
    let code = done.unwrap_or_else(|error| crate::cli::report(&error));
    std::process::exit(i32::from(code != ExitCode::SUCCESS));
}

fn stand_by(
    args: &mut ServeArgs,
    supervisor: &Supervisor,
    boss: Pid,
    mut server: Watched,
) -> Result<ExitCode> {
    memory::serve_reclaim(false);
    if let Some(boss) = handle_of(boss)? {
        while server.hear()? && !has_ended(&boss) {
            server.wait_beside(&boss)?;
        }
        if !has_ended(&boss) && !left_alone(&server, &boss)? {
            return Ok(ExitCode::SUCCESS);
        }
    }
    let Some(id) = server.told().device else { return Ok(ExitCode::SUCCESS) };
    let _ = rustix::thread::set_name(c"nbdbridge");
    tracing::error!("{}: its supervisor has died: process {} takes its place", block_path(id), getpid());
    // What is remembered tells people, and the pid-file scripts, whom to ask.
    if let Some(record) = state::read(id)
        && let Err(error) = record.supervised_by(getpid()).write()
    {
        tracing::warn!("{error:#}");
    }
    // As a zombie the dead one can look alive for a while: what is its own is not in the way.
    if let Some(path) = &supervisor.pid_path
        && pid_file::read_old(path).is_some_and(|text| text.trim() == boss.as_raw_pid().to_string())
    {
        let _ = std::fs::remove_file(path);
    }
    let publish = |path: &PathBuf| PidFile::prepare(path).and_then(|file| file.publish().map(|()| file));
    let pid_file = supervisor.pid_path.as_ref().map(publish).transpose();
    if let Err(error) = &pid_file {
        tracing::warn!("{error:#}");
    }
    supervisor.watch_over(args, server)
}

/// The server has ended. Whether its supervisor does, too, before it has seen to the device.
fn left_alone(server: &Watched, boss: &OwnedFd) -> Result<bool> {
    let told = server.told();
    let Some(id) = told.device.filter(|_| !told.gone) else { return Ok(false) };
    let mut control = Control::open()?;
    while !has_ended(boss) {
        let Ok(info) = control.info(id) else { return Ok(false) };
        if info.state() == State::Live && info.ublksrv_pid > 0 && info.ublksrv_pid != server.number() {
            return Ok(false);
        }
        std::thread::sleep(LOOK);
    }
    Ok(true)
}
