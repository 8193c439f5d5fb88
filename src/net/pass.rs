//! A pass: all that is complete among the received bytes, without waiting.
//!
//! It runs on the worker's scratch memory. What the fast path of the export answers goes into the arena (`read`,
//! `write`); what it declines becomes a task (`slow`).

use std::io;
use std::time::Instant;

use bridge::{Charge, Flags, Operation, Request};
use nbd_proto::{MAX_PAYLOAD_BYTES, NbdError, Request as WireRequest, put_done, put_error};

use super::arena::{ARENA_BYTES, ARENA_CHARGE, Arena, HEAD_BYTES, SMALL_BYTES};
use super::input::{Payload, Stop};
use super::reader::{Reader, TURN};
use super::slow::{self, Answer, OVERHEAD_BYTES, STATUS_BYTES};
use super::translate::{self, Asked};

/// After requests for so many bytes a pass looks at the clock.
const LOOK_AFTER_BYTES: u64 = 256 << 10;

/// The least that a request counts there.
const SMALL_WORK_BYTES: u64 = 8 << 10;

/// What a step came to.
pub(super) enum Step {
    /// So many bytes are done with.
    Used(usize),
    /// The pass ends; nothing was used.
    Stop(Stop),
}

impl Step {
    /// The step, `head` bytes further on.
    pub(super) fn after(self, head: usize) -> Step {
        match self {
            Step::Used(n) => Step::Used(n + head),
            stop => stop,
        }
    }
}

impl Reader {
    /// Processes what is complete in `bytes`; answers stay in the arena. Returns how many bytes are done with.
    pub(super) fn pass(&mut self, bytes: &[u8], arena: &mut Arena) -> io::Result<(usize, Stop)> {
        let arrived = Instant::now();
        let (mut used, mut work) = (0, 0);
        loop {
            match self.step(&bytes[used..], arena, arrived) {
                Ok(Step::Used(n)) => {
                    used += n;
                    // What was waited for is used, or was not needed after all.
                    self.input.granted = None;
                    work += self.worked;
                    if work >= LOOK_AFTER_BYTES {
                        work = 0;
                        if arrived.elapsed() > TURN {
                            break Ok((used, Stop::Yield));
                        }
                    }
                }
                Ok(Step::Stop(stop)) => break Ok((used, stop)),
                Err(error) => break Err(error),
            }
        }
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
        self.taken += 1;
        self.overlapped |= arena.answers() > 0 || self.connection.in_flight() > 0;
        self.worked = wire.length.max(SMALL_WORK_BYTES);
        let contexts = self.connection.contexts.any();
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
            Operation::BlockStatus => match self.permit(STATUS_BYTES) {
                Some(charge) => {
                    slow::other(self.owe(&wire), request, charge, arrived);
                    Ok(Step::Used(head))
                }
                // Memory is short: one extent is answer enough.
                None => Ok(self.wait_or_start(&wire, request, head, Flags::REQ_ONE, arrived)),
            },
            _ => Ok(self.wait_or_start(&wire, request, head, Flags::NONE, arrived)),
        }
    }

    /// Starts a request that needs little memory, or waits for that little.
    fn wait_or_start(
        &mut self,
        wire: &WireRequest,
        mut request: Request,
        head: usize,
        more: Flags,
        arrived: Instant,
    ) -> Step {
        let Some(charge) = self.permit(OVERHEAD_BYTES) else {
            return Step::Stop(Stop::Charge(OVERHEAD_BYTES));
        };
        request.flags |= more;
        slow::other(self.owe(wire), request, charge, arrived);
        Step::Used(head)
    }

    /// Answers with an error now, or once the payload has been skipped.
    pub(super) fn refuse(
        &mut self,
        wire: &WireRequest,
        head: usize,
        error: NbdError,
        why: &str,
        arena: &mut Arena,
    ) -> io::Result<Step> {
        let extended = self.connection.style.extended();
        let left = wire.payload_len(extended);
        // The extension wants the connection dropped; compact headers cannot announce more than 4 GiB.
        if extended && left > u64::from(MAX_PAYLOAD_BYTES) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a payload longer than the largest allowed",
            ));
        }
        if left > 0 {
            let (cookie, offset) = (wire.cookie, wire.offset);
            self.input.payload = Some(Payload::Skip { left, cookie, offset, error });
        } else {
            self.answer_error(wire.cookie, wire.offset, error, why, arena);
        }
        Ok(Step::Used(head))
    }

    /// Memory for a waiting request: what was waited for, or what is free now.
    pub(super) fn permit(&mut self, bytes: u32) -> Option<Charge> {
        match self.input.granted.take_if(|granted| granted.0 >= bytes) {
            Some((_, charge)) => Some(charge),
            None => self.connection.account.try_charge(bytes),
        }
    }

    pub(super) fn owe(&self, wire: &WireRequest) -> Answer {
        Answer::owe(&self.connection, wire.cookie, wire.offset)
    }

    /// Makes sure that an answer of `len` bytes has its place in the arena, and that whatever the socket may not
    /// take of the arena is paid for. False where the peer must read first.
    #[inline]
    pub(super) fn room_for(&mut self, len: usize, arena: &mut Arena) -> io::Result<bool> {
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
            self.arena_charge = self.connection.account.try_window(ARENA_CHARGE);
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
    pub(super) fn answer_done(&self, wire: &WireRequest, arena: &mut Arena) {
        arena.put_head(|out| put_done(self.connection.style, wire.cookie, wire.offset, out));
        arena.count_answer();
    }

    /// Failure, into the arena.
    pub(super) fn answer_error(
        &self,
        cookie: u64,
        offset: u64,
        error: NbdError,
        why: &str,
        arena: &mut Arena,
    ) {
        let why = &why[..why.floor_char_boundary(64)];
        arena.put_head(|out| put_error(self.connection.style, cookie, offset, error, why, out));
        arena.count_answer();
    }
}
