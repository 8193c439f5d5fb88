//! Who is connected, for people who ask: collected by asking each worker, so that connections need no lock.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use bridge::worker::Workers;
use tokio::sync::{Mutex, oneshot};
use tokio::time::{Instant, timeout_at};

use super::connection::{Connection, for_each_here};
use crate::control::{Client, ClientReport, Clients, SendFuture};

/// A worker that does not answer within this time is busy with something that takes long: the rest is told without.
const PATIENCE: Duration = Duration::from_millis(500);

/// Asks the workers.
pub(crate) struct ClientList {
    workers: Arc<Workers>,
    /// For each worker whether a question to it is open: then no second one is put, or they would pile up.
    asked: Arc<[AtomicBool]>,
    /// Held by who is asking.
    turn: Mutex<()>,
}

impl ClientList {
    /// Of the clients on these workers.
    pub(super) fn new(workers: Arc<Workers>) -> Self {
        let asked = (0..workers.count()).map(|_| AtomicBool::new(false)).collect();
        ClientList { workers, asked, turn: Mutex::new(()) }
    }

    fn ask(&self, worker: usize) -> Option<oneshot::Receiver<Vec<Client>>> {
        if self.asked[worker].swap(true, Relaxed) {
            return None;
        }
        let (tell, answer) = oneshot::channel();
        let asked = self.asked.clone();
        self.workers.spawn(worker, move || async move {
            asked[worker].store(false, Relaxed);
            let mut here = Vec::new();
            for_each_here(|connection| here.push(describe(connection)));
            // Who asked may have gone.
            let _ = tell.send(here);
        });
        Some(answer)
    }
}

impl Clients for ClientList {
    fn list(&self) -> SendFuture<'_, ClientReport> {
        Box::pin(async {
            let _turn = self.turn.lock().await;
            let answers: Vec<_> = (0..self.asked.len()).map(|worker| self.ask(worker)).collect();
            let deadline = Instant::now() + PATIENCE;
            let mut report = ClientReport::default();
            for answer in answers {
                let here = match answer {
                    Some(answer) => timeout_at(deadline, answer).await.ok().and_then(Result::ok),
                    None => None,
                };
                match here {
                    Some(here) => report.clients.extend(here),
                    None => report.silent_workers += 1,
                }
            }
            report.clients.sort_by_key(|client| std::cmp::Reverse(client.connected_s));
            report
        })
    }
}

fn describe(connection: &Connection) -> Client {
    let (received_bytes, sent_bytes) = connection.socket.traffic();
    Client {
        peer: connection.peer.clone(),
        export: connection.export.name().to_owned(),
        in_flight: connection.in_flight(),
        received_bytes,
        sent_bytes,
        connected_s: connection.since.elapsed().as_secs(),
    }
}
