//! What a client may expect of a disk after a power cut: for each block what the last flush or FUA that it heard of before
//! the cut made durable, or anything written to that block later.

use std::collections::HashMap;
use std::ops::Range;

use nbd_proto::{Command, CommandFlags};

use super::model::{BLOCK, BLOCKS, SECTOR, content};
use super::recorder::Recorder;
use super::support::{Client, NO_FLAGS, Random};

/// Requests in flight.
const DEPTH: usize = 16;

/// Blocks that are used: few, so that they are written over again and again.
const USED: usize = 600;

/// A change of a block.
#[derive(Clone, Copy)]
struct Change {
    /// 0 for zeroes.
    stamp: u64,
    /// What was there may stay.
    is_trim: bool,
    /// When it was answered, in ticks of the client; MAX while it is not.
    answered: u64,
    /// The recorder's position from which on the change is durable by itself (FUA); MAX for never.
    durable: usize,
}

/// A flush that succeeded.
struct Flush {
    sent: u64,
    /// The recorder's position when it was answered.
    position: usize,
}

struct Asked {
    blocks: Range<usize>,
    /// The index of the change in each of its blocks' histories.
    changes: Vec<usize>,
    sent: u64,
    is_flush: bool,
    fua: bool,
}

pub(crate) struct History {
    blocks: Vec<Vec<Change>>,
    flushes: Vec<Flush>,
    in_flight: HashMap<u64, Asked>,
    tick: u64,
    next: u64,
}

impl History {
    pub(crate) fn new() -> History {
        History {
            blocks: vec![Vec::new(); BLOCKS],
            flushes: Vec::new(),
            in_flight: HashMap::new(),
            tick: 0,
            next: 1,
        }
    }

    /// Sends so many requests, [`DEPTH`] of them in flight, and takes all answers.
    pub(crate) fn load(
        &mut self,
        client: &mut Client,
        random: &mut Random,
        recorder: &Recorder,
        mut count: usize,
    ) {
        while count > 0 || !self.in_flight.is_empty() {
            while count > 0 && self.in_flight.len() < DEPTH {
                let first = random.index(USED);
                let blocks = first..first + 1 + random.index(4);
                let meets =
                    |asked: &Asked| asked.blocks.start < blocks.end && blocks.start < asked.blocks.end;
                if self.in_flight.values().any(meets) {
                    break;
                }
                count -= 1;
                self.send(client, random, blocks);
            }
            let answer = client.answer();
            assert_eq!(answer.error, None);
            self.tick += 1;
            let asked = self.in_flight.remove(&answer.cookie).unwrap();
            let position = recorder.position();
            if asked.is_flush {
                self.flushes.push(Flush { sent: asked.sent, position });
            }
            for (block, change) in asked.blocks.zip(asked.changes) {
                let change = &mut self.blocks[block][change];
                change.answered = self.tick;
                if asked.fua {
                    change.durable = position;
                }
            }
        }
    }

    fn send(&mut self, client: &mut Client, random: &mut Random, blocks: Range<usize>) {
        let (offset, len) = ((blocks.start * BLOCK) as u64, (blocks.len() * BLOCK) as u64);
        let fua = random.below(8) == 0;
        let flag = if fua { CommandFlags::FUA } else { NO_FLAGS };
        self.tick += 1;
        let (mut stamp, mut is_trim, mut is_flush) = (0, false, false);
        let cookie = match random.below(24) {
            0..3 => {
                is_flush = true;
                client.ask(Command::Flush, NO_FLAGS, 0, 0)
            }
            3 => {
                is_trim = true;
                client.ask(Command::Trim, flag, offset, len)
            }
            4 | 5 => client.ask(Command::WriteZeroes, flag, offset, len),
            6 | 7 => client.ask(Command::WriteZeroes, flag | CommandFlags::NO_HOLE, offset, len),
            _ => {
                stamp = self.next;
                self.next += 1;
                let data: Vec<u8> = blocks.clone().flat_map(|block| content(block, stamp)).collect();
                client.ask_write(flag, offset, &data)
            }
        };
        let change = Change { stamp, is_trim, answered: u64::MAX, durable: usize::MAX };
        let blocks = if is_flush { 0..0 } else { blocks };
        let changes = blocks.clone().map(|block| {
            self.blocks[block].push(change);
            self.blocks[block].len() - 1
        });
        let changes = changes.collect();
        self.in_flight.insert(cookie, Asked { blocks, changes, sent: self.tick, is_flush, fua });
    }

    /// What each block may hold after a cut at this position.
    pub(crate) fn allowed(&self, position: usize) -> Vec<Vec<u64>> {
        let heard = self.flushes.iter().filter(|flush| flush.position <= position);
        let covered = heard.map(|flush| flush.sent).max().unwrap_or(0);
        let of_block = |changes: &Vec<Change>| {
            let is_durable = |change: &Change| change.answered < covered || change.durable <= position;
            // A trim that is durable leaves what was there before it, or zeroes.
            let base = changes.iter().rposition(|change| !change.is_trim && is_durable(change));
            let mut may: Vec<u64> = changes[base.unwrap_or(0)..].iter().map(|change| change.stamp).collect();
            if base.is_none() {
                may.push(0);
            }
            may
        };
        self.blocks.iter().map(of_block).collect()
    }
}

/// Holds a disk's bytes against what may be there.
pub(crate) fn verify(bytes: &[u8], allowed: &[Vec<u64>]) {
    for (block, (bytes, may)) in bytes.chunks(BLOCK).zip(allowed).enumerate() {
        for (number, sector) in bytes.chunks(SECTOR).enumerate() {
            let fits = |stamp: &u64| content(block, *stamp)[number * SECTOR..][..SECTOR] == *sector;
            assert!(
                may.iter().any(fits),
                "sector {number} of block {block} holds stamp {} of block {}; it may hold {may:?}",
                u64::from_le_bytes(sector[..8].try_into().unwrap()),
                u64::from_le_bytes(sector[8..16].try_into().unwrap()),
            );
        }
    }
}
