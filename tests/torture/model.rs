//! A disk as its client knows it: for each block the values that a read may give, and the requests that are not answered.

use std::collections::HashMap;
use std::ops::Range;

use nbd_proto::{Command, CommandFlags, NbdError};

use super::disk::SIZE;
use super::support::{Answer, Client, NO_FLAGS, Random};

/// Bytes of a block, of which each sector may be new or old where a request was cut short.
pub(crate) const BLOCK: usize = 4096;
pub(crate) const SECTOR: usize = 512;
pub(crate) const BLOCKS: usize = SIZE / BLOCK;

/// Requests in flight.
const DEPTH: usize = 16;

/// A block's content: zeroes, or stamped by the write of this number. What was never written may be zeroes only.
type Stamp = u64;

/// See the module.
pub(crate) struct Model {
    /// What each block may hold.
    blocks: Vec<Vec<Stamp>>,
    /// By cookie.
    in_flight: HashMap<u64, Request>,
    next: Stamp,
}

struct Request {
    blocks: Range<usize>,
    effect: Effect,
}

#[derive(Clone, Copy)]
enum Effect {
    /// The blocks hold this.
    Put(Stamp),
    /// They hold zeroes, or what they held.
    Trim,
    Nothing,
}

impl Default for Model {
    fn default() -> Self {
        Model { blocks: vec![vec![0]; BLOCKS], in_flight: HashMap::new(), next: 1 }
    }
}

impl Model {
    /// Sends requests until [`DEPTH`] are in flight, none over blocks of another. Gives how many.
    pub(crate) fn begin(&mut self, client: &mut Client, random: &mut Random) -> u64 {
        let mut sent = 0;
        for _ in 0..DEPTH {
            let first = random.index(BLOCKS - 40);
            let count = if random.below(12) == 0 { 1 + random.index(40) } else { 1 + random.index(3) };
            let blocks = first..first + count;
            let meets = |other: &Request| other.blocks.start < blocks.end && blocks.start < other.blocks.end;
            if self.in_flight.values().any(meets) {
                continue;
            }
            self.send(client, random, blocks);
            sent += 1;
        }
        sent
    }

    fn send(&mut self, client: &mut Client, random: &mut Random, blocks: Range<usize>) {
        let (offset, len) = ((blocks.start * BLOCK) as u64, (blocks.len() * BLOCK) as u64);
        let fua = if random.below(12) == 0 { CommandFlags::FUA } else { NO_FLAGS };
        let (cookie, effect) = match random.below(20) {
            0 => (client.ask(Command::Flush, NO_FLAGS, 0, 0), Effect::Nothing),
            1 => (client.ask(Command::Trim, fua, offset, len), Effect::Trim),
            2 => (client.ask(Command::WriteZeroes, fua, offset, len), Effect::Put(0)),
            3 => (client.ask(Command::WriteZeroes, fua | CommandFlags::NO_HOLE, offset, len), Effect::Put(0)),
            _ => {
                let stamp = self.next;
                self.next += 1;
                let data: Vec<u8> = blocks.clone().flat_map(|block| content(block, stamp)).collect();
                (client.ask_write(fua, offset, &data), Effect::Put(stamp))
            }
        };
        for block in blocks.clone() {
            let may = &mut self.blocks[block];
            let new = match effect {
                Effect::Put(stamp) => stamp,
                Effect::Trim => 0,
                Effect::Nothing => continue,
            };
            if !may.contains(&new) {
                may.push(new);
            }
        }
        self.in_flight.insert(cookie, Request { blocks, effect });
    }

    /// Takes an answer. An error must be one that `expects`; it leaves old and new possible.
    pub(crate) fn take(&mut self, answer: Answer, mut expects: impl FnMut(NbdError) -> bool) {
        let request = self.in_flight.remove(&answer.cookie).expect("a request in flight");
        match (answer.error, request.effect) {
            (None, Effect::Put(stamp)) => {
                self.blocks[request.blocks].fill(vec![stamp]);
            }
            (None, Effect::Trim | Effect::Nothing) => {}
            (Some(error), _) => assert!(expects(error), "{error:?} for blocks {:?}", request.blocks),
        }
    }

    /// One batch of requests and their answers. Gives how many.
    pub(crate) fn load(
        &mut self,
        client: &mut Client,
        random: &mut Random,
        mut expects: impl FnMut(NbdError) -> bool,
    ) -> u64 {
        let sent = self.begin(client, random);
        while !self.in_flight.is_empty() {
            self.take(client.answer(), &mut expects);
        }
        sent
    }

    /// Frees some space of the disk, and writes one block in each 64 KiB of it: changes of the image's tables that are
    /// answered and not flushed.
    pub(crate) fn allocate(&mut self, client: &mut Client, random: &mut Random) {
        let part = (64 << 10) / BLOCK;
        let first = random.index(BLOCKS / part - 4) * part;
        let (offset, len) = ((first * BLOCK) as u64, (4 * part * BLOCK) as u64);
        assert_eq!(client.call(Command::WriteZeroes, NO_FLAGS, offset, len).error, None);
        self.blocks[first..first + 4 * part].fill(vec![0]);
        for block in (first..).step_by(part).take(4).map(|block| block + random.index(part)) {
            let stamp = self.next;
            self.next += 1;
            client.write((block * BLOCK) as u64, &content(block, stamp));
            self.blocks[block] = vec![stamp];
        }
    }

    /// Forgets the requests whose server is gone: each may have been carried out, or not, or in part.
    pub(crate) fn lose_sight(&mut self) {
        self.in_flight.clear();
    }

    /// Reads all, and holds each sector against what may be there. From now on it is what was read.
    pub(crate) fn check(&mut self, client: &mut Client) {
        assert!(self.in_flight.is_empty());
        let step = 256;
        for first in (0..BLOCKS).step_by(step) {
            let data = client.read((first * BLOCK) as u64, (step * BLOCK) as u64);
            for (block, data) in (first..).zip(data.chunks(BLOCK)) {
                self.check_block(block, data);
            }
        }
    }

    fn check_block(&mut self, block: usize, data: &[u8]) {
        let mut seen = Vec::new();
        for (number, sector) in data.chunks(SECTOR).enumerate() {
            let found = self.blocks[block].iter().find(|stamp| {
                let whole = content(block, **stamp);
                whole[number * SECTOR..][..SECTOR] == *sector
            });
            let Some(stamp) = found else {
                let held = u64::from_le_bytes(sector[..8].try_into().unwrap());
                let of = u64::from_le_bytes(sector[8..16].try_into().unwrap());
                panic!(
                    "sector {number} of block {block} holds stamp {held} of block {of}; it may hold {:?}",
                    self.blocks[block]
                );
            };
            if !seen.contains(stamp) {
                seen.push(*stamp);
            }
        }
        self.blocks[block] = seen;
    }
}

/// The bytes of a block: the stamp and the block's own number, again and again.
pub(crate) fn content(block: usize, stamp: Stamp) -> Vec<u8> {
    if stamp == 0 {
        return vec![0; BLOCK];
    }
    [stamp.to_le_bytes(), (block as u64).to_le_bytes()].concat().repeat(BLOCK / 16)
}
