//! The control socket's thread: accepts, limits what a client may cost, and hands requests to the routes.

use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use hyper::Request;
use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::oneshot;

use super::folder::{self, OwnSocket};
use super::guests::{Guests, Progress};
use super::{Site, routes};

/// Time for a request's head.
const HEAD_LIMIT: Duration = Duration::from_secs(2);

/// Time for a client from its first byte to its last: a change of size may take long.
const CLIENT_LIMIT: Duration = Duration::from_secs(60);

/// The longest head of a request.
const HEAD_BYTES: usize = 16 << 10;

/// After an accept that failed for want of descriptors or memory, so long until the next.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The control socket of this process. Dropped, it is closed and removed.
#[derive(Debug)]
pub(crate) struct Control {
    /// Removed first: who looks then finds nothing.
    socket: Option<OwnSocket>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Control {
    /// Opens the socket. Where that is not possible the process does without, and says so in one line.
    pub(crate) fn start(site: Site) -> Option<Self> {
        match Control::open(site) {
            Ok(control) => Some(control),
            Err(error) => {
                tracing::warn!("no control socket, so that nbdbridge ps does not see this server: {error:#}");
                None
            }
        }
    }

    fn open(site: Site) -> Result<Self> {
        let (listener, socket) = OwnSocket::bind(&folder::path())?;
        let (stop, stopped) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start its event loop")?;
        tracing::info!("control socket: {}", socket.path().display());
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || runtime.block_on(run(listener, site, stopped)))
            .context("cannot start its thread")?;
        Ok(Control { socket: Some(socket), stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.socket = None;
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // It waits for nothing but its sockets, and ends at once.
            let _ = thread.join();
        }
    }
}

async fn run(listener: StdListener, site: Site, stopped: oneshot::Receiver<()>) {
    let accept = async {
        match UnixListener::from_std(listener) {
            Ok(listener) => accept(listener, routes::router(Arc::new(site))).await,
            Err(error) => tracing::warn!(%error, "the control socket does not work"),
        }
    };
    tokio::select! {
        () = accept => {}
        _ = stopped => {}
    }
}

async fn accept(listener: UnixListener, router: Router) {
    let mut guests = Guests::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) if is_welcome(&stream) => {
                guests.make_room().await;
                guests.admit(|progress| serve(stream, router.clone(), progress));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept on the control socket");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Whether the client is our user or root, whatever became of the socket's mode.
fn is_welcome(stream: &UnixStream) -> bool {
    let uid = stream.peer_cred().map(|cred| cred.uid());
    uid.is_ok_and(|uid| uid == 0 || uid == rustix::process::geteuid().as_raw())
}

/// One client, one request.
async fn serve(stream: UnixStream, router: Router, progress: Progress) {
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: Request<Incoming>| {
        if request.body().is_end_stream() {
            progress.begin();
        }
        // Where there is a body, whoever has read it says so.
        request.extensions_mut().insert(progress.clone());
        let (answer, progress) = (router.call(request), progress.clone());
        async move {
            let answer = answer.await;
            progress.end();
            answer
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CLIENT_LIMIT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a client of the control socket was dropped"),
        Err(_) => tracing::debug!("a client of the control socket took too long"),
    }
}
