//! `nbdbridge volumed`: the volumes of a pool for Docker and podman, by the Docker volume plugin protocol, version 1.
//!
//! ```text
//!   dockerd, podman ── HTTP over a Unix socket
//!      │
//!   server   a connection for each request; who is slow or sends garbage hinders nobody
//!   routes   requests and answers (wire), errors as status 500
//!   work     one thing at a time for a volume, on threads that may block; takes back what nobody waited for
//!      │
//!   Pool
//! ```
//!
//! Nothing is remembered here: a daemon that is killed and started again knows what the pool and the kernel know. What
//! serves the volumes are processes of their own, which it neither ends nor takes with it.

mod listen;
mod routes;
mod server;
mod wire;
mod work;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::Pool;
use crate::output;
use crate::stop::Stop;
use crate::systemd::{self, PassedSocket};
use listen::Door;
use work::Work;

/// What the daemon was asked to be.
#[derive(Debug)]
pub(crate) struct DaemonArgs {
    /// The pool's folder; made, where it is missing.
    pub(crate) pool: PathBuf,
    /// The socket, where systemd passes none.
    pub(crate) socket: PathBuf,
    /// Where volumes are mounted; None for below /run.
    pub(crate) mount_root: Option<PathBuf>,
}

/// Serves until a signal ends it.
///
/// # Errors
/// One line: the pool or the socket.
pub(crate) fn run(args: &DaemonArgs) -> Result<ExitCode> {
    let passed = systemd::take_sockets()?;
    Pool::make(&args.pool, false)?;
    let mut pool = Pool::open(&args.pool)?;
    if let Some(folder) = &args.mount_root {
        ensure!(
            folder.to_str().is_some(),
            "--mount-root {}: the path is not UTF-8, which Docker's plugin protocol cannot carry; choose another",
            folder.display()
        );
        pool.set_mount_root(folder)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    let result = runtime.block_on(serve(pool, &args.socket, passed));
    // What still runs is cut short as by a crash, which volumes survive.
    runtime.shutdown_background();
    result.map(|()| ExitCode::SUCCESS)
}

async fn serve(pool: Pool, socket: &Path, passed: Vec<PassedSocket>) -> Result<()> {
    // Taken before there is a socket that would stay.
    let mut stop = Stop::new()?;
    let door = Door::open(socket, passed)?;
    let path = door.path().to_owned();
    let (listener, file) = door.listen()?;
    let work = Work::new(pool);
    let looked = Arc::clone(&work);
    tokio::task::spawn_blocking(move || looked.recover());
    // Whoever started the daemon knows the path.
    if let Err(error) = output::places(&[path.into()]) {
        tracing::warn!("{error:#}");
    }
    tell("READY=1");
    tokio::select! {
        () = server::accept(listener, &work) => {}
        () = stop.wait() => {}
    }
    tell("STOPPING=1");
    // Removed first: who comes now finds nothing.
    drop(file);
    work.finish().await;
    Ok(())
}

fn tell(state: &str) {
    if let Err(error) = systemd::notify(state) {
        tracing::warn!(%error, "cannot tell systemd {state}");
    }
}
