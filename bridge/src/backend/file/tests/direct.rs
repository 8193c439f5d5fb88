//! O_DIRECT requests of any alignment, many at a time, against a model.

use super::*;

const BLOCK: u64 = 4096;

/// Each task owns every TASKS-th stretch of UNIT bytes, so that the outcome is certain while neighbours share blocks.
const TASKS: usize = 16;
const UNIT: u64 = 700;
const STRETCHES: u64 = 600;
/// No multiple of any block.
const SIZE: u64 = UNIT * STRETCHES + 13;

struct Model {
    backend: FileBackend,
    bytes: std::cell::RefCell<Vec<u8>>,
}

async fn task(model: std::rc::Rc<Model>, index: u64, mut seed: u64) {
    // Numbers by a linear congruence: its upper bits are random enough.
    let mut below = |n: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % n
    };
    for _ in 0..60 {
        let stretch = below(STRETCHES / TASKS as u64) * TASKS as u64 + index;
        let from = stretch * UNIT + below(UNIT / 2);
        let len = if stretch == STRETCHES - 1 { SIZE - from } else { 1 + below((stretch + 1) * UNIT - from) };
        let place = usize::try_from(from).unwrap()..usize::try_from(from + len).unwrap();
        let byte = u8::try_from(1 + below(255)).unwrap();
        match below(8) {
            0 => {
                model.backend.write_zeroes(from, len, Flags::NONE).await.unwrap();
                model.bytes.borrow_mut()[place].fill(0);
            }
            1..=5 => {
                let flags = if below(8) == 0 { Flags::FUA } else { Flags::NONE };
                store(&model.backend, from, &vec![byte; place.len()], flags).await.unwrap();
                model.bytes.borrow_mut()[place].fill(byte);
            }
            _ => {
                let found = load(&model.backend, from, place.len()).await;
                assert!(found == model.bytes.borrow()[place], "{from} {len}");
            }
        }
    }
}

fn against_model(path: &Path, size: u64, options: &FileOptions) {
    let seed = std::time::UNIX_EPOCH.elapsed().map_or(0, |now| u64::from(now.subsec_nanos()));
    println!("seed {seed:?}, {options:?}");
    let backend = open(path, options);
    assert_eq!(backend.geometry().size, size);
    assert!(backend.disk.direct.is_some());
    let bytes = vec![0; usize::try_from(size).unwrap()];
    block_on(async {
        let model = std::rc::Rc::new(Model { backend, bytes: bytes.into() });
        let tasks: Vec<_> = (0..TASKS as u64)
            .map(|index| tokio::task::spawn_local(task(model.clone(), index, seed ^ (index << 48))))
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
        model.backend.flush().await.unwrap();
        let expected = model.bytes.take();
        assert!(load(&model.backend, 0, expected.len()).await == expected);
        assert!(std::fs::read(path).unwrap() == expected, "and through the page cache");
    });
}

fn direct(aio: AioMode, cache: CacheMode) -> FileOptions {
    FileOptions { cache, aio, ..FileOptions::default() }
}

/// Whether the test folder's file system has O_DIRECT.
fn available(path: &Path) -> bool {
    let opened =
        FileBackend::open(path, &FileOptions { lock: false, ..direct(AioMode::Auto, CacheMode::None) });
    if let Err(error) = &opened {
        eprintln!("SKIP O_DIRECT: {error}");
    }
    opened.is_ok()
}

#[test]
fn unaligned_requests_on_a_file_of_odd_size() {
    for aio in [AioMode::Auto, AioMode::Threads] {
        let folder = disk();
        let path = image(&folder, SIZE);
        if available(&path) {
            against_model(&path, SIZE, &direct(aio, CacheMode::None));
            assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
        }
    }
}

#[test]
fn unaligned_requests_on_a_device_of_large_sectors() {
    let folder = disk();
    let size = SIZE.next_multiple_of(BLOCK);
    let path = image(&folder, size);
    let Some(device) = Loop::over(&path, &["--sector-size", "4096"]) else { return };
    against_model(device.path(), size, &direct(AioMode::Auto, CacheMode::None));
}

#[test]
fn each_shape_of_a_direct_request() {
    let folder = disk();
    let path = image(&folder, 3 * BLOCK + 100);
    if !available(&path) {
        return;
    }
    let backend = open(&path, &direct(AioMode::Auto, CacheMode::DirectSync));
    let mut bytes = vec![0; 3 * 4096 + 100];
    block_on(async {
        let ends = [0, 1, 511, 512, 513, 4095, 4096, 4097, 8192, 9000, 12287, 12288, 12289, 12388];
        for (n, from) in ends.iter().enumerate() {
            for to in &ends[n..] {
                let byte = u8::try_from((from * 7 + to) % 255 + 1).unwrap();
                store(&backend, *from as u64, &vec![byte; to - from], Flags::NONE).await.unwrap();
                bytes[*from..*to].fill(byte);
                assert!(load(&backend, *from as u64, to - from).await == bytes[*from..*to]);
            }
        }
        assert!(load(&backend, 0, bytes.len()).await == bytes);
        assert_eq!(load(&backend, 12_288, 100).await.len(), 100);
    });
    assert!(std::fs::read(&path).unwrap() == bytes);
}

#[test]
fn a_dropped_write_ends_what_it_began() {
    let folder = disk();
    let path = image(&folder, 4 * BLOCK);
    if !available(&path) {
        return;
    }
    for aio in [AioMode::Auto, AioMode::Threads] {
        let backend = open(&path, &direct(aio, CacheMode::None));
        block_on(async {
            for turns in 0..30 {
                let mut dropped = backend.write(100, Buffer::copy_of(&[turns; 50]), Flags::NONE);
                for _ in 0..=turns {
                    let poll = std::future::poll_fn(|context| {
                        std::task::Poll::Ready(dropped.as_mut().poll(context).is_ready())
                    });
                    if poll.await {
                        break;
                    }
                    tokio::task::yield_now().await;
                }
                drop(dropped);
                store(&backend, 200, &[turns + 1; 50], Flags::NONE).await.unwrap();
                store(&backend, 90, &[turns + 1; 10], Flags::NONE).await.unwrap();
                let found = load(&backend, 90, 160).await;
                assert_eq!(found[..10], [turns + 1; 10]);
                assert_eq!(found[10..60], [turns; 50], "it was begun, and so it ends");
                assert_eq!(found[110..], [turns + 1; 50]);
            }
        });
    }
}
