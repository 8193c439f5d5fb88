//! One connection under load: a fixed number of slots, each with a request in flight or free. Nothing is
//! allocated for a request.
//!
//! ```text
//!   issue: free slot -> Picker -> Output ==one send==> server
//!   digest: socket ==one receive==> Replies -> slot -> Tally -> free
//! ```

use std::io;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use nbd_proto::{Command, CommandFlags, NbdError, Request};

use super::connect::Connected;
use super::output::Output;
use super::pattern::{self, Blocks, Found};
use super::plan::{Picker, Plan};
use super::replies::{Event, Replies};
use super::socket::Socket;
use super::tally::{Kind, Tally};

/// One connection.
pub(super) struct Connection<'a> {
    plan: &'a Plan,
    pub(super) socket: Socket,
    output: Output,
    replies: Replies,
    slots: Box<[Slot]>,
    free: Vec<usize>,
    /// Without `--verify` one, which every write sends; with it one for each slot.
    buffers: Vec<Box<[u8]>>,
    picker: Picker,
    /// Requests still to be made.
    quota: u64,
    /// Writes until the next flush.
    until_flush: u64,
    reading_back: bool,
    began: Instant,
    /// Cookies so far: an answer to a former request of a slot is not taken for one to this.
    sequence: u32,
}

/// A request in flight; of a free one nothing counts.
#[derive(Clone, Copy)]
struct Slot {
    busy: bool,
    cookie: u64,
    kind: Kind,
    block: u64,
    /// That a read must find, or that a write makes.
    generation: u32,
    start_ns: u64,
    /// Bytes of the answer so far.
    received: usize,
    error: Option<NbdError>,
}

const FREE: Slot = Slot {
    busy: false,
    cookie: 0,
    kind: Kind::Read,
    block: 0,
    generation: 0,
    start_ns: 0,
    received: 0,
    error: None,
};

impl<'a> Connection<'a> {
    /// Connection `index` of `count`, which makes `quota` requests with up to `depth` of them in flight.
    pub(super) fn new(
        connected: Connected,
        plan: &'a Plan,
        depth: u16,
        (index, count): (u64, u64),
        quota: u64,
        began: Instant,
    ) -> Self {
        let mut picker = Picker::new(plan, index, count);
        let block = || vec![0; plan.block_size as usize].into_boxed_slice();
        let mut buffers: Vec<_> = (0..if plan.verify { depth } else { 1 }).map(|_| block()).collect();
        if !plan.verify {
            // Random, so that no server takes it for zeroes.
            picker.fill(&mut buffers[0]);
        }
        Connection {
            plan,
            socket: connected.socket,
            output: Output::new(plan.extended),
            replies: Replies::new(connected.negotiated.style),
            slots: vec![FREE; depth.into()].into(),
            free: (0..usize::from(depth)).rev().collect(),
            buffers,
            picker,
            quota,
            until_flush: plan.flush_every,
            reading_back: false,
            began,
            sequence: 0,
        }
    }

    /// Whether it has made all its requests and has all the answers.
    pub(super) fn is_done(&self) -> bool {
        self.quota == 0 && self.free.len() == self.slots.len()
    }

    /// No more requests.
    pub(super) fn finish(&mut self) {
        self.quota = 0;
    }

    /// From now on reads every block of its part that this run has written.
    pub(super) fn read_back(&mut self) {
        self.reading_back = true;
        self.quota = u64::MAX;
        self.picker.restart();
    }

    /// Whether the socket has no room for what is to be sent.
    pub(super) fn is_blocked(&self) -> bool {
        !self.output.is_empty()
    }

    /// Makes requests for all free slots, and sends them.
    pub(super) fn issue(&mut self) -> Result<()> {
        let now = self.now();
        while self.quota > 0
            && let Some(at) = self.free.last().copied()
        {
            let Some((kind, block, generation)) = self.choose() else {
                break;
            };
            self.free.pop();
            self.quota -= 1;
            self.put(at, Slot { kind, block, generation, start_ns: now, ..FREE });
        }
        self.send()
    }

    /// Sends what is left to be sent, as far as there is room.
    pub(super) fn send(&mut self) -> Result<()> {
        self.output.send(&self.socket, &self.buffers).context("cannot send to the server")
    }

    /// Takes what has come; whether there was something. With `wait` it waits for it a little.
    pub(super) fn receive(&mut self, wait: bool, tally: &mut Tally) -> Result<bool> {
        match self.replies.receive(&self.socket, wait) {
            Ok(Some(0)) => bail!("the server closed the connection"),
            Ok(Some(_)) => {}
            Ok(None) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                bail!("the server closed the connection");
            }
            Err(error) => return Err(error).context("cannot receive from the server"),
        }
        let now = self.now();
        while let Some(event) = self.replies.next()? {
            self.take(event, now, tally)?;
        }
        Ok(true)
    }

    fn now(&self) -> u64 {
        // More than 500 years.
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// What to do next, and where; None where nothing can be done now.
    fn choose(&mut self) -> Option<(Kind, u64, u32)> {
        if self.reading_back {
            return self.choose_written();
        }
        if self.until_flush == 0 {
            self.until_flush = self.plan.flush_every;
            return Some((Kind::Flush, 0, 0));
        }
        let kind = if self.picker.reads(self.plan) { Kind::Read } else { Kind::Write };
        let (block, generation) = match &self.plan.written {
            None => (self.picker.block(self.plan), 0),
            Some(written) => {
                let (block, before) = self.picker.claim(self.plan, written)?;
                (block, if kind == Kind::Write { Blocks::next(before) } else { before })
            }
        };
        if kind == Kind::Write {
            self.until_flush -= 1;
        }
        Some((kind, block, generation))
    }

    /// The next block that this run has written; at the end no more requests.
    fn choose_written(&mut self) -> Option<(Kind, u64, u32)> {
        let written = self.plan.written.as_ref()?;
        while let Some(block) = self.picker.step() {
            // Parts do not overlap, and all writes are answered: nobody else has it.
            match written.claim(block) {
                Some(generation) if generation > 0 => return Some((Kind::Read, block, generation)),
                Some(generation) => written.release(block, generation),
                None => {}
            }
        }
        self.quota = 0;
        None
    }

    /// Puts a request into a slot and into the output.
    fn put(&mut self, at: usize, slot: Slot) {
        self.sequence = self.sequence.wrapping_add(1);
        let cookie = u64::from(self.sequence) << 32 | at as u64;
        self.slots[at] = Slot { busy: true, cookie, ..slot };
        let (offset, length) = (self.plan.offset_of(slot.block), u64::from(self.plan.block_size));
        let flags = CommandFlags::empty();
        let request = Request { flags, command: Command::Read, cookie, offset, length };
        match slot.kind {
            Kind::Read => self.output.push(&request, None),
            Kind::Flush => {
                let flush = Request { command: Command::Flush, offset: 0, length: 0, ..request };
                self.output.push(&flush, None);
            }
            Kind::Write => {
                let buffer = if self.plan.verify { at } else { 0 };
                if self.plan.verify {
                    pattern::fill(&mut self.buffers[buffer], self.plan.seed, offset, slot.generation);
                }
                // Extended headers want it said that the length is a payload's.
                let flags = if self.plan.extended { CommandFlags::PAYLOAD_LEN } else { flags };
                self.output.push(&Request { flags, command: Command::Write, ..request }, Some(buffer));
            }
        }
    }

    fn take(&mut self, event: Event, now: u64, tally: &mut Tally) -> Result<()> {
        match event {
            Event::Answer { cookie, error, done } => {
                let at = self.find(cookie)?;
                let slot = &mut self.slots[at];
                slot.error = slot.error.or(error);
                if slot.kind == Kind::Read && slot.error.is_none() && self.replies.are_simple() {
                    let offset = self.plan.offset_of(slot.block);
                    self.replies.expect_data(cookie, offset, self.plan.block_size);
                } else if done {
                    self.complete(at, now, tally)?;
                }
            }
            Event::Piece { cookie, offset, range, done } => {
                let (at, begin) = self.place(cookie, offset, range.len())?;
                if self.plan.verify {
                    self.buffers[at][begin..begin + range.len()].copy_from_slice(self.replies.bytes(range));
                }
                if done {
                    self.complete(at, now, tally)?;
                }
            }
            Event::Hole { cookie, offset, length, done } => {
                let length = length as usize;
                let (at, begin) = self.place(cookie, offset, length)?;
                if self.plan.verify {
                    self.buffers[at][begin..begin + length].fill(0);
                }
                if done {
                    self.complete(at, now, tally)?;
                }
            }
        }
        Ok(())
    }

    /// The slot of a request in flight.
    fn find(&self, cookie: u64) -> Result<usize> {
        // The lower half is the slot.
        let at = usize::try_from(cookie & u64::from(u32::MAX)).unwrap_or(usize::MAX);
        match self.slots.get(at) {
            Some(slot) if slot.busy && slot.cookie == cookie => Ok(at),
            _ => bail!("the server answers a request that was not made (cookie {cookie:#x})"),
        }
    }

    /// The slot that data belongs to, and where in its block.
    fn place(&mut self, cookie: u64, offset: u64, length: usize) -> Result<(usize, usize)> {
        let at = self.find(cookie)?;
        let slot = &mut self.slots[at];
        let begin = offset.checked_sub(self.plan.offset_of(slot.block)).map(usize::try_from);
        let size = self.plan.block_size as usize;
        match begin {
            Some(Ok(begin)) if slot.kind == Kind::Read && begin < size && length <= size - begin => {
                slot.received = slot.received.saturating_add(length);
                Ok((at, begin))
            }
            _ => bail!("the server answers with data that was not asked for, at {offset}"),
        }
    }

    /// A request has its answer.
    fn complete(&mut self, at: usize, now: u64, tally: &mut Tally) -> Result<()> {
        let slot = std::mem::replace(&mut self.slots[at], FREE);
        self.free.push(at);
        let latency = now.saturating_sub(slot.start_ns);
        match slot.error {
            Some(error) => tally.failed(slot.kind, error, latency),
            None => {
                let length = if slot.kind == Kind::Flush { 0 } else { self.plan.block_size };
                if slot.kind == Kind::Read && slot.received != self.plan.block_size as usize {
                    bail!("the server answers a read of {length} bytes with {} bytes", slot.received);
                }
                tally.done(slot.kind, u64::from(length), latency);
            }
        }
        if slot.kind == Kind::Read && slot.error.is_none() && self.plan.verify {
            self.verify(&self.buffers[at], &slot, tally);
        }
        if let Some(written) = &self.plan.written
            && slot.kind != Kind::Flush
        {
            // What a failed write has left behind, nobody knows.
            let lost = slot.kind == Kind::Write && slot.error.is_some();
            written.release(slot.block, if lost { 0 } else { slot.generation });
        }
        Ok(())
    }

    /// Looks at a block that was read.
    fn verify(&self, data: &[u8], slot: &Slot, tally: &mut Tally) {
        let offset = self.plan.offset_of(slot.block);
        let expected = self.plan.written.is_some().then_some(slot.generation);
        if expected == Some(0) {
            tally.unknown += 1;
            return;
        }
        match (pattern::examine(data, self.plan.seed, offset), expected) {
            (Found::Pattern { .. }, None) => tally.verified += 1,
            (Found::Pattern { generation }, Some(wanted)) if generation == u64::from(wanted) => {
                tally.verified += 1;
            }
            (Found::Foreign, None) => tally.unknown += 1,
            (found, _) => tally.mismatch(|| format!("the block at {offset} {}", describe(found, slot))),
        }
    }
}

fn describe(found: Found, slot: &Slot) -> String {
    match found {
        Found::Pattern { generation } => {
            format!("is as written by write {generation} of it, not by write {}", slot.generation)
        }
        Found::Elsewhere { offset } => format!("holds what was written at {offset}"),
        Found::Broken { at } => format!("is wrong from its byte {at} on"),
        Found::Foreign => "does not hold what was written".to_owned(),
    }
}
