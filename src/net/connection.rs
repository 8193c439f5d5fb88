//! The state that a connection's reader, writer and slow requests share. All of them run on one worker, so that
//! cells do where locks would be needed; no borrow is held across an await.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bridge::{Account, Charge, Export, FileRange};
use bytes::Bytes;
use nbd_proto::{Negotiated, ReplyStyle, TransmissionFlags};

use tokio::sync::Notify;

use super::arena::Arena;
use super::late::Changes;
use super::output::{Body, Output, Segment, Sent};
use super::server::Settings;
use super::socket::Socket;
use super::translate::{ALLOCATION_DEPTH, BASE_ALLOCATION};

/// A connection in its transmission phase.
pub(super) struct Connection {
    /// Who it is, for people.
    pub(super) peer: String,
    pub(super) since: Instant,
    pub(super) socket: Socket,
    pub(super) export: Arc<Export>,
    pub(super) style: ReplyStyle,
    /// The transmission flags that the client was told.
    pub(super) granted: TransmissionFlags,
    /// What block status is asked about.
    pub(super) contexts: Contexts,
    pub(super) account: Account,
    pub(super) settings: Arc<Settings>,
    /// Changes that wait for the export.
    pub(super) changes: Changes,
    /// Requests taken in and not yet answered to the last byte.
    in_flight: Cell<u32>,
    output: RefCell<Output>,
    closed: Cell<bool>,
    draining: Cell<bool>,
    reader: Cell<Option<Waker>>,
    writer: Cell<Option<Waker>>,
    /// Told when the queue has been sent, or the connection is closed.
    sent: Notify,
    /// Held by whoever has a stream open.
    pub(super) streaming: tokio::sync::Mutex<()>,
}

/// The ids of the metadata contexts that were negotiated.
#[derive(Clone, Copy)]
pub(super) struct Contexts {
    /// Of `base:allocation`.
    pub(super) allocation: Option<u32>,
    /// Of `qemu:allocation-depth`.
    pub(super) depth: Option<u32>,
}

impl Contexts {
    /// Whether there is any.
    pub(super) fn any(self) -> bool {
        self.allocation.is_some() || self.depth.is_some()
    }
}

impl Connection {
    /// The transmission phase of `socket`, as the handshake settled it.
    pub(super) fn new(
        peer: &str,
        socket: Socket,
        export: Arc<Export>,
        negotiated: &Negotiated,
        account: Account,
        settings: Arc<Settings>,
    ) -> Rc<Self> {
        let id =
            |name| negotiated.contexts.iter().find(|context| context.name == name).map(|context| context.id);
        Rc::new(Connection {
            peer: peer.to_owned(),
            since: Instant::now(),
            socket,
            export,
            style: negotiated.style,
            granted: negotiated.info.flags,
            contexts: Contexts { allocation: id(BASE_ALLOCATION), depth: id(ALLOCATION_DEPTH) },
            account,
            settings,
            changes: Changes::default(),
            in_flight: Cell::new(0),
            output: RefCell::default(),
            closed: Cell::new(false),
            draining: Cell::new(false),
            reader: Cell::new(None),
            writer: Cell::new(None),
            sent: Notify::new(),
            streaming: tokio::sync::Mutex::new(()),
        })
    }

    /// Whether one more request may be taken in, beside `gathered` answers that are not sent yet.
    pub(super) fn has_slot(&self, gathered: u32) -> bool {
        self.in_flight.get() + gathered < self.settings.max_in_flight
    }

    pub(super) fn in_flight(&self) -> u32 {
        self.in_flight.get()
    }

    /// Takes a slot for a request that is answered later.
    pub(super) fn begin(&self) {
        self.in_flight.set(self.in_flight.get() + 1);
    }

    fn end(&self, answers: u32) {
        if answers > 0 {
            self.in_flight.set(self.in_flight.get().saturating_sub(answers));
            self.wake_reader();
        }
    }

    /// Queues (part of) an answer and has the writer send it.
    pub(super) fn push(&self, head: Bytes, body: Body, last: bool, charge: Charge) {
        let answers = u32::from(last);
        if self.closed.get() {
            self.end(answers);
            return;
        }
        self.output.borrow_mut().push(Segment { head, body, answers, _charge: charge });
        self.wake_writer();
    }

    /// Queues a part of the stream that the caller holds the lock for, and waits until it is sent.
    pub(super) async fn push_stream(&self, head: Bytes, body: Body, last: bool) {
        let answers = u32::from(last);
        if self.closed.get() {
            self.end(answers);
            return;
        }
        let segment = Segment { head, body, answers, _charge: Charge::default() };
        self.output.borrow_mut().push_stream(segment, last);
        self.wake_writer();
        while !last && !self.closed.get() && self.output.borrow().has_next() {
            self.sent.notified().await;
        }
    }

    /// Queues part of a file, whose head the arena has just sent. The caller sends the queue or wakes the writer.
    pub(super) fn push_file(&self, range: FileRange, last: bool) {
        let answers = u32::from(last);
        self.in_flight.set(self.in_flight.get() + answers);
        let (head, body, charge) = (Bytes::new(), Body::File(range), Charge::default());
        self.output.borrow_mut().push(Segment { head, body, answers, _charge: charge });
    }

    /// Whether nothing waits for the socket.
    pub(super) fn output_is_empty(&self) -> bool {
        self.output.borrow().is_empty()
    }

    /// Bytes of memory that wait for the socket.
    pub(super) fn held_bytes(&self) -> usize {
        self.output.borrow().held_bytes()
    }

    /// Sends what the arena holds, or queues what the socket does not take; `charge` pays for that. The arena is
    /// empty afterwards.
    pub(super) fn send_arena(
        &self,
        arena: &mut Arena,
        more: bool,
        charge: &mut Option<Charge>,
    ) -> io::Result<()> {
        if arena.is_empty() {
            return Ok(());
        }
        let bytes = arena.filled();
        let sent = if self.output_is_empty() { self.socket.send(bytes, more)?.unwrap_or(0) } else { 0 };
        if sent < bytes.len() {
            self.in_flight.set(self.in_flight.get() + arena.answers());
            self.output.borrow_mut().push(Segment {
                head: Bytes::new(),
                body: Body::Bytes(Bytes::copy_from_slice(&bytes[sent..])),
                answers: arena.answers(),
                _charge: charge.take().unwrap_or_default(),
            });
            self.wake_writer();
        }
        arena.clear();
        Ok(())
    }

    /// Sends from the queue what the socket takes.
    pub(super) fn send_queue(&self) -> io::Result<Sent> {
        let mut answered = 0;
        let result = self.output.borrow_mut().send(&self.socket, &mut answered);
        self.end(answered);
        if matches!(result, Ok(Sent::All)) {
            // They may have waited for just that, even where no answer has ended.
            self.wake_reader();
            self.sent.notify_waiters();
        }
        result
    }

    /// Bytes that were sent from the queue since the beginning.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.output.borrow().sent_bytes()
    }

    /// Ends the connection at once: what is queued is dropped, what is in flight is answered to nobody.
    pub(super) fn close(&self) {
        if !self.closed.replace(true) {
            self.socket.shut_down();
            let lost = self.output.borrow_mut().clear();
            self.end(lost);
            self.wake_reader();
            self.wake_writer();
            self.sent.notify_waiters();
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.get()
    }

    /// From now on requests are refused, and the connection ends when nothing is in flight.
    pub(super) fn drain(&self) {
        if !self.draining.replace(true) {
            self.wake_reader();
        }
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.get()
    }

    pub(super) fn wake_reader(&self) {
        if let Some(waker) = self.reader.take() {
            waker.wake();
        }
    }

    pub(super) fn wake_writer(&self) {
        if let Some(waker) = self.writer.take() {
            waker.wake();
        }
    }

    /// Polls on the reader's behalf: whatever changes here wakes it. Cancel-safe if `poll` is.
    pub(super) async fn reader_wait<T>(&self, poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> T {
        wait(&self.reader, poll).await
    }

    /// Waits on the writer's behalf until something is queued, or the connection is closed.
    pub(super) async fn writer_wait(&self) {
        wait(&self.writer, |_| ready_if(self.closed.get() || self.output.borrow().has_next())).await;
    }
}

/// Ready when the condition holds.
pub(super) fn ready_if(condition: bool) -> Poll<()> {
    if condition { Poll::Ready(()) } else { Poll::Pending }
}

async fn wait<T>(slot: &Cell<Option<Waker>>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> T {
    poll_fn(|cx| {
        let result = poll(cx);
        if result.is_pending() {
            let waker = match slot.take() {
                Some(waker) if waker.will_wake(cx.waker()) => waker,
                _ => cx.waker().clone(),
            };
            slot.set(Some(waker));
        }
        result
    })
    .await
}

thread_local! {
    /// The connections of this worker that are in their transmission phase.
    static HERE: RefCell<HashMap<u64, Weak<Connection>>> = RefCell::default();
}

/// Keeps a connection in its worker's list.
pub(super) struct Listed(u64);

impl Listed {
    pub(super) fn new(id: u64, connection: &Rc<Connection>) -> Self {
        HERE.with_borrow_mut(|here| here.insert(id, Rc::downgrade(connection)));
        Listed(id)
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        HERE.with_borrow_mut(|here| here.remove(&self.0));
    }
}

/// Calls `each` for every connection of this worker.
pub(super) fn for_each_here(each: impl FnMut(&Connection)) {
    let all: Vec<_> = HERE.with_borrow(|here| here.values().filter_map(Weak::upgrade).collect());
    all.iter().map(Rc::as_ref).for_each(each);
}
