//! Connections, of one request each. One whose request is not whole yet waits in a room of limited size, from which the
//! oldest is thrown out when it is full, unless it has just come: who is slow, or sends no request at all, keeps nobody
//! out for long.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::AbortHandle;

use super::routes;
use super::work::{Client, Stay, Work};
use crate::control::is_welcome;

/// Connections whose requests are not whole.
const ROOM: usize = 64;

/// Nobody is thrown out before that.
const GRACE: Duration = Duration::from_millis(250);

/// How often to look whether there is room.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Time for a request's head.
const HEAD_LIMIT: Duration = Duration::from_secs(5);

/// The longest head.
const HEAD_BYTES: usize = 16 << 10;

/// Time for a client to read its answer.
const HEAR_LIMIT: Duration = Duration::from_secs(5);

/// After an accept that failed for want of descriptors or memory, so long until the next.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves whoever comes.
pub(super) async fn accept(listener: UnixListener, work: &Arc<Work>) {
    let room = Arc::new(Room::default());
    loop {
        room.make_room().await;
        match listener.accept().await {
            Ok((stream, _)) if is_welcome(&stream) => {
                let seat = Arc::new(Seat::new(&room, work));
                let number = seat.number;
                let task = tokio::spawn(serve(stream, Arc::clone(work), seat));
                room.enter(number, task.abort_handle());
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// One client, one request.
async fn serve(stream: UnixStream, work: Arc<Work>, seat: Arc<Seat>) {
    let router = routes::router(work, Arc::clone(&seat));
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let served = std::future::poll_fn(|context| connection.poll_without_shutdown(context)).await;
    match served {
        Ok(()) => {
            seat.take();
            match hear_out(connection.into_parts().io.into_inner()).await {
                Ok(()) => seat.client.has_heard(),
                Err(error) => tracing::debug!(%error, "a client did not read its answer"),
            }
        }
        Err(error) => tracing::debug!(%error, "a client was dropped"),
    }
}

/// Waits until the client has read its answer. A Unix socket that is closed with something unread in it makes the other
/// end's next read fail: that is how we learn of it.
async fn hear_out(mut stream: UnixStream) -> io::Result<()> {
    stream.shutdown().await?;
    let mut rest = [0; 512];
    let closed = async {
        while stream.read(&mut rest).await? > 0 {}
        Ok(())
    };
    // One that keeps its end open is there to hear.
    tokio::time::timeout(HEAR_LIMIT, closed).await.unwrap_or(Ok(()))
}

/// Connections whose requests are not whole yet, oldest first.
#[derive(Default)]
struct Room {
    waiting: Mutex<VecDeque<Waiting>>,
    next: AtomicU64,
}

struct Waiting {
    number: u64,
    since: Instant,
    task: AbortHandle,
}

impl Room {
    /// Waits until one more can enter.
    async fn make_room(&self) {
        while !self.has_room() {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    fn has_room(&self) -> bool {
        let mut waiting = self.lock();
        if waiting.len() >= ROOM
            && waiting.front().is_some_and(|oldest| oldest.since.elapsed() >= GRACE)
            && let Some(oldest) = waiting.pop_front()
        {
            oldest.task.abort();
        }
        waiting.len() < ROOM
    }

    fn enter(&self, number: u64, task: AbortHandle) {
        self.lock().push_back(Waiting { number, since: Instant::now(), task });
    }

    fn leave(&self, number: u64) {
        self.lock().retain(|there| there.number != number);
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place, in the room at first. When it goes, so has the client.
pub(super) struct Seat {
    number: u64,
    room: Arc<Room>,
    work: Arc<Work>,
    client: Arc<Client>,
    stay: Mutex<Option<Stay>>,
}

impl Seat {
    fn new(room: &Arc<Room>, work: &Arc<Work>) -> Self {
        let number = room.next.fetch_add(1, Ordering::Relaxed);
        Seat {
            number,
            room: Arc::clone(room),
            work: Arc::clone(work),
            client: Arc::default(),
            stay: Mutex::default(),
        }
    }

    /// Its request is whole: it is not thrown out any more, and the process does not end before the answer is given.
    pub(super) fn take(&self) {
        self.room.leave(self.number);
        let mut stay = self.stay.lock().unwrap_or_else(PoisonError::into_inner);
        if stay.is_none() {
            *stay = self.work.stay();
        }
    }

    /// Who sits there.
    pub(super) fn client(&self) -> Arc<Client> {
        Arc::clone(&self.client)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.room.leave(self.number);
        if let Some((name, id)) = self.client.leave() {
            self.work.take_back(name, id);
        }
    }
}
