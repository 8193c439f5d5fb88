use proptest::prelude::*;

use super::*;
use crate::consts::MAX_NAME_BYTES;
use crate::parse::{ChunkBody, Reply, ReplyHeader};
use crate::testing::quick;
use crate::{BadMagic, BadReply};

const COOKIE: u64 = 0x0102_0304_0506_0708;
const STYLES: [ReplyStyle; 3] = [ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended];

/// A message in hexadecimal; blanks are for the reader.
fn hex(text: &str) -> Vec<u8> {
    let digits: String = text.split_whitespace().collect();
    (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap()).collect()
}

fn put(encode: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    // What is in the buffer already must not matter.
    let mut out = b"before".to_vec();
    encode(&mut out);
    out.split_off(6)
}

fn only(bytes: &[u8], style: ReplyStyle) -> Reply<'_> {
    let (reply, used) = Reply::parse(bytes, style, 1 << 20).unwrap().unwrap();
    assert_eq!(used, bytes.len());
    reply
}

#[test]
fn messages_as_the_document_lays_them_out() {
    use ReplyStyle::{Extended, Simple, Structured};
    let rows: [(&str, Vec<u8>, &str); 15] = [
        (
            "done, simple",
            put(|out| put_done(Simple, COOKIE, 4096, out)),
            "67446698 00000000 0102030405060708",
        ),
        (
            "done, structured",
            put(|out| put_done(Structured, COOKIE, 4096, out)),
            "67446698 00000000 0102030405060708",
        ),
        (
            "an empty read, structured",
            put(|out| put_data_header(Structured, COOKIE, 4096, 4096, 0, true, out)),
            "668e33ef 0001 0000 0102030405060708 00000000",
        ),
        (
            "done, extended",
            put(|out| put_done(Extended, COOKIE, 4096, out)),
            "6e8a278c 0001 0000 0102030405060708 0000000000001000 0000000000000000",
        ),
        (
            "error, simple",
            put(|out| put_error(Simple, COOKIE, 4096, NbdError::NoSpc, "full", out)),
            "67446698 0000001c 0102030405060708",
        ),
        (
            "error, structured",
            put(|out| put_error(Structured, COOKIE, 4096, NbdError::NoSpc, "full", out)),
            "668e33ef 0001 8001 0102030405060708 0000000a 0000001c 0004 66756c6c",
        ),
        (
            "error, extended",
            put(|out| put_error(Extended, COOKIE, 4096, NbdError::Shutdown, "", out)),
            "6e8a278c 0001 8001 0102030405060708 0000000000001000 0000000000000006 0000006c 0000",
        ),
        (
            "data, simple",
            put(|out| put_data_header(Simple, COOKIE, 4096, 4096, 512, true, out)),
            "67446698 00000000 0102030405060708",
        ),
        (
            "data, structured",
            put(|out| put_data_header(Structured, COOKIE, 4096, 8192, 512, false, out)),
            "668e33ef 0000 0001 0102030405060708 00000208 0000000000002000",
        ),
        (
            "data, extended",
            put(|out| put_data_header(Extended, COOKIE, 4096, 8192, u32::MAX, true, out)),
            "6e8a278c 0001 0001 0102030405060708 0000000000001000 0000000100000007 0000000000002000",
        ),
        (
            "hole, simple",
            put(|out| put_hole(Simple, COOKIE, 4096, 4096, 512, true, out)),
            "67446698 00000000 0102030405060708",
        ),
        (
            "hole, structured",
            put(|out| put_hole(Structured, COOKIE, 4096, 8192, 512, true, out)),
            "668e33ef 0001 0002 0102030405060708 0000000c 0000000000002000 00000200",
        ),
        (
            "block status, simple: there is no such thing",
            put(|out| put_block_status(Simple, COOKIE, 4096, 7, &[(512, 3)], true, out)),
            "67446698 00000016 0102030405060708",
        ),
        (
            "block status, structured",
            put(|out| put_block_status(Structured, COOKIE, 4096, 7, &[(512, 3), (1024, 0)], false, out)),
            "668e33ef 0000 0005 0102030405060708 00000014 00000007 00000200 00000003 00000400 00000000",
        ),
        (
            "block status, extended",
            put(|out| put_block_status(Extended, COOKIE, 4096, 7, &[(1 << 40, 3)], true, out)),
            "6e8a278c 0001 0006 0102030405060708 0000000000001000 0000000000000018 00000007 00000001 \
             0000010000000000 0000000000000003",
        ),
    ];
    for (name, bytes, expected) in rows {
        assert_eq!(bytes, hex(expected), "{name}");
    }
}

#[test]
fn no_chunk_is_empty() {
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        let done = put(|out| put_data_header(style, COOKIE, 4096, 4096, 0, true, out));
        assert!(matches!(only(&done, style), Reply::Chunk { body: ChunkBody::None, .. }));
        assert_eq!(put(|out| put_hole(style, COOKIE, 4096, 4096, 0, true, out)), done);
        assert_eq!(put(|out| put_data_header(style, COOKIE, 4096, 4096, 0, false, out)), b"");
        assert_eq!(put(|out| put_hole(style, COOKIE, 4096, 4096, 0, false, out)), b"");
        let with_empty = put(|out| put_block_status(style, COOKIE, 0, 0, &[(0, 1), (512, 2)], true, out));
        assert_eq!(with_empty, put(|out| put_block_status(style, COOKIE, 0, 0, &[(512, 2)], true, out)));
    }
}

fn extents(bytes: &[u8], style: ReplyStyle) -> Vec<(u64, u64)> {
    match only(bytes, style) {
        Reply::Chunk { body: ChunkBody::BlockStatus { extents, .. }, .. } => extents.iter().collect(),
        other => panic!("no block status: {other:?}"),
    }
}

/// CVE-2025-47711 and CVE-2025-47712 (nbdkit): extents at and beyond 4 GiB.
#[test]
fn a_long_extent_is_cut_and_ends_a_narrow_chunk() {
    let four_gib = 1_u64 << 32;
    for length in [four_gib, four_gib + 1, u64::MAX] {
        let all = [(512, 1), (length, 2), (512, 3)];
        let narrow = put(|out| put_block_status(ReplyStyle::Structured, COOKIE, 0, 0, &all, true, out));
        assert_eq!(extents(&narrow, ReplyStyle::Structured), [(512, 1), (0xffff_0000, 2)]);
        let wide = put(|out| put_block_status(ReplyStyle::Extended, COOKIE, 0, 0, &all, true, out));
        assert_eq!(extents(&wide, ReplyStyle::Extended), [(512, 1), (length, 2), (512, 3)]);
    }
    let fits = [(four_gib - 1, 2), (512, 3)];
    let narrow = put(|out| put_block_status(ReplyStyle::Structured, COOKIE, 0, 0, &fits, true, out));
    assert_eq!(extents(&narrow, ReplyStyle::Structured), [(four_gib - 1, 2), (512, 3)]);
}

#[test]
fn a_chunk_has_at_most_a_million_extents() {
    let many = vec![(512, 1); MAX_EXTENTS + 1];
    for (style, prefix, width) in [(ReplyStyle::Structured, 4, 8), (ReplyStyle::Extended, 8, 16)] {
        let bytes = put(|out| put_block_status(style, COOKIE, 0, 0, &many, true, out));
        let header = ChunkHeader::parse(&bytes, style).unwrap().unwrap();
        assert_eq!(header.length, prefix + width * (1 << 20));
    }
}

/// CVE-2020-10761 (qemu): a text with a 4096-byte name in it is over-long.
#[test]
fn error_texts_are_bounded() {
    let text = format!("x{}", "é".repeat(4096));
    let bytes = put(|out| put_error(ReplyStyle::Structured, COOKIE, 0, NbdError::Io, &text, out));
    match only(&bytes, ReplyStyle::Structured) {
        Reply::Chunk { body: ChunkBody::Error { error: NbdError::Io, message }, .. } => {
            assert_eq!(message.len(), MAX_NAME_BYTES - 1);
            assert!(text.starts_with(message));
        }
        other => panic!("no error: {other:?}"),
    }
}

#[test]
fn malformed_replies_are_refused() {
    use ReplyStyle::{Extended, Structured};
    let malformed = |kind| Err(BadReply::Malformed { kind });
    let rows = [
        (Structured, "668e33ef 0000 0000 0102030405060708 00000000", malformed(0)),
        (Structured, "668e33ef 0001 0000 0102030405060708 00000001 00", malformed(0)),
        (Structured, "668e33ef 0001 0001 0102030405060708 00000008 0000000000000000", malformed(1)),
        (Structured, "668e33ef 0001 0002 0102030405060708 0000000c 0000000000000000 00000000", malformed(2)),
        (Structured, "668e33ef 0001 0005 0102030405060708 00000004 00000000", malformed(5)),
        (Structured, "668e33ef 0001 0005 0102030405060708 0000000c 00000000 00000000 00000000", malformed(5)),
        (Structured, "668e33ef 0001 8001 0102030405060708 00000006 00000000 0000", malformed(0x8001)),
        (Structured, "668e33ef 0001 8001 0102030405060708 00000006 00000005 0001", malformed(0x8001)),
        (Structured, "668e33ef 0001 8002 0102030405060708 00000006 00000005 0000", malformed(0x8002)),
        (
            Extended,
            "6e8a278c 0001 0006 0102030405060708 0000000000000000 0000000000000018 00000000 00000002 \
             0000000000000200 0000000000000000",
            malformed(6),
        ),
        (Extended, "67446698 00000000 0102030405060708", Err(BadMagic { found: 0x6744_6698 }.into())),
        (Structured, "6e8a278c", Err(BadMagic { found: 0x6e8a_278c }.into())),
        (
            Extended,
            "6e8a278c 0001 0001 0102030405060708 0000000000000000 ffffffffffffffff",
            Err(BadReply::TooLong { length: u64::MAX, max: 4096 + 14 }),
        ),
        (
            Structured,
            "668e33ef 0001 0001 0102030405060708 ffffffff",
            Err(BadReply::TooLong { length: 0xffff_ffff, max: 4096 + 14 }),
        ),
    ];
    for (style, bytes, expected) in rows {
        assert_eq!(Reply::parse(&hex(bytes), style, 512), expected, "{bytes}");
    }
}

#[test]
fn simple_replies_are_legal_beside_structured_ones() {
    let bytes = simple_reply(COOKIE, Some(NbdError::Perm));
    for style in [ReplyStyle::Simple, ReplyStyle::Structured] {
        let expected = ReplyHeader::Simple { cookie: COOKIE, error: Some(NbdError::Perm) };
        assert_eq!(ReplyHeader::parse(&bytes, style), Ok(Some((expected, 16))));
        assert!(only(&bytes, style).done());
    }
}

proptest! {
    #![proptest_config(quick(0x5eed_0002))]

    /// Every encoder's output is parsed again, cut anywhere it is incomplete, and encodes to the same bytes.
    #[test]
    fn replies_survive_decoding(
        which in 0..5,
        style in 0..3_usize,
        cookie: u64,
        offset: u64,
        done: bool,
        error in prop::sample::select(vec![1_u32, 5, 12, 22, 28, 75, 95, 108]),
        message in "\\PC{0,40}",
        data in prop::collection::vec(any::<u8>(), 1..64),
        list in prop::collection::vec((1_u64..=0xffff_ffff, any::<u32>()), 1..8),
    ) {
        let style = STYLES[style];
        let error = NbdError::from_wire(error).unwrap();
        let mut bytes = Vec::new();
        match which {
            0 => put_done(style, cookie, offset, &mut bytes),
            1 => put_error(style, cookie, offset, error, &message, &mut bytes),
            2 => {
                let length = u32::try_from(data.len()).unwrap();
                put_data_header(style, cookie, offset, offset, length, done, &mut bytes);
                if style != ReplyStyle::Simple {
                    bytes.extend_from_slice(&data);
                }
            }
            3 => put_hole(style, cookie, offset, offset, 512, done, &mut bytes),
            _ => put_block_status(style, cookie, offset, 3, &list, done, &mut bytes),
        }
        let reply = only(&bytes, style);
        prop_assert_eq!(reply.cookie(), cookie);
        let mut again = Vec::new();
        reply.encode(style, &mut again);
        prop_assert_eq!(&again, &bytes);
        for cut in 0..bytes.len() {
            prop_assert_eq!(Reply::parse(&bytes[..cut], style, 1 << 20), Ok(None));
        }
        if let Reply::Chunk { body: ChunkBody::BlockStatus { extents, .. }, .. } = reply {
            let decoded: Vec<_> = extents.iter().map(|(l, f)| (l, u32::try_from(f).unwrap())).collect();
            prop_assert_eq!(decoded, list);
        }
    }

    #[test]
    fn chunk_headers_survive_decoding(flags: u16, kind: u16, cookie: u64, offset: u64, length: u64, wide: bool) {
        let style = if wide { ReplyStyle::Extended } else { ReplyStyle::Structured };
        let (offset, length) = if wide { (offset, length) } else { (0, length & 0xffff_ffff) };
        let header = ChunkHeader { flags, kind: ChunkType::from_wire(kind), cookie, offset, length };
        let mut fixed = [0; 40];
        let written = header.write(style, &mut fixed);
        prop_assert_eq!(written, ChunkHeader::len(style));
        let mut appended = Vec::new();
        header.put(style, &mut appended);
        prop_assert_eq!(&fixed[..written], &appended[..]);
        prop_assert_eq!(ChunkHeader::parse(&fixed, style), Ok(Some(header)));
        prop_assert_eq!(ChunkType::from_wire(kind).wire(), kind);
    }

    /// Whatever comes, decoding is stable: what is decoded encodes to bytes that decode to the same.
    #[test]
    fn arbitrary_bytes_decode_stably(style in 0..3_usize, kind in 0..8_u16, bytes: Vec<u8>) {
        let style = STYLES[style];
        let _ = Reply::parse(&bytes, style, 1 << 16);
        if style == ReplyStyle::Simple {
            return Ok(());
        }
        let kind = ChunkType::from_wire(if kind < 7 { kind } else { 0x8001 });
        let length = u64::try_from(bytes.len()).unwrap();
        let mut message = Vec::new();
        ChunkHeader { flags: 1, kind, cookie: 1, offset: 0, length }.put(style, &mut message);
        message.extend_from_slice(&bytes);
        if let Ok(Some((reply, _))) = Reply::parse(&message, style, 1 << 16) {
            let mut again = Vec::new();
            reply.encode(style, &mut again);
            prop_assert_eq!(only(&again, style), reply);
        }
    }
}
