//! The worker's scratch memory: one receive buffer and one output arena, shared by all its connections.
//!
//! Both are borrowed only within a pass, which does not wait: so an idle connection owns neither, and what a
//! pass leaves over is copied to the connection's own memory (and charged to it).

use std::cell::RefCell;

use bridge::admission::RESERVE_BYTES;

use super::splice::Pipe;

/// Most bytes received at once, and the most that a connection keeps unprocessed.
pub(super) const RECEIVE_BYTES: usize = RECEIVE_CHARGE as usize;

/// What that is charged.
pub(super) const RECEIVE_CHARGE: u32 = 256 << 10;

/// Most bytes of answers gathered for one send.
pub(super) const ARENA_BYTES: usize = ARENA_CHARGE as usize;

/// What that is charged.
pub(super) const ARENA_CHARGE: u32 = 256 << 10;

/// Room that the head of any answer without data needs.
pub(super) const HEAD_BYTES: usize = 128;

/// What a connection may keep of either kind without a charge: its account's standing reserve covers it.
pub(super) const SMALL_BYTES: usize = RESERVE_BYTES as usize;

/// A worker's scratch memory.
pub(super) struct Scratch {
    /// Where the network's bytes arrive.
    pub(super) receive: Box<[u8]>,
    /// Where answers are gathered.
    pub(super) arena: Arena,
    /// Where large payloads pass through; made for the first.
    pub(super) pipe: Option<Pipe>,
}

thread_local! {
    /// This worker's scratch memory, made at the first pass.
    pub(super) static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        receive: vec![0; RECEIVE_BYTES].into_boxed_slice(),
        arena: Arena {
            bytes: vec![0; ARENA_BYTES].into_boxed_slice(),
            used: 0,
            answers: 0,
            head: Vec::with_capacity(HEAD_BYTES),
        },
        pipe: None,
    });
}

/// Answers laid end to end, ready for one send.
pub(super) struct Arena {
    bytes: Box<[u8]>,
    used: usize,
    answers: u32,
    /// Where a head is encoded before it is copied to its place.
    head: Vec<u8>,
}

impl Arena {
    /// The bytes gathered so far.
    pub(super) fn filled(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    /// How many requests these bytes answer.
    pub(super) fn answers(&self) -> u32 {
        self.answers
    }

    /// Whether nothing is gathered.
    pub(super) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Room for `len` bytes behind what is there, not yet part of it; None where the arena is too full.
    pub(super) fn tail(&mut self, len: usize) -> Option<&mut [u8]> {
        self.bytes.get_mut(self.used..self.used.checked_add(len)?)
    }

    /// Appends a head, for which there must be room ([`HEAD_BYTES`]).
    pub(super) fn put_head(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        self.head.clear();
        encode(&mut self.head);
        let len = self.head.len();
        debug_assert!(self.used + len <= self.bytes.len());
        if let Some(place) = self.bytes.get_mut(self.used..self.used + len) {
            place.copy_from_slice(&self.head);
            self.used += len;
        }
    }

    /// Makes the first `len` bytes of the tail part of the output.
    pub(super) fn commit(&mut self, len: usize) {
        debug_assert!(self.used + len <= self.bytes.len());
        self.used += len;
    }

    /// Counts one request as answered by what is there.
    pub(super) fn count_answer(&mut self) {
        self.answers += 1;
    }

    /// Empties the arena.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.answers = 0;
    }
}
