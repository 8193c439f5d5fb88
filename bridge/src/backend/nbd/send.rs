//! Sending requests: all that wait leave in one go, headers and payloads gathered from where they lie.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::task::{Context, Poll};
use std::time::Instant;

use nbd_proto::{Command, CommandFlags, Request};

use super::connection::Connection;
use super::slots::{Ask, Data, Slots, Stage};

/// Requests gathered into one send at most.
const GATHER: usize = 64;

/// The most that a compact header can ask for, in whole blocks of any size.
const MAX_COMPACT_LEN: u64 = (1 << 32) - (1 << 16);

impl Connection {
    /// Sends what is queued, up to `limit` requests in flight; whether anything went out.
    ///
    /// # Errors
    /// The connection is lost; the words say why.
    pub(super) fn send(
        &mut self,
        cx: &mut Context<'_>,
        slots: &mut Slots,
        queue: &mut VecDeque<u64>,
        limit: u32,
    ) -> Result<bool, String> {
        let mut any = false;
        loop {
            self.take_in(slots, queue, limit);
            if self.sending.is_empty() {
                return Ok(any);
            }
            match self.send_gathered(cx, slots) {
                Poll::Ready(Ok(sent)) => self.advance(sent, slots),
                Poll::Ready(Err(error)) => return Err(format!("sending failed: {error}")),
                Poll::Pending => return Ok(any),
            }
            any = true;
        }
    }

    /// Moves requests from the queue to those that are being sent.
    fn take_in(&mut self, slots: &mut Slots, queue: &mut VecDeque<u64>, limit: u32) {
        if self.leaving || queue.is_empty() {
            return;
        }
        let now = Instant::now();
        while self.sending.len() < GATHER && self.in_flight < limit {
            let Some(cookie) = queue.pop_front() else { return };
            // One whose caller has lost interest is not there any more.
            let Some(slot) = slots.get_mut(cookie) else { continue };
            slot.stage = Stage::Sending;
            slot.sent_at = Some(now);
            self.sending.push_back(cookie);
            self.large_reads += u32::from(slot.ask.is_large_read());
            self.in_flight += 1;
        }
    }

    fn send_gathered(&mut self, cx: &mut Context<'_>, slots: &Slots) -> Poll<std::io::Result<usize>> {
        let extended = self.style.extended();
        let head_len = Request::header_len(extended);
        self.heads.clear();
        for cookie in &self.sending {
            if let Some(slot) = slots.get(*cookie) {
                request(*cookie, &slot.ask, extended).encode(extended, &mut self.heads);
            }
        }
        let mut slices = [IoSlice::new(&[]); 2 * GATHER];
        let (mut count, mut skip) = (0, self.sent);
        for (cookie, head) in self.sending.iter().zip(self.heads.chunks_exact(head_len)) {
            for part in [head, payload(slots, *cookie)] {
                let done = skip.min(part.len());
                skip -= done;
                if done < part.len() {
                    slices[count] = IoSlice::new(&part[done..]);
                    count += 1;
                }
            }
        }
        self.socket.poll_send(cx, &slices[..count])
    }

    /// Counts bytes that are out.
    fn advance(&mut self, sent: usize, slots: &mut Slots) {
        self.sent += sent;
        let head_len = Request::header_len(self.style.extended());
        while let Some(cookie) = self.sending.front() {
            let len = head_len + payload(slots, *cookie).len();
            if self.sent < len {
                return;
            }
            self.sent -= len;
            if let Some(slot) = slots.get_mut(*cookie) {
                slot.stage = Stage::Sent;
            }
            self.sending.pop_front();
        }
    }
}

fn payload(slots: &Slots, cookie: u64) -> &[u8] {
    match slots.get(cookie).map(|slot| &slot.data) {
        Some(Data::Write(buffer)) => buffer,
        _ => &[],
    }
}

fn request(cookie: u64, ask: &Ask, extended: bool) -> Request {
    let mut flags = ask.flags;
    if extended && ask.command == Command::Write {
        flags |= CommandFlags::PAYLOAD_LEN;
    }
    // Of block status, less than was asked will do; others are short enough.
    let length = if extended { ask.len } else { ask.len.min(MAX_COMPACT_LEN) };
    Request { flags, command: ask.command, cookie, offset: ask.offset, length }
}
