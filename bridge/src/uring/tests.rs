//! The ring against pipes, which complete when the test says so, and files.

use std::fs::File;
use std::io::Write;
use std::task::{Context, Waker};

use super::*;
use crate::Buffer;

/// Says so where there is nothing to test.
fn no_ring() -> bool {
    let refusal = allowed().err();
    if let Some(error) = &refusal {
        eprintln!("SKIP io_uring: {error}");
    }
    refusal.is_some()
}

fn block_on<T>(test: impl Future<Output = T>) -> T {
    runtime().block_on(test)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn read(file: &Arc<File>, len: usize, offset: u64) -> Op {
    Op { file: file.clone(), call: Call::Read { buf: Buffer::new(len), part: 0..len, offset } }
}

fn start(op: Op) -> Completion {
    submit(op).unwrap_or_else(|_| panic!("this machine has no io_uring"))
}

fn pipe() -> (Arc<File>, File) {
    let (reader, writer) = std::io::pipe().unwrap();
    let (reader, writer): (std::os::fd::OwnedFd, std::os::fd::OwnedFd) = (reader.into(), writer.into());
    (Arc::new(reader.into()), writer.into())
}

/// A file in which each 4 KiB block holds its own number.
fn numbered(blocks: u32) -> Arc<File> {
    let mut file = tempfile::tempfile_in("/var/tmp").unwrap();
    let bytes: Vec<u8> = (0..blocks).flat_map(|n| n.to_le_bytes().repeat(1024)).collect();
    file.write_all(&bytes).unwrap();
    Arc::new(file)
}

async fn settle() {
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
}

#[test]
fn a_thousand_operations_share_a_ring_that_holds_fewer() {
    if no_ring() {
        return;
    }
    let file = numbered(1000);
    block_on(async {
        let reads: Vec<_> = (0..1000_u32).map(|n| start(read(&file, 4096, u64::from(n) * 4096))).collect();
        for (n, read) in reads.into_iter().enumerate() {
            let (op, outcome) = read.await;
            assert_eq!(outcome, Ok(4096));
            let buf = op.into_buffer().unwrap();
            assert_eq!(buf[..4], u32::try_from(n).unwrap().to_le_bytes());
        }
    });
}

#[test]
fn every_kind_of_operation() {
    if no_ring() {
        return;
    }
    let file = Arc::new(tempfile::tempfile_in("/var/tmp").unwrap());
    block_on(async {
        let run = async |call| start(Op { file: file.clone(), call }).await.1;
        for durable in [false, true] {
            let buf = Buffer::copy_of(&[b"0123456789".as_slice(), &[7; 100]].concat());
            assert_eq!(run(Call::Write { buf, part: 2..10, offset: 100, durable }).await, Ok(8));
        }
        let mode = rustix::fs::FallocateFlags::empty();
        assert_eq!(run(Call::Fallocate { mode, offset: 0, len: 3 << 20 }).await, Ok(0));
        assert_eq!(file.metadata().unwrap().len(), 3 << 20);
        file.set_len(1 << 20).unwrap();
        assert_eq!(run(Call::Sync).await, Ok(0));
        let call = Call::Read { buf: Buffer::new(20), part: 5..15, offset: 98 };
        let (op, outcome) = start(Op { file: file.clone(), call }).await;
        assert_eq!((outcome, &op.into_buffer().unwrap()[5..15]), (Ok(10), b"\0\x0023456789".as_slice()));
        let call = Call::Read { buf: Buffer::new(20), part: 0..20, offset: 1 << 20 };
        assert_eq!(run(call).await, Ok(0), "at the end of the file");
        let call = Call::Fallocate { mode: rustix::fs::FallocateFlags::PUNCH_HOLE, offset: 0, len: 1 };
        assert_eq!(run(call).await, Err(Errno::OPNOTSUPP));
    });
}

#[test]
fn a_dropped_future_leaves_its_buffer_with_the_kernel() {
    if no_ring() {
        return;
    }
    block_on(async {
        let (reader, mut writer) = pipe();
        let mut orphan = start(read(&reader, 4096, 0));
        settle().await;
        assert!(std::pin::Pin::new(&mut orphan).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        drop(orphan);
        // Buffers of that size that are made now are other ones.
        let others: Vec<Buffer> = (0..100).map(|_| Buffer::copy_of(&[1; 4096])).collect();
        writer.write_all(&[9; 4096]).unwrap();
        settle().await;
        assert!(others.iter().all(|buffer| buffer.iter().all(|byte| *byte == 1)));
        drop(writer);
        assert_eq!(start(read(&reader, 1, 0)).await.1, Ok(0), "the orphan has read the bytes");
        assert_eq!(Arc::strong_count(&reader), 1, "and has given up its file");
    });
}

#[test]
fn what_is_dropped_before_its_turn_never_begins() {
    if no_ring() {
        return;
    }
    block_on(async {
        let (reader, mut writer) = pipe();
        writer.write_all(b"kept").unwrap();
        drop(start(read(&reader, 4, 0)));
        settle().await;
        let (op, outcome) = start(read(&reader, 4, 0)).await;
        assert_eq!((outcome, &op.into_buffer().unwrap()[..]), (Ok(4), b"kept".as_slice()));
    });
}

#[test]
fn the_end_of_a_runtime_waits_for_the_kernel_and_the_next_one_has_its_own_ring() {
    if no_ring() {
        return;
    }
    let (reader, mut writer) = pipe();
    let first = runtime();
    let mut pending = None;
    first.block_on(async {
        pending = Some(start(read(&reader, 8, 0)));
        settle().await;
    });
    let late = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        writer.write_all(b"too late").unwrap();
    });
    drop(first);
    late.join().unwrap();
    // The outcome can still be had elsewhere.
    let (op, outcome) = block_on(pending.unwrap());
    assert_eq!((outcome, &op.into_buffer().unwrap()[..]), (Ok(8), b"too late".as_slice()));
    let file = numbered(1);
    assert_eq!(block_on(async { start(read(&file, 4096, 0)).await.1 }), Ok(4096));
}

/// A runtime that ends where the kernel does not let it wait leaves the operation's memory alone for good.
#[test]
fn what_cannot_be_waited_for_keeps_its_memory() {
    if no_ring() {
        return;
    }
    let (reader, mut writer) = pipe();
    let count = || Arc::strong_count(&reader);
    std::thread::scope(|scope| {
        let ended = scope.spawn(|| {
            let runtime = runtime();
            runtime.block_on(async {
                let mut orphan = start(read(&reader, 4096, 0));
                settle().await;
                let mut context = Context::from_waker(Waker::noop());
                assert!(std::pin::Pin::new(&mut orphan).poll(&mut context).is_pending());
            });
            crate::sys::deny_on_this_thread(libc::SYS_io_uring_enter).unwrap();
            drop(runtime);
            assert_eq!(count(), 2, "the kernel still has it");
            // Buffers of that size that are made now are other ones.
            let others: Vec<Buffer> = (0..100).map(|_| Buffer::copy_of(&[1; 4096])).collect();
            writer.write_all(&[9; 4096]).unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert!(others.iter().all(|buffer| buffer.iter().all(|byte| *byte == 1)));
        });
        ended.join().unwrap();
    });
    assert_eq!(count(), 2, "nothing is freed that the kernel may write to");
}

#[test]
fn an_operation_added_while_the_driver_sleeps_wakes_it() {
    if no_ring() {
        return;
    }
    let file = numbered(8);
    block_on(async {
        for n in 0..8_u32 {
            let (op, outcome) = start(read(&file, 4, u64::from(n) * 4096)).await;
            assert_eq!((outcome, &op.into_buffer().unwrap()[..]), (Ok(4), n.to_le_bytes().as_slice()));
            settle().await;
        }
    });
}

#[test]
fn a_thread_without_permission_has_no_ring() {
    crate::sys::deny_on_this_thread(libc::SYS_io_uring_setup).unwrap();
    assert_eq!(allowed().unwrap_err().raw_os_error(), Some(libc::EPERM));
    let file = numbered(1);
    block_on(async {
        let mut op = submit(read(&file, 4, 0)).err().expect("no ring");
        assert_eq!(op.run(), Ok(4));
    });
}
