//! The requests of one connection, by cookie. A request owns its buffer from the moment it is handed over until its
//! answer is fetched, so that a caller who loses interest leaves the stream as it is.

use std::task::Waker;
use std::time::Instant;

use nbd_proto::{Command, CommandFlags};

use super::coverage::Coverage;
use super::receive::DIRECT_BYTES;
use crate::{Buffer, Error, Extent};

/// What is asked of the server.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ask {
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    /// In bytes; of a read or write, the length of its buffer.
    pub(super) len: u64,
}

impl Ask {
    /// Whether it is a read whose data is received where it belongs.
    pub(super) fn is_large_read(&self) -> bool {
        self.command == Command::Read && self.len >= 4 * DIRECT_BYTES as u64
    }
}

/// What a request carries either way.
#[derive(Debug)]
pub(super) enum Data {
    None,
    /// To be filled.
    Read(Buffer),
    /// To be stored.
    Write(Buffer),
    /// What block status found so far.
    Status(Vec<Extent>),
}

/// How a request ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Answered(Result<(), Error>),
    /// The connection was lost before the answer: ask again.
    Lost,
}

/// How far a request is.
#[derive(Debug)]
pub(super) enum Stage {
    /// It waits for its turn, or for a connection.
    Queued,
    /// Some of it may be on the wire.
    Sending,
    /// It is on the wire, all of it.
    Sent,
    /// Its outcome waits to be fetched.
    Over(Outcome),
}

/// One request.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) ask: Ask,
    pub(super) data: Data,
    pub(super) stage: Stage,
    /// Who waits for the outcome; None once nobody does.
    pub(super) waker: Option<Waker>,
    /// When it went out, once it has.
    pub(super) sent_at: Option<Instant>,
    /// While there is no connection, it fails then.
    pub(super) deadline: Option<Instant>,
    /// It came when the server had been away for too long: it has one attempt to connect.
    pub(super) last_chance: bool,
    /// Of a read, what has come.
    pub(super) covered: Coverage,
    /// An error that a chunk told before the last one.
    pub(super) error: Option<Error>,
}

/// The requests of one connection.
#[derive(Default)]
pub(super) struct Slots {
    entries: Vec<Entry>,
    free: Vec<u32>,
}

#[derive(Default)]
struct Entry {
    /// Counts the requests that have been here, so that an old cookie meets nothing.
    generation: u32,
    slot: Option<Slot>,
}

impl Slots {
    /// Takes a request in, and gives it its cookie.
    pub(super) fn insert(&mut self, slot: Slot) -> u64 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push(Entry::default());
            // Memory ends long before.
            u32::try_from(self.entries.len() - 1).expect("fewer than 2^32 requests")
        });
        let entry = &mut self.entries[index as usize];
        entry.slot = Some(slot);
        u64::from(entry.generation) << 32 | u64::from(index)
    }

    /// The request of this cookie, if there is one. The cookie may be the server's invention.
    pub(super) fn get(&self, cookie: u64) -> Option<&Slot> {
        let (generation, index) = split(cookie);
        let entry = self.entries.get(index)?;
        if entry.generation == generation { entry.slot.as_ref() } else { None }
    }

    /// The same, to be changed.
    pub(super) fn get_mut(&mut self, cookie: u64) -> Option<&mut Slot> {
        let (generation, index) = split(cookie);
        let entry = self.entries.get_mut(index)?;
        if entry.generation == generation { entry.slot.as_mut() } else { None }
    }

    /// Gives a request back.
    pub(super) fn remove(&mut self, cookie: u64) -> Option<Slot> {
        let (generation, index) = split(cookie);
        let entry = self.entries.get_mut(index)?;
        if entry.generation != generation {
            return None;
        }
        let slot = entry.slot.take()?;
        entry.generation = generation.wrapping_add(1);
        // It came from a u32.
        self.free.push(u32::try_from(index).unwrap_or_default());
        Some(slot)
    }

    /// Ends a request: its outcome waits to be fetched by whoever `woken` then wakes.
    pub(super) fn end(&mut self, cookie: u64, outcome: Outcome, woken: &mut Vec<Waker>) {
        let Some(slot) = self.get_mut(cookie) else { return };
        slot.stage = Stage::Over(outcome);
        match slot.waker.take() {
            Some(waker) => woken.push(waker),
            // Nobody waits any more.
            None => drop(self.remove(cookie)),
        }
    }

    /// The cookies of all requests.
    pub(super) fn cookies(&self) -> Vec<u64> {
        let cookie = |(index, entry): (u64, &Entry)| u64::from(entry.generation) << 32 | index;
        (0..).zip(&self.entries).filter(|(_, entry)| entry.slot.is_some()).map(cookie).collect()
    }

    /// When the one went out that is on the wire for longest.
    pub(super) fn oldest_sent(&self) -> Option<Instant> {
        let slots = self.entries.iter().filter_map(|entry| entry.slot.as_ref());
        slots.filter(|slot| slot.is_on_the_wire()).filter_map(|slot| slot.sent_at).min()
    }
}

impl Slot {
    pub(super) fn is_on_the_wire(&self) -> bool {
        matches!(self.stage, Stage::Sending | Stage::Sent)
    }
}

fn split(cookie: u64) -> (u32, usize) {
    let [a, b, c, d, index @ ..] = cookie.to_be_bytes();
    (u32::from_be_bytes([a, b, c, d]), u32::from_be_bytes(index) as usize)
}
