//! Writes to exports whose smallest block may be longer than what a connection keeps of its input: the payload is gathered
//! into buffers of whole blocks, each of which is stored on the slow path.

use std::rc::Rc;
use std::time::Instant;

use bridge::{Buffer, Charge, Flags, Operation, Request};

use super::input::{Payload, Stop};
use super::pass::Step;
use super::reader::Reader;
use super::slow::{OVERHEAD_BYTES, WriteJob};
use super::write::STORE_BYTES;

/// Blocks up to this length in bytes need no gathering: a connection's small input window holds some of them.
pub(super) const UNGATHERED_BLOCK: u32 = 4096;

/// A write whose payload is being gathered.
pub(super) struct Gather {
    /// Bytes of the payload that belong to no buffer yet.
    pub(super) left: u64,
    /// Where the next buffer belongs.
    pub(super) offset: u64,
    pub(super) flags: Flags,
    pub(super) job: Rc<WriteJob>,
    pub(super) piece: Option<Piece>,
}

/// A buffer that is being filled.
pub(super) struct Piece {
    buffer: Buffer,
    filled: usize,
    charge: Charge,
}

impl Reader {
    /// Takes in what has arrived of a payload. A failed write's payload is dropped as it arrives.
    pub(super) fn gather_payload(&mut self, mut gather: Gather, bytes: &[u8], arrived: Instant) -> Step {
        let used = if gather.job.has_failed() {
            let waiting = gather.piece.take().map_or(0, |piece| piece.buffer.len() - piece.filled);
            let left = gather.left + waiting as u64;
            let used = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            gather.left = left - used as u64;
            used
        } else {
            let Some(mut piece) = gather.piece.take().or_else(|| self.next_piece(&mut gather)) else {
                let bytes = self.bytes_of_piece(gather.left);
                self.input.payload = Some(Payload::Gather(gather));
                return Step::Stop(Stop::Charge(bytes));
            };
            let used = bytes.len().min(piece.buffer.len() - piece.filled);
            piece.buffer[piece.filled..piece.filled + used].copy_from_slice(&bytes[..used]);
            piece.filled += used;
            if piece.filled < piece.buffer.len() {
                gather.piece = Some(piece);
            } else {
                let len = piece.buffer.len() as u64;
                let request = Request::new(Operation::Write, gather.offset, len).with_flags(gather.flags);
                gather.job.store(request, piece.buffer, piece.charge, arrived);
                gather.offset += len;
                gather.flags |= Flags::CONTINUED;
            }
            used
        };
        if gather.left == 0 && gather.piece.is_none() {
            gather.job.complete();
        } else {
            self.input.payload = Some(Payload::Gather(gather));
            if used == 0 {
                return Step::Stop(Stop::NeedMore);
            }
        }
        Step::Used(used)
    }

    /// Returns a buffer for the next bytes, if there is memory for it now.
    fn next_piece(&mut self, gather: &mut Gather) -> Option<Piece> {
        let bytes = self.bytes_of_piece(gather.left);
        let charge = self.connection.account.try_window(bytes).or_else(|| self.permit(bytes))?;
        let buffer = Buffer::new(usize::try_from(bytes - OVERHEAD_BYTES).unwrap_or_default());
        gather.left -= buffer.len() as u64;
        Some(Piece { buffer, filled: 0, charge })
    }

    /// Returns the memory that the next buffer needs, in bytes: of the longest block there is, or of what is left.
    fn bytes_of_piece(&self, left: u64) -> u32 {
        let most = self.connection.export.geometry().piece(STORE_BYTES);
        most.min(u32::try_from(left).unwrap_or(u32::MAX)) + OVERHEAD_BYTES
    }
}
