//! The reader of a connection: one receive, all complete requests in it, one send.
//!
//! No slot, no memory, no room for answers: then the reader stops taking in, the socket fills, and the peer is
//! slowed. What is done with the bytes is in `pass`.

use std::io;
use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use bridge::Charge;

use super::arena::{RECEIVE_BYTES, SCRATCH, Scratch};
use super::connection::Connection;
use super::input::{Input, Stop};

/// How long a busy connection keeps its worker before it lets the others run.
const TURN: Duration = Duration::from_micros(500);

/// The reading half of a connection.
pub(super) struct Reader {
    pub(super) connection: Rc<Connection>,
    pub(super) input: Input,
    /// Pays for answers in the arena beyond what the reserve covers, during a pass.
    pub(super) arena_charge: Option<Charge>,
    /// At a shutdown: the last look for requests was taken.
    looked: bool,
}

impl Reader {
    /// A reader that begins with `first`, what arrived behind the handshake.
    pub(super) fn new(connection: &Rc<Connection>, first: Vec<u8>) -> Self {
        Reader { connection: connection.clone(), input: Input::new(first), arena_charge: None, looked: false }
    }

    /// Serves until the peer says goodbye or is gone, or a shutdown has drained the connection; then waits for
    /// what is in flight. Not cancel-safe: dropped, the connection must be closed.
    ///
    /// # Errors
    /// A broken connection, a peer that breaks the protocol or stops in the middle of a request.
    pub(super) async fn run(mut self) -> io::Result<()> {
        let mut stop = self.pass_kept()?;
        let mut turn = Instant::now();
        loop {
            stop = match stop {
                Stop::End => break,
                Stop::Full => {
                    self.wait_for_room().await;
                    self.pass_kept()?
                }
                Stop::Charge(bytes) => {
                    self.input.granted = Some((bytes, self.connection.account.charge(bytes).await));
                    self.pass_kept()?
                }
                Stop::NeedMore => self.receive().await?,
            };
            if self.connection.is_closed() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            if turn.elapsed() > TURN {
                tokio::task::yield_now().await;
                turn = Instant::now();
            }
        }
        self.finish().await
    }

    /// Waits until everything in flight is answered and sent.
    async fn finish(&self) -> io::Result<()> {
        let connection = &self.connection;
        connection
            .reader_wait(|_| {
                let idle = connection.in_flight() == 0 && connection.output_is_empty();
                if idle || connection.is_closed() { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        Ok(())
    }

    /// Waits until a slot is free and the socket has taken what waited for it.
    async fn wait_for_room(&self) {
        let connection = &self.connection;
        connection
            .reader_wait(|_| {
                let room = connection.has_slot(0) && connection.output_is_empty();
                if room || connection.is_closed() { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
    }

    /// Waits for bytes, receives them, and makes a pass over all there are.
    async fn receive(&mut self) -> io::Result<Stop> {
        let connection = self.connection.clone();
        let midway = self.input.is_midway();
        let looked = self.looked;
        let wait = connection.reader_wait(|cx| {
            if connection.is_closed() {
                return Poll::Ready(Ok(None));
            }
            if connection.is_draining() {
                let idle = connection.in_flight() == 0 && connection.output_is_empty();
                match connection.socket.poll_readable(cx) {
                    Poll::Ready(guard) if !looked || !idle => return Poll::Ready(guard.map(Some)),
                    Poll::Pending if !idle => return Poll::Pending,
                    _ => return Poll::Ready(Ok(None)),
                }
            }
            Poll::Ready(ready!(connection.socket.poll_readable(cx)).map(Some))
        });
        let guard = if midway {
            let limit = connection.settings.payload_timeout;
            tokio::time::timeout(limit, wait).await.map_err(|_| stalled(limit))??
        } else {
            wait.await?
        };
        let Some(mut guard) = guard else { return Ok(Stop::End) };
        if connection.is_draining() {
            self.looked = true;
        }
        SCRATCH.with_borrow_mut(|Scratch { receive, arena }| {
            let kept = self.input.unprocessed();
            let have = kept.len();
            receive[..have].copy_from_slice(kept);
            let window = self.input.window(&connection).max((have + 1).min(RECEIVE_BYTES));
            let room = &mut receive[have..window];
            let wanted = room.len();
            let Some(received) = connection.socket.receive(room)? else {
                guard.clear_ready();
                return Ok(Stop::NeedMore);
            };
            if received == 0 {
                return if midway { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(Stop::End) };
            }
            if received < wanted {
                // The socket was emptied: its next bytes raise a new event.
                guard.clear_ready();
            }
            self.input.received(received, wanted);
            let bytes = &receive[..have + received];
            let (used, stop) = self.pass(bytes, arena)?;
            self.input.keep_rest(bytes, used);
            Ok(stop)
        })
    }

    /// A pass over the bytes kept from an earlier one.
    fn pass_kept(&mut self) -> io::Result<Stop> {
        let mut kept = std::mem::take(&mut self.input);
        let result = SCRATCH.with_borrow_mut(|scratch| {
            self.input.payload = kept.payload.take();
            self.input.granted = kept.granted.take();
            self.pass(kept.unprocessed(), &mut scratch.arena)
        });
        kept.payload = self.input.payload.take();
        kept.granted = self.input.granted.take();
        self.input = kept;
        let (used, stop) = result?;
        self.input.skip(used);
        Ok(stop)
    }
}

fn stalled(limit: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("sent nothing for {limit:?} in the middle of a request"))
}
