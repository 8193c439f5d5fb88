//! Writes within a pass: whole where the payload is there, and piece by piece as it arrives where it is large.

use std::io;
use std::rc::Rc;
use std::time::Instant;

use bridge::{Buffer, Data, Flags, Operation, Request};
use nbd_proto::Request as WireRequest;

use super::arena::{Arena, HEAD_BYTES, RECEIVE_BYTES, SMALL_BYTES};
use super::input::{Payload, Stop};
use super::pass::Step;
use super::reader::Reader;
use super::slow::{self, OVERHEAD_BYTES, WriteJob};
use super::translate;

/// Part of a large payload that is stored at once, at least; a smaller write is stored whole.
const STORE_BYTES: usize = 64 << 10;

impl Reader {
    /// Stores a write's payload, as far as it has arrived.
    pub(super) fn write(
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
    pub(super) fn payload(
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
}
