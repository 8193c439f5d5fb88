//! Changes that a client left behind. A client that lost its connection comes back and stores newer data: writes of the
//! lost connection that are still under way must not land after these. So a new connection is answered when every
//! connection of the same export whose peer has hung up is at its end, with all of its changes.
//!
//! A peer whose network failed has not hung up as far as this host knows: its connection is another client's, until
//! TCP gives it up.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bridge::Export;
use tokio::sync::watch;

use super::socket::{HangUp, hang_up};

/// What a connection has under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    /// Changes handed to the export and not done.
    changes: u32,
    /// Nothing more is taken in.
    ended: bool,
    /// The reader waits for a slot or for memory. It takes nothing more in if the peer is gone by then.
    paused: bool,
}

impl State {
    /// Whether no change is under way and none can follow; `gone` says that the peer has closed both directions.
    fn is_over(self, gone: bool) -> bool {
        self.changes == 0 && (self.ended || self.paused && gone)
    }
}

/// The changes of one connection; clones count together.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes(watch::Sender<State>);

impl Changes {
    /// Counts a change until the guard is dropped.
    pub(super) fn begin(&self) -> Change {
        self.0.send_modify(|state| state.changes += 1);
        Change(self.clone())
    }

    /// Notes that the reader takes nothing more in.
    pub(super) fn end(&self) {
        self.0.send_modify(|state| state.ended = true);
    }

    /// Notes that the reader waits for a slot or for memory, or no longer.
    pub(super) fn pause(&self, paused: bool) {
        self.0.send_modify(|state| state.paused = paused);
    }
}

/// A change under way.
pub(super) struct Change(Changes);

impl Drop for Change {
    fn drop(&mut self) {
        self.0.0.send_modify(|state| state.changes -= 1);
    }
}

struct Entry {
    id: u64,
    export: Arc<Export>,
    /// None after the end of the connection.
    socket: Option<Arc<OwnedFd>>,
    state: watch::Receiver<State>,
}

impl Entry {
    /// Returns None if the peer is there, and else whether it has closed both directions.
    fn left(&self) -> Option<bool> {
        match self.socket.as_ref().map_or(HangUp::Full, hang_up) {
            HangUp::No => None,
            HangUp::Half => Some(false),
            HangUp::Full => Some(true),
        }
    }
}

/// The connections of a server, with what they have under way.
#[derive(Default)]
pub(super) struct Registry(Mutex<Vec<Entry>>);

impl Registry {
    /// Adds a connection until the guard is dropped, and longer while its changes are under way.
    pub(super) fn add(
        self: &Arc<Self>,
        id: u64,
        export: &Arc<Export>,
        socket: &Arc<OwnedFd>,
        changes: &Changes,
    ) -> Registered {
        let (export, socket) = (export.clone(), Some(socket.clone()));
        self.lock().push(Entry { id, export, socket, state: changes.0.subscribe() });
        Registered { registry: self.clone(), id, changes: changes.clone() }
    }

    /// Waits until the changes of clients that have left this export are done. False if `limit` passes first.
    pub(super) async fn settle(&self, export: &Arc<Export>, limit: Duration) -> bool {
        let left: Vec<_> = self
            .lock()
            .iter()
            .filter(|entry| Arc::ptr_eq(&entry.export, export))
            .filter_map(|entry| entry.left().map(|gone| (entry.state.clone(), gone)))
            .collect();
        if left.is_empty() {
            return true;
        }
        let all = async {
            for (mut state, gone) in left {
                // An error means that the connection is gone, with all it had.
                let _ = state.wait_for(|state| state.is_over(gone)).await;
            }
        };
        tokio::time::timeout(limit, all).await.is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection in the registry.
pub(super) struct Registered {
    registry: Arc<Registry>,
    id: u64,
    changes: Changes,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.changes.end();
        let mut entries = self.registry.lock();
        if let Some(entry) = entries.iter_mut().find(|entry| entry.id == self.id) {
            entry.socket = None;
        }
        entries.retain(|entry| entry.socket.is_some() || !entry.state.borrow().is_over(true));
    }
}
