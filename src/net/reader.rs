//! The reader of a connection: one receive, all complete requests in it, one send.
//!
//! No slot, no memory, no room for answers: then the reader stops taking in, the socket fills, and the peer is
//! slowed. What is done with the bytes is in `pass`.

use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bridge::Charge;
use bytes::BytesMut;

use super::arena::{Arena, RECEIVE_BYTES, SCRATCH, Scratch};
use super::connection::{Connection, ready_if};
use super::input::{Input, Stop};
use super::linger::{self, Linger};
use super::socket::HangUp;
use super::splice::Spliced;

/// A client that ended its half of the connection is believed to be there for so long.
const HALF_OPEN: Duration = Duration::from_secs(10);

/// Answers gathered for one send, where more requests keep coming.
const GATHER_ANSWERS: u32 = 8;

/// Looks that may find nothing after one that found something.
const EAGER_LOOKS: u8 = 4;

/// One look in so many is taken in any case.
const PROBE: u8 = 32;

/// How long a busy connection keeps its worker before it lets the others run.
pub(super) const TURN: Duration = Duration::from_micros(500);

/// The reading half of a connection.
pub(super) struct Reader {
    pub(super) connection: Rc<Connection>,
    pub(super) input: Input,
    /// Pays for answers in the arena beyond what the reserve covers, during a pass.
    pub(super) arena_charge: Option<Charge>,
    /// The length of the last request taken in: a measure of the work it made.
    pub(super) worked: u64,
    /// Requests taken in since the last wait.
    pub(super) taken: u32,
    /// Whether one of them came before an earlier one was answered.
    pub(super) overlapped: bool,
    linger: Linger,
    /// Whether to splice large payloads.
    pub(super) splicing: Look,
    /// Whether to look for more requests before answers are sent, and after it before waiting.
    before_send: Look,
    after_send: Look,
    /// At a shutdown: the last look for requests was taken.
    looked: bool,
}

impl Reader {
    /// A reader that begins with `first`, what arrived behind the handshake.
    pub(super) fn new(connection: &Rc<Connection>, first: BytesMut) -> Self {
        Reader {
            connection: connection.clone(),
            input: Input::new(first),
            arena_charge: None,
            worked: 0,
            taken: 0,
            overlapped: false,
            linger: Linger::new(),
            splicing: Look { eager: 1, declined: 0 },
            before_send: Look::default(),
            after_send: Look::default(),
            looked: false,
        }
    }

    /// Serves until the peer says goodbye or is gone, or a shutdown has drained the connection; then waits for
    /// what is in flight. Not cancel-safe: dropped, the connection must be closed.
    ///
    /// # Errors
    /// A broken connection, a peer that breaks the protocol or stops in the middle of a request.
    pub(super) async fn run(&mut self) -> io::Result<()> {
        let mut stop = self.pass_kept()?;
        let mut turn = Instant::now();
        loop {
            stop = match stop {
                Stop::End => break,
                Stop::NeedMore => self.receive().await?,
                Stop::Yield => {
                    tokio::task::yield_now().await;
                    self.pass_kept()?
                }
                Stop::Full => {
                    let connection = &self.connection;
                    let room = || connection.has_slot(0) && connection.output_is_empty();
                    let wait = connection.reader_wait(|_| ready_if(room()));
                    self.resume_after(wait).await?;
                    self.pass_kept()?
                }
                Stop::Charge(bytes) => {
                    let charge = self.resume_after(self.connection.account.charge(bytes)).await?;
                    self.input.granted = Some((bytes, charge));
                    self.pass_kept()?
                }
            };
            if turn.elapsed() > TURN {
                tokio::task::yield_now().await;
                turn = Instant::now();
            }
        }
        self.finish().await
    }

    /// Waits for what requests that are here already need, as long as the connection lives. Requests of a client
    /// that has left meanwhile are not begun any more: it may have stored newer data by another connection.
    async fn resume_after<T>(&self, wait: impl Future<Output = T>) -> io::Result<T> {
        let connection = &self.connection;
        let begun = Instant::now();
        connection.changes.pause(true);
        let result = tokio::select! {
            result = wait => result,
            () = connection.reader_wait(|_| ready_if(connection.is_closed())) => return Err(gone()),
        };
        connection.changes.pause(false);
        let left = match connection.socket.hang_up() {
            HangUp::No => false,
            // A client may end its half and still wait for answers; but one that closed TCP looks the same.
            HangUp::Half => begun.elapsed() > HALF_OPEN,
            HangUp::Full => true,
        };
        if left || connection.is_closed() { Err(gone()) } else { Ok(result) }
    }

    /// Waits until everything in flight is answered and sent.
    async fn finish(&self) -> io::Result<()> {
        let connection = &self.connection;
        connection.changes.end();
        connection
            .reader_wait(|_| {
                let idle = connection.in_flight() == 0 && connection.output_is_empty();
                if idle || connection.is_closed() { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        Ok(())
    }

    /// Waits for bytes for a moment without sleeping, while others have their turn. Whether there are some. Cancel-safe.
    async fn stay_awake(&self) -> bool {
        let begun = Instant::now();
        loop {
            let readable =
                |cx: &mut Context<'_>| Poll::Ready(self.connection.socket.poll_readable(cx).is_ready());
            if poll_fn(readable).await {
                return true;
            }
            if begun.elapsed() >= linger::LIMIT {
                return false;
            }
            // Whoever waits for this core, as the client may, goes first.
            rustix::thread::sched_yield();
            // Between two turns the worker looks for events, and does not sleep where somebody has yielded.
            tokio::task::yield_now().await;
        }
    }

    /// Waits for bytes, receives them, and makes a pass over all there are.
    async fn receive(&mut self) -> io::Result<Stop> {
        let connection = self.connection.clone();
        let midway = self.input.is_midway();
        let looked = self.looked;
        if midway {
            if self.linger.is_awake() {
                self.stay_awake().await;
            }
        } else {
            let (taken, overlapped) = (std::mem::take(&mut self.taken), std::mem::take(&mut self.overlapped));
            if self.linger.decide(taken, overlapped, processor_time) {
                let found = self.stay_awake().await;
                self.linger.ended(found);
            }
        }
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
        SCRATCH.with_borrow_mut(|scratch| {
            let begun = Instant::now();
            let mut told = true;
            loop {
                let (gathered, emptied) = self.gather(scratch, told);
                told = false;
                self.send_gathered(&mut scratch.arena)?;
                let again = matches!(gathered, Ok(Stop::NeedMore)) && self.after_send.is_worth_it();
                if !again || begun.elapsed() > TURN {
                    if emptied {
                        // Its next bytes raise a new event.
                        guard.clear_ready();
                    }
                    return gathered;
                }
            }
        })
    }

    /// Receives and makes passes until nothing more is there, or enough answers are gathered for one send. `told`
    /// says that there should be something. The second value says whether the socket has been emptied.
    ///
    /// A client that keeps many requests in flight sends them one by one, and is woken by each answer that is sent
    /// alone. So the socket is looked at once more before sending, and after it before waiting, as long as such
    /// looks have found something of late.
    fn gather(&mut self, scratch: &mut Scratch, told: bool) -> (io::Result<Stop>, bool) {
        let Scratch { receive, arena, pipe } = scratch;
        arena.clear();
        let mut first = true;
        loop {
            let (len, emptied) = match self.splice(pipe, receive) {
                Ok(Spliced::Stored) => return (Ok(Stop::NeedMore), false),
                Ok(Spliced::Received(len)) => (len, false),
                Ok(Spliced::No) => match self.receive_more(receive, first, told) {
                    Ok(received) => received,
                    Err(ended) => return ended,
                },
                Err(error) => return (Err(error), false),
            };
            first = false;
            let bytes = &receive[..len];
            let (used, stop) = match self.pass(bytes, arena) {
                Ok(passed) => passed,
                Err(error) => return (Err(error), false),
            };
            self.input.keep_rest(bytes, used);
            let enough = !(1..GATHER_ANSWERS).contains(&arena.answers());
            if stop != Stop::NeedMore || enough || !self.before_send.is_worth_it() {
                return (Ok(stop), emptied);
            }
        }
    }

    /// Receives what is there behind the kept bytes. How many there are then, and whether the socket has been emptied; or what
    /// [`Reader::gather`] returns.
    fn receive_more(
        &mut self,
        receive: &mut [u8],
        first: bool,
        told: bool,
    ) -> Result<(usize, bool), (io::Result<Stop>, bool)> {
        let midway = self.input.is_midway();
        let kept = self.input.unprocessed();
        let have = kept.len();
        receive[..have].copy_from_slice(kept);
        let window = self.input.window(&self.connection).max((have + 1).min(RECEIVE_BYTES));
        let room = &mut receive[have..window];
        let wanted = room.len();
        let received = match self.connection.socket.receive(room) {
            Ok(Some(0)) if midway => return Err((Err(io::ErrorKind::UnexpectedEof.into()), false)),
            Ok(Some(0)) => return Err((Ok(Stop::End), false)),
            Ok(received) => received,
            Err(error) => return Err((Err(error), false)),
        };
        match (first, told) {
            (true, true) => {}
            (true, false) => self.after_send.found(received.is_some()),
            (false, _) => self.before_send.found(received.is_some()),
        }
        let Some(received) = received else { return Err((Ok(Stop::NeedMore), true)) };
        self.input.received(received, wanted);
        Ok((have + received, received < wanted))
    }

    /// A pass over the bytes kept from an earlier one.
    fn pass_kept(&mut self) -> io::Result<Stop> {
        let mut kept = std::mem::take(&mut self.input);
        let result = SCRATCH.with_borrow_mut(|scratch| {
            scratch.arena.clear();
            self.input.payload = kept.payload.take();
            self.input.granted = kept.granted.take();
            let passed = self.pass(kept.unprocessed(), &mut scratch.arena);
            self.send_gathered(&mut scratch.arena)?;
            passed
        });
        kept.payload = self.input.payload.take();
        kept.granted = self.input.granted.take();
        self.input = kept;
        let (used, stop) = result?;
        self.input.skip(used);
        Ok(stop)
    }

    fn send_gathered(&mut self, arena: &mut Arena) -> io::Result<()> {
        let sent = self.connection.send_arena(arena, false, &mut self.arena_charge);
        self.arena_charge = None;
        sent
    }
}

/// A guess whether a look at the socket will find something, from how the last ones went.
#[derive(Default)]
pub(super) struct Look {
    eager: u8,
    declined: u8,
}

impl Look {
    pub(super) fn is_worth_it(&mut self) -> bool {
        self.declined = if self.eager > 0 { 0 } else { (self.declined + 1) % PROBE };
        self.eager > 0 || self.declined == 0
    }

    pub(super) fn found(&mut self, something: bool) {
        self.eager = if something { EAGER_LOOKS } else { self.eager.saturating_sub(1) };
    }
}

/// What this worker has used up.
fn processor_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn gone() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, "the client left with requests that had not been begun")
}

fn stalled(limit: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("sent nothing for {limit:?} in the middle of a request"))
}
