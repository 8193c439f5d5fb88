//! The life of a process that serves: open the sources, open the doors, tell that it is ready, serve, end in good
//! order.
//!
//! ```text
//!   fork ─ sources ─ workers ─ doors ─ READY ─ serve ─┬─ signal ─ release (nobody would be hurt) ─┬─ drain ─ flush
//!                                                     └─ a door ended by itself ──────────────────┘
//! ```
//!
//! The first signal ends it as soon as that hurts nobody, one more ends it although it does, and one during the end
//! cuts that short.

use std::future::poll_fn;
use std::pin::pin;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bridge::backend::image::ImageMemory;
use bridge::worker::Workers;
use bridge::{Capabilities, Export, LocalFuture, OpenError, Request};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::{DoorArgs, ProcessArgs, ServeArgs, UsageError};
use crate::daemon::{self, Forked, PidFile, Ready};
use crate::door::{self, Door, Site};
use crate::{assemble, control, systemd};

/// The last flush has so long where the doors took all the time there was.
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
    if process.fork { daemon::fork(process.verbose > 0) } else { Ok(Forked::Child(Ready::foreground())) }
}

/// The same in a process that has gone where it belongs.
///
/// # Errors
/// One line that says what kept it from starting.
pub(crate) fn run_ready(args: &ServeArgs, ready: Ready) -> Result<ExitCode> {
    let passed = take_sockets(&args.doors)?;
    let process = &args.process;
    let pid_file = process.pid_file.as_deref().map(PidFile::create).transpose()?;
    door::before_sources(&args.doors)?;
    let (exports, made) = sources(args)?;
    door::before_threads(&args.doors, process.pid_file.as_deref());
    let workers = Arc::new(Workers::start(process.workers).context("cannot start the workers")?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let status = runtime.block_on(async {
        let alone = args.doors.len() == 1;
        let mut site =
            Site { exports: &exports, args: &args.exports, workers: &workers, alone, process, passed };
        let mut doors = Vec::new();
        // The kernel's caches behind one door do not hear of what is written through another.
        let views: Vec<_> = exports.iter().map(|export| export.read_only_view()).collect();
        for (n, door) in args.doors.iter().enumerate() {
            site.exports = if n == 0 || args.multi_writer { &exports } else { &views };
            doors.push(door::open(door, &mut site).await?);
        }
        let mut stop = Stop::new()?;
        let control = control::Control::start(control_site(args, &exports, &doors, &workers));
        let lines: Vec<String> = doors.iter().flat_map(|door| door.lines()).collect();
        ready.announce(&lines)?;
        made.keep();
        // Without systemd there is nobody to tell.
        let _ = systemd::notify("READY=1");
        let told = serve(&doors, &mut stop).await;
        let _ = systemd::notify("STOPPING=1");
        let all_well = tokio::select! {
            all_well = end(&doors, &exports, &workers, process.drain_timeout) => all_well,
            () = stop.again(told) => {
                tracing::warn!("told again to stop: ending at once");
                false
            }
        };
        drop(control);
        anyhow::Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    });
    drop(pid_file);
    // Workers may still hold a request that storage does not finish: ending must not wait for it.
    std::mem::forget(workers);
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

/// The sockets that systemd passed, where there is a door that can take them.
fn take_sockets(doors: &[DoorArgs]) -> Result<Vec<systemd::PassedSocket>> {
    let Some(net) = doors.iter().find_map(DoorArgs::net) else { return Ok(Vec::new()) };
    let passed = systemd::take_sockets()?;
    if !passed.is_empty() && !net.listen.is_empty() {
        let message = "the sockets come from systemd here; leave out --bind, --port and --socket";
        return Err(UsageError::new(message).into());
    }
    Ok(passed)
}

/// What the control socket tells of.
fn control_site(
    args: &ServeArgs,
    exports: &[Arc<Export>],
    doors: &[Box<dyn Door>],
    workers: &Arc<Workers>,
) -> control::Site {
    let sources = args.exports.iter().map(|export| export.source.global());
    let exports = exports.iter().cloned().zip(sources).collect();
    control::Site::new(exports, doors.iter().map(|door| door.watch()).collect(), workers.clone())
}

/// Serves until the command's own door has ended, or a signal has come and nobody needs the doors any more. Says whether one has come.
async fn serve(doors: &[Box<dyn Door>], stop: &mut Stop) -> bool {
    let mut ended = pin!(main_one(doors.iter().map(|door| door.serve()).collect()));
    tokio::select! {
        () = &mut ended => return false,
        () = stop.wait() => tracing::info!("stopping"),
    }
    tokio::select! {
        _ = all(doors.iter().map(|door| door.release()).collect()) => {}
        () = ended => {}
        () = stop.wait() => tracing::warn!("told again to stop: ending although it is in use"),
    }
    true
}

/// Closes the doors, then flushes what came through them, for what is left of the time. False where not everything
/// went well.
async fn end(doors: &[Box<dyn Door>], exports: &[Arc<Export>], workers: &Workers, limit: Duration) -> bool {
    let until = Instant::now() + limit;
    let drained = all(doors.iter().map(|door| door.drain()).collect()).await;
    let mut all_well = drained.into_iter().all(|well| well);
    let now = Instant::now();
    let until = if now < until { until } else { now + LAST_FLUSH };
    let flushes =
        exports.iter().map(|export| Box::pin(flush(export, workers, until)) as LocalFuture<'_, bool>);
    all_well &= all(flushes.collect()).await.into_iter().all(|well| well);
    all_well
}

async fn flush(export: &Arc<Export>, workers: &Workers, until: Instant) -> bool {
    let caps = export.geometry().capabilities;
    if caps.contains(Capabilities::READ_ONLY) || !caps.contains(Capabilities::FLUSH) {
        return true;
    }
    let there = export.clone();
    let flushed = workers.run(workers.next(), move || async move {
        there.execute(Request::flush(), None, Instant::now()).await.map(|_| ())
    });
    match tokio::time::timeout_at(until.into(), flushed).await {
        Ok(Some(Ok(()))) => true,
        Ok(Some(Err(error))) => {
            tracing::error!(export = export.name(), %error, "cannot flush");
            false
        }
        Ok(None) => false,
        Err(_) => {
            let name = export.name();
            tracing::error!(
                export = name,
                "cannot flush: no answer within --drain-timeout; what was not flushed may be lost"
            );
            false
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

/// The signals that end the process.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
    /// None where whoever started us wants it ignored, as nohup does.
    hangup: Option<Signal>,
}

impl Stop {
    fn new() -> Result<Self> {
        let handle = |kind| signal(kind).context("cannot handle signals");
        Ok(Stop {
            terminate: handle(SignalKind::terminate())?,
            interrupt: handle(SignalKind::interrupt())?,
            hangup: (!hangup_is_ignored()).then(|| handle(SignalKind::hangup())).transpose()?,
        })
    }

    /// Waits for one more than the first; whether that has come already is `told`.
    async fn again(&mut self, told: bool) {
        if !told {
            self.wait().await;
        }
        self.wait().await;
    }

    /// Waits for the next one. Cancel-safe.
    async fn wait(&mut self) {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => _ = hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = hangup => {}
        }
    }
}

fn hangup_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Signal 1 has the lowest bit.
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 != 0)
}
