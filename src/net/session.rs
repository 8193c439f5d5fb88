//! One client from its first byte to its last: handshake, then reader and writer.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bridge::Account;
use bytes::BytesMut;
use nbd_proto::{CloseReason, Handshake, Limits, Negotiated, Step, TlsPolicy};

use super::connection::{Connection, Listed};
use super::output::Sent;
use super::reader::Reader;
use super::server::{Phase, Shared};
use super::socket::Socket;

/// What a client must take within the send timeout while answers wait for it.
const PROGRESS_BYTES: u64 = 64 << 10;

/// How often the socket is tried where nothing tells of room.
const LOOK_PAUSE: Duration = Duration::from_millis(2);

/// Received at once during the handshake.
const HANDSHAKE_BYTES: usize = 4096;

/// Serves a connected socket until its end. What goes wrong with a peer is logged, and costs only this peer.
pub(super) async fn serve(shared: Arc<Shared>, fd: OwnedFd, id: u64, peer: String, account: Account) {
    match serve_client(&shared, fd, id, &peer, account).await {
        Ok(()) => tracing::info!(%peer, "client left"),
        Err(error) => tracing::info!(%peer, %error, "client dropped"),
    }
}

async fn serve_client(
    shared: &Arc<Shared>,
    fd: OwnedFd,
    id: u64,
    peer: &str,
    account: Account,
) -> io::Result<()> {
    let fd = Arc::new(fd);
    let socket = Socket::new(fd.clone())?;
    let limit = shared.settings.handshake_limit;
    let outcome = tokio::time::timeout(limit, negotiate(shared, &socket)).await.map_err(|_| {
        io::Error::new(io::ErrorKind::TimedOut, format!("handshake not done within {limit:?}"))
    })??;
    let Some((negotiated, first)) = outcome else { return Ok(()) };
    // The handshake found it a moment ago, and the list of exports does not change.
    let Some(export) = shared.exports.get(&negotiated.export).cloned() else { return Ok(()) };
    tracing::info!(%peer, export = negotiated.export, style = ?negotiated.style, "client connected");
    if !shared.registry.settle(&export, limit).await {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("changes of a client that has left are still under way after {limit:?}"),
        ));
    }
    let connection = Connection::new(peer, socket, export, &negotiated, account, shared.settings.clone());
    let _registered = shared.registry.add(id, &connection.export, &fd, &connection.changes);
    drop(fd);
    let _listed = Listed::new(id, &connection);
    if shared.phase() != Phase::Running {
        connection.drain();
    }
    tokio::task::spawn_local(write(connection.clone()));
    let mut reader = Reader::new(&connection, first);
    // However this function is left, the socket is closed and the writer ends; before the reader is dropped, so
    // that what it still owes is owed to nobody.
    let _closing = CloseOnDrop(connection.clone());
    reader.run().await
}

struct CloseOnDrop(Rc<Connection>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// The writer of a connection: sends what could not be sent at once, until the connection is closed.
async fn write(connection: Rc<Connection>) {
    while !connection.is_closed() {
        connection.writer_wait().await;
        if let Err(error) = send_queued(&connection).await {
            if !connection.is_closed() {
                tracing::info!(%error, "cannot send; client dropped");
            }
            connection.close();
        }
    }
}

/// Sends until the queue is empty. A client that takes too little for too long is given up: otherwise a sip now
/// and then would keep its memory for ever.
async fn send_queued(connection: &Connection) -> io::Result<()> {
    let limit = connection.settings.send_timeout;
    let mut mark = (Instant::now(), connection.sent_bytes());
    let mut room = None;
    while !connection.is_closed() {
        match connection.send_queue()? {
            Sent::All => return Ok(()),
            Sent::Paused => tokio::task::yield_now().await,
            Sent::Blocked => {
                if room.is_none() {
                    room = connection.socket.send_room().ok();
                }
                let Some(room) = &room else {
                    // No descriptor is free to be told by: then by looking, until there is one.
                    if mark.0.elapsed() > limit {
                        return Err(too_slow(limit));
                    }
                    tokio::time::sleep(LOOK_PAUSE).await;
                    continue;
                };
                let left = limit.saturating_sub(mark.0.elapsed());
                let writable = tokio::time::timeout(left, room.ready()).await;
                let mut writable = writable.map_err(|_| too_slow(limit))??;
                if connection.send_queue()? == Sent::Blocked {
                    writable.clear_ready();
                }
            }
        }
        if connection.sent_bytes() - mark.1 >= PROGRESS_BYTES {
            mark = (Instant::now(), connection.sent_bytes());
        }
    }
    Ok(())
}

fn too_slow(limit: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("the client has not read its answers for {limit:?}"))
}

/// The handshake. None where the client left in good order; else the outcome, and what came behind it.
async fn negotiate(shared: &Shared, socket: &Socket) -> io::Result<Option<(Negotiated, BytesMut)>> {
    let limits = Limits::default().for_exports(shared.exports.list.len());
    let mut handshake = Handshake::new(limits, TlsPolicy::Disabled);
    let mut phase = shared.watch_phase();
    send_all(socket, &handshake.greeting()).await?;
    let mut buf = [0; HANDSHAKE_BYTES];
    let mut out = Vec::new();
    loop {
        // At a shutdown what the client has sent already is still answered, with a refusal.
        let stopping = *phase.borrow_and_update() != Phase::Running;
        if stopping {
            handshake.shutting_down();
        }
        let received = match socket.receive(&mut buf)? {
            Some(received) => received,
            None if stopping => return Ok(None),
            None => {
                tokio::select! {
                    guard = socket.readable() => {
                        let mut guard = guard?;
                        match socket.receive(&mut buf)? {
                            Some(received) => received,
                            None => {
                                guard.clear_ready();
                                continue;
                            }
                        }
                    }
                    changed = phase.changed() => {
                        if changed.is_err() {
                            return Ok(None);
                        }
                        continue;
                    }
                }
            }
        };
        if received == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the client hung up during the handshake",
            ));
        }
        // A client that never stops sending must not hold the worker, nor outlive the limit.
        tokio::task::yield_now().await;
        let mut input = &buf[..received];
        loop {
            let (used, step) = handshake.advance(input, &shared.exports, &mut out);
            input = &input[used..];
            send_all(socket, &out).await?;
            out.clear();
            match step {
                Step::NeedMore => break,
                Step::Flush => {}
                Step::Transmission(negotiated) => return Ok(Some((negotiated, BytesMut::from(input)))),
                Step::Close(CloseReason::Abort) => return Ok(None),
                Step::Close(reason) => return Err(io::Error::new(io::ErrorKind::InvalidData, reason)),
                // Without TLS the handshake refuses the option itself.
                Step::StartTls => return Err(io::Error::other("TLS is not set up")),
            }
        }
    }
}

async fn send_all(socket: &Socket, mut bytes: &[u8]) -> io::Result<()> {
    let mut room = None;
    while !bytes.is_empty() {
        if let Some(sent) = socket.send(bytes, false)? {
            bytes = &bytes[sent..];
            continue;
        }
        let room = match &mut room {
            Some(room) => room,
            none => none.insert(socket.send_room()?),
        };
        let mut guard = room.ready().await?;
        match socket.send(bytes, false)? {
            Some(sent) => bytes = &bytes[sent..],
            None => guard.clear_ready(),
        }
    }
    Ok(())
}
