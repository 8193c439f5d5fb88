//! Requests of any size over a source that takes only whole blocks.

use bridge::backend::memory::MemoryBackend;
use bridge::{Backend, Extent, Geometry, LocalFuture};

use super::*;

const BLOCK: u32 = 512;

/// A disk in memory whose smallest unit is a block, as some remote disks have it. The export refuses all else.
struct InBlocks(MemoryBackend);

impl Backend for InBlocks {
    fn geometry(&self) -> Geometry {
        let geometry = self.0.geometry();
        // Without FUA a durable write is a write and a flush.
        Geometry {
            min_block: BLOCK,
            capabilities: geometry.capabilities.without(Capabilities::FUA),
            ..geometry
        }
    }

    fn try_read(&self, offset: u64, buf: &mut [u8], flags: Flags) -> Option<Result<()>> {
        self.0.try_read(offset, buf, flags)
    }

    fn try_write(&self, offset: u64, data: &[u8], flags: Flags) -> Option<Result<()>> {
        self.0.try_write(offset, data, flags)
    }

    fn read(&self, offset: u64, buf: Buffer, flags: Flags) -> LocalFuture<'_, Result<Buffer>> {
        self.0.read(offset, buf, flags)
    }

    fn write(&self, offset: u64, data: Buffer, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.0.write(offset, data, flags)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.0.flush()
    }

    fn trim(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.0.trim(offset, len, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<()>> {
        self.0.write_zeroes(offset, len, flags)
    }

    fn cache(&self, offset: u64, len: u64) -> LocalFuture<'_, Result<()>> {
        self.0.cache(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64, flags: Flags) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.0.block_status(offset, len, flags)
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

fn export(size: u64) -> Arc<Export> {
    Export::new("", None, Box::new(InBlocks(MemoryBackend::new(size))))
}

async fn content(export: &Export, offset: u64, len: u64) -> Vec<u8> {
    let asked = Request::new(Operation::Read, offset, len);
    let (data, part) = read(export, asked, Instant::now()).await.unwrap();
    data[part].to_vec()
}

#[test]
fn parts_of_blocks_are_read_written_and_zeroed() {
    block_on(async {
        // The last block is a short one.
        let size = 20 * u64::from(BLOCK) + 100;
        let (export, blocks) = (export(size), RwLock::new(()));
        let mut model = vec![0; usize::try_from(size).unwrap()];
        let mut random = bridge::random::Random::new(5);
        for n in 0..2000_u32 {
            let offset = random.below(size);
            let len = (random.below(3000) + 1).min(size - offset);
            let range = length(offset)..length(offset + len);
            let flags = if n % 7 == 0 { Flags::FUA } else { Flags::NONE };
            match n % 3 {
                0 => {
                    let mut data = Buffer::new(length(len));
                    random.fill(&mut data);
                    model[range].copy_from_slice(&data);
                    let asked = Request::new(Operation::Write, offset, len).with_flags(flags);
                    write(&export, asked, data, &blocks, Instant::now()).await.unwrap();
                }
                1 => {
                    zero(&export, offset, len, punch_flags(&export), &blocks).await.unwrap();
                    model[range].fill(0);
                }
                _ => assert!(content(&export, offset, len).await == model[range], "{len} bytes at {offset}"),
            }
        }
        assert!(content(&export, 0, size).await == model);
        assert!(export.stats().count(Operation::Flush) > 0, "durable by a flush");
    });
}

#[test]
fn data_and_holes_are_looked_for_from_any_byte() {
    block_on(async {
        const CHUNK: u64 = bridge::backend::memory::CHUNK_BYTES;
        let (export, blocks) = (export(8 * CHUNK), RwLock::new(()));
        let data = Buffer::copy_of(&[1; 10]);
        let asked = Request::new(Operation::Write, 3 * CHUNK + 7, 10);
        write(&export, asked, data, &blocks, Instant::now()).await.unwrap();
        for (from, data, expected) in [
            (1, true, Some(3 * CHUNK)),
            (1, false, Some(1)),
            (3 * CHUNK + 1, true, Some(3 * CHUNK + 1)),
            (3 * CHUNK + 1, false, Some(4 * CHUNK)),
            (4 * CHUNK + 3, true, None),
            (8 * CHUNK - 1, false, Some(8 * CHUNK - 1)),
        ] {
            assert_eq!(seek(&export, from, data).await.unwrap(), expected, "{from} {data}");
        }
    });
}
