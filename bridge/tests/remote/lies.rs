//! Replies that break the protocol, and errors that keep to it.

use super::*;

/// Bytes that break the protocol, one way each, and a word of the complaint.
type Lie = (&'static str, ReplyStyle, fn(&Seen<'_>) -> Vec<u8>);

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
