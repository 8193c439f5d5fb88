//! `nbdbridge bench`: load for any NBD server, cheap enough that the server is what is measured.
//!
//! ```text
//!   main thread: connect, Plan, watch (progress, signals), Report
//!   each load thread: load::run -> Connection (slots) -> Output ==one send per batch==> server
//!                                      ^                                                 |
//!                                      +------ Replies <==one receive per batch==========+
//! ```
//!
//! What it costs itself is printed with the result. It reads unless it was told to write; with `--verify` it
//! knows every block that it wrote again.

mod connect;
mod connection;
mod histogram;
mod load;
mod output;
mod pattern;
mod plan;
mod replies;
mod report;
mod socket;
mod tally;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nbd_proto::Negotiated;
use tokio::signal::unix::{SignalKind, signal};

use self::connect::{Connected, connect};
use self::connection::Connection;
use self::load::Shared;
use self::plan::Plan;
use self::report::Report;
use self::tally::Tally;
use crate::cli::{BenchArgs, End};

/// How often the main thread looks.
const WATCH: Duration = Duration::from_millis(50);
/// How many looks there are to a progress line.
const LOOKS_PER_LINE: u32 = 10;

/// Connects, runs, and prints the result.
///
/// # Errors
/// One line: no connection, a range that does not fit, a server that breaks off; and, with the result printed,
/// requests that failed and blocks that are wrong.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let mut connected = Vec::new();
    for n in 1..=args.connections {
        let one = connect(&args.uri, args.style);
        connected.push(if n == 1 { one? } else { one.with_context(|| format!("connection {n}"))? });
    }
    let Some(export) = connected.first().map(|first| first.negotiated.clone()) else {
        bail!("no connection was asked for");
    };
    if connected.iter().any(|one| !alike(&one.negotiated, &export)) {
        bail!("{}: the export changed from one connection to the next", args.uri);
    }
    let plan = Plan::new(args, &export)?;
    let (tally, ended) = load(args, &plan, connected)?;
    let report = Report { args, plan: &plan, export: &export, tally: &tally };
    let text = if args.json { report.json() } else { report.text() };
    if args.json {
        crate::output::json(&text)?
    } else {
        crate::output::text(&text)?
    }
    ended.and_then(|()| report.verdict()).with_context(|| args.uri.to_string())
}

/// Whether two connections see the same export.
fn alike(one: &Negotiated, other: &Negotiated) -> bool {
    (&one.info, one.style) == (&other.info, other.style)
}

/// Runs the threads to their end; what they counted, and what ended one of them early.
fn load(args: &BenchArgs, plan: &Plan, connected: Vec<Connected>) -> Result<(Tally, Result<()>)> {
    let shared = Shared {
        stop: AtomicBool::new(false),
        answered: AtomicU64::new(0),
        written: Barrier::new(args.threads.into()),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let began = Instant::now();
    let mut shares: Vec<Vec<Connection<'_>>> = (0..args.threads).map(|_| Vec::new()).collect();
    let (count, threads) = (u64::from(args.connections), usize::from(args.threads));
    for ((index, n), one) in (0..count).zip((0..threads).cycle()).zip(connected) {
        let quota = match args.end {
            End::After(_) => u64::MAX,
            End::Requests(all) => all.get() / count + u64::from(index < all.get() % count),
        };
        shares[n].push(Connection::new(one, plan, args.depth, (index, count), quota, began));
    }
    let deadline = match args.end {
        End::After(duration) => Some(began + duration),
        End::Requests(_) => None,
    };
    std::thread::scope(|scope| {
        let mut handles = Vec::new();
        for share in shares {
            let shared = &shared;
            handles.push(scope.spawn(move || load::run(share, plan, deadline, shared)));
        }
        runtime.block_on(watch(&handles, &shared))?;
        let (mut tally, mut ended) = (Tally::new(), Ok(()));
        for handle in handles {
            let (counted, end) = handle.join().map_err(|_| anyhow!("a thread panicked"))?;
            tally.add(counted);
            ended = ended.and(end);
        }
        Ok((tally, ended))
    })
}

/// Waits for the threads; shows how they get on, and ends them at a signal. A second signal ends the program.
async fn watch<T>(handles: &[ScopedJoinHandle<'_, T>], shared: &Shared) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot handle signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot handle signals")?;
    let shown = crate::output::stderr_is_terminal();
    let (mut last, mut since, mut looks) = (0, Instant::now(), 0);
    let mut tick = tokio::time::interval(WATCH);
    while !handles.iter().all(ScopedJoinHandle::is_finished) {
        tokio::select! {
            _ = tick.tick() => {}
            _ = interrupt.recv() => stop(shared),
            _ = terminate.recv() => stop(shared),
        }
        looks += 1;
        if shown && looks % LOOKS_PER_LINE == 0 {
            let answered = shared.answered.load(Relaxed);
            let rate = (answered - last) as f64 / since.elapsed().as_secs_f64();
            (last, since) = (answered, Instant::now());
            crate::output::progress(&format!("{answered} requests, {rate:.0} IOPS"));
        }
    }
    if shown && looks >= LOOKS_PER_LINE {
        crate::output::progress("");
    }
    Ok(())
}

fn stop(shared: &Shared) {
    if shared.stop.swap(true, Relaxed) {
        std::process::exit(1);
    }
}
