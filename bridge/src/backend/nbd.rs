//! A remote NBD export as a block source: an asynchronous client.
//!
//! ```text
//!   worker 0        worker 1        worker 2          each worker's requests go by its own link, where the server
//!      │               │               │              has NBD_FLAG_CAN_MULTI_CONN; else all go by the primary one
//!   primary link    further link    further link      (up to --connections; beyond that, links are shared)
//!      │ driver        │ driver        │ driver       all that waits leaves in one send, replies are understood
//!      └───── socket ──┴──── socket ───┴── socket     where they were received, in any order
//! ```
//!
//! A lost connection costs time, not requests: what was on the wire is asked again when the server is back. That takes
//! it on trust that what the server had answered and not yet made durable is still there (`Reconnect`), and it cannot
//! call back a write that a server still carries out for a connection that is gone.
//!
//! The protocol is `nbd-proto`'s business: here are sockets, time, and what to do about a server that misbehaves.
//! There is no TLS.

mod connect;
mod connection;
mod coverage;
mod driver;
mod link;
mod options;
mod receive;
mod send;
mod slots;
mod socket;
mod translate;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use nbd_proto::uri::Uri;
use nbd_proto::{Command, CommandFlags, Goal, Listed};

pub use options::{NbdOptions, Reconnect};

use crate::extent::{MAX_EXTENTS, part_of};
use crate::{
    Backend, Buffer, Error, ErrorKind, Extent, ExtentKind, Flags, Geometry, LocalFuture, OpenError, Result,
};
use connect::{block_on, connect};
use link::{Config, Link};
use slots::{Ask, Data, Outcome};
use translate::{MAX_PART_BYTES, Shape, command_flags};

/// A remote export.
pub struct NbdBackend {
    config: Arc<Config>,
    /// The first is the primary one; there is always that.
    links: Box<[Arc<Link>]>,
    /// Tells this source apart in what threads remember.
    id: u64,
    /// Threads that have asked for a link so far.
    threads: AtomicUsize,
}

impl NbdBackend {
    /// Connects to an export.
    ///
    /// # Errors
    /// One line that says why that was not possible.
    pub fn open(uri: &Uri, options: &NbdOptions) -> std::result::Result<Self, OpenError> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let refusal = |reason| OpenError::Remote { uri: uri.to_string(), reason };
        let fresh =
            block_on(connect(uri, options.connect_timeout)).map_err(|error| refusal(error.to_string()))?;
        let fresh = fresh.map_err(refusal)?;
        let shape = Shape::new(&fresh.negotiated);
        if let Some(lack) = shape.lacks(options.reconnect) {
            return Err(refusal(format!("--reconnect strict needs {lack}, which the server does not offer")));
        }
        let count = if shape.multi_conn() { options.connections.max(1) } else { 1 };
        let config =
            Arc::new(Config { uri: uri.clone(), name: uri.to_string(), options: options.clone(), shape });
        let further = (1..count).map(|_| Link::new(&config, None));
        let links = [Link::new(&config, Some(fresh))].into_iter().chain(further).collect();
        Ok(NbdBackend { config, links, id: NEXT_ID.fetch_add(1, Relaxed), threads: AtomicUsize::new(0) })
    }

    /// What the server at `uri` tells about the export there ([`Goal::Info`]), or about all it has ([`Goal::List`]).
    ///
    /// # Errors
    /// As [`NbdBackend::open`].
    pub fn ask(uri: &Uri, goal: Goal, options: &NbdOptions) -> std::result::Result<Vec<Listed>, OpenError> {
        let refusal = |reason| OpenError::Remote { uri: uri.to_string(), reason };
        let asked = block_on(connect::ask(uri, goal, options.connect_timeout));
        asked.map_err(|error| refusal(error.to_string()))?.map_err(refusal)
    }

    /// This thread's way to the server.
    fn link(&self) -> &Arc<Link> {
        thread_local! {
            static MINE: RefCell<HashMap<u64, usize>> = RefCell::default();
        }
        if self.links.len() == 1 {
            return &self.links[0];
        }
        let mine = MINE.with_borrow_mut(|mine| {
            *mine.entry(self.id).or_insert_with(|| self.threads.fetch_add(1, Relaxed) % self.links.len())
        });
        let link = &self.links[mine];
        if mine == 0 || link.is_up() {
            return link;
        }
        link.bring_up();
        &self.links[0]
    }

    /// Asks until there is an answer, or it makes no sense to ask any longer.
    async fn ask_server(&self, ask: Ask, mut data: Data) -> (Result<()>, Data) {
        let mut deadline = None;
        loop {
            let link = if deadline.is_none() { self.link() } else { &self.links[0] };
            let (outcome, came_back) = link.call(ask, data, deadline).await;
            data = came_back;
            match outcome {
                Outcome::Answered(result) => return (result, data),
                Outcome::Lost => {
                    let now = Instant::now();
                    let end = *deadline.get_or_insert(now + self.config.options.reconnect_timeout);
                    if end <= now {
                        let reason = link.lock().reason.clone();
                        return (Err(driver::no_connection(&self.config.name, &reason)), data);
                    }
                    // It is told anew.
                    if let Data::Status(extents) = &mut data {
                        extents.clear();
                    }
                }
            }
        }
    }

    async fn change(&self, command: Command, offset: u64, len: u64, flags: CommandFlags) -> Result<()> {
        let flags = flags | self.durability();
        let fast = flags.contains(CommandFlags::FAST_ZERO);
        if fast && len > u64::from(u32::MAX) {
            // In parts it would not be all or nothing.
            return Err(Error::new(ErrorKind::NotSupported, "too long for zeroes all at once"));
        }
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let len = if fast { end - at } else { (end - at).min(MAX_PART_BYTES) };
            self.ask_server(Ask { command, flags, offset: at, len }, Data::None).await.0?;
            at += len;
        }
        Ok(())
    }

    /// Returns the flag that every change has where nothing is taken on trust, or where the server has no flush.
    fn durability(&self) -> CommandFlags {
        match self.config.options.reconnect {
            Reconnect::Trust if !self.config.shape.flushes_by_fua() => CommandFlags::empty(),
            _ => CommandFlags::FUA,
        }
    }

    fn max_payload(&self) -> usize {
        // Bounded by 32 MiB.
        usize::try_from(self.config.shape.max_payload).unwrap_or(usize::MAX)
    }

    async fn read_once(&self, offset: u64, buf: Buffer) -> Result<Buffer> {
        let ask = Ask { command: Command::Read, flags: CommandFlags::empty(), offset, len: buf.len() as u64 };
        match self.ask_server(ask, Data::Read(buf)).await {
            (Ok(()), Data::Read(buf)) => Ok(buf),
            (Err(error), _) => Err(error),
            (Ok(()), _) => Err(Error::new(ErrorKind::Io, "a read brought no data")),
        }
    }

    async fn read_in_parts(&self, offset: u64, mut buf: Buffer) -> Result<Buffer> {
        let mut at = offset;
        for part in buf.chunks_mut(self.max_payload()) {
            part.copy_from_slice(&self.read_once(at, Buffer::new(part.len())).await?);
            at += part.len() as u64;
        }
        Ok(buf)
    }

    async fn write_once(&self, offset: u64, data: Buffer, flags: CommandFlags) -> Result<()> {
        let ask = Ask { command: Command::Write, flags, offset, len: data.len() as u64 };
        self.ask_server(ask, Data::Write(data)).await.0
    }

    async fn write_in_parts(&self, offset: u64, data: Buffer, flags: CommandFlags) -> Result<()> {
        let mut at = offset;
        for part in data.chunks(self.max_payload()) {
            self.write_once(at, Buffer::copy_of(part), flags).await?;
            at += part.len() as u64;
        }
        Ok(())
    }
}

impl Backend for NbdBackend {
    fn geometry(&self) -> Geometry {
        self.config.shape.geometry
    }

    /// Everything here waits for the network.
    fn try_read(&self, _offset: u64, _buf: &mut [u8], _flags: Flags) -> Option<Result<()>> {
        None
    }

    fn try_write(&self, _offset: u64, _data: &[u8], _flags: Flags) -> Option<Result<()>> {
        None
    }

    fn read(&self, offset: u64, buf: Buffer, _flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        match buf.len() {
            0 => Box::pin(ready(Ok(buf))),
            len if len <= self.max_payload() => Box::pin(self.read_once(offset, buf)),
            _ => Box::pin(self.read_in_parts(offset, buf)),
        }
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        let flags = command_flags(flags) | self.durability();
        match data.len() {
            0 => Box::pin(ready(Ok(()))),
            len if len <= self.max_payload() => Box::pin(self.write_once(offset, data, flags)),
            _ => Box::pin(self.write_in_parts(offset, data, flags)),
        }
    }

    /// On any link: where there are several, the server has promised that a flush covers what was answered on all.
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        if self.config.shape.flushes_by_fua() {
            return Box::pin(ready(Ok(())));
        }
        let ask = Ask { command: Command::Flush, flags: CommandFlags::empty(), offset: 0, len: 0 };
        Box::pin(async move { self.ask_server(ask, Data::None).await.0 })
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.change(Command::Trim, offset, len, command_flags(flags)))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.change(Command::WriteZeroes, offset, len, command_flags(flags)))
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let len = (end - at).min(MAX_PART_BYTES);
                let ask = Ask { command: Command::Cache, flags: CommandFlags::empty(), offset: at, len };
                self.ask_server(ask, Data::None).await.0?;
                at += len;
            }
            Ok(())
        })
    }

    /// All of it is data where the server does not tell. The range need not be one of whole blocks: a server may tell of
    /// extents that end within one.
    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        if !self.config.shape.allocation {
            return Box::pin(ready(Ok(vec![Extent { len, kind: ExtentKind::Data }])));
        }
        let (start, end) = self.config.shape.geometry.whole_blocks(offset, len);
        // Of a block that the range begins within, more than the first extent may be needed.
        let one = flags.contains(Flags::REQ_ONE);
        let flags = if start < offset { flags.without(Flags::REQ_ONE) } else { flags };
        let flags = command_flags(flags);
        let ask = Ask { command: Command::BlockStatus, flags, offset: start, len: end - start };
        Box::pin(async move {
            match self.ask_server(ask, Data::Status(Vec::new())).await {
                (Ok(()), Data::Status(extents)) => {
                    let mut extents = part_of(&extents, offset - start, len);
                    extents.truncate(if one { 1 } else { MAX_EXTENTS });
                    Ok(extents)
                }
                (Err(error), _) => Err(error),
                (Ok(()), _) => Err(Error::new(ErrorKind::Io, "block status brought nothing")),
            }
        })
    }
}

impl Drop for NbdBackend {
    fn drop(&mut self) {
        self.links.iter().for_each(|link| link.close());
    }
}
