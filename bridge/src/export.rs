//! An export: a name, a stack of layers over a backend, and the one way in for requests.
//!
//! Here and only here a request is checked (range, alignment, read-only, flags); what is below may rely on it.
//! Every request is counted, on either path. Admission by bytes happens where buffers are made, at the door.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::{Mutex, watch};

use crate::extent::part_of;
use crate::layer::{ReadOnly, Throttle, ThrottleHandle};
use crate::stats::Stats;
use crate::{
    Backend, Buffer, Capabilities, Depth, Error, ErrorKind, Extent, Flags, Geometry, Operation, Piped,
    RangeOrHole, Request, Result,
};

/// Where a fast request's bytes go or come from.
pub enum Data<'a> {
    /// To be filled by a read.
    Into(&'a mut [u8]),
    /// To be stored by a write.
    From(&'a [u8]),
    /// To be stored by a write, from a pipe; after None they are still in it.
    Piped(Piped<'a>),
}

/// The answer to a request that succeeded.
#[derive(Debug)]
pub enum Reply {
    /// Done; nothing to hand over.
    Done,
    /// What a read found.
    Data(Buffer),
    /// What block status found.
    Extents(Vec<Extent>),
}

/// A block source under a name.
pub struct Export {
    name: String,
    description: Option<String>,
    backend: Arc<dyn Backend>,
    stats: Stats,
    throttle: Option<ThrottleHandle>,
    /// Limits that it shares with others, by their names.
    groups: Vec<(String, ThrottleHandle)>,
    /// Held while the size changes.
    resizing: Mutex<()>,
    size: watch::Sender<u64>,
}

impl Export {
    /// An export of this stack.
    pub fn new(name: impl Into<String>, description: Option<String>, backend: Box<dyn Backend>) -> Arc<Self> {
        Export::of(name.into(), description, Arc::from(backend), None, Vec::new())
    }

    /// An export whose limits can be changed while it is served: see [`Export::throttle`]. `groups` are those whose
    /// limits lie below its own.
    pub fn throttled(
        name: impl Into<String>,
        description: Option<String>,
        stack: Throttle,
        groups: Vec<(String, ThrottleHandle)>,
    ) -> Arc<Self> {
        let throttle = Some(stack.handle());
        Export::of(name.into(), description, Arc::new(stack), throttle, groups)
    }

    fn of(
        name: String,
        description: Option<String>,
        backend: Arc<dyn Backend>,
        throttle: Option<ThrottleHandle>,
        groups: Vec<(String, ThrottleHandle)>,
    ) -> Arc<Self> {
        let size = watch::Sender::new(backend.geometry().size);
        let (stats, resizing) = (Stats::new(), Mutex::new(()));
        Arc::new(Export { name, description, backend, stats, throttle, groups, resizing, size })
    }

    /// The same export for a door that must not write: one name, one backend, one set of counters and limits, one
    /// size. What is written through the other doors shows in it.
    pub fn read_only_view(&self) -> Arc<Self> {
        Arc::new(Export {
            name: self.name.clone(),
            description: self.description.clone(),
            backend: Arc::new(ReadOnly::over(self.backend.clone())),
            stats: self.stats.clone(),
            throttle: self.throttle.clone(),
            groups: self.groups.clone(),
            resizing: Mutex::new(()),
            size: self.size.clone(),
        })
    }

    /// The name that clients ask for; "" is the default export.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Words for people.
    pub fn description(&self) -> Option<&str> {
        self.description.as_deref()
    }

    /// The present shape.
    pub fn geometry(&self) -> Geometry {
        self.backend.geometry()
    }

    /// The counters.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// What changes its limits; None where it was made without.
    pub fn throttle(&self) -> Option<&ThrottleHandle> {
        self.throttle.as_ref()
    }

    /// What changes limits that it shares with others, by their names.
    pub fn throttle_groups(&self) -> &[(String, ThrottleHandle)] {
        &self.groups
    }

    /// Executes a read or write now, or declines with None: then [`Export::execute`] is the way. `arrived` is
    /// when the request came in; the latency counts from there.
    #[inline]
    pub fn try_execute(&self, request: &Request, data: Data<'_>, arrived: Instant) -> Option<Result<()>> {
        if let Err(error) = self.admit(request, arrived) {
            return Some(Err(error));
        }
        let result = match data {
            Data::Into(buf) => self.backend.try_read(request.offset, buf, request.flags),
            Data::From(data) => self.backend.try_write(request.offset, data, request.flags),
            Data::Piped(data) => self.backend.try_write_piped(request.offset, data, request.flags),
        }?;
        self.record(request, result.is_ok(), arrived);
        Some(result)
    }

    /// Checks a request whose data is still on its way; a failure counts as the request's answer.
    ///
    /// # Errors
    /// As [`Export::check`].
    #[inline]
    pub fn admit(&self, request: &Request, arrived: Instant) -> Result<()> {
        let result = self.check(request);
        if result.is_err() {
            self.record(request, false, arrived);
        }
        result
    }

    /// The start of a read's range as part of a file in memory, or as a hole; None where only the other ways
    /// will do. With `Flags::WHOLE` it is all of the range, and no hole. Counts what it answers; the caller asks
    /// for the rest with `Flags::CONTINUED`.
    pub fn try_file_range(&self, request: &Request, arrived: Instant) -> Option<RangeOrHole> {
        self.check(request).ok()?;
        let range = self.backend.file_range(request.offset, request.len, request.flags)?;
        let len = match &range {
            RangeOrHole::Range(range) => range.len,
            RangeOrHole::Hole(len) => *len,
        };
        self.record(&Request { len, ..*request }, true, arrived);
        Some(range)
    }

    /// Executes a request. `data` holds what a write stores; for a read it is the buffer to fill, of the
    /// request's length; for others None.
    pub async fn execute(&self, request: Request, data: Option<Buffer>, arrived: Instant) -> Result<Reply> {
        let result = self.dispatch(request, data).await;
        self.record(&request, result.is_ok(), arrived);
        result
    }

    /// Block status of another kind: how deep in a chain of overlays the range lies, see [`Backend::allocation_depth`].
    /// Counts as a block status; where one has been counted already, give `Flags::CONTINUED`.
    pub async fn allocation_depth(&self, request: Request, arrived: Instant) -> Result<Vec<Depth>> {
        debug_assert_eq!(request.operation, Operation::BlockStatus);
        let result = match self.check(&request) {
            Ok(()) => self.backend.allocation_depth(request.offset, request.len, request.flags).await,
            Err(error) => Err(error),
        };
        self.record(&request, result.is_ok(), arrived);
        result
    }

    /// Returns the kinds of the runs from `offset` on, at most `len` bytes of them. Unlike those of
    /// [`Export::execute`], the range need not be one of whole blocks: an extent may end within a block.
    ///
    /// # Errors
    /// As [`Export::execute`].
    pub async fn extents(
        &self,
        offset: u64,
        len: u64,
        flags: Flags,
        arrived: Instant,
    ) -> Result<Vec<Extent>> {
        let geometry = self.geometry();
        let (start, end) = geometry.whole_blocks(offset, len);
        let request = Request::new(Operation::BlockStatus, start, end - start);
        if start == offset || !flags.contains(Flags::REQ_ONE) {
            let reply = self.execute(request.with_flags(flags), None, arrived).await?;
            let Reply::Extents(extents) = reply else {
                return Err(Error::new(ErrorKind::Io, "block status brought no extents"));
            };
            return Ok(part_of(&extents, offset - start, len));
        }
        // The one extent that is asked for may end before `offset`.
        let all = Box::pin(self.extents(offset, len, flags.without(Flags::REQ_ONE), arrived)).await?;
        Ok(all.into_iter().take(1).collect())
    }

    /// Checks a request against the present shape.
    ///
    /// # Errors
    /// `NoSpace` for a write or zeroes past the end, `InvalidInput` for others; `ReadOnly`; `InvalidInput` for a
    /// flag or an operation that the source does not have, or a range that breaks the alignment.
    #[inline]
    pub fn check(&self, request: &Request) -> Result<()> {
        let geometry = self.backend.geometry();
        let (operation, caps) = (request.operation, geometry.capabilities);
        if operation.changes_data() && caps.contains(Capabilities::READ_ONLY) {
            return Err(Error::new(ErrorKind::ReadOnly, "the export is read-only"));
        }
        if request.offset.checked_add(request.len).is_none_or(|end| end > geometry.size) {
            let kind = match operation {
                Operation::Write | Operation::WriteZeroes => ErrorKind::NoSpace,
                _ => ErrorKind::InvalidInput,
            };
            return Err(Error::new(kind, "the range goes past the end of the export"));
        }
        if request.flags != Flags::NONE {
            let needs = |flag, capability| request.flags.contains(flag) && !caps.contains(capability);
            if operation.changes_data() && needs(Flags::FUA, Capabilities::FUA)
                || operation == Operation::WriteZeroes && needs(Flags::FAST_ZERO, Capabilities::FAST_ZERO)
            {
                return Err(Error::new(ErrorKind::InvalidInput, "the export cannot honour this flag"));
            }
        }
        if geometry.min_block > 1 {
            check_alignment(request, &geometry)?;
        }
        let refused = match operation {
            Operation::Read | Operation::Write => return Ok(()),
            Operation::Flush => !caps.contains(Capabilities::FLUSH),
            Operation::Trim => !caps.contains(Capabilities::TRIM),
            Operation::WriteZeroes => !caps.contains(Capabilities::WRITE_ZEROES),
            Operation::Cache => !caps.contains(Capabilities::CACHE),
            Operation::BlockStatus => false,
        };
        if refused {
            return Err(Error::new(ErrorKind::InvalidInput, "the export does not have this operation"));
        }
        if operation == Operation::BlockStatus && request.len == 0 {
            return Err(Error::new(ErrorKind::InvalidInput, "block status of an empty range"));
        }
        Ok(())
    }

    /// Makes the export `size` bytes long; what is new reads as zeroes. It only grows: the size it has already is no
    /// error, a smaller one is. Not cancel-safe: dropped, it may or may not have grown.
    ///
    /// # Errors
    /// `ReadOnly`; `NotSupported` where the source cannot grow; `InvalidInput` for a smaller size, or one that is no
    /// multiple of the smallest block; the source's own.
    pub async fn resize(&self, size: u64) -> Result<()> {
        let _alone = self.resizing.lock().await;
        if size < self.geometry().size {
            return Err(Error::new(ErrorKind::InvalidInput, "the export is larger already, and only grows"));
        }
        self.grow(size).await
    }

    /// The same, but does nothing where the export is larger already.
    ///
    /// # Errors
    /// As [`Export::resize`].
    pub async fn grow_to(&self, size: u64) -> Result<()> {
        let _alone = self.resizing.lock().await;
        self.grow(size).await
    }

    async fn grow(&self, size: u64) -> Result<()> {
        let geometry = self.geometry();
        if geometry.read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "the export is read-only"));
        }
        if size <= geometry.size {
            return Ok(());
        }
        if !geometry.capabilities.contains(Capabilities::GROW) {
            return Err(Error::new(ErrorKind::NotSupported, "the source cannot grow"));
        }
        if !size.is_multiple_of(u64::from(geometry.min_block)) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "the size is not a multiple of the minimum block",
            ));
        }
        self.backend.grow(size).await?;
        tracing::info!(export = self.name, from = geometry.size, to = size, "the export has grown");
        self.size.send_replace(self.geometry().size);
        Ok(())
    }

    /// Makes the export `size` bytes long, where it is longer; what lies past that is gone. Only for a door that is alone
    /// with the export and has no request in flight: what was checked against the old size may lie past the new one.
    /// Not cancel-safe.
    ///
    /// # Errors
    /// `ReadOnly`; `NotSupported` where the source cannot shrink; the source's own.
    pub async fn shrink_to(&self, size: u64) -> Result<()> {
        let _alone = self.resizing.lock().await;
        let geometry = self.geometry();
        if geometry.read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "the export is read-only"));
        }
        if size >= geometry.size {
            return Ok(());
        }
        if !geometry.capabilities.contains(Capabilities::SHRINK) {
            return Err(Error::new(ErrorKind::NotSupported, "the source cannot shrink"));
        }
        debug_assert!(size.is_multiple_of(u64::from(geometry.min_block)), "who can shrink has no blocks");
        self.backend.shrink(size).await?;
        tracing::info!(export = self.name, from = geometry.size, to = size, "the export has shrunk");
        self.size.send_replace(size);
        Ok(())
    }

    /// The size in bytes, and each change of it.
    pub fn watch_size(&self) -> watch::Receiver<u64> {
        self.size.subscribe()
    }

    /// Reserves the space of a range; its data stays as it is.
    ///
    /// # Errors
    /// `ReadOnly`, `NotSupported`, `NoSpace`; `InvalidInput` for a range past the end; the source's own.
    pub async fn allocate(&self, offset: u64, len: u64) -> Result<()> {
        let geometry = self.geometry();
        if geometry.read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, "the export is read-only"));
        }
        if !geometry.capabilities.contains(Capabilities::ALLOCATE) {
            return Err(Error::new(ErrorKind::NotSupported, "the source cannot reserve space"));
        }
        if offset.checked_add(len).is_none_or(|end| end > geometry.size) {
            return Err(Error::new(ErrorKind::InvalidInput, "the range goes past the end of the export"));
        }
        if len == 0 { Ok(()) } else { self.backend.allocate(offset, len).await }
    }

    /// Returns why writes that were answered and not flushed do not survive a crash of this process, in words; None where
    /// they do, and where nothing is written.
    pub fn loss_after_crash(&self) -> Option<String> {
        let geometry = self.geometry();
        let volatile = geometry.capabilities.contains(Capabilities::VOLATILE) && !geometry.read_only();
        let told = || self.backend.loss_after_crash();
        volatile.then(|| told().unwrap_or_else(|| "the source keeps them in this process".to_owned()))
    }

    /// Bytes of storage that the source takes up now, where that is cheap to tell; else block status is the way.
    pub fn allocated(&self) -> Option<u64> {
        self.backend.allocated()
    }

    async fn dispatch(&self, request: Request, data: Option<Buffer>) -> Result<Reply> {
        self.check(&request)?;
        let Request { operation, flags, offset, len } = request;
        if len == 0 && matches!(operation, Operation::Trim | Operation::WriteZeroes | Operation::Cache) {
            return Ok(Reply::Done);
        }
        match (operation, data) {
            (Operation::Read, Some(buf)) => {
                debug_assert_eq!(buf.len() as u64, len);
                self.backend.read(offset, buf, flags).await.map(Reply::Data)
            }
            (Operation::Write, Some(data)) => {
                debug_assert_eq!(data.len() as u64, len);
                self.backend.write(offset, data, flags).await.map(|()| Reply::Done)
            }
            (Operation::Read | Operation::Write, None) => {
                Err(Error::new(ErrorKind::Io, "a read or write came without its buffer"))
            }
            (Operation::Flush, _) => self.backend.flush().await.map(|()| Reply::Done),
            (Operation::Trim, _) => self.backend.trim(offset, len, flags).await.map(|()| Reply::Done),
            (Operation::WriteZeroes, _) => {
                self.backend.write_zeroes(offset, len, flags).await.map(|()| Reply::Done)
            }
            (Operation::Cache, _) => self.backend.cache(offset, len).await.map(|()| Reply::Done),
            (Operation::BlockStatus, _) => {
                self.backend.block_status(offset, len, flags).await.map(Reply::Extents)
            }
        }
    }

    #[inline]
    fn record(&self, request: &Request, ok: bool, arrived: Instant) {
        let counted = !request.flags.contains(Flags::CONTINUED);
        self.stats.record(request.operation, request.len, ok, counted, arrived.elapsed());
    }
}

#[cold]
fn check_alignment(request: &Request, geometry: &Geometry) -> Result<()> {
    let mask = u64::from(geometry.min_block) - 1;
    // The last, shorter block of a size that is no multiple may be asked for whole.
    let end = request.offset + request.len;
    if request.offset & mask != 0 || (end & mask != 0 && end != geometry.size) {
        return Err(Error::new(ErrorKind::InvalidInput, "the range is not a multiple of the minimum block"));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
