//! A remote export whose server goes away, comes back as another, says nothing, or says what it should not. The
//! server runs in this process (`support/nbd.rs`), so that every byte of it can be chosen.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test program: exports nothing, may panic")]

#[path = "remote/lies.rs"]
mod lies;
#[path = "remote/limits.rs"]
mod limits;
#[path = "remote/reconnecting.rs"]
mod reconnecting;
mod support;

use std::future::poll_fn;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::task::Poll;
use std::time::{Duration, Instant};

use bridge::backend::nbd::{NbdBackend, NbdOptions, Reconnect};
use bridge::worker::Workers;
use bridge::{Backend, Buffer, Capabilities, Error, ErrorKind, Flags};
use nbd_proto::uri::Uri;
use nbd_proto::{
    ChunkHeader, ChunkType, Command, CommandFlags, NbdError, REPLY_FLAG_DONE, ReplyStyle, TransmissionFlags,
    put_data_header, put_done, put_error, put_hole, simple_reply,
};
use support::nbd::{ALL_FLAGS, Act, Offer, Seen, Server};
use support::run;

const SIZE: u64 = 1 << 20;
const MULTI_CONN: TransmissionFlags = TransmissionFlags(ALL_FLAGS.0 | TransmissionFlags::CAN_MULTI_CONN.0);

const STRUCTURED: ReplyStyle = ReplyStyle::Structured;
const EXTENDED: ReplyStyle = ReplyStyle::Extended;

fn offer(style: ReplyStyle) -> Offer {
    Offer::new(SIZE, style)
}

/// Patience for what should work, little for what should not.
fn options() -> NbdOptions {
    NbdOptions { reconnect_timeout: Duration::from_secs(20), ..NbdOptions::default() }
}

fn impatient() -> NbdOptions {
    NbdOptions { reconnect_timeout: Duration::from_millis(300), ..NbdOptions::default() }
}

async fn read(disk: &NbdBackend, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
    disk.read(offset, Buffer::new(len), Flags::NONE).await.map(|data| data.to_vec())
}

/// The same of an impatient source, whose connection may have been lost a moment ago.
async fn read_in_the_end(disk: &NbdBackend, offset: u64, len: usize) -> Vec<u8> {
    let begun = Instant::now();
    loop {
        match read(disk, offset, len).await {
            Ok(data) => return data,
            Err(error) => assert!(begun.elapsed() < Duration::from_secs(10), "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn write(disk: &NbdBackend, offset: u64, data: &[u8]) -> Result<(), Error> {
    disk.write(offset, Buffer::copy_of(data), Flags::NONE).await
}

/// Polls all of them until all are ready.
async fn poll_all<T>(futures: &mut [bridge::LocalFuture<'_, T>]) -> Vec<T> {
    let mut results: Vec<Option<T>> = futures.iter().map(|_| None).collect();
    poll_fn(|cx| {
        for (future, result) in futures.iter_mut().zip(&mut results) {
            if result.is_none()
                && let Poll::Ready(value) = future.as_mut().poll(cx)
            {
                *result = Some(value);
            }
        }
        if results.iter().all(Option::is_some) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    results.into_iter().flatten().collect()
}

fn bytes(make: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    make(&mut out);
    out
}
