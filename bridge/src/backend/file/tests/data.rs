//! Reads, writes, trims and zeroes.

use super::*;
use crate::ExtentKind;

const MODES: [AioMode; 2] = [AioMode::Auto, AioMode::Threads];

async fn store(backend: &FileBackend, offset: u64, bytes: &[u8]) {
    backend.write(offset, Buffer::copy_of(bytes), Flags::NONE).await.unwrap();
}

async fn load(backend: &FileBackend, offset: u64, len: usize) -> Vec<u8> {
    backend.read(offset, Buffer::new(len), Flags::NONE).await.unwrap().to_vec()
}

#[test]
fn both_paths_see_each_other_on_every_file_system() {
    for folder in [memory(), disk()] {
        for aio in MODES {
            let path = folder.path().join(format!("{aio:?}"));
            create(&path, 1_000_003).unwrap();
            let backend = open(&path, &FileOptions { aio, ..FileOptions::default() });
            assert_eq!(backend.geometry().size, 1_000_003);
            block_on(async {
                let data: Vec<u8> = (0..=u8::MAX).cycle().take(70_001).collect();
                store(&backend, 929_999, &data).await;
                let mut fast = vec![0; data.len()];
                backend.try_read(929_999, &mut fast, Flags::NONE).unwrap().unwrap();
                assert!(fast == data, "in the cache after a write");
                backend.try_write(7, &data[..30_000], Flags::NONE).unwrap().unwrap();
                assert!(load(&backend, 7, 30_000).await == data[..30_000]);
                assert_eq!(load(&backend, 0, 7).await, [0; 7]);
                backend.flush().await.unwrap();
                let status = backend.block_status(500_000, 100_000, Flags::NONE).await.unwrap();
                assert_eq!(status, [Extent { len: 100_000, kind: ExtentKind::Hole }]);
            });
        }
    }
}
