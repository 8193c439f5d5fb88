//! Nobody is left waiting for a device whose process has died: another process watches, and sees to it that a successor
//! takes over, or that the device goes.
//!
//! ```text
//!   --supervise:  supervisor ──fork──> server      dies: fork again, with --recover; after --recover-timeout: bury
//!                                        └─fork──> standby     the supervisor dies: it becomes the supervisor
//!   without:      server ──fork──> guardian        dies: wait for somebody's --recover so long; then bury
//! ```
//!
//! The server tells of itself through a pipe to each watcher, whose end is the server's. The watchers are whole before
//! the device exists: they need no file of a disk that hangs. The standby is `standby`'s business.

use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, getpid, setpgid};

use super::abi::{Described, State};
use super::control::{Control, block_path};
use super::device::bury;
use super::memory;
use super::signals::{Heard, Signals};
use super::wait::is_alive;
use super::watched::Watched;
use super::{standby, state};
use crate::cli::{ServeArgs, UblkArgs};
use crate::daemon::{self, Forked, Ready};
use crate::pid_file::PidFile;
use crate::serve;

/// A server that lived for so long begins a new series of failures.
const WELL_AFTER: Duration = Duration::from_secs(10);

/// Between two attempts to take over.
const PAUSE: Duration = Duration::from_millis(200);

/// The server's ends of the pipes, one to each watcher.
static PIPES: OnceLock<Vec<File>> = OnceLock::new();

/// What a server tells its watcher. The device's number is four bytes more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// The device is made, or about to be taken over.
    Device(u32),
    /// It serves.
    Live,
    /// It is being ended on purpose.
    Stopping,
    /// It is deleted.
    Gone,
}

/// What a watcher has been told.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) device: Option<u32>,
    live: bool,
    stopping: bool,
    pub(super) gone: bool,
}

/// Tells the watchers, where there are any.
pub(super) fn tell(message: Message) {
    let bytes: Vec<u8> = match message {
        Message::Device(id) => [b"D".as_slice(), &id.to_ne_bytes()].concat(),
        Message::Live => b"L".to_vec(),
        Message::Stopping => b"S".to_vec(),
        Message::Gone => b"G".to_vec(),
    };
    for mut pipe in PIPES.get().into_iter().flatten() {
        // A watcher that is gone needs no telling.
        let _ = pipe.write_all(&bytes);
    }
}

impl Told {
    pub(super) fn from(bytes: &[u8]) -> Self {
        let mut told = Told::default();
        let mut rest = bytes;
        while let Some((word, tail)) = rest.split_first() {
            rest = tail;
            match word {
                b'D' => {
                    let Some((id, tail)) = rest.split_first_chunk() else { break };
                    told = Told { device: Some(u32::from_ne_bytes(*id)), ..Told::default() };
                    rest = tail;
                }
                b'L' => told.live = true,
                b'S' => told.stopping = true,
                b'G' => told.gone = true,
                _ => {}
            }
        }
        told
    }
}

/// Serves a device, with whatever watches over it.
///
/// # Errors
/// One line that says what kept it from starting.
pub(crate) fn run(mut args: ServeArgs) -> Result<ExitCode> {
    // A kernel without ublk is told of here: before there are other processes, with words of their own.
    drop(Control::open()?);
    let ready = match serve::start(&args.process)? {
        Forked::Parent(status) => return Ok(status),
        Forked::Child(ready) => ready,
    };
    match args.ublk() {
        Some(ublk) if ublk.supervise && ublk.recoverable => supervise(&mut args, ready),
        Some(ublk) if ublk.recoverable => {
            guard(ublk.recover_timeout)?;
            serve::run_ready(&args, ready)
        }
        _ => serve::run_ready(&args, ready),
    }
}

/// Makes a guardian, which outlives this process for as long as the device needs it.
fn guard(patience: Duration) -> Result<()> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("no pipe for the guardian")?;
    // Asked for now: once it is dead, the guardian has another parent, and would take the dying server for its successor.
    let server = getpid();
    if daemon::split()?.is_some() {
        let _ = PIPES.set(vec![File::from(writer)]);
        return Ok(());
    }
    drop(writer);
    let _ = rustix::thread::set_name(c"nbdbridge-guard");
    let guarded = daemon::leave_terminal(false).and_then(|()| {
        let mut bytes = Vec::new();
        File::from(reader).read_to_end(&mut bytes)?;
        let told = Told::from(&bytes);
        match told.device {
            Some(id) if !told.gone => {
                let patience = if told.stopping { Duration::ZERO } else { patience };
                wait_for_successor(id, server, patience)
            }
            _ => Ok(()),
        }
    });
    std::process::exit(i32::from(guarded.is_err()));
}

/// Waits until somebody else serves the device, or it is gone; after `patience` it is removed.
fn wait_for_successor(id: u32, dead: Pid, patience: Duration) -> Result<()> {
    let until = Instant::now() + patience;
    let mut control = Control::open()?;
    loop {
        let Ok(info) = control.info(id) else { return Ok(()) };
        let served = info.state() == State::Live
            && is_alive(info.ublksrv_pid)
            && info.ublksrv_pid != dead.as_raw_pid();
        if served {
            return Ok(());
        }
        if Instant::now() >= until {
            return bury(&mut control, id);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Serves in a child; when that dies, in another one that takes the device over.
fn supervise(args: &mut ServeArgs, ready: Ready) -> Result<ExitCode> {
    let signals = Signals::block().context("cannot block signals")?;
    let pid_path = args.process.pid_file.take();
    // With the number of this process, which outlives servers; written by the first of them, when it is ready.
    let pid_file = pid_path.as_deref().map(PidFile::prepare).transpose()?.map(Rc::new);
    let ready = match &pid_file {
        Some(pid_file) => ready.with_pid_file(pid_file.clone()),
        None => ready,
    };
    memory::serve_reclaim(false);
    let supervisor = Supervisor { signals, pid_path };
    let first = start_server(args, &supervisor, Some(ready))?;
    let status = supervisor.watch_over(args, first);
    drop(pid_file);
    status
}

/// A process that starts servers.
pub(super) struct Supervisor {
    pub(super) signals: Signals,
    /// Its pid-file, which its successor writes anew.
    pub(super) pid_path: Option<PathBuf>,
}

impl Supervisor {
    /// Watches over a server, and over those that come after it.
    pub(super) fn watch_over(&self, args: &mut ServeArgs, mut server: Watched) -> Result<ExitCode> {
        let signals = &self.signals;
        let (mut started, mut failing_since) = (Instant::now(), None);
        loop {
            let (status, told) = server.until_it_ends(signals)?;
            // One that was to take over and did not come so far has left the device as it was.
            let device = told.device.or(args.ublk().and_then(|ublk| ublk.recover));
            let Some(id) = device.filter(|_| !told.gone) else { return Ok(status.code) };
            let mut control = Control::open()?;
            let left = control.info(id).is_ok_and(|info| {
                info.state() != State::Live || info.ublksrv_pid == status.pid || !is_alive(info.ublksrv_pid)
            });
            if !left {
                return Ok(status.code);
            }
            if told.live && state::read(id).is_some_and(|record| !record.recoverable) {
                bury(&mut control, id)?;
                tracing::error!(
                    "{}: its server has died, and it is not recoverable: removed",
                    block_path(id)
                );
                return Ok(ExitCode::FAILURE);
            }
            if told.live && (failing_since.is_none() || started.elapsed() > WELL_AFTER) {
                failing_since = Some(Instant::now());
            }
            let patience = args.ublk().map_or(Duration::ZERO, |ublk| ublk.recover_timeout);
            let failing = failing_since.get_or_insert_with(Instant::now).elapsed();
            // A first start that failed has said why: nobody uses the device yet.
            let never_lived = args.ublk().is_none_or(|ublk| ublk.recover.is_none()) && !told.live;
            if told.stopping || status.stop || never_lived || failing >= patience {
                bury(&mut control, id)?;
                if failing >= patience {
                    tracing::error!("{}: no successor within {patience:?}: removed", block_path(id));
                }
                return Ok(ExitCode::FAILURE);
            }
            tracing::error!("{}: its server has ended unexpectedly: starting another one", block_path(id));
            if let Some(ublk) = args.ublk_mut() {
                ublk.recover = Some(id);
            }
            if !told.live && stopped_within(PAUSE, signals) {
                bury(&mut control, id)?;
                return Ok(ExitCode::FAILURE);
            }
            started = Instant::now();
            server = start_server(args, self, None)?;
        }
    }
}

/// Waits for so long. True where it is told to stop meanwhile.
fn stopped_within(pause: Duration, signals: &Signals) -> bool {
    let until = Instant::now() + pause;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match signals.wait(left) {
            Heard::Stop => return true,
            Heard::Child | Heard::Nothing if left.is_zero() => return false,
            Heard::Child | Heard::Nothing => {}
        }
    }
}

/// Forks a server, and it its standby. The child tells whoever waits.
fn start_server(args: &mut ServeArgs, supervisor: &Supervisor, ready: Option<Ready>) -> Result<Watched> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).context("no pipe for the server")?;
    let own = getpid();
    let Some(child) = daemon::split()? else {
        drop(reader);
        // A Ctrl-C is for the supervisor alone, which passes it on.
        if !args.process.fork {
            let _ = setpgid(None, None);
        }
        let served = || -> Result<ExitCode> {
            let mut pipes = vec![File::from(writer)];
            standby::make(args, supervisor, own, &mut pipes)?;
            let _ = PIPES.set(pipes);
            supervisor.signals.restore();
            if let Some(ublk) = args.ublk_mut() {
                ublk.supervisor = Some(own.as_raw_pid().unsigned_abs());
            }
            serve::run_ready(args, ready.unwrap_or_else(Ready::silent))
        };
        let code = served().unwrap_or_else(|error| crate::cli::report(&error));
        std::process::exit(i32::from(code != ExitCode::SUCCESS));
    };
    drop(writer);
    if ready.is_some() && args.process.fork {
        daemon::leave_terminal(args.process.verbose > 0)?;
    }
    Watched::new(child, reader, true)
}

/// The device's flags among those of a process.
impl ServeArgs {
    pub(super) fn ublk(&self) -> Option<&UblkArgs> {
        self.doors.iter().find_map(crate::cli::DoorArgs::ublk)
    }

    pub(super) fn ublk_mut(&mut self) -> Option<&mut UblkArgs> {
        self.doors.iter_mut().find_map(crate::cli::DoorArgs::ublk_mut)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watcher_knows_how_far_its_server_came() {
        let device = [b"D".as_slice(), &7_u32.to_ne_bytes()].concat();
        let told = |words: &[u8]| Told::from(&[&device, words].concat());
        assert_eq!(Told::from(b""), Told::default());
        assert_eq!(told(b""), Told { device: Some(7), ..Told::default() });
        assert_eq!(told(b"L"), Told { device: Some(7), live: true, ..Told::default() });
        let all = Told { device: Some(7), live: true, stopping: true, gone: true };
        assert_eq!(told(b"LSG"), all);
        // Cut short by a death.
        assert_eq!(Told::from(&device[..3]), Told::default());
    }
}
