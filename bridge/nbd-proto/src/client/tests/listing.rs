//! `LIST` and `INFO`.

use super::*;
use ReplyStyle::{Simple, Structured};

fn list(style: ReplyStyle) -> Wants {
    Wants { goal: Goal::List, ..wants(style) }
}

fn info(style: ReplyStyle) -> Wants {
    Wants { goal: Goal::Info, ..wants(style) }
}

fn server_reply(name: &str, description: &str) -> Vec<u8> {
    reply(LIST, 2, &[&counted(name)[..], description.as_bytes()].concat())
}

fn listed(name: &str, info: Result<ExportInfo, ClientError>) -> Listed {
    Listed { name: name.to_owned(), description: None, info, tells_block_sizes: false, contexts: Vec::new() }
}

#[test]
fn all_there_is_to_know() {
    let described = ExportInfo {
        description: Some("from INFO".to_owned()),
        min_block: 4096,
        preferred_block: 4096,
        ..plain_info()
    };
    check(
        "list",
        &list(Structured),
        &[
            greeting(),
            ack(STRUCTURED_REPLY),
            server_reply("", "from LIST"),
            server_reply("b", "too"),
            server_reply("secret", ""),
            ack(LIST),
            info_export(INFO),
            info_text(INFO, 1, "a"),
            info_text(INFO, 2, "from INFO"),
            info_blocks(INFO, [4096, 4096, 32 << 20]),
            ack(INFO),
            context(LIST_META_CONTEXT, 0, "base:allocation"),
            context(LIST_META_CONTEXT, 0, "x:y"),
            ack(LIST_META_CONTEXT),
            info_export(INFO),
            ack(INFO),
            reply(LIST_META_CONTEXT, UNSUP, b""),
            reply(INFO, TLS_REQD, b""),
        ],
        &[
            client_flags(),
            option(STRUCTURED_REPLY, b""),
            option(LIST, b""),
            ask(INFO, ""),
            // By the name the server told.
            queries(LIST_META_CONTEXT, "a", &[]),
            ask(INFO, "b"),
            queries(LIST_META_CONTEXT, "b", &[]),
            ask(INFO, "secret"),
            option(ABORT, b""),
        ],
        &Ok(ClientStep::Listed(vec![
            Listed {
                description: described.description.clone(),
                tells_block_sizes: true,
                contexts: vec!["base:allocation".to_owned(), "x:y".to_owned()],
                ..listed("a", Ok(described))
            },
            Listed { description: Some("too".to_owned()), ..listed("b", Ok(plain_info())) },
            listed("secret", Err(ClientError::TlsRequired)),
        ])),
    );
}

#[test]
fn servers_that_know_less() {
    let unsupported = || Err(ClientError::Unsupported(OptionCode::Info));
    check(
        "no INFO",
        &list(Simple),
        &[greeting(), server_reply("a", ""), server_reply("b", ""), ack(LIST), reply(INFO, UNSUP, b"")],
        &[client_flags(), option(LIST, b""), ask(INFO, "a"), option(ABORT, b"")],
        // Once is enough to know.
        &Ok(ClientStep::Listed(vec![listed("a", unsupported()), listed("b", unsupported())])),
    );
    check(
        "nothing",
        &list(Simple),
        &[greeting(), ack(LIST)],
        &[client_flags(), option(LIST, b""), option(ABORT, b"")],
        &Ok(ClientStep::Listed(vec![])),
    );
    check(
        "not for you",
        &list(Simple),
        &[greeting(), reply(LIST, POLICY, b"no")],
        &[client_flags(), option(LIST, b"")],
        &Err(ClientError::Refused {
            option: OptionCode::List,
            kind: OptReply::ErrPolicy,
            message: "no".to_owned(),
        }),
    );
    let old = b"NBDMAGICIHAVEOPT\0\x02".to_vec();
    for (wants, what) in [
        (list(Simple), "list its exports"),
        (info(Simple), "describe an export"),
        (Wants { tls: true, ..list(Simple) }, "start TLS"),
    ] {
        let error = Err(ClientError::NotFixedNewstyle(what));
        check("too old", &wants, std::slice::from_ref(&old), &[vec![0, 0, 0, 2]], &error);
    }
}

#[test]
fn one_export() {
    check(
        "info",
        &info(Simple),
        &[greeting(), info_export(INFO), ack(INFO)],
        &[client_flags(), ask(INFO, "disk"), option(ABORT, b"")],
        &Ok(ClientStep::Listed(vec![listed("disk", Ok(plain_info()))])),
    );
    for (kind, error) in [
        (UNSUP, ClientError::Unsupported(OptionCode::Info)),
        (UNKNOWN, ClientError::UnknownExport { name: "disk".to_owned(), message: String::new() }),
        (TLS_REQD, ClientError::TlsRequired),
    ] {
        check(
            "refused",
            &info(Simple),
            &[greeting(), reply(INFO, kind, b"")],
            &[client_flags(), ask(INFO, "disk")],
            &Err(error),
        );
    }
}

#[test]
fn no_more_than_a_few_are_asked_about() {
    let limits = ClientLimits { max_described: 1, ..ClientLimits::default() };
    check(
        "one of two",
        &Wants { limits, ..list(Simple) },
        &[greeting(), server_reply("a", ""), server_reply("b", ""), ack(LIST), info_export(INFO), ack(INFO)],
        &[client_flags(), option(LIST, b""), ask(INFO, "a"), option(ABORT, b"")],
        &Ok(ClientStep::Listed(vec![listed("a", Ok(plain_info())), listed("b", Err(ClientError::NotAsked))])),
    );
}

#[test]
fn broken_lists() {
    let rows = [
        reply(LIST, 2, b"\0\0\0"),
        reply(LIST, 2, b"\0\0\0\x02a"),
        reply(LIST, 2, b"\0\0\0\x01\xff"),
        reply(LIST, 2, b"\0\0\0\x01a\xff"),
        reply(LIST, 2, &counted(&"x".repeat(4097))),
        server_reply("a", &"x".repeat(4097)),
    ];
    for answer in rows {
        let what = "a broken name";
        check(
            what,
            &list(Simple),
            &[greeting(), answer[..answer.len().min(8216)].to_vec()],
            &[client_flags(), option(LIST, b"")],
            &Err(ClientError::Malformed { option: OptionCode::List, what }),
        );
    }
}
