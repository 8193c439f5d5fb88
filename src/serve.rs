//! The life of `nbdbridge net`: open, listen, tell that it is ready, serve, end in good order.

use std::future::poll_fn;
use std::process::ExitCode;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use anyhow::{Context, Result};
use bridge::Export;
use bridge::worker::Workers;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::{NetArgs, UsageError};
use crate::daemon::{self, Forked, PidFile, Ready};
use crate::net::{Listener, Local, Server, Settings, bind};
use crate::{assemble, systemd, uri};

/// A client that stops for so long in the middle of a request is dropped.
const PAYLOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// A handshake without a limit of its own ends after this: nobody waits for days.
const NO_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// Serves until told to stop.
///
/// # Errors
/// One line that says what kept the server from starting.
pub(crate) fn net(args: &NetArgs) -> Result<ExitCode> {
    let passed = systemd::take_sockets()?;
    if !passed.is_empty() && !args.listen.is_empty() {
        let message = "the sockets come from systemd here; leave out --bind, --port and --socket";
        return Err(UsageError::new(message).into());
    }
    let ready = if args.fork {
        match daemon::fork(args.verbose > 0)? {
            Forked::Parent(status) => return Ok(status),
            Forked::Child(ready) => ready,
        }
    } else {
        Ready::foreground()
    };
    let pid_file = args.pid_file.as_deref().map(PidFile::create).transpose()?;
    let exports = assemble::exports(args)?;
    let workers = Workers::start(args.workers).context("cannot start the workers")?;
    let server = Server::new(exports.clone(), settings(args), workers);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let status = runtime.block_on(async {
        let listeners = if passed.is_empty() {
            let each = args.listen_or_default();
            each.iter().map(bind).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect()
        } else {
            passed.into_iter().map(Listener::from_passed).collect::<Result<Vec<_>>>()?
        };
        let mut stop = Stop::new()?;
        ready.announce(&uris(&listeners, &exports))?;
        // Without systemd there is nobody to tell.
        let _ = systemd::notify("READY=1");
        serve(&server, listeners, args.once, &mut stop).await;
        let _ = systemd::notify("STOPPING=1");
        let flushed = server.shut_down(stop.wait()).await;
        anyhow::Ok(if flushed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    });
    drop(pid_file);
    // Workers may still hold a request that storage does not finish: ending must not wait for it.
    std::mem::forget(server);
    status
}

/// Accepts on every listener until a signal comes, or with `once` until the last client has left.
async fn serve(server: &Server, listeners: Vec<Listener>, once: bool, stop: &mut Stop) {
    let mut clients = server.clients();
    let last_left = async {
        // Whether one has been here at all must not be missed between two looks.
        let _ = clients.wait_for(|count| *count > 0).await;
        let _ = clients.wait_for(|count| *count == 0).await;
    };
    let mut accepting: Vec<_> = listeners.iter().map(|listener| Box::pin(listener.serve(server))).collect();
    let accept_all = poll_fn(|cx| {
        for listener in &mut accepting {
            let _ = listener.as_mut().poll(cx);
        }
        Poll::<()>::Pending
    });
    tokio::select! {
        () = accept_all => {}
        () = last_left, if once => tracing::info!("the last client has left"),
        () = stop.wait() => tracing::info!("stopping"),
    }
    // Dropped here, the listeners take no more clients, and their paths are removed.
}

fn settings(args: &NetArgs) -> Settings {
    Settings {
        max_in_flight: args.max_in_flight,
        handshake_limit: args.handshake_limit.unwrap_or(NO_LIMIT),
        send_timeout: args.send_timeout,
        payload_timeout: PAYLOAD_TIMEOUT,
        drain_timeout: args.drain_timeout,
        max_clients: args.shared.map(|n| usize::try_from(n.get()).unwrap_or(usize::MAX)),
        memory_budget: args.memory_budget,
    }
}

/// One line for each way to each export.
fn uris(listeners: &[Listener], exports: &[Arc<Export>]) -> Vec<String> {
    let mut lines = Vec::new();
    for listener in listeners {
        for export in exports {
            match listener.local() {
                Local::Tcp(address) => lines.push(uri::tcp(address, export.name())),
                Local::Unix(path) => {
                    let path = std::path::absolute(&path).unwrap_or(path);
                    lines.push(uri::unix(&path, export.name()));
                }
                Local::Unnamed => {}
            }
        }
    }
    lines
}

/// The signals that end the server.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> Result<Self> {
        let handle = |kind| signal(kind).context("cannot handle signals");
        Ok(Stop { terminate: handle(SignalKind::terminate())?, interrupt: handle(SignalKind::interrupt())? })
    }

    /// Waits for the next one. Cancel-safe.
    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
