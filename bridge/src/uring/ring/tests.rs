//! The ring in states that are forced: entries that the kernel has not read, and system calls that fail.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::Arc;

use super::*;
use crate::Buffer;

/// A ring with a read of a pipe that the kernel has, and a write to a file in the submission queue, which it has not
/// read.
struct Half {
    ring: Ring,
    /// Both ends of the pipe.
    reader: Arc<File>,
    pipe: File,
    /// The file that is written to.
    file: Arc<File>,
    /// The keys of the operations.
    read: usize,
    write: usize,
}

fn half_submitted() -> Option<Half> {
    let mut ring = match Ring::new() {
        Ok(ring) => ring,
        Err(error) => {
            eprintln!("SKIP: uring::ring: {error}");
            return None;
        }
    };
    let (reader, writer) = std::io::pipe().unwrap();
    let reader = Arc::new(File::from(OwnedFd::from(reader)));
    let file = Arc::new(tempfile::tempfile_in("/var/tmp").unwrap());
    let call = Call::Read { buf: Buffer::new(4), part: 0..4, offset: 0 };
    let read = ring.add(Op { file: reader.clone(), call }).unwrap();
    assert_ne!(ring.turn(&mut Vec::new()), Next::Later);
    let call = Call::Write { buf: Buffer::copy_of(b"late"), part: 0..4, offset: 0, durable: false };
    let write = ring.add(Op { file: file.clone(), call }).unwrap();
    ring.fill();
    assert_eq!((ring.pushed.len(), ring.in_flight), (1, 2));
    Some(Half { ring, reader, pipe: OwnedFd::from(writer).into(), file, read, write })
}

fn outcome(ring: &mut Ring, key: usize) -> Outcome {
    match ring.poll(key, &Context::from_waker(Waker::noop())) {
        Poll::Ready((_, outcome)) => outcome,
        Poll::Pending => panic!("operation {key} has not ended"),
    }
}

fn content(mut file: &File) -> String {
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_end_hands_nothing_over() {
    let Some(Half { mut ring, mut pipe, file, read, write, .. }) = half_submitted() else { return };
    // The read ends while it is waited for.
    let late = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        pipe.write_all(b"read").unwrap();
    });
    ring.drain(&mut Vec::new()).unwrap();
    late.join().unwrap();
    assert_eq!(outcome(&mut ring, write), Err(Errno::CANCELED));
    assert_eq!(outcome(&mut ring, read), Ok(4));
    // The buffer of the write is gone: the kernel must not have been given it.
    drop(ring);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(content(&file), "");
}

#[test]
fn a_failed_submission_closes_and_hands_nothing_over_later() {
    let Ok(_) = Ring::new() else { return };
    let file = tempfile::tempfile_in("/var/tmp").unwrap();
    // A ring that is not enabled refuses every submission.
    let mut ring = Ring::over(IoUring::builder().setup_r_disabled().build(ENTRIES).unwrap());
    let call = Call::Write { buf: Buffer::copy_of(b"late"), part: 0..4, offset: 0, durable: false };
    let write = ring.add(Op { file: Arc::new(file.try_clone().unwrap()), call }).unwrap();
    assert_eq!(ring.turn(&mut Vec::new()), Next::Again);
    assert!(ring.closed() && ring.in_flight == 0);
    assert_eq!(outcome(&mut ring, write), Err(Errno::BADFD));
    ring.uring.submitter().register_enable_rings().unwrap();
    assert_eq!(ring.turn(&mut Vec::new()), Next::Wait);
    ring.drain(&mut Vec::new()).unwrap();
    assert_eq!(content(&file), "");
}

#[test]
fn what_the_kernel_has_read_is_told_by_the_queue() {
    let Some(Half { mut ring, mut pipe, file, read, write, .. }) = half_submitted() else { return };
    // The kernel reads the entry, and the count is not seen.
    assert_eq!(ring.uring.submit().unwrap(), 1);
    pipe.write_all(b"read").unwrap();
    ring.drain(&mut Vec::new()).unwrap();
    assert_eq!((outcome(&mut ring, write), outcome(&mut ring, read)), (Ok(4), Ok(4)));
    assert_eq!(content(&file), "late");
}

/// Runs a turn on a thread that may not call io_uring_enter(2).
fn refused_turn(ring: &mut Ring) -> Next {
    std::thread::scope(|scope| {
        let turn = scope.spawn(|| {
            crate::sys::deny_on_this_thread(libc::SYS_io_uring_enter).unwrap();
            ring.turn(&mut Vec::new())
        });
        turn.join().unwrap()
    })
}

#[test]
fn a_refused_submission_keeps_what_the_kernel_has() {
    for is_abandoned in [false, true] {
        let Some(Half { mut ring, reader, mut pipe, file, read, write }) = half_submitted() else { return };
        if is_abandoned {
            ring.abandon(read);
            ring.abandon(write);
        }
        assert_eq!(refused_turn(&mut ring), Next::Again);
        assert!(ring.closed());
        assert_eq!(ring.in_flight, 1, "the read is with the kernel, and the write is not");
        if !is_abandoned {
            assert_eq!(outcome(&mut ring, write), Err(Errno::PERM));
            assert!(ring.poll(read, &Context::from_waker(Waker::noop())).is_pending());
        }
        assert_eq!(Arc::strong_count(&file), 1, "an operation that never begins gives up its file");
        assert_eq!(Arc::strong_count(&reader), 2, "one that runs keeps it, and its buffer");
        // Whoever adds is refused, and nothing goes to the kernel by a further turn.
        let call = Call::Write { buf: Buffer::copy_of(b"more"), part: 0..4, offset: 0, durable: false };
        assert!(ring.add(Op { file: file.clone(), call }).is_err());
        assert_eq!(ring.turn(&mut Vec::new()), Next::Wait);
        pipe.write_all(b"read").unwrap();
        ring.drain(&mut Vec::new()).unwrap();
        assert_eq!(ring.in_flight, 0);
        if !is_abandoned {
            assert_eq!(outcome(&mut ring, read), Ok(4));
        }
        assert_eq!(Arc::strong_count(&reader), 1);
        drop(ring);
        assert_eq!(content(&file), "");
    }
}

#[test]
fn a_drain_that_cannot_wait_says_so_and_keeps_what_the_kernel_has() {
    let Some(Half { mut ring, reader, mut pipe, file, read, write }) = half_submitted() else { return };
    let drained = std::thread::scope(|scope| {
        let drain = scope.spawn(|| {
            crate::sys::deny_on_this_thread(libc::SYS_io_uring_enter).unwrap();
            ring.drain(&mut Vec::new())
        });
        drain.join().unwrap()
    });
    assert_eq!(Errno::from_io_error(&drained.unwrap_err()), Some(Errno::PERM));
    assert_eq!((ring.in_flight, Arc::strong_count(&reader)), (1, 2));
    assert_eq!(outcome(&mut ring, write), Err(Errno::CANCELED));
    // Asked again by somebody who may wait, it does.
    pipe.write_all(b"read").unwrap();
    ring.drain(&mut Vec::new()).unwrap();
    assert_eq!(outcome(&mut ring, read), Ok(4));
    assert_eq!(content(&file), "");
}
