//! Requests of any size over a source that takes only whole blocks.

use bridge::backend::memory::MemoryBackend;

use super::*;

const BLOCK: u32 = 512;

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(future)
}

/// The export refuses all that is not whole blocks, and without FUA a durable write is a write and a flush.
fn export(size: u64) -> Arc<Export> {
    Export::new("", None, Box::new(MemoryBackend::new(size).posing_as(BLOCK, Capabilities::FUA)))
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
