//! Requests that could not be answered within a pass: each is a task on the connection's worker, and answers
//! when it is done, in whatever order.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Instant;

use bridge::admission::RESERVE_BYTES;
use bridge::zero::is_zero;
use bridge::{Buffer, Charge, Error, ErrorKind, Flags, Operation, Reply, Request};
use bytes::Bytes;
use nbd_proto::{
    ChunkHeader, NbdError, ReplyStyle, SIMPLE_REPLY_LEN, put_block_status, put_data_header, put_done,
    put_error, put_hole,
};

use super::connection::Connection;
use super::late::Change;
use super::output::Body;
use super::translate;

/// Largest part of a read that is fetched at once, where the reply may come in chunks.
pub(super) const PIECE_BYTES: u32 = 1 << 20;

/// What a waiting request is charged beside its data: its task and its answer's head.
pub(super) const OVERHEAD_BYTES: u32 = 1 << 10;

/// What block status is charged: its longest answer, of two contexts, beside one list that it is made of.
pub(super) const STATUS_BYTES: u32 = 196 << 10;
const _: () = assert!(STATUS_BYTES as usize > 48 * bridge::extent::MAX_EXTENTS);

/// A piece that fits into a connection's own reserve together with its overhead.
pub(super) const SMALL_PIECE_BYTES: u32 = RESERVE_BYTES - OVERHEAD_BYTES;

/// Returns the length of a piece when memory is short, in bytes: what the reserve covers, in whole blocks. A block that is
/// longer than the reserve has to wait for its memory.
pub(super) fn small_piece(connection: &Connection) -> u32 {
    connection.export.geometry().piece(SMALL_PIECE_BYTES)
}

/// Room for the head of an answer with `fields` bytes of a chunk's own: no more, since a vector that is full becomes `Bytes`
/// without another allocation.
fn room(style: ReplyStyle, fields: usize) -> Vec<u8> {
    let simple = style == ReplyStyle::Simple || fields == 0 && !style.extended();
    Vec::with_capacity(if simple { SIMPLE_REPLY_LEN } else { ChunkHeader::len(style) + fields })
}

/// The answer that a request still owes. It is given exactly once: dropped without, it is EIO.
pub(super) struct Answer {
    connection: Rc<Connection>,
    cookie: u64,
    /// The request's offset: extended headers repeat it.
    offset: u64,
    given: bool,
}

impl Answer {
    /// Takes a slot of the connection.
    pub(super) fn owe(connection: &Rc<Connection>, cookie: u64, offset: u64) -> Self {
        connection.begin();
        Answer { connection: connection.clone(), cookie, offset, given: false }
    }

    /// Success, with nothing to hand over.
    pub(super) fn done(self, charge: Charge) {
        let mut head = room(self.connection.style, 0);
        put_done(self.connection.style, self.cookie, self.offset, &mut head);
        self.give(head, Body::None, charge);
    }

    /// Failure.
    pub(super) fn failed(self, error: &Error, charge: Charge) {
        tracing::debug!(cookie = self.cookie, offset = self.offset, %error, "request failed");
        self.refused(translate::error(error), &error.to_string(), charge);
    }

    fn refused(mut self, error: NbdError, message: &str, charge: Charge) {
        self.refuse(error, message, charge);
    }

    fn refuse(&mut self, error: NbdError, message: &str, charge: Charge) {
        let mut head = Vec::with_capacity(64);
        put_error(self.connection.style, self.cookie, self.offset, error, message, &mut head);
        self.given = true;
        self.connection.push(head.into(), Body::None, true, charge);
    }

    /// Part of a read's data; `last` gives the answer.
    fn data(&mut self, offset: u64, data: Buffer, last: bool, may_be_hole: bool, charge: Charge) {
        let style = self.connection.style;
        // A buffer's length is bounded by the largest payload.
        let len = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let is_hole = may_be_hole && style != ReplyStyle::Simple && is_zero(&data);
        let mut head = room(style, if is_hole { 12 } else { 8 });
        let body = if is_hole {
            put_hole(style, self.cookie, self.offset, offset, len, last, &mut head);
            Body::None
        } else {
            put_data_header(style, self.cookie, self.offset, offset, len, last, &mut head);
            Body::Buffer(data)
        };
        self.given |= last;
        self.connection.push(head.into(), body, last, charge);
    }

    fn give(mut self, head: Vec<u8>, body: Body, charge: Charge) {
        self.given = true;
        self.connection.push(head.into(), body, true, charge);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.given {
            if !self.connection.is_closed() {
                tracing::error!(cookie = self.cookie, "a request was dropped without an answer");
            }
            self.refuse(NbdError::Io, "the request was dropped", Charge::default());
        }
    }
}

/// Reads on the slow path. `first_bytes` is what `charge` pays for, 0 where nothing is charged yet; `whole`
/// forbids more than one piece.
pub(super) fn read(
    answer: Answer,
    mut request: Request,
    first_bytes: u32,
    whole: bool,
    charge: Charge,
    arrived: Instant,
) {
    tokio::task::spawn_local(async move {
        let mut answer = answer;
        let connection = answer.connection.clone();
        let (mut charge, mut piece) = (charge, u64::from(first_bytes));
        let end = request.offset + request.len;
        if piece == 0 {
            (charge, piece) = next_piece(&connection, request.len).await;
        }
        loop {
            request.len = (end - request.offset).min(piece);
            let last = request.offset + request.len == end;
            // Bounded by the largest payload, checked at the door.
            let buffer = Buffer::new(usize::try_from(request.len).unwrap_or_default());
            match connection.export.execute(request, Some(buffer), arrived).await {
                Ok(Reply::Data(data)) => answer.data(request.offset, data, last, !whole, charge),
                Ok(_) => return answer.failed(&Error::new(ErrorKind::Io, "a read brought no data"), charge),
                Err(error) => return answer.failed(&error, charge),
            }
            if last || connection.is_closed() {
                return;
            }
            request.offset += request.len;
            request.flags |= Flags::CONTINUED;
            (charge, piece) = next_piece(&connection, end - request.offset).await;
        }
    });
}

/// Reads what must be answered in one chunk or as plain data, in pieces of `piece` bytes, which `charge` covers, when memory
/// is short. After the head is out, a failure can only be told by closing the connection.
pub(super) fn read_stream(
    answer: Answer,
    mut request: Request,
    piece: u32,
    charge: Charge,
    arrived: Instant,
) {
    tokio::task::spawn_local(async move {
        let connection = answer.connection.clone();
        let _alone = connection.streaming.lock().await;
        let (len, end) = (request.len, request.offset + request.len);
        let mut head = room(connection.style, 8);
        let (style, cookie, offset) = (connection.style, answer.cookie, answer.offset);
        // No longer than the largest payload.
        put_data_header(
            style,
            cookie,
            offset,
            offset,
            u32::try_from(len).unwrap_or(u32::MAX),
            true,
            &mut head,
        );
        let mut head = Bytes::from(head);
        let mut answer = Some(answer);
        while request.offset < end && !connection.is_closed() {
            request.len = (end - request.offset).min(u64::from(piece));
            let last = request.offset + request.len == end;
            let buffer = Buffer::new(usize::try_from(request.len).unwrap_or_default());
            let data = match (connection.export.execute(request, Some(buffer), arrived).await, answer.take())
            {
                (Ok(Reply::Data(data)), None) => data,
                (Ok(Reply::Data(data)), Some(mut first)) => {
                    // From here on the stream owes the answer.
                    first.given = true;
                    data
                }
                (Err(error), Some(first)) => return first.failed(&error, charge),
                (failed, _) => {
                    tracing::warn!(
                        cookie,
                        ?failed,
                        "a read failed after its head was sent: closing the connection"
                    );
                    connection.close();
                    return;
                }
            };
            connection.push_stream(std::mem::take(&mut head), Body::Buffer(data), last).await;
            request.offset += request.len;
            request.flags |= Flags::CONTINUED;
        }
    });
}

/// A charge for the next piece of a read: a large one if it is to be had now, else what the reserve covers.
async fn next_piece(connection: &Connection, left: u64) -> (Charge, u64) {
    let large = u32::try_from(left).unwrap_or(u32::MAX).min(PIECE_BYTES);
    match connection.account.try_charge(large + OVERHEAD_BYTES) {
        Some(charge) => (charge, u64::from(large)),
        None => {
            let small = large.min(small_piece(connection));
            (connection.account.charge(small + OVERHEAD_BYTES).await, u64::from(small))
        }
    }
}

/// Writes one whole request on the slow path.
pub(super) fn write(answer: Answer, request: Request, data: Buffer, charge: Charge, arrived: Instant) {
    let change = answer.connection.changes.begin();
    tokio::task::spawn_local(async move {
        let _change = change;
        match answer.connection.export.execute(request, Some(data), arrived).await {
            Ok(_) => answer.done(charge),
            Err(error) => answer.failed(&error, charge),
        }
    });
}

/// Any request without payload either way, or block status.
pub(super) fn other(answer: Answer, request: Request, charge: Charge, arrived: Instant) {
    let change = request.operation.changes_data().then(|| answer.connection.changes.begin());
    tokio::task::spawn_local(async move {
        let _change = change;
        let connection = answer.connection.clone();
        if request.operation == Operation::BlockStatus {
            return match block_status(&connection, answer.cookie, request, arrived).await {
                Ok(head) => answer.give(head, Body::None, charge),
                Err(error) => answer.failed(&error, charge),
            };
        }
        match connection.export.execute(request, None, arrived).await {
            Ok(_) => answer.done(charge),
            Err(error) => answer.failed(&error, charge),
        }
    });
}

/// A chunk for each context that was negotiated.
async fn block_status(
    connection: &Connection,
    cookie: u64,
    mut request: Request,
    arrived: Instant,
) -> bridge::Result<Vec<u8>> {
    let (contexts, style, offset) = (connection.contexts, connection.style, request.offset);
    let mut head = Vec::new();
    if let Some(context) = contexts.allocation {
        let Reply::Extents(extents) = connection.export.execute(request, None, arrived).await? else {
            return Err(Error::new(ErrorKind::Io, "block status brought no extents"));
        };
        let extents: Vec<(u64, u32)> = extents.iter().map(translate::allocation).collect();
        let last = contexts.depth.is_none();
        put_block_status(style, cookie, offset, context, &extents, last, &mut head);
        // It counts once.
        request.flags |= Flags::CONTINUED;
    }
    if let Some(context) = contexts.depth {
        let depths = connection.export.allocation_depth(request, arrived).await?;
        let depths: Vec<(u64, u32)> = depths.iter().map(translate::depth).collect();
        put_block_status(style, cookie, offset, context, &depths, true, &mut head);
    }
    Ok(head)
}

/// A large write whose payload is stored piece by piece as it arrives, so that it never needs memory for all of
/// it. It is answered when the payload is complete and the last piece is stored.
pub(super) struct WriteJob {
    answer: RefCell<Option<Answer>>,
    connection: Rc<Connection>,
    durable: bool,
    outstanding: Cell<u32>,
    complete: Cell<bool>,
    error: RefCell<Option<Error>>,
    _change: Change,
}

impl WriteJob {
    /// A connection has one at a time that is not complete, which its seat covers: it is not charged.
    pub(super) fn new(answer: Answer, durable: bool) -> Rc<Self> {
        Rc::new(WriteJob {
            connection: answer.connection.clone(),
            _change: answer.connection.changes.begin(),
            answer: RefCell::new(Some(answer)),
            durable,
            outstanding: Cell::new(0),
            complete: Cell::new(false),
            error: RefCell::new(None),
        })
    }

    /// Whether a piece has failed: then the rest need not be stored.
    pub(super) fn has_failed(&self) -> bool {
        self.error.borrow().is_some()
    }

    pub(super) fn fail(&self, error: Error) {
        self.error.borrow_mut().get_or_insert(error);
    }

    /// Stores a piece on the slow path.
    pub(super) fn store(self: &Rc<Self>, request: Request, data: Buffer, charge: Charge, arrived: Instant) {
        self.outstanding.set(self.outstanding.get() + 1);
        let job = self.clone();
        tokio::task::spawn_local(async move {
            let mut piece = Piece { job, ended: false };
            if let Err(error) = piece.job.connection.export.execute(request, Some(data), arrived).await {
                piece.job.fail(error);
            }
            piece.ended = true;
            drop(charge);
        });
    }

    /// The payload has arrived whole.
    pub(super) fn complete(self: &Rc<Self>) {
        self.complete.set(true);
        self.finish();
    }

    fn finish(self: &Rc<Self>) {
        if !self.complete.get() || self.outstanding.get() > 0 {
            return;
        }
        let Some(answer) = self.answer.borrow_mut().take() else { return };
        let charge = Charge::default();
        if let Some(error) = self.error.borrow_mut().take() {
            answer.failed(&error, charge);
        } else if self.durable {
            other(answer, Request::flush(), charge, Instant::now());
        } else {
            answer.done(charge);
        }
    }
}

/// A piece that is being stored; counted off however its task ends.
struct Piece {
    job: Rc<WriteJob>,
    ended: bool,
}

impl Drop for Piece {
    fn drop(&mut self) {
        if !self.ended {
            self.job.fail(Error::new(ErrorKind::Io, "the write was dropped"));
        }
        self.job.outstanding.set(self.job.outstanding.get() - 1);
        self.job.finish();
    }
}
