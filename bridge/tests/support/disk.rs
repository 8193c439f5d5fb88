//! A client of an export, in the place of a door.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bridge::random::Random;
use bridge::{Buffer, Data, Error, ErrorKind, Export, Extent, Flags, Operation, Reply, Request, Result};

use super::Kind;

/// Which way a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// As a door does it: the fast path, and where that declines the slow one.
    Fast,
    /// The slow path at once.
    Slow,
}

pub const PATHS: [Path; 2] = [Path::Fast, Path::Slow];

/// An export under test. A source with blocks gets whole blocks: what is not aligned is read, changed and written, as the
/// clients of such a server do it.
#[derive(Clone)]
pub struct Disk {
    pub export: Arc<Export>,
    pub kind: Kind,
    /// Held by a change of a part of a block.
    blocks: Arc<tokio::sync::Mutex<()>>,
}

impl Disk {
    pub fn new(export: Arc<Export>, kind: Kind) -> Self {
        Disk { export, kind, blocks: Arc::default() }
    }

    pub fn has_blocks(&self) -> bool {
        self.export.geometry().min_block > 1
    }

    /// The whole blocks of a range within the disk, as start and length; None if the range is one of whole blocks.
    fn around(&self, offset: u64, len: u64) -> Option<(u64, usize)> {
        let geometry = self.export.geometry();
        let within = offset.checked_add(len).is_some_and(|end| end <= geometry.size);
        let (start, end) = geometry.whole_blocks(offset, len);
        (within && (start, end) != (offset, offset + len))
            .then(|| (start, usize::try_from(end - start).unwrap()))
    }

    /// The whole blocks within a range that lies within the disk.
    fn inner(&self, offset: u64, len: u64) -> (u64, u64) {
        let geometry = self.export.geometry();
        let start = offset.next_multiple_of(u64::from(geometry.min_block)).min(offset + len);
        (start, geometry.cut(start, offset + len - start))
    }

    pub fn size(&self) -> u64 {
        self.export.geometry().size
    }

    pub async fn execute(&self, request: Request, data: Option<Buffer>) -> Result<Reply> {
        self.export.execute(request, data, Instant::now()).await
    }

    pub async fn read(&self, path: Path, offset: u64, len: usize) -> Result<Vec<u8>> {
        self.read_with(path, offset, len, Flags::NONE).await
    }

    pub async fn read_with(&self, path: Path, offset: u64, len: usize, flags: Flags) -> Result<Vec<u8>> {
        if let Some((start, whole)) = self.around(offset, len as u64) {
            let data = Box::pin(self.read_with(path, start, whole, flags)).await?;
            return Ok(data[usize::try_from(offset - start).unwrap()..][..len].to_vec());
        }
        let request = Request::new(Operation::Read, offset, len as u64).with_flags(flags);
        if path == Path::Fast {
            let mut buf = vec![0xee; len];
            if let Some(result) = self.export.try_execute(&request, Data::Into(&mut buf), Instant::now()) {
                return result.map(|()| buf);
            }
        }
        let mut buf = Buffer::new(len);
        buf.fill(0xee);
        match self.execute(request, Some(buf)).await? {
            Reply::Data(data) => Ok(data.to_vec()),
            other => panic!("a read was answered with {other:?}"),
        }
    }

    pub async fn write(&self, path: Path, offset: u64, data: &[u8], flags: Flags) -> Result<()> {
        if let Some((start, len)) = self.around(offset, data.len() as u64) {
            let _alone = self.blocks.lock().await;
            let mut whole = self.read(path, start, len).await?;
            whole[usize::try_from(offset - start).unwrap()..][..data.len()].copy_from_slice(data);
            return Box::pin(self.write(path, start, &whole, flags)).await;
        }
        let request = Request::new(Operation::Write, offset, data.len() as u64).with_flags(flags);
        if path == Path::Fast
            && let Some(result) = self.export.try_execute(&request, Data::From(data), Instant::now())
        {
            return result;
        }
        self.done(request, Some(Buffer::copy_of(data))).await
    }

    pub async fn zero(&self, offset: u64, len: u64, flags: Flags) -> Result<()> {
        if self.around(offset, len).is_some() {
            if flags.contains(Flags::FAST_ZERO) {
                return Err(Error::new(ErrorKind::NotSupported, "parts of blocks have to be written"));
            }
            let (start, inner) = self.inner(offset, len);
            if inner > 0 {
                self.done(Request::new(Operation::WriteZeroes, start, inner).with_flags(flags), None).await?;
            }
            for (from, to) in [(offset, start), (start + inner, offset + len)] {
                let zeroes = vec![0; usize::try_from(to - from).unwrap()];
                self.write(Path::Slow, from, &zeroes, flags.without(Flags::NO_HOLE)).await?;
            }
            return Ok(());
        }
        self.done(Request::new(Operation::WriteZeroes, offset, len).with_flags(flags), None).await
    }

    pub async fn trim(&self, offset: u64, len: u64, flags: Flags) -> Result<()> {
        let (offset, len) = match self.around(offset, len).map(|_| self.inner(offset, len)) {
            Some((_, 0)) => return Ok(()),
            Some(inner) => inner,
            None => (offset, len),
        };
        self.done(Request::new(Operation::Trim, offset, len).with_flags(flags), None).await
    }

    pub async fn cache(&self, offset: u64, len: u64) -> Result<()> {
        let whole = self.around(offset, len).map(|(start, len)| (start, len as u64));
        let (offset, len) = whole.unwrap_or((offset, len));
        self.done(Request::new(Operation::Cache, offset, len), None).await
    }

    pub async fn flush(&self) -> Result<()> {
        self.done(Request::flush(), None).await
    }

    pub async fn status(&self, offset: u64, len: u64, flags: Flags) -> Result<Vec<Extent>> {
        if self.around(offset, len).is_some() && len > 0 {
            return self.export.extents(offset, len, flags, Instant::now()).await;
        }
        let request = Request::new(Operation::BlockStatus, offset, len).with_flags(flags);
        match self.execute(request, None).await? {
            Reply::Extents(extents) => Ok(extents),
            other => panic!("block status was answered with {other:?}"),
        }
    }

    async fn done(&self, request: Request, data: Option<Buffer>) -> Result<()> {
        match self.execute(request, data).await? {
            Reply::Done => Ok(()),
            other => panic!("{request:?} was answered with {other:?}"),
        }
    }

    /// Compares the whole disk.
    pub async fn assert_is(&self, expected: &[u8]) {
        assert_eq!(self.size(), expected.len() as u64);
        for (n, part) in expected.chunks(1 << 20).enumerate() {
            let offset = (n << 20) as u64;
            let path = PATHS[n % 2];
            let found = self.read(path, offset, part.len()).await.unwrap();
            if found != part {
                let at = found.iter().zip(part).position(|(found, expected)| found != expected).unwrap();
                let place = offset + at as u64;
                panic!("byte {place} is {:#x}, not {:#x} ({path:?})", found[at], part[at]);
            }
        }
    }
}

/// Bytes that tell their place, and are never zero. Repeats after a prime number of them, so that no two blocks
/// or chunks are alike; copied from one table, because debug builds are slow at anything else.
pub fn pattern(offset: u64, len: usize) -> Vec<u8> {
    const PERIOD: usize = 65_521;
    static TABLE: OnceLock<Vec<u8>> = OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let mut table = vec![0; PERIOD];
        Random::new(0).fill(&mut table);
        table.iter().map(|byte| byte | 1).collect()
    });
    let mut from = usize::try_from(offset % PERIOD as u64).unwrap();
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let part = &table[from..];
        bytes.extend_from_slice(&part[..part.len().min(len - bytes.len())]);
        from = 0;
    }
    bytes
}

/// Whether there is nothing but zeroes.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks(4096).all(|part| part == &[0; 4096][..part.len()])
}
