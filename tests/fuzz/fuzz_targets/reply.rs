//! A stream of replies, as a client receives it: no panic, and decoding is stable.
//!
//! Input: one byte that chooses the style, then the stream. Style 3 stands for replies to options.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nbd_proto::{ChunkBody, OptionReply, Reply, ReplyStyle};

const MAX_PAYLOAD: u32 = 1 << 16;

fuzz_target!(|data: &[u8]| {
    let Some((choice, mut stream)) = data.split_first() else {
        return;
    };
    let style = match choice % 4 {
        0 => ReplyStyle::Simple,
        1 => ReplyStyle::Structured,
        2 => ReplyStyle::Extended,
        _ => return options(stream),
    };
    while let Ok(Some((reply, used))) = Reply::parse(stream, style, MAX_PAYLOAD) {
        let mut again = Vec::new();
        reply.encode(style, &mut again);
        // Later fields of an error chunk are dropped, so the bytes may differ; their meaning may not.
        assert_eq!(Reply::parse(&again, style, MAX_PAYLOAD), Ok(Some((reply, again.len()))));
        assert!(again.len() <= used);
        if let Reply::Chunk { body: ChunkBody::BlockStatus { extents, .. }, .. } = reply {
            assert!(extents.len() > 0);
            assert_eq!(extents.iter().count(), extents.len());
            assert!(extents.iter().all(|(length, _)| length > 0));
        }
        stream = &stream[used..];
    }
});

fn options(mut stream: &[u8]) {
    while let Ok(Some((reply, used))) = OptionReply::parse(stream, MAX_PAYLOAD) {
        assert_eq!(reply.data.len() + 20, used);
        stream = &stream[used..];
    }
}
