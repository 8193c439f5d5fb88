//! The handshake, option by option: what is answered, what is refused, what closes the connection, and that after
//! a refusal the negotiation goes on in step.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};

use nbd_proto::{NbdError, OptReply, OptionCode, ReplyStyle, TransmissionFlags, put_option};
use support::{NO_FLAGS, Negotiation, STYLES, Server, go_data, meta_data};

/// Several exports, none of them called "".
fn several() -> Server {
    let description = "a disk for the tests";
    Server::serve(&[
        "mem:1M",
        "-x",
        "one",
        "-D",
        description,
        "--export",
        "two=null:2M",
        "--export",
        "drei/ü=mem:3M",
    ])
}

/// Proof that the negotiation is in step.
fn assert_goes_on(mut negotiation: Negotiation) {
    assert_eq!(negotiation.verdict(OptionCode::List, b""), OptReply::Ack);
    let mut client = negotiation.enter(ReplyStyle::Structured, "one");
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn list_names_every_export() {
    let server = several();
    let mut negotiation = server.negotiate();
    let replies = negotiation.option(OptionCode::List, b"");
    let listed: Vec<(String, String)> = replies[..3]
        .iter()
        .map(|(kind, data)| {
            assert_eq!(*kind, OptReply::Server);
            let length = usize::try_from(u32::from_be_bytes(data[..4].try_into().unwrap())).unwrap();
            let (name, description) = data[4..].split_at(length);
            (String::from_utf8(name.to_vec()).unwrap(), String::from_utf8(description.to_vec()).unwrap())
        })
        .collect();
    let expected = [("one", "a disk for the tests"), ("two", ""), ("drei/ü", "")];
    assert_eq!(listed, expected.map(|(name, words)| (name.to_owned(), words.to_owned())));
    assert_eq!(replies[3], (OptReply::Ack, Vec::new()));
    assert_goes_on(negotiation);
}

#[test]
fn info_and_go_agree() {
    let server = several();
    for (name, size) in [("one", 1 << 20), ("two", 2 << 20), ("drei/ü", 3 << 20)] {
        for style in STYLES {
            let mut negotiation = server.negotiate();
            negotiation.settle(style);
            // Unknown requests are ignored.
            let ask = go_data(name, &[1, 2, 3, 999, 0xffff]);
            let info = negotiation.option(OptionCode::Info, &ask);
            let go = negotiation.option(OptionCode::Go, &ask);
            assert_eq!(info, go, "{name}");
            let of = |kind: u16| {
                let replies = info.iter().filter(move |(_, data)| data.starts_with(&kind.to_be_bytes()));
                replies.map(|(_, data)| &data[2..]).collect::<Vec<_>>()
            };
            let export = of(0);
            assert_eq!((export.len(), &export[0][..8]), (1, &u64::to_be_bytes(size)[..]));
            let flags = TransmissionFlags(u16::from_be_bytes(export[0][8..].try_into().unwrap()));
            assert!(flags.contains(TransmissionFlags::HAS_FLAGS));
            assert_eq!(flags.contains(TransmissionFlags::SEND_DF), style != ReplyStyle::Simple);
            assert_eq!(of(1), [name.as_bytes()]);
            let description: &[&[u8]] = if name == "one" { &[b"a disk for the tests"] } else { &[] };
            assert_eq!(of(2), description);
            let blocks = of(3);
            let sizes: Vec<u32> =
                blocks[0].chunks(4).map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap())).collect();
            assert!(sizes[0].is_power_of_two() && sizes[1].is_power_of_two() && sizes[0] <= sizes[1]);
            assert!(sizes[2] >= 32 << 20);
        }
    }
}

#[test]
fn flags_and_read_only() {
    let server = Server::serve(&["mem:1M", "-r"]);
    for style in STYLES {
        let client = server.client(style);
        assert!(client.flags.contains(TransmissionFlags::READ_ONLY), "{style:?}");
    }
    let server = Server::serve(&["mem:1M"]);
    let writing = TransmissionFlags::SEND_FLUSH
        | TransmissionFlags::SEND_FUA
        | TransmissionFlags::SEND_TRIM
        | TransmissionFlags::SEND_WRITE_ZEROES;
    for style in STYLES {
        let client = server.client(style);
        assert!(client.flags.contains(writing), "{:?}", client.flags);
        assert!(!client.flags.contains(TransmissionFlags::READ_ONLY));
    }
}

#[test]
fn unknown_names_are_told_and_the_client_may_try_again() {
    let server = several();
    let mut negotiation = server.negotiate();
    for name in ["", "One", "one ", "thr", &"x".repeat(4096), &"ü".repeat(2048)] {
        for option in [OptionCode::Info, OptionCode::Go] {
            let replies = negotiation.option(option, &go_data(name, &[3]));
            assert_eq!(replies.len(), 1);
            assert_eq!(replies[0].0, OptReply::ErrUnknown, "{} bytes", name.len());
        }
    }
    assert_goes_on(negotiation);
}

#[test]
fn names_that_are_none() {
    let server = several();
    let mut negotiation = server.negotiate();
    let bad: [Vec<u8>; 7] = [
        b"".to_vec(),
        b"\0\0\0".to_vec(),
        go_data(&"x".repeat(4097), &[]),
        go_data("on\0e", &[]),
        [&3_u32.to_be_bytes()[..], b"\xff\xfe\xfd\0\0"].concat(),
        [go_data("one", &[]), vec![0]].concat(),
        [&go_data("one", &[])[..7], &[0, 2, 0, 3]].concat(),
    ];
    for data in bad {
        for option in [OptionCode::Info, OptionCode::Go] {
            assert_eq!(negotiation.verdict(option, &data), OptReply::ErrInvalid, "{data:?}");
        }
    }
    assert_goes_on(negotiation);
}

#[test]
fn export_name_pads_unless_told_not_to() {
    let server = several();
    for (flags, padding) in [(1, 124), (3, 0), (0, 124), (2, 0)] {
        let mut negotiation = Negotiation::begin_with(server.stream(), flags);
        negotiation.send(OptionCode::ExportName, b"two");
        let mut answer = vec![0xee; 10 + padding];
        negotiation.stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..8], (2_u64 << 20).to_be_bytes());
        assert!(answer[10..].iter().all(|byte| *byte == 0));
        // A read follows at once, which tells whether there is more padding than that.
        let mut request = Vec::new();
        let read = nbd_proto::Request {
            flags: NO_FLAGS,
            command: nbd_proto::Command::Read,
            cookie: 1,
            offset: 0,
            length: 512,
        };
        read.encode(false, &mut request);
        negotiation.stream.write_all(&request).unwrap();
        let mut reply = [0; 16];
        negotiation.stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], [0x67, 0x44, 0x66, 0x98]);
    }
    for name in ["", "three", &"x".repeat(4096)] {
        let mut negotiation = server.negotiate();
        negotiation.send(OptionCode::ExportName, name.as_bytes());
        assert!(negotiation.reply().is_none(), "an unknown name closes, and says nothing");
    }
    // With one export only, the empty name is the default.
    let single = Server::serve(&["mem:1M", "-x", "one"]);
    assert_eq!(single.negotiate().export_name("").size, 1 << 20);
}

#[test]
fn unknown_client_flags_close() {
    let server = several();
    for flags in [4, 7, 1 << 31, u32::MAX] {
        let mut negotiation = Negotiation::begin_with(server.stream(), flags);
        let mut bytes = Vec::new();
        put_option(OptionCode::List, b"", &mut bytes);
        let _ = negotiation.stream.write_all(&bytes);
        assert!(negotiation.reply().is_none(), "{flags:#x}");
    }
}

#[test]
fn unknown_options_are_skipped_exactly() {
    let server = several();
    let mut negotiation = server.negotiate();
    for code in [0, 4, 12, 99, 0x7fff_ffff, u32::MAX] {
        for length in [0, 1, 16, 5000, 300_000] {
            let option = OptionCode::from_wire(code);
            assert_eq!(
                negotiation.verdict(option, &vec![0x49; length]),
                OptReply::ErrUnsup,
                "{code} {length}"
            );
        }
    }
    assert_goes_on(negotiation);
}

#[test]
fn options_without_data_refuse_some() {
    let server = several();
    let mut negotiation = server.negotiate();
    for option in
        [OptionCode::List, OptionCode::StartTls, OptionCode::StructuredReply, OptionCode::ExtendedHeaders]
    {
        for length in [1, 100, 100_000] {
            assert_eq!(negotiation.verdict(option, &vec![0; length]), OptReply::ErrInvalid, "{option:?}");
        }
    }
    assert_goes_on(negotiation);
}

#[test]
fn starttls_without_tls_is_refused_and_the_client_goes_on() {
    let server = several();
    let mut negotiation = server.negotiate();
    for _ in 0..2 {
        let verdict = negotiation.verdict(OptionCode::StartTls, b"");
        assert!(matches!(verdict, OptReply::ErrPolicy | OptReply::ErrUnsup), "{verdict:?}");
    }
    assert_goes_on(negotiation);
}

#[test]
fn abort_is_acknowledged_whatever_its_data() {
    let server = several();
    for length in [0, 10, 1 << 20] {
        let mut negotiation = server.negotiate();
        assert_eq!(negotiation.verdict(OptionCode::Abort, &vec![1; length]), OptReply::Ack);
        assert!(negotiation.reply().is_none(), "{length}: closed after it");
    }
}

#[test]
fn metadata_contexts() {
    let server = several();
    let mut negotiation = server.negotiate();
    let (list, set) = (OptionCode::ListMetaContext, OptionCode::SetMetaContext);
    for option in [list, set] {
        let data = meta_data("one", &["base:allocation"]);
        assert_eq!(negotiation.verdict(option, &data), OptReply::ErrInvalid, "before structured replies");
    }
    negotiation.settle(ReplyStyle::Structured);
    let cases: [(&[&str], usize, usize); 6] = [
        (&[], 1, 0),
        (&["base:"], 1, 0),
        (&["base:allocation"], 1, 1),
        (&["qemu:dirty-bitmap:x", "nowhere:", "base:allocatio", "", ":"], 0, 0),
        (&["qemu:allocation-depth", "base:allocation", "base:allocation"], 1, 1),
        (&["base"], 0, 0),
    ];
    for (queries, lists, sets) in cases {
        for (option, count) in [(list, lists), (set, sets)] {
            let replies = negotiation.option(option, &meta_data("one", queries));
            assert_eq!(replies.len(), count + 1, "{option:?} {queries:?}: {replies:?}");
            assert_eq!(replies[count].0, OptReply::Ack);
            for (kind, data) in &replies[..count] {
                assert_eq!((*kind, &data[4..]), (OptReply::MetaContext, &b"base:allocation"[..]));
            }
        }
    }
    for option in [list, set] {
        assert_eq!(negotiation.verdict(option, &meta_data("nobody", &[])), OptReply::ErrUnknown);
        let cut = &meta_data("one", &["base:allocation"])[..15];
        assert_eq!(negotiation.verdict(option, cut), OptReply::ErrInvalid);
    }
    assert_eq!(negotiation.verdict(OptionCode::StructuredReply, b""), OptReply::ErrInvalid, "a second one");
    negotiation.select_allocation("one");
    assert_eq!(negotiation.go(ReplyStyle::Structured, "one").read(0, 512), [0; 512]);
}

/// Something that a client does after its selection.
type Deed = &'static dyn Fn(&mut Negotiation);

/// The ways in which a selection that was made does not hold.
#[test]
fn contexts_that_are_void() {
    let server = several();
    let forget: [(&str, Deed); 4] = [
        ("two", &|_| {}),
        ("one", &|n| drop(n.option(OptionCode::SetMetaContext, &meta_data("one", &[])))),
        ("one", &|n| drop(n.option(OptionCode::SetMetaContext, &meta_data("nobody", &["base:allocation"])))),
        ("one", &|n| drop(n.option(OptionCode::SetMetaContext, b"junk"))),
    ];
    for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
        for (n, (name, forget)) in forget.iter().enumerate() {
            let mut negotiation = server.negotiate();
            negotiation.settle(style);
            negotiation.select_allocation("one");
            forget(&mut negotiation);
            let mut client = negotiation.go(style, name);
            let answer = client.call(nbd_proto::Command::BlockStatus, NO_FLAGS, 0, 4096);
            assert_eq!(answer.error, Some(NbdError::Inval), "{style:?}, case {n}");
            assert_eq!(client.read(0, 512).len(), 512);
        }
        // INFO of another export changes nothing.
        let mut negotiation = server.negotiate();
        negotiation.settle(style);
        negotiation.select_allocation("one");
        assert_eq!(negotiation.verdict(OptionCode::Info, &go_data("two", &[])), OptReply::Ack);
        let mut client = negotiation.go(style, "one");
        let answer = client.call(nbd_proto::Command::BlockStatus, NO_FLAGS, 0, 4096);
        assert_eq!(answer.error, None, "{style:?}");
    }
}

#[test]
fn extended_headers_exclude_the_older_ways() {
    let server = several();
    let mut negotiation = server.negotiate();
    assert!(negotiation.settle(ReplyStyle::Extended));
    for option in [OptionCode::StructuredReply, OptionCode::ExtendedHeaders] {
        assert!(negotiation.verdict(option, b"").is_error(), "{option:?}");
    }
    negotiation.send(OptionCode::ExportName, b"one");
    assert!(negotiation.reply().is_none(), "EXPORT_NAME cannot follow extended headers");
    // The other order is legal: extended headers replace structured replies.
    let mut negotiation = server.negotiate();
    negotiation.settle(ReplyStyle::Structured);
    let mut client = negotiation.enter(ReplyStyle::Extended, "one");
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn a_handshake_in_any_cut() {
    let server = several();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    put_option(OptionCode::from_wire(50), b"whatever", &mut bytes);
    put_option(OptionCode::StructuredReply, b"", &mut bytes);
    put_option(OptionCode::SetMetaContext, &meta_data("one", &["base:allocation"]), &mut bytes);
    put_option(OptionCode::Go, &go_data("one", &[3]), &mut bytes);
    for cut in [1, 7, 16, bytes.len()] {
        let mut stream = server.stream();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        bytes.chunks(cut).for_each(|piece| stream.write_all(piece).unwrap());
        // Error, ACK, context and ACK, at least one information and ACK; then the client is in.
        let mut request = Vec::new();
        let read = nbd_proto::Request {
            flags: NO_FLAGS,
            command: nbd_proto::Command::Read,
            cookie: 0x7777_7777_7777_7777,
            offset: 0,
            length: 16,
        };
        read.encode(false, &mut request);
        stream.write_all(&request).unwrap();
        let mut got = Vec::new();
        while !got.windows(8).any(|window| window == [0x77; 8]) {
            let mut buf = [0; 512];
            let count = stream.read(&mut buf).unwrap();
            assert!(count > 0, "closed, cut into {cut}");
            got.extend_from_slice(&buf[..count]);
        }
    }
}
