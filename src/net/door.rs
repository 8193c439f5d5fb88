//! The NBD server as a door: listeners in front of a [`Server`].

use std::cell::RefCell;
use std::ffi::OsString;
use std::future::poll_fn;
use std::os::fd::OwnedFd;
use std::path::absolute;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use anyhow::Result;
use bridge::{Export, LocalFuture};
use nbd_proto::uri::Uri;

use super::listener::{Listener, Local, bind, passed_client};
use super::server::{Server, Settings};
use crate::cli::{NetArgs, ProcessArgs, abstract_name};
use crate::control::{Place, Watch};
use crate::door::{Door, Site};
use crate::systemd::SocketState;

/// A client that stops for so long in the middle of a request is dropped.
const PAYLOAD_TIMEOUT: Duration = Duration::from_secs(30);

/// A handshake without a limit of its own ends after this: nobody waits for days.
const NO_LIMIT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The server and its listeners.
pub(crate) struct NetDoor {
    server: Server,
    /// Empty once the door is closed: dropped, they take no more clients, and their paths are removed.
    listeners: RefCell<Vec<Arc<Listener>>>,
    exports: Vec<Arc<Export>>,
    /// Connections that were passed in and are not served yet, with their peers' names.
    connected: RefCell<Vec<(OwnedFd, String)>>,
    /// Ends when the last client has left.
    once: bool,
    /// The sockets were passed in: whoever did that knows where they are, and may want stdout for something else.
    passed: bool,
}

impl NetDoor {
    /// Listens at the addresses of `args`, or at the sockets that were passed in.
    ///
    /// # Errors
    /// One line that names the address and the way out.
    pub(crate) fn open(args: &NetArgs, site: &mut Site<'_>) -> Result<Self> {
        let passed = std::mem::take(&mut site.passed);
        let was_passed = !passed.is_empty();
        let (connected, listening): (Vec<_>, Vec<_>) =
            passed.into_iter().partition(|socket| socket.state == SocketState::Connected);
        let listeners: Vec<Listener> = if was_passed {
            listening.into_iter().map(Listener::from_passed).collect::<Result<_>>()?
        } else {
            let each = args.listen_or_default();
            each.iter().map(bind).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect()
        };
        let connected: Vec<_> = connected.into_iter().map(passed_client).collect::<Result<_>>()?;
        Ok(NetDoor {
            server: Server::new(site.exports.to_vec(), settings(args, site.process), site.workers.clone()),
            once: args.once || listeners.is_empty(),
            listeners: RefCell::new(listeners.into_iter().map(Arc::new).collect()),
            exports: site.exports.to_vec(),
            connected: RefCell::new(connected),
            passed: was_passed,
        })
    }

    /// One URI for each way to each export.
    fn places(&self) -> Vec<Place> {
        let mut places = Vec::new();
        for listener in self.listeners.borrow().iter() {
            for export in &self.exports {
                let name = export.name();
                let at = match listener.local() {
                    Local::Tcp(address) => Uri::tcp(address, name).to_string(),
                    Local::Unix(path) if abstract_name(&path).is_some() => Uri::unix(&path, name).to_string(),
                    Local::Unix(path) => Uri::unix(&absolute(&path).unwrap_or(path), name).to_string(),
                    Local::Unnamed => continue,
                };
                places.push(Place { export: name.to_owned(), at: at.into() });
            }
        }
        places
    }
}

impl Door for NetDoor {
    fn lines(&self) -> Vec<OsString> {
        if self.passed {
            return Vec::new();
        }
        self.places().into_iter().map(|place| place.at.into()).collect()
    }

    fn watch(&self) -> Watch {
        let clients = Some(Arc::new(self.server.client_list()) as _);
        Watch { kind: "net", places: self.places(), clients, fixed: None }
    }

    /// Serves what is connected already and accepts on every listener; with `once` until the last client has left.
    fn serve(&self) -> LocalFuture<'_, ()> {
        let listeners = self.listeners.borrow().clone();
        Box::pin(async move {
            for (fd, peer) in self.connected.take() {
                self.server.take(fd, peer);
            }
            let mut accepting: Vec<_> =
                listeners.iter().map(|listener| Box::pin(listener.serve(&self.server))).collect();
            let accept_all = poll_fn(|cx| {
                for listener in &mut accepting {
                    let _ = listener.as_mut().poll(cx);
                }
                Poll::<()>::Pending
            });
            tokio::select! {
                () = accept_all => {}
                () = self.server.until_left(), if self.once => tracing::info!("the last client has left"),
            }
        })
    }

    /// Clients are told that the server ends, and may come back later.
    fn release(&self) -> LocalFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn drain(&self) -> LocalFuture<'_, bool> {
        self.listeners.borrow_mut().clear();
        Box::pin(async {
            self.server.drain().await;
            true
        })
    }

    fn cut(&self) -> LocalFuture<'_, ()> {
        self.listeners.borrow_mut().clear();
        Box::pin(self.server.close())
    }
}

fn settings(args: &NetArgs, process: &ProcessArgs) -> Settings {
    Settings {
        max_in_flight: args.max_in_flight,
        handshake_limit: args.handshake_limit.unwrap_or(NO_LIMIT),
        send_timeout: args.send_timeout,
        payload_timeout: PAYLOAD_TIMEOUT,
        drain_timeout: process.drain_timeout,
        max_clients: args.shared.map(|n| usize::try_from(n.get()).unwrap_or(usize::MAX)),
        memory_budget: args.memory_budget,
        allocation_depth: args.allocation_depth,
    }
}
