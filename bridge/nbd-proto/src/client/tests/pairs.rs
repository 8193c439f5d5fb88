//! Client and server of this crate on both ends of a line: they agree on everything.

use proptest::prelude::*;

use super::*;
use crate::export::Directory;
use crate::handshake::{Handshake, Limits, Step, TlsPolicy};
use crate::testing::quick;

/// Any names and sizes.
#[derive(Debug)]
struct Exports(Vec<(String, ExportInfo)>);

impl Directory for Exports {
    fn list(&self, each: &mut dyn FnMut(&str, Option<&str>)) {
        self.0.iter().for_each(|(name, info)| each(name, info.description.as_deref()));
    }

    fn find(&self, name: &str) -> Option<(String, ExportInfo)> {
        self.0.iter().find(|(known, _)| known == name || name.is_empty()).cloned()
    }

    fn contexts(&self, name: &str) -> Vec<String> {
        ["base:allocation", "x:long", "x:y"].map(str::to_owned)[..name.len() % 4].to_vec()
    }
}

/// Carries bytes both ways, `size` of them at a time, until both sides have an end.
fn connect(exports: &Exports, tls: TlsPolicy, wants: &Wants, size: usize) -> (Option<Step>, Ending) {
    let mut server = Handshake::new(Limits::default(), tls);
    let mut client = ClientHandshake::new(wants.clone());
    let (mut to_client, mut to_server) = (server.greeting().to_vec(), Vec::new());
    let mut served = None;
    loop {
        let piece: Vec<u8> = to_client.drain(..size.min(to_client.len())).collect();
        let ending = match client.advance(&piece, &mut to_server) {
            Ok((taken, step)) => {
                assert!(taken == piece.len());
                step
            }
            Err(error) => return (served, Err(error)),
        };
        match ending {
            ClientStep::StartTls if to_client.is_empty() && served == Some(Step::StartTls) => {
                server.tls_started();
                client.tls_started(&mut to_server);
            }
            ClientStep::NeedMore | ClientStep::StartTls => {}
            end => return (served, Ok(end)),
        }
        let piece: Vec<u8> = to_server.drain(..size.min(to_server.len())).collect();
        let (taken, step) = server.advance(&piece, exports, &mut to_client);
        to_server.splice(..0, piece[taken..].iter().copied());
        let stuck = to_client.is_empty() && to_server.is_empty() && step == Step::NeedMore;
        assert!(!stuck, "both sides wait");
        if served.as_ref().is_none_or(|step| !matches!(step, Step::Transmission(_) | Step::Close(_))) {
            served = Some(step);
        }
    }
}

fn exports() -> impl Strategy<Value = Exports> {
    let info = ("[^\0]{0,20}", 0..1_u64 << 47, any::<u16>(), 0..=16_u32, 9..=20_u32, 20..=31_u32);
    let info = info.prop_map(|(description, blocks, flags, min, preferred, max)| ExportInfo {
        size: blocks << min,
        flags: TransmissionFlags(flags),
        description: (!description.is_empty()).then_some(description),
        min_block: 1 << min,
        preferred_block: 1 << preferred.max(min),
        max_payload: 1 << max,
    });
    prop::collection::btree_map("[a-zä /]{1,12}", info, 1..5)
        .prop_map(|exports| Exports(exports.into_iter().collect()))
}

fn style() -> impl Strategy<Value = ReplyStyle> {
    prop::sample::select(vec![ReplyStyle::Simple, ReplyStyle::Structured, ReplyStyle::Extended])
}

proptest! {
    #![proptest_config(quick(0x5eed_0011))]

    #[test]
    fn both_sides_agree(exports in exports(), style in style(), size in 1..200_usize, tls: bool, pick: usize) {
        let name = exports.0[pick % exports.0.len()].0.clone();
        let contexts = vec!["x:y".to_owned(), "base:allocation".to_owned()];
        let wants = Wants { style, tls, contexts, ..Wants::export(&name) };
        let (served, ending) = connect(&exports, TlsPolicy::Optional, &wants, size);
        let Ok(ClientStep::Transmission(client)) = ending else {
            panic!("{ending:?}");
        };
        let offered = exports.contexts(&name);
        let chosen = offered.iter().filter(|name| *name != "x:long").count();
        prop_assert_eq!(client.contexts.len(), if style == ReplyStyle::Simple { 0 } else { chosen });
        prop_assert_eq!(client.style, style);
        prop_assert_eq!(client.encrypted, tls);
        prop_assert_eq!(served, Some(Step::Transmission(client)));
    }

    #[test]
    fn lists_are_what_was_served(exports in exports(), style in style(), size in 1..200_usize) {
        let wants = Wants { goal: Goal::List, style, ..Wants::export("") };
        let (_, ending) = connect(&exports, TlsPolicy::Disabled, &wants, size);
        let Ok(ClientStep::Listed(listed)) = ending else {
            panic!("{ending:?}");
        };
        prop_assert_eq!(listed.len(), exports.0.len());
        for (listed, (name, info)) in listed.iter().zip(&exports.0) {
            prop_assert_eq!(&listed.name, name);
            prop_assert_eq!(&listed.description, &info.description);
            prop_assert!(listed.tells_block_sizes);
            let expected = ExportInfo { flags: info.flags.advertised(style), ..info.clone() };
            prop_assert_eq!(&listed.info, &Ok(expected));
            if style != ReplyStyle::Simple {
                prop_assert_eq!(&listed.contexts, &exports.contexts(name));
            }
        }
    }

    #[test]
    fn any_answer_is_used_or_refused(server: Vec<u8>, plausible in prop::collection::vec(any_reply(), 0..12)) {
        for goal in [Goal::Transmission, Goal::Info, Goal::List] {
            let wants = Wants { goal, ..with_contexts(ReplyStyle::Structured, &["base:allocation"]) };
            let bytes = [greeting(), plausible.concat(), server.clone()].concat();
            let whole = play(&wants, &bytes, Feed::Whole);
            let pieces = play(&wants, &bytes, Feed::Pieces(3));
            prop_assert_eq!((whole.0, whole.1), (pieces.0, pieces.1));
        }
    }
}

/// A reply that might be one.
fn any_reply() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![Just(1), 2..=4_u32, Just(UNSUP), 0x8000_0001..0x8000_000b_u32];
    let data = prop_oneof![Just(vec![]), Just([vec![0, 0], size_and_flags()].concat()), any::<Vec<u8>>()];
    (3..=11_u32, kind, data).prop_map(|(option, kind, data)| reply(option, kind, &data))
}

#[test]
fn tls_policies() {
    let info = plain_info();
    let exports = Exports(vec![("disk".to_owned(), info)]);
    let plain = wants(ReplyStyle::Extended);
    let (_, ending) = connect(&exports, TlsPolicy::Required, &plain, 100);
    assert_eq!(ending, Err(ClientError::TlsRequired));
    let tls = Wants { tls: true, ..plain };
    let (_, ending) = connect(&exports, TlsPolicy::Disabled, &tls, 100);
    assert_eq!(ending, Err(ClientError::TlsRefused("TLS is not configured".to_owned())));
    let (_, ending) = connect(&exports, TlsPolicy::Required, &tls, 100);
    assert!(matches!(ending, Ok(ClientStep::Transmission(Negotiated { encrypted: true, .. }))), "{ending:?}");
    let absent = Wants { export: "none".to_owned(), ..tls };
    let (_, ending) = connect(&exports, TlsPolicy::Required, &absent, 100);
    assert!(matches!(ending, Err(ClientError::UnknownExport { .. })), "{ending:?}");
}
