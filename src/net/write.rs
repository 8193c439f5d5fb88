//! Writes within a pass: whole where the payload is there, and piece by piece as it arrives where it is large.

use std::io;
use std::rc::Rc;
use std::time::Instant;

use bridge::{Buffer, Capabilities, Data, Flags, Geometry, Operation, Request};
use nbd_proto::Request as WireRequest;

use super::arena::{Arena, HEAD_BYTES, RECEIVE_BYTES, SMALL_BYTES};
use super::gather::{Gather, UNGATHERED_BLOCK};
use super::input::{Payload, Stop};
use super::pass::Step;
use super::reader::Reader;
use super::slow::{self, OVERHEAD_BYTES, SMALL_PIECE_BYTES, WriteJob};
use super::translate;

/// Part of a large payload that is stored at once, at least; a smaller write is stored whole.
pub(super) const STORE_BYTES: u32 = 64 << 10;

/// The same as a length in memory.
pub(super) const STORE_LEN: usize = STORE_BYTES as usize;

/// What storage changes as a whole, in bytes.
const PAGE: u32 = 4096;

/// A piece that a connection's own reserve covers.
const SMALL_PIECE: usize = SMALL_PIECE_BYTES as usize;

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
                    match self.permit(bytes) {
                        Some(charge) => {
                            slow::write(self.owe(wire), request, Buffer::copy_of(payload), charge, arrived);
                        }
                        None if len <= SMALL_PIECE => return Ok(Step::Stop(Stop::Charge(bytes))),
                        // Memory is short: in pieces that the reserve covers.
                        None => return Ok(self.store_in_pieces(wire, request, head)),
                    }
                }
            }
            return Ok(Step::Used(head + len));
        }
        if len <= STORE_LEN.min(self.input_window() / 2) {
            return Ok(Step::Stop(Stop::NeedMore));
        }
        Ok(self.store_in_pieces(wire, request, head))
    }

    /// Takes in the head of a write whose payload will be stored as it comes.
    fn store_in_pieces(&mut self, wire: &WireRequest, request: Request, head: usize) -> Step {
        let geometry = self.connection.export.geometry();
        // One flush makes all pieces durable; without it, each piece has to be durable by itself.
        let flush = request.flags.contains(Flags::FUA) && geometry.capabilities.contains(Capabilities::FLUSH);
        let flags = if flush { request.flags.without(Flags::FUA) } else { request.flags };
        let job = WriteJob::new(self.owe(wire), flush);
        let (left, offset) = (request.len, request.offset);
        self.input.payload = Some(match geometry.min_block <= UNGATHERED_BLOCK {
            true => Payload::Store { left, offset, flags, job },
            false => Payload::Gather(Gather { left, offset, flags, job, piece: None }),
        });
        Step::Used(head)
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
            Payload::Gather(gather) => Ok(self.gather_payload(gather, bytes, arrived)),
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
        if (available as u64) < left && available < STORE_LEN.min(self.input_window() / 2) {
            self.input.payload = Some(Payload::Store { left, offset, flags, job });
            return Ok(Step::Stop(Stop::NeedMore));
        }
        let geometry = self.connection.export.geometry();
        let mut piece = whole_pages(&geometry, offset, available, left);
        let request = |piece| Request::new(Operation::Write, offset, piece as u64).with_flags(flags);
        if !job.has_failed() {
            match self.connection.export.try_execute(&request(piece), Data::From(&bytes[..piece]), arrived) {
                Some(Ok(())) => {}
                Some(Err(error)) => job.fail(error),
                None => {
                    // No longer than the receive buffer.
                    let bytes_of =
                        |piece| u32::try_from(piece).unwrap_or(u32::MAX).saturating_add(OVERHEAD_BYTES);
                    let mut charge = self.permit(bytes_of(piece));
                    if charge.is_none() {
                        piece = whole_pages(&geometry, offset, piece.min(SMALL_PIECE), left);
                        charge = self.permit(bytes_of(piece));
                    }
                    let Some(charge) = charge else {
                        self.input.payload = Some(Payload::Store { left, offset, flags, job });
                        return Ok(Step::Stop(Stop::Charge(bytes_of(piece))));
                    };
                    job.store(request(piece), Buffer::copy_of(&bytes[..piece]), charge, arrived);
                }
            }
        }
        let last = piece as u64 == left;
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

/// Returns how many of `available` bytes at `offset` to store at once. They end on a whole page, so that storage is not
/// asked to change parts of one twice, or at least on a block; all of them where they are the last.
pub(super) fn whole_pages(geometry: &Geometry, offset: u64, available: usize, left: u64) -> usize {
    if available as u64 == left {
        return available;
    }
    let pages = Geometry { min_block: geometry.min_block.max(PAGE), ..*geometry };
    let cut = match pages.cut(offset, available as u64) {
        0 => geometry.cut(offset, available as u64),
        cut => cut,
    };
    usize::try_from(cut).unwrap_or(available)
}
