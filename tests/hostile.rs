//! Peers that break the rules, or break: each costs its own connection only. What broke other servers comes first,
//! by its CVE number where it has one.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::{Command, NbdError, OptReply, OptionCode, ReplyStyle, put_option};
use rustix::process::Signal;
use support::{NO_FLAGS, Negotiation, Random, STYLES, Server, Stream, go_data, meta_data, text};

const MIB: u64 = 1 << 20;

#[test]
fn cve_2024_7409_idle_and_half_shaken_clients_at_shutdown() {
    let mut server = Server::serve(&["mem:1M", "-p", "0"]);
    let silent: Vec<Stream> = (0..40).map(|_| server.stream()).collect();
    let greeted: Vec<Negotiation> = (0..40).map(|_| server.negotiate()).collect();
    let halfway: Vec<Negotiation> = (0..40)
        .map(|_| {
            let mut negotiation = server.negotiate();
            negotiation.stream.write_all(b"IHAVEOPT\0\0\0\x07\0\0\0").unwrap();
            negotiation
        })
        .collect();
    let idle: Vec<_> = STYLES.iter().cycle().take(40).map(|style| server.client(*style)).collect();
    // Some hang up while the server ends.
    let leaving = thread::spawn(move || drop((silent, halfway)));
    let start = Instant::now();
    server.signal(Signal::TERM);
    assert_eq!(server.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    leaving.join().unwrap();
    drop((greeted, idle));
}

#[test]
fn cve_2020_10761_long_names_echoed_in_error_texts() {
    let server = Server::serve(&["mem:1M", "-x", "disk"]);
    let mut negotiation = server.negotiate();
    // Names whose quoted form is longer than they are.
    for piece in ["x", "\u{1}", "\"", "\u{200b}", "ü"] {
        let name = piece.repeat(4096 / piece.len());
        // The replies' texts are measured where they are received.
        assert_eq!(negotiation.verdict(OptionCode::Go, &go_data(&name, &[])), OptReply::ErrUnknown);
        let long = piece.repeat(4096 / piece.len() + 1);
        assert_eq!(negotiation.verdict(OptionCode::Go, &go_data(&long, &[])), OptReply::ErrInvalid);
    }
    assert_eq!(negotiation.go(ReplyStyle::Simple, "disk").read(0, 512), [0; 512]);
}

#[test]
fn cve_2017_15118_and_15119_huge_options() {
    let server = Server::serve(&["mem:1M"]);
    let before = server.resident();
    let body = vec![0; 1 << 20];
    let options = [OptionCode::List, OptionCode::Go, OptionCode::SetMetaContext, OptionCode::Unknown(77)];
    for option in options {
        let mut negotiation = server.negotiate();
        let mut header = b"IHAVEOPT".to_vec();
        header.extend_from_slice(&option.wire().to_be_bytes());
        header.extend_from_slice(&(64_u32 << 20).to_be_bytes());
        negotiation.stream.write_all(&header).unwrap();
        (0..64).for_each(|_| negotiation.stream.write_all(&body).unwrap());
        let replies = negotiation.replies(option);
        assert!(replies[0].0.is_error(), "{option:?}: {replies:?}");
        assert_eq!(negotiation.verdict(OptionCode::List, b""), OptReply::Ack, "{option:?}: still in step");
        // One that claims 4 GiB, and leaves.
        header[12..].copy_from_slice(&u32::MAX.to_be_bytes());
        let mut negotiation = server.negotiate();
        negotiation.stream.write_all(&header).unwrap();
        negotiation.stream.write_all(&body).unwrap();
    }
    assert!(server.resident() < before + (4 << 20), "option data was kept");
    // EXPORT_NAME cannot be answered with an error.
    for length in [4097, u32::MAX] {
        let mut negotiation = server.negotiate();
        let _ = negotiation.stream.write_all(b"IHAVEOPT\0\0\0\x01");
        let _ = negotiation.stream.write_all(&length.to_be_bytes());
        let _ = negotiation.stream.write_all(&[b'x'; 5000]);
        assert!(negotiation.reply().is_none());
    }
    server.assert_alive();
}

#[test]
fn cve_2017_7539_and_9524_and_2013_7441_junk_and_hangups_in_the_handshake() {
    let server = Server::serve(&["mem:1M", "-x", "disk", "-p", "0"]);
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    put_option(OptionCode::StructuredReply, b"", &mut bytes);
    put_option(OptionCode::SetMetaContext, &meta_data("disk", &["base:allocation"]), &mut bytes);
    put_option(OptionCode::Go, &go_data("missing", &[]), &mut bytes);
    put_option(OptionCode::Go, &go_data("disk", &[]), &mut bytes);
    bytes.extend_from_slice(&[0x25, 0x60, 0x95, 0x13]);
    for cut in 0..bytes.len() {
        // With its answers read or not, by both kinds of socket: an unread answer makes it a reset.
        let mut stream = if cut % 2 == 0 { server.stream() } else { Stream::tcp(server.address()).unwrap() };
        stream.write_all(&bytes[..cut]).unwrap();
        if cut % 3 == 0 {
            let _ = stream.read(&mut [0; 64]);
        }
        drop(stream);
        // A byte that is wrong.
        let mut wrong = bytes.clone();
        wrong[cut] ^= 0x80;
        let mut stream = server.stream();
        let _ = stream.write_all(&wrong);
    }
    for name in ["missing", "", &"x".repeat(5000)] {
        let mut negotiation = server.negotiate();
        negotiation.send(OptionCode::ExportName, name.as_bytes());
        assert!(name.is_empty() || negotiation.reply().is_none());
    }
    server.assert_alive();
}

#[test]
fn cve_2019_14850_and_14851_things_out_of_order() {
    let server = Server::serve(&["mem:1M"]);
    // A request in the handshake.
    let mut negotiation = server.negotiate();
    negotiation.stream.write_all(b"\x25\x60\x95\x13\0\0\0\0aaaaaaaabbbbbbbbcccc").unwrap();
    assert!(negotiation.reply().is_none());
    // Options in the transmission phase, and block status where nothing was negotiated for it.
    for style in STYLES {
        let mut client = server.client(style);
        let mut bytes = Vec::new();
        put_option(OptionCode::StructuredReply, b"", &mut bytes);
        bytes.resize(64, 0);
        client.stream.write_all(&bytes).unwrap();
        assert!(client.stream.is_closed(), "{style:?}");
        // The header of another style.
        let mut client = server.client(style);
        bytes.clear();
        let read = client.request(Command::Read, NO_FLAGS, 0, 512);
        read.encode(!style.extended(), &mut bytes);
        bytes.resize(64, 0);
        client.stream.write_all(&bytes).unwrap();
        assert!(client.stream.is_closed(), "{style:?}");
    }
    server.assert_alive();
}

/// Without TLS the option is refused; what follows in the same packet is then an option like any other.
#[test]
fn cve_2021_3716_options_behind_starttls() {
    let server = Server::serve(&["mem:1M"]);
    let mut negotiation = server.negotiate();
    let mut bytes = Vec::new();
    put_option(OptionCode::StartTls, b"", &mut bytes);
    put_option(OptionCode::StructuredReply, b"", &mut bytes);
    negotiation.stream.write_all(&bytes).unwrap();
    assert!(negotiation.replies(OptionCode::StartTls)[0].0.is_error());
    assert_eq!(negotiation.replies(OptionCode::StructuredReply)[0].0, OptReply::Ack);
    assert_eq!(negotiation.go(ReplyStyle::Structured, "").read(0, 512), [0; 512]);
}

#[test]
fn cve_2022_26495_and_26496_lengths_that_lie() {
    let server = Server::serve(&["mem:1M"]);
    let mut negotiation = server.negotiate();
    negotiation.settle(ReplyStyle::Structured);
    let options = [OptionCode::Info, OptionCode::Go, OptionCode::ListMetaContext, OptionCode::SetMetaContext];
    for option in options {
        for length in [u32::MAX, u32::MAX - 5, 1 << 31, 4097, 100, 11, 5] {
            let mut data = length.to_be_bytes().to_vec();
            data.extend_from_slice(b"\0\0\0\0\0\0");
            assert_eq!(negotiation.verdict(option, &data), OptReply::ErrInvalid, "{option:?} {length}");
        }
    }
    for (count, length) in [(u32::MAX, 0), (1, u32::MAX), (1, 100), (2, 4), (0, 0)] {
        let mut data = go_data("", &[])[..4].to_vec();
        data.extend_from_slice(&u32::to_be_bytes(count));
        data.extend_from_slice(&u32::to_be_bytes(length));
        data.extend_from_slice(b"base");
        for option in [OptionCode::ListMetaContext, OptionCode::SetMetaContext] {
            assert_eq!(
                negotiation.verdict(option, &data),
                OptReply::ErrInvalid,
                "{option:?} {count} {length}"
            );
        }
    }
    assert_eq!(negotiation.go(ReplyStyle::Structured, "").read(0, 512), [0; 512]);
}

/// nbd#173: a peer that has ended its side, at any stage, and keeps the other open.
#[test]
fn an_end_of_file_does_not_spin() {
    let server = Server::serve(&["mem:1M", "--fault", "op=read,offset=0,len=512,hang-every=1"]);
    let mut negotiation = server.negotiate();
    negotiation.send(OptionCode::List, b"");
    let mut halfway = server.client(ReplyStyle::Structured);
    halfway.ask(Command::Read, NO_FLAGS, 0, 512);
    let idle = server.client(ReplyStyle::Structured);
    let silent = server.stream();
    for stream in [&negotiation.stream, &halfway.stream, &idle.stream, &silent] {
        stream.finish_sending();
    }
    let before = server.processor_time();
    thread::sleep(Duration::from_millis(700));
    let used = server.processor_time() - before;
    assert!(used < Duration::from_millis(200), "{used:?} of processor time for clients that do nothing");
    server.assert_alive_at(4096);
}

/// nbdkit 1.44.1: a request of zeroes that was cut to 64 MiB left old data.
#[test]
fn zeroes_over_more_than_64_mib() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0xee; 130 << 20]).unwrap();
    for args in [&[text(&path)][..], &[text(&path), "--discard", "ignore"]] {
        let server = Server::serve(args);
        let mut client = server.client(ReplyStyle::Structured);
        let answer = client.call(Command::WriteZeroes, NO_FLAGS, 4096, 130 * MIB - 8192);
        assert_eq!(answer.error, None);
        for offset in (0..130).map(|n| n * MIB) {
            let page = client.read(offset + 4096, 4096);
            assert!(page == vec![0; 4096], "old data at {offset}");
        }
        for end in [0, 130 * MIB - 4096] {
            assert!(client.read(end, 4096) == vec![0xee; 4096], "beyond the range, at {end}");
        }
        server.stop();
        std::fs::write(&path, vec![0xee; 130 << 20]).unwrap();
    }
}

#[test]
fn garbage() {
    let server = Server::serve(&["mem:1M", "-p", "0"]);
    let before = server.resident();
    let mut random = Random::new(0x5eed_3001);
    for n in 0..1000 {
        let length = random.index(600);
        let mut bytes = random.bytes(length);
        // Some get further than the first four bytes.
        match n % 4 {
            1 => drop(bytes.splice(..4.min(length), 3_u32.to_be_bytes())),
            2 => drop(bytes.splice(..12.min(length), *b"\0\0\0\x03IHAVEOPT")),
            3 => {
                let mut option = 3_u32.to_be_bytes().to_vec();
                put_option(
                    OptionCode::from_wire(u32::try_from(random.below(12)).unwrap()),
                    &bytes,
                    &mut option,
                );
                bytes = option;
            }
            _ => {}
        }
        let mut stream = if n % 2 == 0 { server.stream() } else { Stream::tcp(server.address()).unwrap() };
        let _ = stream.write_all(&bytes);
    }
    for style in STYLES {
        for _ in 0..50 {
            let mut client = server.client(style);
            let length = random.index(2000);
            let _ = client.stream.write_all(&random.bytes(length));
        }
    }
    server.assert_alive();
    assert!(server.resident() < before + (8 << 20), "garbage is kept");
}

#[test]
fn a_bad_magic_in_the_midst() {
    let server = Server::serve(&["mem:1M"]);
    let mut other = server.client(ReplyStyle::Structured);
    for style in STYLES {
        let mut client = server.client(style);
        client.write(0, &[1; 4096]);
        let good = client.request(Command::Read, NO_FLAGS, 0, 4096);
        let mut bytes = client.prepare(good);
        bytes.extend_from_slice(&[0xff; 64]);
        client.stream.write_all(&bytes).unwrap();
        // What came before it may be answered or not; then it is over.
        if let Some(answer) = client.answer_or_end() {
            assert_eq!(answer.data, [1; 4096]);
        }
        assert!(client.stream.is_closed(), "{style:?}");
        assert_eq!(other.read(0, 4096), [1; 4096]);
    }
}

#[test]
fn hangups_in_requests_and_with_requests_in_flight() {
    let server = Server::serve(&["mem:64M", "--fault", "op=read,offset=0,len=4096,delay-ms=50,delay-rate=1"]);
    for style in STYLES {
        for cut in [1, 4, 27, 28, 31, 32, 33, 5000, 400_000] {
            let mut client = server.client(style);
            let write = client.request(Command::Write, NO_FLAGS, 0, 500_000);
            let mut bytes = client.prepare(write);
            bytes.resize(500_000, 7);
            client.stream.write_all(&bytes[..cut]).unwrap();
        }
        // SIGPIPE: many large reads under way, and nobody there.
        for _ in 0..10 {
            let mut client = server.client(style);
            for n in 0..16 {
                client.ask(Command::Read, NO_FLAGS, n % 2 * 8192, 16 * MIB);
            }
        }
        thread::sleep(Duration::from_millis(250));
    }
    server.assert_alive_at(8192);
    server.stop();
}

#[test]
fn a_full_disk_is_enospc_by_rule() {
    let server =
        Server::serve(&["mem:8M", "--fault", "op=write,offset=4M,len=4M,errno=ENOSPC,error-every=1"]);
    for style in STYLES {
        let mut client = server.client(style);
        client.write(0, &[1; 4096]);
        for length in [512, 4 << 20] {
            let answer = client.call_write(NO_FLAGS, 4 * MIB, &vec![1; length]);
            assert_eq!(answer.error, Some(NbdError::NoSpc), "{style:?} {length}");
        }
        // One that reaches into it.
        let answer = client.call_write(NO_FLAGS, 0, &vec![2; 8 << 20]);
        assert_eq!(answer.error, Some(NbdError::NoSpc), "{style:?}");
        assert_eq!(client.read(4 * MIB, 512), [0; 512]);
    }
}
