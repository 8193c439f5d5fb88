//! A remote export whose server goes away, comes back as another, says nothing, or says what it should not. The
//! server runs in this process (`support/nbd.rs`), so that every byte of it can be chosen.

#![allow(unreachable_pub, clippy::unwrap_used, reason = "a test program: exports nothing, may panic")]

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

/// Bytes that break the protocol, one way each, and a word of the complaint.
type Lie = (&'static str, ReplyStyle, fn(&Seen<'_>) -> Vec<u8>);

fn bytes(make: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    make(&mut out);
    out
}

/// A chunk of this kind whose payload is said to have `length` bytes.
fn chunk(seen: &Seen<'_>, kind: ChunkType, flags: u16, length: u64, payload: &[u8]) -> Vec<u8> {
    let (cookie, offset) = (seen.request.cookie, seen.request.offset);
    bytes(|out| {
        ChunkHeader { flags, kind, cookie, offset, length }.put(seen.style, out);
        out.extend_from_slice(payload);
    })
}

/// A chunk of data, `at` bytes from the start of the request.
fn data(seen: &Seen<'_>, at: i64, len: u32, done: bool) -> Vec<u8> {
    let (cookie, offset) = (seen.request.cookie, seen.request.offset);
    bytes(|out| {
        put_data_header(seen.style, cookie, offset, offset.wrapping_add_signed(at), len, done, out);
        out.extend(std::iter::repeat_n(7, len as usize));
    })
}

const STRUCTURED: ReplyStyle = ReplyStyle::Structured;
const EXTENDED: ReplyStyle = ReplyStyle::Extended;

/// Answers to a read of 4096 bytes at 8192.
#[rustfmt::skip]
const LIES: &[Lie] = &[
    ("was not made", ReplyStyle::Simple, |seen| simple_reply(seen.request.cookie ^ 1 << 33, None).to_vec()),
    ("was not made", ReplyStyle::Simple, |seen| simple_reply(seen.request.cookie + 5, Some(NbdError::Io)).to_vec()),
    ("was not made", STRUCTURED, |seen| bytes(|out| put_done(seen.style, u64::MAX, 0, out))),
    ("garbage", ReplyStyle::Simple, |_| b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()),
    ("garbage", STRUCTURED, |_| vec![0; 1 << 20]),
    ("garbage", EXTENDED, |seen| simple_reply(seen.request.cookie, None).to_vec()),
    ("without all", STRUCTURED, |seen| simple_reply(seen.request.cookie, None).to_vec()),
    ("without all", STRUCTURED, |seen| bytes(|out| put_done(seen.style, seen.request.cookie, 0, out))),
    ("without all", EXTENDED, |seen| data(seen, 0, 4095, true)),
    ("without all", STRUCTURED, |seen| [data(seen, 1, 4095, false), bytes(|out| put_done(STRUCTURED, seen.request.cookie, 0, out))].concat()),
    ("outside", STRUCTURED, |seen| data(seen, 1, 4096, true)),
    ("outside", STRUCTURED, |seen| data(seen, -1, 4096, true)),
    ("outside", EXTENDED, |seen| data(seen, i64::MAX, 1, true)),
    ("outside", STRUCTURED, |seen| chunk(seen, ChunkType::OffsetData, 0, u64::from(u32::MAX), &8192_u64.to_be_bytes())),
    ("outside", EXTENDED, |seen| chunk(seen, ChunkType::OffsetData, 0, u64::MAX, &8192_u64.to_be_bytes())),
    ("outside", EXTENDED, |seen| chunk(seen, ChunkType::OffsetData, 0, 8, &8192_u64.to_be_bytes())),
    ("outside", STRUCTURED, |seen| bytes(|out| put_hole(seen.style, seen.request.cookie, 8192, 8192, u32::MAX, true, out))),
    ("twice", STRUCTURED, |seen| [data(seen, 0, 2048, false), data(seen, 2047, 2049, true)].concat()),
    ("twice", EXTENDED, |seen| [data(seen, 2048, 2048, false), data(seen, 0, 2049, true)].concat()),
    ("BlockStatus", STRUCTURED, |seen| chunk(seen, ChunkType::BlockStatus, REPLY_FLAG_DONE, 12, &[0; 12])),
    ("Unknown", EXTENDED, |seen| chunk(seen, ChunkType::Unknown(77), REPLY_FLAG_DONE, 0, b"")),
    ("None", STRUCTURED, |seen| chunk(seen, ChunkType::None, 0, 0, b"")),
    ("None", STRUCTURED, |seen| chunk(seen, ChunkType::None, REPLY_FLAG_DONE, 4, &[0; 4])),
    ("Error", EXTENDED, |seen| chunk(seen, ChunkType::Error, REPLY_FLAG_DONE, 1 << 40, &[0; 4096])),
    ("malformed", STRUCTURED, |seen| chunk(seen, ChunkType::Error, REPLY_FLAG_DONE, 6, &[0, 0, 0, 5, 0xff, 0xff])),
];

#[test]
fn lies_cost_the_connection_and_the_request_but_not_the_source() {
    for (n, (word, style, lie)) in LIES.iter().enumerate() {
        let lies = Arc::new(AtomicBool::new(true));
        let (lie, still) = (*lie, lies.clone());
        let server = Server::with_script(offer(*style), move |seen| {
            if seen.request.offset == 8192 && still.load(SeqCst) { Act::Send(lie(seen)) } else { Act::Well }
        });
        run(async {
            let disk = server.open(&NbdOptions { reconnect_timeout: Duration::from_millis(60), ..options() });
            write(&disk, 0, &[9; 512]).await.unwrap();
            let error = read(&disk, 8192, 4096).await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io);
            let text = error.to_string();
            assert!(text.contains(word) && !text.contains('\n'), "{n}: {text}");
            assert_eq!(read_in_the_end(&disk, 0, 512).await, [9; 512], "{n}: others are not harmed");
            lies.store(false, SeqCst);
            assert_eq!(read_in_the_end(&disk, 8192, 4096).await, [0; 4096], "{n}: nor later ones");
        });
    }
}

#[test]
fn garbled_replies_end_in_an_answer_or_an_error() {
    let seed = support::seed();
    for style in [ReplyStyle::Simple, STRUCTURED, EXTENDED] {
        let server = Server::with_script(offer(style), move |seen| {
            if seen.number % 3 == 0 { Act::Well } else { Act::Garble(seed + seen.number) }
        });
        run(async {
            let brief = Duration::from_millis(100);
            let disk = server.open(&NbdOptions {
                request_timeout: Some(brief),
                reconnect_timeout: brief,
                ..options()
            });
            for round in 0..12_u64 {
                let mut answered: Vec<bridge::LocalFuture<'_, Result<(), Error>>> = Vec::new();
                for n in 0..24 {
                    let at = (round * 24 + n) * 512;
                    answered.push(match n % 4 {
                        0 => disk.write(at, Buffer::copy_of(&[1; 512]), Flags::NONE),
                        1 => disk.write_zeroes(at, 512, Flags::NONE),
                        2 => Box::pin(async { disk.block_status(0, SIZE, Flags::NONE).await.map(drop) }),
                        _ => Box::pin(async {
                            disk.read(0, Buffer::new(200_000), Flags::NONE).await.map(drop)
                        }),
                    });
                }
                poll_all(&mut answered).await;
            }
            assert!(server.connections() > 1);
        });
    }
}

#[test]
fn an_answer_too_many() {
    let server = Server::with_script(offer(EXTENDED), |seen| match seen.number {
        0 => Act::Send([data(seen, 0, 512, true), data(seen, 0, 512, true)].concat()),
        _ => Act::Well,
    });
    run(async {
        let disk = server.open(&options());
        assert_eq!(read(&disk, 0, 512).await.unwrap(), [7; 512]);
        assert_eq!(read(&disk, 0, 512).await.unwrap(), [0; 512]);
        assert_eq!(server.connections(), 2);
    });
}

#[test]
fn lies_about_block_status() {
    let lies: &[fn(&Seen<'_>) -> Vec<u8>] = &[
        |seen| chunk(seen, ChunkType::BlockStatus, REPLY_FLAG_DONE, 4, &[0; 4]),
        |seen| chunk(seen, ChunkType::BlockStatus, REPLY_FLAG_DONE, 12, &[0; 12]),
        |seen| chunk(seen, ChunkType::BlockStatus, REPLY_FLAG_DONE, 13, &[0; 13]),
        |seen| {
            chunk(seen, ChunkType::BlockStatus, REPLY_FLAG_DONE, 12, &[0, 0, 0, 9, 0, 0, 2, 0, 0, 0, 0, 0])
        },
        |seen| chunk(seen, ChunkType::BlockStatus, REPLY_FLAG_DONE, 4 + 8 * (1 << 24), &[0; 4]),
        |seen| bytes(|out| put_done(seen.style, seen.request.cookie, 0, out)),
        |seen| data(seen, 0, 512, true),
    ];
    for (n, lie) in lies.iter().enumerate() {
        let lie = *lie;
        let server = Server::with_script(offer(STRUCTURED), move |seen| match seen.request.command {
            Command::BlockStatus => Act::Send(lie(seen)),
            _ => Act::Well,
        });
        run(async {
            let disk = server.open(&NbdOptions { reconnect_timeout: Duration::from_millis(60), ..options() });
            let error = disk.block_status(0, 4096, Flags::NONE).await.unwrap_err();
            assert!(error.to_string().contains("the server"), "{n}: {error}");
            assert_eq!(read_in_the_end(&disk, 0, 512).await, [0; 512]);
        });
    }
    // More than anybody wants to know is cut, not kept.
    let server = Server::with_script(Offer::new(1 << 40, EXTENDED), |seen| match seen.request.command {
        Command::BlockStatus => {
            let mut payload = [0_u32, 1 << 20].map(u32::to_be_bytes).concat();
            for n in 0..1_u64 << 20 {
                payload.extend_from_slice(&[512, n % 2 * 3].map(u64::to_be_bytes).concat());
            }
            Act::Send(chunk(seen, ChunkType::BlockStatusExt, REPLY_FLAG_DONE, payload.len() as u64, &payload))
        }
        _ => Act::Well,
    });
    run(async {
        let disk = server.open(&options());
        let extents = disk.block_status(0, 1 << 40, Flags::NONE).await.unwrap();
        assert_eq!(extents.len(), bridge::extent::MAX_EXTENTS);
        assert!(extents.iter().all(|extent| extent.len == 512));
    });
}

#[test]
fn errors_of_the_server_keep_their_kind_and_words() {
    let server = Server::with_script(offer(EXTENDED), |seen| {
        let errors = [NbdError::Perm, NbdError::NoSpc, NbdError::NotSup, NbdError::NoMem];
        let Seen { style, request, .. } = *seen;
        match usize::try_from(request.offset / 512).ok().and_then(|n| errors.get(n)) {
            Some(error) => Act::Send(bytes(|out| {
                put_error(style, request.cookie, request.offset, *error, "out of\nluck", out);
            })),
            None => Act::Well,
        }
    });
    run(async {
        let disk = server.open(&options());
        let kinds = [ErrorKind::ReadOnly, ErrorKind::NoSpace, ErrorKind::NotSupported, ErrorKind::NoMemory];
        for (n, kind) in (0..).zip(kinds) {
            let error = write(&disk, n * 512, &[1; 512]).await.unwrap_err();
            assert_eq!(error.kind(), kind);
            assert!(error.to_string().ends_with("out of luck"), "{error}");
        }
        write(&disk, 2048, &[1; 512]).await.unwrap();
        assert_eq!(server.connections(), 1, "an error is an answer");
    });
}

#[test]
fn requests_wait_for_a_server_that_comes_back() {
    let server = Server::new(offer(EXTENDED));
    run(async {
        let disk = server.open(&options());
        write(&disk, 4096, &[3; 512]).await.unwrap();
        server.go_away();
        let mut waiting: Vec<_> =
            (0..20).map(|n| disk.write(n * 512, Buffer::copy_of(&[4; 512]), Flags::NONE)).collect();
        let brief = Duration::from_millis(100);
        let early = tokio::time::timeout(brief, poll_all(&mut waiting)).await;
        assert!(early.is_err(), "there is nobody to answer");
        server.listen();
        poll_all(&mut waiting).await.into_iter().for_each(|result| result.unwrap());
        assert_eq!(read(&disk, 0, 20 * 512).await.unwrap(), [4; 20 * 512]);
    });
}

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

#[test]
fn a_server_that_stays_away_costs_errors_and_the_source_lives_on() {
    let server = Server::new(offer(STRUCTURED));
    run(async {
        let disk = server.open(&impatient());
        read(&disk, 0, 512).await.unwrap();
        server.go_away();
        let begun = Instant::now();
        let error = read(&disk, 0, 512).await.unwrap_err();
        assert!(begun.elapsed() >= Duration::from_millis(250), "{:?}", begun.elapsed());
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.to_string().contains("no connection"), "{error}");
        // Later ones have one attempt, which fails at once.
        tokio::time::sleep(Duration::from_millis(100)).await;
        for _ in 0..3 {
            assert_eq!(read(&disk, 0, 512).await.unwrap_err().kind(), ErrorKind::Io);
        }
        server.listen();
        let begun = Instant::now();
        while read(&disk, 0, 512).await.is_err() {
            assert!(begun.elapsed() < Duration::from_secs(10));
        }
    });
}

#[test]
fn no_patience_at_all() {
    let server =
        Server::with_script(
            offer(STRUCTURED),
            |seen| {
                if seen.number == 1 { Act::HangUpAfter } else { Act::Well }
            },
        );
    run(async {
        let disk = server.open(&NbdOptions { reconnect_timeout: Duration::ZERO, ..options() });
        read(&disk, 0, 512).await.unwrap();
        let error = read(&disk, 0, 512).await.unwrap_err();
        assert!(error.to_string().contains("closed the connection"), "{error}");
        read_in_the_end(&disk, 0, 512).await;
    });
}

#[test]
fn silence_on_a_living_connection_is_cut_short() {
    let server = Server::with_script(offer(EXTENDED), |seen| match seen.request.offset {
        // Never answered.
        4096 => Act::Silence,
        // Answered when asked again.
        8192 if seen.connection == 0 => Act::Silence,
        _ => Act::Well,
    });
    run(async {
        let patience = Duration::from_millis(200);
        let disk = server.open(&NbdOptions {
            request_timeout: Some(patience),
            reconnect_timeout: Duration::from_millis(1500),
            ..options()
        });
        let begun = Instant::now();
        read(&disk, 8192, 512).await.unwrap();
        assert!(begun.elapsed() >= patience);
        let (lost, kept) = tokio::join!(read(&disk, 4096, 512), async {
            for _ in 0..100 {
                read(&disk, 0, 512).await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        let error = lost.unwrap_err();
        assert!(error.to_string().contains("no answer for 200ms"), "{error}");
        let () = kept;
        read(&disk, 0, 512).await.unwrap();
    });
}

#[test]
fn a_server_that_is_shutting_down_is_asked_again_when_it_is_back() {
    let server = Server::with_script(offer(EXTENDED), |seen| {
        let Seen { style, request, .. } = *seen;
        match seen.connection {
            0 if seen.number > 0 => Act::Send(bytes(|out| {
                put_error(style, request.cookie, request.offset, NbdError::Shutdown, "", out);
            })),
            _ => Act::Well,
        }
    });
    run(async {
        let disk = server.open(&options());
        read(&disk, 0, 512).await.unwrap();
        write(&disk, 0, &[1; 512]).await.unwrap();
        assert_eq!(read(&disk, 0, 512).await.unwrap(), [1; 512]);
        assert_eq!(server.connections(), 2);
    });
}

#[test]
fn another_export_in_its_place_fails_the_source() {
    type Change = fn(&mut Offer);
    let changes: [(Change, &str); 4] = [
        (|offer| offer.size -= 512, "bytes now"),
        (|offer| offer.flags |= TransmissionFlags::READ_ONLY, "read-only now"),
        (|offer| offer.flags = offer.flags.without(TransmissionFlags::SEND_FUA), "SEND_FUA"),
        (|offer| offer.style = ReplyStyle::Simple, "base:allocation"),
    ];
    for (change, word) in changes {
        let server = Server::new(offer(EXTENDED));
        run(async {
            let disk = server.open(&options());
            read(&disk, 0, 512).await.unwrap();
            server.go_away();
            server.offer(change);
            server.listen();
            for _ in 0..2 {
                let error = read(&disk, 0, 512).await.unwrap_err();
                assert!(error.to_string().contains(word), "{error}");
            }
            assert_eq!(server.connections(), 2, "it is not asked again");
        });
    }
    // A larger one will do, as it was.
    let server = Server::new(offer(EXTENDED));
    run(async {
        let disk = server.open(&options());
        read(&disk, 0, 512).await.unwrap();
        server.go_away();
        server.offer(|offer| offer.size += 512);
        server.listen();
        read(&disk, 0, 512).await.unwrap();
        assert_eq!(disk.geometry().size, SIZE);
    });
}

#[test]
fn strict_makes_every_change_durable() {
    let loose = Arc::new(AtomicU64::new(0));
    let count = loose.clone();
    let server = Server::with_script(offer(STRUCTURED), move |seen| {
        let changes = matches!(seen.request.command, Command::Write | Command::WriteZeroes | Command::Trim);
        if changes && !seen.request.flags.contains(CommandFlags::FUA) {
            count.fetch_add(1, SeqCst);
        }
        Act::Well
    });
    let strict = NbdOptions { reconnect: Reconnect::Strict, ..options() };
    run(async {
        for (options, expected) in [(strict.clone(), 0), (options(), 3)] {
            let disk = server.open(&options);
            write(&disk, 0, &[1; 512]).await.unwrap();
            disk.trim(0, 512, Flags::NONE).await.unwrap();
            disk.write_zeroes(0, 512, Flags::NO_HOLE).await.unwrap();
            assert_eq!(loose.load(SeqCst), expected);
        }
    });
    server.offer(|offer| offer.flags = offer.flags.without(TransmissionFlags::SEND_FUA));
    let error = NbdBackend::open(&server.uri(), &strict).err().unwrap().to_string();
    assert!(error.contains("needs FUA"), "{error}");
    // Who changes nothing needs nothing.
    server.offer(|offer| offer.flags |= TransmissionFlags::READ_ONLY);
    NbdBackend::open(&server.uri(), &strict).unwrap();
}

#[test]
fn what_is_dropped_in_flight_leaves_the_stream_whole() {
    let server = Server::new(Offer::new(8 << 20, EXTENDED));
    let seed = support::seed();
    run(async {
        let disk = server.open(&options());
        let mut random = bridge::random::Random::new(seed);
        for round in 0..300_u64 {
            let len = usize::try_from(1 + random.below(300_000)).unwrap();
            let offset = random.below((8 << 20) - len as u64);
            let mut dropped = if round % 2 == 0 {
                disk.write(offset, Buffer::copy_of(&vec![0; len]), Flags::NONE)
            } else {
                Box::pin(async { disk.read(offset, Buffer::new(len), Flags::NONE).await.map(drop) })
            };
            // Not begun, queued, in part on the wire, or on its way back.
            for _ in 0..random.below(4) {
                let _ = poll_fn(|cx| Poll::Ready(dropped.as_mut().poll(cx))).await;
                tokio::task::yield_now().await;
            }
            drop(dropped);
            let place = random.below(8 << 20).min((8 << 20) - 512);
            read(&disk, place, 512).await.unwrap();
        }
        disk.flush().await.unwrap();
        assert_eq!(server.connections(), 1);
    });
}

#[test]
fn workers_have_connections_of_their_own_where_that_is_safe() {
    for (flags, most, expected) in
        [(MULTI_CONN, 16, 3), (MULTI_CONN, 2, 2), (MULTI_CONN, 1, 1), (ALL_FLAGS, 16, 1)]
    {
        let server = Server::new(Offer { flags, ..offer(EXTENDED) });
        let disk = Arc::new(server.open(&NbdOptions { connections: most, ..options() }));
        assert!(disk.geometry().capabilities.contains(Capabilities::MULTI_CONN));
        let workers = Workers::start(3).unwrap();
        run(async {
            for round in 0..40_u8 {
                for worker in 0..3 {
                    let disk = disk.clone();
                    let work = move || async move {
                        let at = u64::from(round) * 512;
                        write(&disk, at, &[round; 512]).await.unwrap();
                        disk.flush().await.unwrap();
                        assert_eq!(read(&disk, at, 512).await.unwrap(), [round; 512]);
                    };
                    workers.run(worker, work).await.expect("it went well");
                }
                if server.connections() < expected {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
            assert_eq!(server.connections(), expected);
            // A worker that ends takes its connections with it, and nothing else.
            drop(workers);
            assert_eq!(read(&disk, 512, 512).await.unwrap(), [1; 512]);
        });
    }
}

#[test]
fn a_second_connection_that_is_refused_is_done_without() {
    let server = Server::with_script(Offer { flags: MULTI_CONN, ..offer(EXTENDED) }, |seen| {
        if seen.connection > 0 { Act::HangUpAfter } else { Act::Well }
    });
    let disk = Arc::new(server.open(&options()));
    let workers = Workers::start(2).unwrap();
    run(async {
        for _ in 0..100 {
            for worker in 0..2 {
                let disk = disk.clone();
                let work = move || async move { read(&disk, 0, 512).await.map(drop) };
                workers.run(worker, work).await.unwrap().unwrap();
            }
        }
        assert!(server.connections() > 1);
    });
}

#[test]
fn no_more_requests_on_the_wire_than_allowed() {
    let seen = Arc::new(AtomicU64::new(0));
    let count = seen.clone();
    let server = Server::with_script(offer(EXTENDED), move |_| {
        count.fetch_add(1, SeqCst);
        Act::Silence
    });
    run(async {
        let disk = server.open(&NbdOptions { requests: 3, ..options() });
        let mut reads: Vec<_> = (0..10).map(|n| disk.read(n * 512, Buffer::new(512), Flags::NONE)).collect();
        let waited = tokio::time::timeout(Duration::from_millis(100), poll_all(&mut reads)).await;
        assert!(waited.is_err());
        assert_eq!(seen.load(SeqCst), 3);
    });
}

/// A server that says this to each client, then nothing, or hangs up.
fn odd_server(greeting: &'static [u8], hang_up: bool) -> (tempfile::TempDir, Uri) {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("sock")).unwrap();
    let uri = Uri::unix(&folder.path().join("sock"), "disk");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.write_all(greeting);
            if !hang_up {
                // Until the client leaves.
                let _ = stream.read_to_end(&mut Vec::new());
            }
        }
    });
    (folder, uri)
}

#[test]
fn servers_that_cannot_be_used_are_told_in_a_line() {
    let brief = NbdOptions { connect_timeout: Duration::from_millis(200), ..options() };
    for (greeting, hang_up, word) in [
        (&b""[..], true, "without a greeting"),
        (b"", false, "let 200ms pass"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n", false, "no NBD server"),
        (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53", false, "oldstyle"),
        (b"NBDMAGICIHAVEOPT\x00\x03", false, "let 200ms pass"),
        (b"NBDMAGICIHAVEOPT\x00\x00", true, "no export called \"disk\""),
        (b"NBDMAGICIHAVEOPT\x00\x02\xff\xff\xff\xff\xff\xff\xff\xff\x00\x01", false, "make no sense"),
    ] {
        let (_folder, uri) = odd_server(greeting, hang_up);
        let error = NbdBackend::open(&uri, &brief).err().unwrap().to_string();
        assert!(error.starts_with("nbd+unix:///disk?socket=") && error.contains(word), "{error}");
        assert_eq!(error.lines().count(), 1);
    }
    let nobody: Uri = "nbd+unix:///?socket=/nonexistent/socket".parse().unwrap();
    let error = NbdBackend::open(&nobody, &brief).err().unwrap().to_string();
    assert!(error.contains("cannot connect: No such file"), "{error}");
    let nobody: Uri = "nbd://127.0.0.1:1/".parse().unwrap();
    let error = NbdBackend::open(&nobody, &brief).err().unwrap().to_string();
    assert!(error.contains("cannot connect to 127.0.0.1:1: Connection refused"), "{error}");
}
