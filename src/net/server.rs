//! The server: what all connections share, and its life from the first client to the end of the drain.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bridge::worker::Workers;
use bridge::{Budget, Export};
use tokio::sync::watch;

use super::clients::ClientList;
use super::connection::for_each_here;
use super::directory::Exports;
use super::late::Registry;
use super::session;

/// Time for connections that were closed to let go of what they hold.
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// What a user can set.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Requests of one connection in flight at most, 1 to [`Settings::MAX_IN_FLIGHT`].
    pub(crate) max_in_flight: u32,
    /// A handshake that takes longer is dropped.
    pub(crate) handshake_limit: Duration,
    /// A client that takes no answers for so long is dropped.
    pub(crate) send_timeout: Duration,
    /// A client that stops for so long in the middle of a request is dropped.
    pub(crate) payload_timeout: Duration,
    /// At a shutdown, what is in flight gets so long.
    pub(crate) drain_timeout: Duration,
    /// Clients at the same time at most; None for any number.
    pub(crate) max_clients: Option<usize>,
    /// The bytes that all clients together may hold.
    pub(crate) memory_budget: u64,
    /// Offer clients the context `qemu:allocation-depth`.
    pub(crate) allocation_depth: bool,
}

impl Settings {
    /// More requests in flight would let a connection's overhead alone use up its share of the budget.
    pub(crate) const MAX_IN_FLIGHT: u32 = 1024;
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Serving.
    Running,
    /// Requests are refused, those in flight are finished.
    Draining,
    /// Every connection is closed.
    Over,
}

/// What the connections share.
pub(super) struct Shared {
    pub(super) exports: Exports,
    pub(super) settings: Arc<Settings>,
    /// The connections, with their changes under way.
    pub(super) registry: Arc<Registry>,
    budget: Arc<Budget>,
    phase: watch::Sender<Phase>,
    clients: watch::Sender<usize>,
    loads: Box<[AtomicUsize]>,
    next_id: AtomicU64,
}

impl Shared {
    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(super) fn watch_phase(&self) -> watch::Receiver<Phase> {
        self.phase.subscribe()
    }
}

/// A server, ready for clients.
pub(crate) struct Server {
    shared: Arc<Shared>,
    workers: Arc<Workers>,
}

impl Server {
    /// A server of these exports on these workers.
    pub(crate) fn new(exports: Vec<Arc<Export>>, settings: Settings, workers: Arc<Workers>) -> Self {
        let shared = Shared {
            exports: Exports { list: exports.into(), depth: settings.allocation_depth },
            registry: Arc::default(),
            budget: Budget::new(settings.memory_budget),
            settings: Arc::new(settings),
            phase: watch::Sender::new(Phase::Running),
            clients: watch::Sender::new(0),
            loads: (0..workers.count()).map(|_| AtomicUsize::new(0)).collect(),
            next_id: AtomicU64::new(0),
        };
        Server { shared: Arc::new(shared), workers }
    }

    /// Takes a connected, non-blocking socket. It goes to the worker that has the fewest.
    pub(crate) fn take(&self, fd: OwnedFd, peer: String) {
        let shared = self.shared.clone();
        let Some(account) = shared.budget.open_account() else {
            tracing::warn!(%peer, "client refused: the memory budget is used up (--memory-budget)");
            return;
        };
        let loads = shared.loads.iter().map(|load| load.load(Relaxed)).enumerate();
        let Some((worker, _)) = loads.min_by_key(|(_, load)| *load) else { return };
        let id = shared.next_id.fetch_add(1, Relaxed);
        let seat = Seat::take(shared.clone(), worker);
        self.workers.spawn(worker, move || async move {
            let _seat = seat;
            session::serve(shared, fd, id, peer, account).await;
        });
    }

    /// What tells of its clients.
    pub(crate) fn client_list(&self) -> ClientList {
        ClientList::new(self.workers.clone())
    }

    /// Waits until one more client is welcome.
    pub(crate) async fn wait_for_room(&self) {
        let mut clients = self.clients();
        let max = self.shared.settings.max_clients.unwrap_or(usize::MAX);
        let _ = clients.wait_for(|count| *count < max).await;
    }

    /// How many clients there are, and each change of it.
    pub(crate) fn clients(&self) -> watch::Receiver<usize> {
        self.shared.clients.subscribe()
    }

    /// Waits until the last client has left. Before the first one has come, none has.
    pub(crate) async fn until_left(&self) {
        let mut clients = self.clients();
        // Each client changes the count twice, and gets its number before: none is missed between two looks.
        let had_one = || self.shared.next_id.load(Relaxed) > 0;
        let _ = clients.wait_for(|count| *count == 0 && had_one()).await;
    }

    /// Ends: refuses what is new, finishes what is in flight (for `drain_timeout` at most), closes all connections.
    pub(crate) async fn drain(&self) {
        let limit = self.shared.settings.drain_timeout;
        let mut clients = self.clients();
        self.set_phase(Phase::Draining);
        if tokio::time::timeout(limit, clients.wait_for(|count| *count == 0)).await.is_err() {
            tracing::warn!("{} clients still busy after {limit:?}: closing them", *self.clients().borrow());
        }
        self.close().await;
    }

    /// Closes all connections. What is in flight is answered to nobody.
    pub(crate) async fn close(&self) {
        self.set_phase(Phase::Over);
        // Requests that storage still holds cannot be waited for without bound.
        let mut clients = self.clients();
        let gone = clients.wait_for(|count| *count == 0);
        let _ = tokio::time::timeout(CLOSE_LIMIT, gone).await;
    }

    fn set_phase(&self, phase: Phase) {
        self.shared.phase.send_replace(phase);
        for worker in 0..self.workers.count() {
            self.workers.spawn(worker, move || async move {
                for_each_here(|connection| match phase {
                    Phase::Running => {}
                    Phase::Draining => connection.drain(),
                    Phase::Over => connection.close(),
                });
            });
        }
    }
}

/// A client's place in the counts, for as long as it is served.
struct Seat {
    shared: Arc<Shared>,
    worker: usize,
}

impl Seat {
    fn take(shared: Arc<Shared>, worker: usize) -> Self {
        shared.clients.send_modify(|count| *count += 1);
        shared.loads[worker].fetch_add(1, Relaxed);
        Seat { shared, worker }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.loads[self.worker].fetch_sub(1, Relaxed);
        self.shared.clients.send_modify(|count| *count -= 1);
    }
}
