//! The life of a process that serves: open the sources, open the doors, tell that it is ready, serve, end in good
//! order.
//!
//! ```text
//!   fork ─ sources ─ signals ─ workers ─ doors ─ READY ─ serve ─┬─ signal ─ release (the doors are not in use) ─┬─ drain ─ flush
//!                                          │                    └─ a door ended by itself ────────────────────┤
//!                                          └─ a signal, a door that does not open ────────────────────────────┘
//! ```
//!
//! The first signal ends the server when its doors are not in use, the second one although they are. One more during the
//! end cuts short what is in flight; what was answered is still flushed.

use std::cell::{Cell, RefCell};
use std::ffi::OsString;
use std::future::poll_fn;
use std::pin::pin;
use std::process::ExitCode;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bridge::backend::image::ImageMemory;
use bridge::worker::Workers;
use bridge::{Capabilities, Export, LocalFuture, OpenError, Request};

use crate::cli::{DoorArgs, ProcessArgs, ServeArgs, UsageError};
use crate::daemon::{self, Forked, Ready};
use crate::door::{self, Door, Site};
use crate::pid_file::PidFile;
use crate::stop::Stop;
use crate::{assemble, control, detach, end_report, systemd};

/// Time for the last flush where the doors took all the time there was, or the end is forced.
const LAST_FLUSH: Duration = Duration::from_secs(2);

/// The share of the memory budget that the tables and compressed clusters of images take beside it: one part in so many.
const IMAGES_SHARE: u64 = 4;

/// Serves until told to stop.
///
/// # Errors
/// One line that says what kept it from starting.
pub(crate) fn run(args: &ServeArgs) -> Result<ExitCode> {
    match start(&args.process)? {
        Forked::Parent(status) => Ok(status),
        Forked::Child(ready) => run_ready(args, ready),
    }
}

/// Goes to the background where `--fork` says so.
///
/// # Errors
/// As [`daemon::fork`].
pub(crate) fn start(process: &ProcessArgs) -> Result<Forked> {
    if !process.fork {
        return Ok(Forked::Child(Ready::foreground()));
    }
    daemon::fork(process.verbose > 0, |child| detach::sweep(|attachment| attachment.pid == child))
}

/// Serves until told to stop, in a process that has gone to the background where it should.
///
/// # Errors
/// One line that says what kept it from starting.
pub(crate) fn run_ready(args: &ServeArgs, ready: Ready) -> Result<ExitCode> {
    let passed = take_sockets(args)?;
    let process = &args.process;
    let ready = match process.pid_file.as_deref() {
        Some(path) => ready.with_pid_file(Rc::new(PidFile::prepare(path)?)),
        None => ready,
    };
    let pid_file = ready.pid_file();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let take_signals = || {
        let _inside = runtime.enter();
        Stop::new()
    };
    // Opening a source can take long, and until something is made a signal may end that as it comes.
    let early = args.source.create.is_some().then(take_signals).transpose()?;
    door::before_sources(&args.doors)?;
    let (exports, made) = sources(args)?;
    door::before_threads(&args.doors, process.pid_file.as_deref());
    let mut stop = early.map_or_else(take_signals, Ok)?;
    let workers = Arc::new(Workers::start(process.workers).context("cannot start the workers")?);
    let server = Server { args, exports, workers, doors: RefCell::default() };
    let status = runtime.block_on(async {
        let opened = server.open(&mut stop, passed).await;
        let control =
            matches!(opened, Ok(true)).then(|| control::Control::start(server.control_site())).flatten();
        let served = match opened {
            Ok(true) => server.serve(&mut stop, ready, made).await,
            Ok(false) => Ok(()),
            Err(error) => Err(error),
        };
        // However it went, what was opened is closed in good order. Without systemd there is nobody to tell.
        let _ = systemd::notify("STOPPING=1");
        let failed = server.end(&mut stop).await;
        drop(control);
        if let Some(why) = &failed
            && args.doors.iter().any(DoorArgs::is_local)
        {
            end_report::write(why);
        }
        served.map(|()| if failed.is_none() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    });
    drop(pid_file);
    // Workers may still hold a request that storage does not finish: ending must not wait for it.
    std::mem::forget(server.workers);
    status
}

/// Opens the sources. Where a door takes over from a process that has died, its requests may still be in the kernel, and
/// with them its locks: those are waited for.
fn sources(args: &ServeArgs) -> Result<(Vec<Arc<Export>>, assemble::Made)> {
    let until = Instant::now() + door::patience(&args.doors);
    let net = args.doors.iter().find_map(DoorArgs::net);
    let memory =
        net.map_or_else(ImageMemory::default, |net| ImageMemory::new(net.memory_budget / IMAGES_SHARE));
    loop {
        match assemble::exports(&args.exports, &args.source, &memory) {
            Err(error) if is_locked(&error) && Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

fn is_locked(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(OpenError::Locked { .. }))
}

/// Returns the sockets that were passed in, where there is a door that can take them: systemd's, or the one that is stdin.
fn take_sockets(args: &ServeArgs) -> Result<Vec<systemd::PassedSocket>> {
    let Some(net) = args.doors.iter().find_map(DoorArgs::net) else { return Ok(Vec::new()) };
    let passed = systemd::take_sockets()?;
    if !passed.is_empty() {
        let message = "the sockets come from systemd here; leave out --bind, --port and --socket";
        anyhow::ensure!(net.listen.is_empty(), UsageError::new(message));
        return Ok(passed);
    }
    // A server with an address of its own, or one that is to outlive whoever started it, is not inetd's.
    let by_inetd = args.doors.len() == 1 && net.listen.is_empty() && !args.process.fork;
    Ok(if by_inetd { systemd::take_stdin()?.into_iter().collect() } else { Vec::new() })
}

/// What a process serves, and the doors that are open.
struct Server<'a> {
    args: &'a ServeArgs,
    exports: Vec<Arc<Export>>,
    workers: Arc<Workers>,
    /// In the order of `args`. Borrowed for moments only.
    doors: RefCell<Vec<Rc<dyn Door>>>,
}

impl Server<'_> {
    /// Opens the doors. False where a signal came meanwhile: a door that is being opened is opened before that is heard,
    /// so that it can be closed again; a second signal is not so patient.
    async fn open(&self, stop: &mut Stop, passed: Vec<systemd::PassedSocket>) -> Result<bool> {
        let told = Cell::new(false);
        let mut opening = pin!(self.open_each(&told, passed));
        loop {
            tokio::select! {
                biased;
                opened = &mut opening => {
                    opened?;
                    return Ok(!stop.look().await);
                }
                () = stop.wait() => {
                    anyhow::ensure!(!told.replace(true), "told again to stop before the server was ready");
                    tracing::info!("told to stop before the server was ready");
                }
            }
        }
    }

    async fn open_each(&self, told: &Cell<bool>, passed: Vec<systemd::PassedSocket>) -> Result<()> {
        // The kernel's caches behind one door do not hear of what is written through another.
        let views: Vec<_> = self.exports.iter().map(|export| export.read_only_view()).collect();
        let mut site = Site {
            exports: &self.exports,
            args: &self.args.exports,
            workers: &self.workers,
            alone: self.args.doors.len() == 1,
            process: &self.args.process,
            passed,
        };
        for (n, door) in self.args.doors.iter().enumerate() {
            if told.get() {
                break;
            }
            site.exports = if n == 0 || self.args.multi_writer { &self.exports } else { &views };
            let door = door::open(door, &mut site).await?;
            self.doors.borrow_mut().push(door.into());
        }
        Ok(())
    }

    fn doors(&self) -> Vec<Rc<dyn Door>> {
        self.doors.borrow().clone()
    }

    /// Announces the server, and serves until the command's own door has ended, or a signal has come and the doors are not
    /// in use any more.
    async fn serve(&self, stop: &mut Stop, ready: Ready, made: assemble::Made) -> Result<()> {
        let doors = self.doors();
        let lines: Vec<OsString> = doors.iter().flat_map(|door| door.lines()).collect();
        // A server in the foreground has its addresses from the command line.
        let must_print = self.args.process.fork || door::are_made(&self.args.doors);
        ready.announce(&lines, must_print)?;
        made.keep();
        let mut ended = pin!(main_one(doors.iter().map(|door| door.serve()).collect()));
        tokio::select! {
            () = &mut ended => return Ok(()),
            () = stop.wait() => tracing::info!("stopping"),
        }
        tokio::select! {
            _ = all(doors.iter().map(|door| door.release()).collect()) => {}
            () = ended => {}
            () = stop.wait() => tracing::warn!("told again to stop: ending although it is in use"),
        }
        Ok(())
    }

    /// What the control socket tells of.
    fn control_site(&self) -> control::Site {
        let sources = self.args.exports.iter().map(|export| export.source.global());
        let exports = self.exports.iter().cloned().zip(sources).collect();
        let watches = self.doors.borrow().iter().map(|door| door.watch()).collect();
        control::Site::new(exports, watches, self.workers.clone())
    }

    /// Closes the doors, then flushes what came through them. Returns the first reason why data may be lost; None where
    /// everything went well.
    async fn end(&self, stop: &mut Stop) -> Option<String> {
        let doors = self.doors();
        tokio::select! {
            failed = self.drain(&doors) => return failed,
            () = stop.second() => tracing::warn!("told again to stop: ending at once"),
        }
        let cut = async {
            // Nothing is answered after the flush.
            all(doors.iter().map(|door| door.cut()).collect()).await;
            // Logged.
            let _ = self.flush(Instant::now() + LAST_FLUSH).await;
        };
        tokio::select! {
            () = cut => {}
            () = stop.wait() => tracing::error!("told a third time to stop: what was not flushed may be lost"),
        }
        Some("it was told again to stop, and ended at once".to_owned())
    }

    async fn drain(&self, doors: &[Rc<dyn Door>]) -> Option<String> {
        let until = Instant::now() + self.args.process.drain_timeout;
        let drained = all(doors.iter().map(|door| door.drain()).collect()).await;
        let now = Instant::now();
        let until = if now < until { until } else { now + LAST_FLUSH };
        let cut = drained.contains(&false).then(|| "not all requests were finished in time".to_owned());
        self.flush(until).await.err().or(cut)
    }

    /// Flushes every export that can be written to.
    ///
    /// # Errors
    /// The first line that says why one cannot be flushed.
    async fn flush(&self, until: Instant) -> Result<(), String> {
        let flush =
            |export| Box::pin(flush(export, &self.workers, until)) as LocalFuture<'_, Result<(), String>>;
        all(self.exports.iter().map(flush).collect()).await.into_iter().collect()
    }
}

/// Flushes an export. The error is logged, too.
async fn flush(export: &Arc<Export>, workers: &Workers, until: Instant) -> Result<(), String> {
    let caps = export.geometry().capabilities;
    if caps.contains(Capabilities::READ_ONLY) || !caps.contains(Capabilities::FLUSH) {
        return Ok(());
    }
    let there = export.clone();
    let flushed = workers.run(workers.next(), move || async move {
        there.execute(Request::flush(), None, Instant::now()).await.map(|_| ())
    });
    match tokio::time::timeout_at(until.into(), flushed).await {
        Ok(Some(Ok(()))) => Ok(()),
        Ok(Some(Err(error))) => {
            tracing::error!(export = export.name(), %error, "cannot flush");
            Err(error.to_string())
        }
        Ok(None) => Err("its worker has ended".to_owned()),
        Err(_) => {
            let name = export.name();
            tracing::error!(
                export = name,
                "cannot flush: no answer within --drain-timeout; what was not flushed may be lost"
            );
            Err("no answer within --drain-timeout".to_owned())
        }
    }
}

/// Polls all of them until the first in the list is ready: when another door was closed by its user, the one that the
/// command is about goes on.
async fn main_one(mut futures: Vec<LocalFuture<'_, ()>>) {
    let mut over = vec![false; futures.len()];
    poll_fn(|cx| {
        for (future, over) in futures.iter_mut().zip(&mut over) {
            if !*over && future.as_mut().poll(cx).is_ready() {
                *over = true;
            }
        }
        if over.first() == Some(&true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// Polls all of them until all are ready.
async fn all<T>(mut futures: Vec<LocalFuture<'_, T>>) -> Vec<T> {
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none()
                && let Poll::Ready(value) = future.as_mut().poll(cx)
            {
                *result = Some(value);
            }
        }
        if results.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}
