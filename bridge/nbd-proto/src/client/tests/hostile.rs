//! Servers that are none, hang up, break the rules, or talk without end.

use super::*;
use crate::consts::OPTION_REPLY_MAGIC;
use crate::error::{BadMagic, BadReply};
use ReplyStyle::{Simple, Structured};

fn malformed(option: OptionCode, what: &'static str) -> Ending {
    Err(ClientError::Malformed { option, what })
}

#[test]
fn peers_that_are_no_server() {
    let number = |bytes: &[u8; 8]| ClientError::NotNbd(u64::from_be_bytes(*bytes));
    let oldstyle = [&b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"[..], &SIZE.to_be_bytes()].concat();
    let rows = [
        (b"SSH-2.0-OpenSSH".to_vec(), number(b"SSH-2.0-")),
        (b"NBDMAGIC12345678".to_vec(), number(b"12345678")),
        (oldstyle, ClientError::Oldstyle),
    ];
    for (bytes, error) in rows {
        for feed in [Feed::Whole, Feed::Pieces(1)] {
            let (sent, ending, _) = play(&wants(Simple), &bytes, feed);
            assert_eq!((sent, ending), (vec![], Err(error.clone())));
        }
    }
}

#[test]
fn hanging_up() {
    let play = |server: &[u8]| {
        let mut handshake = ClientHandshake::new(wants(Simple));
        handshake.advance(server, &mut Vec::new()).unwrap();
        handshake.hung_up()
    };
    let old = b"NBDMAGICIHAVEOPT\0\0";
    let unknown = ClientError::UnknownExport { name: "disk".to_owned(), message: String::new() };
    assert_eq!(play(b""), ClientError::HungUp("without a greeting"));
    assert_eq!(play(b"NBD"), ClientError::HungUp("in its greeting"));
    assert_eq!(play(&greeting()), ClientError::HungUp("during the handshake"));
    assert_eq!(play(old), unknown);
    assert_eq!(play(&[&old[..], b"x"].concat()), ClientError::HungUp("during the handshake"));
    assert_eq!(play(&[&greeting()[..], &info_export(GO), &ack(GO)].concat()), ClientError::Finished);
}

#[test]
fn frames() {
    let frame = |bytes: Vec<u8>, error: BadReply| {
        check(
            "frame",
            &wants(Simple),
            &[greeting(), bytes],
            &[client_flags(), ask(GO, "disk")],
            &Err(error.into()),
        );
    };
    frame(reply(GO, 1, &[0; 20])[8..].to_vec(), BadMagic { found: 0x0000_0007_0000_0001 }.into());
    let header = |length: u32| {
        [&OPTION_REPLY_MAGIC.to_be_bytes()[..], &GO.to_be_bytes(), &[0, 0, 0, 3], &length.to_be_bytes()]
            .concat()
    };
    // Refused by the header alone: nothing of it is waited for.
    for length in [8197, u32::MAX] {
        frame(header(length), BadReply::TooLong { length: length.into(), max: 8196 });
    }
}

#[test]
fn replies_out_of_place() {
    let wrong_type = "a reply of the wrong type";
    let rows = [
        (ack(LIST), "it answers another option"),
        (reply(GO, 2, &counted("disk")), wrong_type),
        (context(GO, 0, "base:allocation"), wrong_type),
        (reply(GO, 77, b""), wrong_type),
        (ack(GO), "it does not tell the export's size"),
        (reply(GO, 3, b""), "a broken piece of information"),
        (reply(GO, 3, &[0]), "a broken piece of information"),
        (reply(GO, 3, &[0; 11]), "a broken piece of information"),
        (reply(GO, 3, &[0; 13]), "a broken piece of information"),
        (info_text(GO, 1, "a\0b"), "a broken piece of information"),
        (reply(GO, 3, b"\0\x02\xff"), "a broken piece of information"),
        (reply(GO, 3, &[&[0, 3], &[0; 11][..]].concat()), "a broken piece of information"),
        (reply(GO, 3, &[&[0, 3], &[0; 13][..]].concat()), "a broken piece of information"),
        (info_text(GO, 2, &"x".repeat(4097)), "a broken piece of information"),
    ];
    for (answer, what) in rows {
        let sent = [client_flags(), ask(GO, "disk")];
        check(what, &wants(Simple), &[greeting(), answer], &sent, &malformed(OptionCode::Go, what));
    }
}

#[test]
fn contexts_nobody_asked_for() {
    let one = || context(SET_META_CONTEXT, 1, "base:allocation");
    let rows = [
        (vec![context(SET_META_CONTEXT, 1, "base:other")], "a context that was not asked for"),
        (vec![one(), one()], "the same context twice"),
        (vec![one(), context(SET_META_CONTEXT, 1, "x:y")], "the same context twice"),
        (vec![reply(SET_META_CONTEXT, 4, b"\0\0\0")], "a broken context"),
        (vec![context(SET_META_CONTEXT, 1, "")], "a broken context"),
    ];
    for (answers, what) in rows {
        check(
            what,
            &with_contexts(Structured, &["base:allocation", "x:y"]),
            &[greeting(), ack(STRUCTURED_REPLY), answers.concat()],
            &[
                client_flags(),
                option(STRUCTURED_REPLY, b""),
                queries(SET_META_CONTEXT, "disk", &["base:allocation", "x:y"]),
            ],
            &malformed(OptionCode::SetMetaContext, what),
        );
    }
}

#[test]
fn sizes_that_make_no_sense() {
    let rows = [
        (SIZE, [0, 4096, 1 << 25]),
        (SIZE, [3, 4096, 1 << 25]),
        (SIZE, [1 << 17, 1 << 17, 1 << 25]),
        (SIZE, [512, 0, 1 << 25]),
        (SIZE, [4096, 512, 1 << 25]),
        (SIZE, [512, 4096, 511]),
        (1000, [512, 4096, 1 << 25]),
        (1 << 63, [1, 4096, 1 << 25]),
    ];
    for (size, blocks) in rows {
        let [min_block, preferred_block, max_payload] = blocks;
        let export = reply(GO, 3, &[&[0, 0][..], &u64::to_be_bytes(size), &[0, 1]].concat());
        check(
            "sizes",
            &wants(Simple),
            &[greeting(), export, info_blocks(GO, blocks), ack(GO)],
            &[client_flags(), ask(GO, "disk")],
            &Err(ClientError::BadSizes { size, min_block, preferred_block, max_payload }),
        );
    }
}

#[test]
fn flags_that_contradict_the_style() {
    let export = reply(GO, 3, &[&[0, 0][..], &SIZE.to_be_bytes(), &[0xff, 0xff]].concat());
    let server = [greeting(), export, ack(GO)].concat();
    let (_, ending, _) = play(&wants(Simple), &server, Feed::Whole);
    let Ok(ClientStep::Transmission(negotiated)) = ending else {
        panic!("{ending:?}");
    };
    let lost = TransmissionFlags::SEND_DF | TransmissionFlags::BLOCK_STATUS_PAYLOAD;
    assert_eq!(negotiated.info.flags, TransmissionFlags(0xffff).without(lost));
}

#[test]
fn answers_without_end() {
    let limits = ClientLimits { max_replies: 100, ..ClientLimits::default() };
    let server = [greeting(), reply(GO, 3, &[0x77, 0x77]).repeat(101)].concat();
    let (_, ending, _) = play(&Wants { limits, ..wants(Simple) }, &server, Feed::Pieces(1000));
    assert_eq!(ending, Err(ClientError::TooMuch(OptionCode::Go)));

    let limits = ClientLimits { max_kept_bytes: 1 << 16, ..ClientLimits::default() };
    let list = Wants { goal: Goal::List, limits, ..wants(Simple) };
    for name in ["", &"x".repeat(4096)] {
        let server = [greeting(), reply(LIST, 2, &counted(name)).repeat(2000)].concat();
        let (_, ending, _) = play(&list, &server, Feed::Whole);
        assert_eq!(ending, Err(ClientError::TooMuch(OptionCode::List)));
    }
}

#[test]
fn names_that_cannot_be_asked_for() {
    for name in ["a\0b", &"x".repeat(4097)] {
        let (sent, ending, _) = play(&Wants::export(name), &greeting(), Feed::Whole);
        assert_eq!((sent, ending), (vec![], Err(ClientError::BadName)));
    }
}

#[test]
fn an_error_is_one_line_whatever_the_server_says() {
    let text = "\u{1b}[2J\r\n\0\u{9b}".repeat(1000);
    let error = ClientError::refused(OptionCode::Go, OptReply::ErrPolicy, text.as_bytes(), "a\nb");
    assert!(!error.to_string().chars().any(char::is_control));
    assert!(error.to_string().len() < 10_000);
    let error = ClientError::refused(OptionCode::Go, OptReply::ErrUnknown, b"\xff\xfe", "a\nb");
    assert_eq!(error.to_string(), "the server has no export called \"a\\nb\": \u{fffd}\u{fffd}");
}
