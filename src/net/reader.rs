//! The reader of a connection: one receive, all complete requests in it, one send.
//!
//! A pass runs on the worker's scratch memory and does not wait. What the fast path of the export answers goes
//! into the arena; what it declines becomes a task (`slow`). No slot, no memory, no room for answers: then the
//! reader stops taking in, the socket fills, and the peer is slowed.

use std::io;
use std::rc::Rc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use bridge::{Buffer, Charge, Data, Flags, Operation, RangeOrHole, Request};
use nbd_proto::{
    ChunkHeader, ChunkType, CommandFlags, NbdError, REPLY_FLAG_DONE, ReplyStyle, Request as WireRequest,
    SIMPLE_REPLY_LEN, put_data_header, put_done, put_error, put_hole, simple_reply,
};

use super::arena::{
    ARENA_BYTES, ARENA_CHARGE, Arena, HEAD_BYTES, RECEIVE_BYTES, SCRATCH, SMALL_BYTES, Scratch,
};
use super::connection::Connection;
use super::input::{Input, Payload, Stop};
use super::output::Sent;
use super::slow::{self, Answer, OVERHEAD_BYTES, PIECE_BYTES, SMALL_PIECE_BYTES, WriteJob};
use super::translate::{self, Asked};
use super::zero::is_zero;

/// Reads up to this many bytes are answered from the arena.
const INLINE_READ_BYTES: u64 = 128 << 10;

/// Reads from this many bytes on are sent from the file's own pages where that is possible.
const SEND_FILE_BYTES: u64 = 32 << 10;

/// Part of a large payload that is stored at once, at least; a smaller write is stored whole.
const STORE_BYTES: usize = 64 << 10;

/// How long a busy connection keeps its worker before it lets the others run.
const TURN: Duration = Duration::from_micros(500);

/// The reading half of a connection.
pub(super) struct Reader {
    connection: Rc<Connection>,
    input: Input,
    /// Pays for answers in the arena beyond what the reserve covers, during a pass.
    arena_charge: Option<Charge>,
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

    /// Processes what is complete in `bytes`, sends the answers; returns how many bytes are done with.
    fn pass(&mut self, bytes: &[u8], arena: &mut Arena) -> io::Result<(usize, Stop)> {
        let arrived = Instant::now();
        let mut used = 0;
        let result = loop {
            match self.step(&bytes[used..], arena, arrived) {
                Ok(Step::Used(n)) => {
                    used += n;
                    // What was waited for is used, or was not needed after all.
                    self.input.granted = None;
                }
                Ok(Step::Stop(stop)) => break Ok((used, stop)),
                Err(error) => break Err(error),
            }
        };
        let sent = self.connection.send_arena(arena, false, &mut self.arena_charge);
        arena.clear();
        self.arena_charge = None;
        sent?;
        result
    }

    /// Takes in one request, or part of a payload.
    fn step(&mut self, bytes: &[u8], arena: &mut Arena, arrived: Instant) -> io::Result<Step> {
        if let Some(payload) = self.input.payload.take() {
            return self.payload(payload, bytes, arena, arrived);
        }
        let extended = self.connection.style.extended();
        let wire = match WireRequest::parse(bytes, extended) {
            Ok(Some(wire)) => wire,
            Ok(None) => return Ok(Step::Stop(Stop::NeedMore)),
            Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error)),
        };
        if !self.connection.has_slot(arena.answers()) {
            self.connection.send_arena(arena, false, &mut self.arena_charge)?;
            if !self.connection.has_slot(0) {
                return Ok(Step::Stop(Stop::Full));
            }
        }
        if !self.room_for(HEAD_BYTES, arena)? {
            return Ok(Step::Stop(Stop::Full));
        }
        let head = WireRequest::header_len(extended);
        let contexts = self.connection.allocation_context.is_some();
        let request =
            match translate::request(&wire, self.connection.style, self.connection.granted, contexts) {
                Asked::Disconnect => return Ok(Step::Stop(Stop::End)),
                Asked::Refuse(error) => {
                    return self.refuse(&wire, head, error, "the request is not valid", arena);
                }
                Asked::Execute(request) => request,
            };
        if self.connection.is_draining() {
            return self.refuse(&wire, head, NbdError::Shutdown, "the server is shutting down", arena);
        }
        match request.operation {
            Operation::Write => self.write(&wire, request, head, &bytes[head..], arena, arrived),
            Operation::Read => Ok(self.read(&wire, request, arena, arrived)?.after(head)),
            operation => {
                let bytes =
                    if operation == Operation::BlockStatus { slow::STATUS_BYTES } else { OVERHEAD_BYTES };
                let Some(charge) = self.permit(bytes) else { return Ok(Step::Stop(Stop::Charge(bytes))) };
                slow::other(self.owe(&wire), request, charge, arrived);
                Ok(Step::Used(head))
            }
        }
    }

    /// Answers with an error now, or once the payload has been skipped.
    fn refuse(
        &mut self,
        wire: &WireRequest,
        head: usize,
        error: NbdError,
        why: &str,
        arena: &mut Arena,
    ) -> io::Result<Step> {
        let left = wire.payload_len(self.connection.style.extended());
        if left > u64::from(u32::MAX) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a payload of more than 4 GiB"));
        }
        if left > 0 {
            let (cookie, offset) = (wire.cookie, wire.offset);
            self.input.payload = Some(Payload::Skip { left, cookie, offset, error });
        } else {
            self.answer_error(wire.cookie, wire.offset, error, why, arena);
        }
        Ok(Step::Used(head))
    }

    fn read(
        &mut self,
        wire: &WireRequest,
        request: Request,
        arena: &mut Arena,
        arrived: Instant,
    ) -> io::Result<Step> {
        let style = self.connection.style;
        let whole = style == ReplyStyle::Simple || wire.flags.contains(CommandFlags::DF);
        if request.len >= SEND_FILE_BYTES
            && let Some(step) = self.read_file(wire, request, whole, arena, arrived)?
        {
            return Ok(step);
        }
        let head = read_head_len(style);
        // No longer than the largest payload.
        let wire_len = u32::try_from(request.len).unwrap_or(u32::MAX);
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        if request.len <= INLINE_READ_BYTES && self.room_for(head + len, arena)? {
            let Some(tail) = arena.tail(head + len) else { return Ok(Step::Stop(Stop::Full)) };
            let data = &mut tail[head..];
            match self.connection.export.try_execute(&request, Data::Into(&mut *data), arrived) {
                Some(Ok(())) if len == 0 => self.answer_done(wire, arena),
                Some(Ok(())) => {
                    let hole = style != ReplyStyle::Simple && !whole && is_zero(data);
                    let head = put_read_head(style, wire, hole, wire_len, tail);
                    arena.commit(if hole { head } else { head + len });
                    arena.count_answer();
                }
                Some(Err(error)) => {
                    tracing::debug!(cookie = wire.cookie, offset = wire.offset, %error, "read failed");
                    self.answer_error(
                        wire.cookie,
                        wire.offset,
                        translate::error(&error),
                        &error.to_string(),
                        arena,
                    );
                }
                None => return Ok(self.slow_read(wire, request, whole, arrived)),
            }
            return Ok(Step::Used(0));
        }
        Ok(self.slow_read(wire, request, whole, arrived))
    }

    fn slow_read(&mut self, wire: &WireRequest, request: Request, whole: bool, arrived: Instant) -> Step {
        let len = u32::try_from(request.len).unwrap_or(u32::MAX);
        let wanted = if whole { len } else { len.min(PIECE_BYTES) };
        let small = wanted.min(SMALL_PIECE_BYTES);
        let (charge, piece) = match self.permit(wanted + OVERHEAD_BYTES) {
            Some(charge) => (charge, wanted),
            None if whole => return Step::Stop(Stop::Charge(wanted + OVERHEAD_BYTES)),
            None => match self.permit(small + OVERHEAD_BYTES) {
                Some(charge) => (charge, small),
                None => return Step::Stop(Stop::Charge(small + OVERHEAD_BYTES)),
            },
        };
        slow::read(self.owe(wire), request, piece, whole, charge, arrived);
        Step::Used(0)
    }

    /// Answers a read from the file's own pages; None where that is not possible.
    fn read_file(
        &mut self,
        wire: &WireRequest,
        request: Request,
        whole: bool,
        arena: &mut Arena,
        arrived: Instant,
    ) -> io::Result<Option<Step>> {
        let connection = self.connection.clone();
        let (style, mut rest) = (connection.style, request);
        let end = request.offset + request.len;
        while let Some(range) = connection.export.try_file_range(&rest, whole, arrived) {
            let (len, file) = match range {
                RangeOrHole::Hole(len) => (len, None),
                RangeOrHole::Range(range) => (range.len, Some(range)),
            };
            let last = rest.offset + len == end;
            // No longer than the largest payload.
            let chunk = u32::try_from(len).unwrap_or(u32::MAX);
            let (cookie, asked, offset) = (wire.cookie, wire.offset, rest.offset);
            match file {
                Some(range) => {
                    arena.put_head(|out| put_data_header(style, cookie, asked, offset, chunk, last, out));
                    connection.send_arena(arena, true, &mut self.arena_charge)?;
                    connection.push_file(range, last);
                    if connection.send_queue()? == Sent::Blocked {
                        connection.wake_writer();
                    }
                }
                None => {
                    arena.put_head(|out| put_hole(style, cookie, asked, offset, chunk, last, out));
                    if last {
                        arena.count_answer();
                    } else {
                        connection.send_arena(arena, true, &mut self.arena_charge)?;
                    }
                }
            }
            if last {
                return Ok(Some(Step::Used(0)));
            }
            rest.offset += len;
            rest.len -= len;
            rest.flags |= Flags::CONTINUED;
        }
        if rest.offset == request.offset {
            return Ok(None);
        }
        // The first chunks are on their way, so that the rest is owed: it waits for its memory in its own task.
        connection.send_arena(arena, false, &mut self.arena_charge)?;
        slow::read(self.owe(wire), rest, 0, false, Charge::default(), arrived);
        Ok(Some(Step::Used(0)))
    }

    fn write(
        &mut self,
        wire: &WireRequest,
        request: Request,
        head: usize,
        payload: &[u8],
        arena: &mut Arena,
        arrived: Instant,
    ) -> io::Result<Step> {
        let export = &self.connection.export;
        if let Err(error) = export.admit(&request, arrived) {
            let text = error.to_string();
            return self.refuse(wire, head, translate::error(&error), &text, arena);
        }
        let len = usize::try_from(request.len).unwrap_or(usize::MAX);
        if let Some(payload) = payload.get(..len) {
            match export.try_execute(&request, Data::From(payload), arrived) {
                Some(Ok(())) => self.answer_done(wire, arena),
                Some(Err(error)) => {
                    tracing::debug!(cookie = wire.cookie, offset = wire.offset, %error, "write failed");
                    let text = error.to_string();
                    self.answer_error(wire.cookie, wire.offset, translate::error(&error), &text, arena);
                }
                None => {
                    // A payload in the receive buffer is no longer than that.
                    let bytes = u32::try_from(len).unwrap_or(u32::MAX).saturating_add(OVERHEAD_BYTES);
                    let Some(charge) = self.permit(bytes) else { return Ok(Step::Stop(Stop::Charge(bytes))) };
                    slow::write(self.owe(wire), request, Buffer::copy_of(payload), charge, arrived);
                }
            }
            return Ok(Step::Used(head + len));
        }
        if len <= STORE_BYTES.min(self.input_window() / 2) {
            return Ok(Step::Stop(Stop::NeedMore));
        }
        let Some(charge) = self.permit(OVERHEAD_BYTES) else {
            return Ok(Step::Stop(Stop::Charge(OVERHEAD_BYTES)));
        };
        let job = WriteJob::new(self.owe(wire), request.flags.contains(Flags::FUA), charge);
        self.input.payload = Some(Payload::Store {
            left: request.len,
            offset: request.offset,
            flags: request.flags.without(Flags::FUA),
            job,
        });
        Ok(Step::Used(head))
    }

    /// Takes in what has arrived of a payload.
    fn payload(
        &mut self,
        payload: Payload,
        bytes: &[u8],
        arena: &mut Arena,
        arrived: Instant,
    ) -> io::Result<Step> {
        match payload {
            Payload::Skip { left, cookie, offset, error } => {
                if !self.room_for(HEAD_BYTES, arena)? {
                    self.input.payload = Some(Payload::Skip { left, cookie, offset, error });
                    return Ok(Step::Stop(Stop::Full));
                }
                let used = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                let left = left - used as u64;
                if left == 0 {
                    self.answer_error(cookie, offset, error, "the write was refused", arena);
                } else {
                    self.input.payload = Some(Payload::Skip { left, cookie, offset, error });
                    if used == 0 {
                        return Ok(Step::Stop(Stop::NeedMore));
                    }
                }
                Ok(Step::Used(used))
            }
            Payload::Store { left, offset, flags, job } => {
                self.store(left, offset, flags, job, bytes, arrived)
            }
        }
    }

    /// Stores what has arrived of a large write.
    fn store(
        &mut self,
        left: u64,
        offset: u64,
        flags: Flags,
        job: Rc<WriteJob>,
        bytes: &[u8],
        arrived: Instant,
    ) -> io::Result<Step> {
        let available = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let last = available as u64 == left;
        let mut piece = available;
        if !last {
            if available < STORE_BYTES.min(self.input_window() / 2) {
                self.input.payload = Some(Payload::Store { left, offset, flags, job });
                return Ok(Step::Stop(Stop::NeedMore));
            }
            // Pieces end on whole pages, so that storage is not asked to change parts of one twice.
            let past_page = usize::try_from((offset + available as u64) % 4096).unwrap_or_default();
            piece -= past_page.min(piece - 1);
        }
        let request = Request::new(Operation::Write, offset, piece as u64).with_flags(flags);
        if !job.has_failed() {
            match self.connection.export.try_execute(&request, Data::From(&bytes[..piece]), arrived) {
                Some(Ok(())) => {}
                Some(Err(error)) => job.fail(error),
                None => {
                    // No longer than the receive buffer.
                    let wanted = u32::try_from(piece).unwrap_or(u32::MAX).saturating_add(OVERHEAD_BYTES);
                    let Some(charge) = self.permit(wanted) else {
                        self.input.payload = Some(Payload::Store { left, offset, flags, job });
                        return Ok(Step::Stop(Stop::Charge(wanted)));
                    };
                    job.store(request, Buffer::copy_of(&bytes[..piece]), charge, arrived);
                }
            }
        }
        if last {
            job.complete();
        } else {
            self.input.payload = Some(Payload::Store {
                left: left - piece as u64,
                offset: offset + piece as u64,
                flags: flags | Flags::CONTINUED,
                job,
            });
        }
        Ok(Step::Used(piece))
    }

    fn input_window(&self) -> usize {
        if self.input.is_charged() { RECEIVE_BYTES } else { SMALL_BYTES }
    }

    /// Memory for a waiting request: what was waited for, or what is free now.
    fn permit(&mut self, bytes: u32) -> Option<Charge> {
        match self.input.granted.take_if(|granted| granted.0 >= bytes) {
            Some((_, charge)) => Some(charge),
            None => self.connection.account.try_charge(bytes),
        }
    }

    fn owe(&self, wire: &WireRequest) -> Answer {
        Answer::owe(&self.connection, wire.cookie, wire.offset)
    }

    /// Makes sure that an answer of `len` bytes has its place in the arena, and that whatever the socket may not
    /// take of the arena is paid for. False where the peer must read first.
    #[inline]
    fn room_for(&mut self, len: usize, arena: &mut Arena) -> io::Result<bool> {
        let need = arena.filled().len() + len;
        if need <= SMALL_BYTES && self.connection.output_is_empty()
            || need <= ARENA_BYTES && self.arena_charge.is_some()
        {
            return Ok(true);
        }
        self.make_room(len, arena)
    }

    #[cold]
    fn make_room(&mut self, len: usize, arena: &mut Arena) -> io::Result<bool> {
        if self.arena_charge.is_none() {
            self.arena_charge = self.connection.account.try_charge(ARENA_CHARGE);
        }
        if self.arena_charge.is_some()
            && arena.filled().len() + len <= ARENA_BYTES
            && self.connection.held_bytes() < ARENA_BYTES
        {
            return Ok(true);
        }
        self.connection.send_arena(arena, false, &mut self.arena_charge)?;
        if !self.connection.output_is_empty() {
            return Ok(false);
        }
        Ok(len <= SMALL_BYTES || (self.arena_charge.is_some() && len <= ARENA_BYTES))
    }

    /// Success of a request without data, into the arena.
    fn answer_done(&self, wire: &WireRequest, arena: &mut Arena) {
        arena.put_head(|out| put_done(self.connection.style, wire.cookie, wire.offset, out));
        arena.count_answer();
    }

    /// Failure, into the arena.
    fn answer_error(&self, cookie: u64, offset: u64, error: NbdError, why: &str, arena: &mut Arena) {
        let why = why.get(..64).unwrap_or(why);
        arena.put_head(|out| put_error(self.connection.style, cookie, offset, error, why, out));
        arena.count_answer();
    }
}

/// What a step came to.
enum Step {
    /// So many bytes are done with.
    Used(usize),
    /// The pass ends; nothing was used.
    Stop(Stop),
}

impl Step {
    /// The step, `head` bytes further on.
    fn after(self, head: usize) -> Step {
        match self {
            Step::Used(n) => Step::Used(n + head),
            stop => stop,
        }
    }
}

/// The head of a read's data, at the front of `place`; for a hole, instead of the data.
#[inline]
fn put_read_head(style: ReplyStyle, wire: &WireRequest, hole: bool, len: u32, place: &mut [u8]) -> usize {
    if style == ReplyStyle::Simple {
        let head = simple_reply(wire.cookie, None);
        place[..head.len()].copy_from_slice(&head);
        return head.len();
    }
    let (kind, length) =
        if hole { (ChunkType::OffsetHole, 12) } else { (ChunkType::OffsetData, 8 + u64::from(len)) };
    let (cookie, offset) = (wire.cookie, wire.offset);
    let at = ChunkHeader { flags: REPLY_FLAG_DONE, kind, cookie, offset, length }.write(style, place);
    place[at..at + 8].copy_from_slice(&offset.to_be_bytes());
    if hole {
        place[at + 8..at + 12].copy_from_slice(&len.to_be_bytes());
        return at + 12;
    }
    at + 8
}

/// How long the head of a read's data is.
#[inline]
fn read_head_len(style: ReplyStyle) -> usize {
    match style {
        ReplyStyle::Simple => SIMPLE_REPLY_LEN,
        _ => ChunkHeader::len(style) + 8,
    }
}

fn stalled(limit: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("sent nothing for {limit:?} in the middle of a request"))
}
