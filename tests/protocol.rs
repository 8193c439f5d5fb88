//! The transmission phase, request by request and in every reply style: what succeeds, which errno answers what
//! is wrong, and that the connection lives on. The client of `support` checks the form of every reply.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::time::Duration;

use nbd_proto::{Command, CommandFlags, NbdError, ReplyStyle, Request, TransmissionFlags};
use rustix::process::Signal;
use support::{Client, NO_FLAGS, Random, STYLES, Server, text};

const MIB: u64 = 1 << 20;
const INVAL: Option<NbdError> = Some(NbdError::Inval);

/// Proof that the connection lives on, and is not out of step.
fn assert_lives(client: &mut Client) {
    assert_eq!(client.read(0, 100).len(), 100);
}

#[test]
fn what_is_written_is_read() {
    // Large payloads go to files by another way than to memory, and to tmpfs by another than to storage.
    let (storage, memory) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
    let images = [&storage, &memory].map(|folder| folder.path().join("disk.img"));
    for source in ["mem:4M", text(&images[0]), text(&images[1])] {
        eprintln!("{source}");
        if !source.starts_with("mem:") {
            std::fs::File::create(source).unwrap().set_len(4 << 20).unwrap();
        }
        let server = Server::serve(&[source, "-p", "0"]);
        write_and_read(&server);
        server.stop();
    }
}

/// Writes and reads 4 MiB at random, in every style, over both kinds of sockets.
fn write_and_read(server: &Server) {
    let mut random = Random::new(0x5eed_1001);
    let mut image = vec![0; 4 << 20];
    for (n, style) in STYLES.into_iter().chain(STYLES).enumerate() {
        let stream = if n < 3 { server.stream() } else { support::Stream::tcp(server.address()).unwrap() };
        let mut client = support::Negotiation::begin(stream).enter(style, "");
        assert_eq!(client.size, 4 * MIB);
        for _ in 0..40 {
            let most = random.pick(&[64, 5000, 200_000, 1 << 20]);
            let length = 1 + random.index(most);
            let at = random.index(image.len() - length);
            let offset = at as u64;
            if random.below(2) == 0 {
                let data = random.bytes(length);
                client.write(offset, &data);
                image[at..at + length].copy_from_slice(&data);
            } else {
                assert!(client.read(offset, length as u64) == image[at..at + length], "{offset} {length}");
            }
        }
        assert!(client.read(0, 4 * MIB) == image, "{style:?}");
    }
}

#[test]
fn past_the_end() {
    let server = Server::serve(&["mem:1M"]);
    for style in STYLES {
        let mut client = server.client(style);
        let ranges =
            [(MIB, 1), (MIB - 1, 2), (0, MIB + 1), (u64::MAX, 1), (u64::MAX - 99, 512), (1 << 63, 4096)];
        for (offset, length) in ranges {
            for command in [Command::Read, Command::Trim, Command::Cache, Command::BlockStatus] {
                let answer = client.call(command, NO_FLAGS, offset, length);
                assert_eq!(answer.error, INVAL, "{style:?} {command:?} {offset} {length}");
            }
            let data = vec![1; usize::try_from(length).unwrap()];
            let answer = client.call_write(NO_FLAGS, offset, &data);
            assert_eq!(answer.error, Some(NbdError::NoSpc), "{style:?} write {offset} {length}");
            let answer = client.call(Command::WriteZeroes, NO_FLAGS, offset, length);
            assert_eq!(answer.error, Some(NbdError::NoSpc), "{style:?} zeroes {offset} {length}");
        }
        assert!(client.read(0, MIB).iter().all(|byte| *byte == 0), "a refused write left something");
    }
}

#[test]
fn read_only_is_eperm() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let server = Server::serve(&[support::text(&path), "-r"]);
    for style in STYLES {
        let mut client = server.client(style);
        assert!(client.flags.contains(TransmissionFlags::READ_ONLY));
        for command in [Command::WriteZeroes, Command::Trim] {
            let answer = client.call(command, NO_FLAGS, 0, 4096);
            assert_eq!(answer.error, Some(NbdError::Perm), "{style:?} {command:?}");
        }
        for length in [1, 4096, 1 << 20] {
            let answer = client.call_write(NO_FLAGS, 0, &vec![1; length]);
            assert_eq!(answer.error, Some(NbdError::Perm), "{style:?} {length}");
        }
        assert!(client.read(0, MIB) == vec![7; 1 << 20]);
    }
    server.stop();
    assert!(std::fs::read(&path).unwrap() == vec![7; 1 << 20]);
}

#[test]
fn flags_that_do_not_apply_are_einval_and_the_payload_is_drained() {
    use CommandFlags as F;
    let server = Server::serve(&["mem:1M"]);
    for style in STYLES {
        let mut client = server.client(style);
        for flags in [F::DF, F::REQ_ONE, F::NO_HOLE, F::FAST_ZERO, F(1 << 6), F(1 << 15)] {
            for length in [0, 1, 512, 100_000, 1 << 20] {
                let answer = client.call_write(flags, 0, &vec![1; length]);
                assert_eq!(answer.error, INVAL, "{style:?} {flags:?} {length}");
            }
        }
        let mut wrong = vec![
            (Command::Read, F::NO_HOLE),
            (Command::Read, F::REQ_ONE),
            (Command::Trim, F::NO_HOLE),
            (Command::Trim, F::DF),
            (Command::Cache, F::FAST_ZERO),
            (Command::WriteZeroes, F::DF),
            (Command::WriteZeroes, F::REQ_ONE),
            (Command::BlockStatus, F::DF),
            (Command::Read, F(1 << 14)),
        ];
        match style {
            ReplyStyle::Simple => wrong.extend([(Command::Read, F::DF), (Command::Read, F::PAYLOAD_LEN)]),
            ReplyStyle::Structured => wrong.push((Command::WriteZeroes, F::PAYLOAD_LEN)),
            ReplyStyle::Extended => {}
        }
        for (command, flags) in wrong {
            let answer = client.call(command, flags, 0, 512);
            assert_eq!(answer.error, INVAL, "{style:?} {command:?} {flags:?}");
        }
        if style.extended() {
            // Here the flag says that a payload follows, whatever the command.
            for command in [Command::Read, Command::Trim, Command::BlockStatus, Command::Unknown(77)] {
                let request = client.request(command, F::PAYLOAD_LEN, 0, 70_000);
                client.post(request, &[1; 70_000]);
                assert_eq!(client.answer().error, INVAL, "{command:?}");
            }
        }
        assert!(client.read(0, MIB).iter().all(|byte| *byte == 0), "a refused write left something");
    }
}

#[test]
fn unknown_commands_and_flushes_with_a_range() {
    let server = Server::serve(&["mem:1M"]);
    for style in STYLES {
        let mut client = server.client(style);
        for command in [8, 9, 99, 0xffff] {
            let answer = client.call(Command::from_wire(command), NO_FLAGS, 0, 512);
            assert_eq!(answer.error, INVAL, "{style:?} {command}");
        }
        // "The length and the offset MUST be zero": of a client; the answer to one that does not is ours.
        let answer = client.call(Command::Flush, NO_FLAGS, 0, 512);
        assert_eq!(answer.error, INVAL, "{style:?}");
        client.flush();
        assert_lives(&mut client);
    }
}

#[test]
fn zero_lengths_do_not_disconnect() {
    let server = Server::serve(&["mem:1M"]);
    for style in STYLES {
        let mut client = server.client(style);
        for offset in [0, 512, MIB] {
            for command in
                [Command::Read, Command::Write, Command::Trim, Command::Cache, Command::WriteZeroes]
            {
                let answer = client.call(command, NO_FLAGS, offset, 0);
                assert_eq!(answer.error, None, "{style:?} {command:?} {offset}");
            }
        }
        assert_eq!(client.call(Command::BlockStatus, NO_FLAGS, 0, 0).error, INVAL);
        assert_lives(&mut client);
    }
}

/// A hole chunk is longer than a few bytes of data.
#[test]
fn reads_of_a_few_zero_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(MIB).unwrap();
    let server = Server::serve(&["mem:1M", "--export", &format!("file={}", support::text(&path))]);
    for name in ["", "file"] {
        for style in STYLES {
            let mut client = server.negotiate().enter(style, name);
            for length in 1..20 {
                for offset in [0, 4095, MIB - length] {
                    assert!(client.read(offset, length).iter().all(|byte| *byte == 0), "{style:?}");
                }
            }
        }
    }
}

#[test]
fn the_largest_payload_and_one_more() {
    let mut random = Random::new(0x5eed_1002);
    let data = random.bytes(32 << 20);
    let server = Server::serve(&["mem:40M"]);
    for style in STYLES {
        let mut client = server.client(style);
        let offset = random.below(8 * MIB);
        client.write(offset, &data);
        assert!(client.read(offset, 32 * MIB) == data, "{style:?}");
        let whole = client.call(
            Command::Read,
            if style == ReplyStyle::Simple { NO_FLAGS } else { CommandFlags::DF },
            offset,
            32 * MIB,
        );
        assert!(whole.error.is_none() && whole.data == data, "{style:?}");
        assert_eq!(client.call(Command::Read, NO_FLAGS, 0, 32 * MIB + 1).error, INVAL);
        let more = vec![1; (32 << 20) + 1];
        if style.extended() {
            // The extension: drop a client that sends more than it was told is the most.
            let write = client.request(Command::Write, NO_FLAGS, 0, more.len() as u64);
            let header = client.prepare(write);
            let _ = client.stream.write_all(&header);
            let _ = client.stream.write_all(&more);
            assert!(client.stream.is_closed());
            client = server.client(style);
        } else {
            assert_eq!(client.call_write(NO_FLAGS, 0, &more).error, INVAL);
        }
        assert!(client.read(offset, MIB) == data[..1 << 20], "{style:?}: refused, but written");
    }
}

#[test]
fn an_error_in_the_midst_of_a_read() {
    let server = Server::serve(&["mem:8M", "--fault", "op=read,offset=5M,len=4096,errno=EIO,error-every=1"]);
    let mut random = Random::new(0x5eed_1003);
    let data = random.bytes(4 << 20);
    for style in STYLES {
        let mut client = server.client(style);
        client.write(0, &data);
        for (offset, length) in [(5 * MIB, 512), (0, 8 * MIB), (4 * MIB, 2 * MIB)] {
            let answer = client.call(Command::Read, NO_FLAGS, offset, length);
            assert_eq!(answer.error, Some(NbdError::Io), "{style:?} {offset}");
        }
        assert!(client.read(0, 4 * MIB) == data, "{style:?}");
    }
}

#[test]
fn only_errnos_of_the_protocol_go_out() {
    let table = [
        ("EPERM", NbdError::Perm),
        ("EIO", NbdError::Io),
        ("ENOMEM", NbdError::NoMem),
        ("ENOSPC", NbdError::NoSpc),
        ("EDQUOT", NbdError::NoSpc),
        ("EROFS", NbdError::Perm),
        ("EINVAL", NbdError::Inval),
        ("ETIMEDOUT", NbdError::Io),
    ];
    let mut args = vec!["mem:1M".to_owned()];
    for (n, (name, _)) in table.iter().enumerate() {
        args.push("--fault".to_owned());
        args.push(format!("offset={},len=4096,errno={name},error-every=1", n * 8192));
    }
    let server = Server::serve(&args.iter().map(String::as_str).collect::<Vec<_>>());
    for style in STYLES {
        let mut client = server.client(style);
        for (n, (name, error)) in table.iter().enumerate() {
            let offset = n as u64 * 8192;
            assert_eq!(client.call_write(NO_FLAGS, offset, &[1; 512]).error, Some(*error), "{name}");
            for command in [Command::Read, Command::Trim, Command::WriteZeroes] {
                let answer = client.call(command, NO_FLAGS, offset, 512);
                assert_eq!(answer.error, Some(*error), "{style:?} {command:?} {name}");
            }
        }
        assert_eq!(client.read(MIB - 512, 512).len(), 512);
    }
}

#[test]
fn zeroes_and_trims_beyond_4_gib() {
    const TIB: u64 = 1 << 40;
    let server = Server::serve(&["mem:1T"]);
    let mut client = server.client(ReplyStyle::Extended);
    let places = [0, (1 << 32) - 512, 1 << 32, 5 << 30, 700 << 30, TIB - 4096];
    for command in [Command::WriteZeroes, Command::Trim] {
        places.iter().for_each(|place| client.write(*place, &[9; 4096]));
        // A length cut to 32 bits would be 512, and leave the rest.
        assert_eq!(client.call(command, NO_FLAGS, 0, (8 << 30) + 512).error, None);
        for place in places {
            let clear = place < 8 << 30;
            assert!(client.read(place, 4096) == vec![if clear { 0 } else { 9 }; 4096], "{command:?} {place}");
        }
        assert_eq!(client.call(command, NO_FLAGS, 0, TIB).error, None);
        assert!(client.read(TIB - 4096, 4096) == vec![0; 4096]);
        let past = if command == Command::Trim { NbdError::Inval } else { NbdError::NoSpc };
        assert_eq!(client.call(command, NO_FLAGS, 1, TIB).error, Some(past));
        assert_eq!(client.call(command, NO_FLAGS, 1, u64::MAX).error, Some(past));
    }
    // A compact header reaches nearly as far.
    let mut client = server.client(ReplyStyle::Structured);
    client.write((1 << 32) - 512, &[9; 4096]);
    assert_eq!(client.call(Command::WriteZeroes, NO_FLAGS, 0, u64::from(u32::MAX)).error, None);
    let left = client.read((1 << 32) - 512, 4096);
    assert_eq!((left[510], left[511], left[512]), (0, 9, 9));
}

#[test]
fn fast_zero_and_no_hole() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    let server = Server::serve(&["mem:1M", "--export", &format!("file={}", support::text(&path))]);
    for name in ["", "file"] {
        let mut client = server.negotiate().enter(ReplyStyle::Structured, name);
        client.write(0, &[7; 1 << 20]);
        assert!(client.flags.contains(TransmissionFlags::SEND_WRITE_ZEROES), "{name}");
        if client.flags.contains(TransmissionFlags::SEND_FAST_ZERO) {
            let answer = client.call(Command::WriteZeroes, CommandFlags::FAST_ZERO, 0, 256 << 10);
            let untouched = match answer.error {
                None => 0,
                Some(NbdError::NotSup) => 7,
                other => panic!("{name}: {other:?}"),
            };
            assert!(client.read(0, 256 << 10) == vec![untouched; 256 << 10], "{name}");
        }
        // What is allocated must stay so; whether a hole gets space differs between sources.
        client.write(0, &[7; 1 << 20]);
        let answer = client.call(Command::WriteZeroes, CommandFlags::NO_HOLE, 0, MIB);
        assert_eq!(answer.error, None, "{name}");
        assert!(client.read(0, MIB) == vec![0; 1 << 20], "{name}");
        let extents = client.call(Command::BlockStatus, NO_FLAGS, 0, MIB).extents;
        assert!(extents.iter().all(|(_, state)| state & 1 == 0), "{name}: NO_HOLE made a hole: {extents:?}");
    }
}

#[test]
fn fua_is_legal_on_every_command() {
    let server = Server::serve(&["mem:1M"]);
    for style in STYLES {
        let mut client = server.client(style);
        let fua = CommandFlags::FUA;
        assert_eq!(client.call_write(fua, 0, &[3; 4096]).error, None);
        assert_eq!(client.call(Command::Read, fua, 0, 4096).data, [3; 4096]);
        for command in [Command::Trim, Command::WriteZeroes, Command::Cache] {
            assert_eq!(client.call(command, fua, 0, 4096).error, None, "{style:?} {command:?}");
        }
        assert_eq!(client.call(Command::Flush, fua, 0, 0).error, None, "{style:?}");
        if style != ReplyStyle::Simple {
            assert_eq!(client.call(Command::BlockStatus, fua, 0, 4096).error, None, "{style:?}");
        }
    }
}

#[test]
fn cookies_are_opaque() {
    let server = Server::serve(&["mem:1M"]);
    for style in STYLES {
        let mut client = server.client(style);
        for cookie in [0, u64::MAX, 1 << 63, 0x2560_9513_0000_0000, 0] {
            let request = Request { cookie, ..client.request(Command::Read, NO_FLAGS, 0, 512) };
            client.post(request, &[]);
            assert_eq!(client.answer().cookie, cookie);
        }
    }
}

#[test]
fn many_requests_in_one_send_and_one_byte_a_send() {
    let server = Server::serve(&["mem:1M", "-p", "0"]);
    for style in STYLES {
        let stream = support::Stream::tcp(server.address()).unwrap();
        let mut client = support::Negotiation::begin(stream).enter(style, "");
        let mut bytes = Vec::new();
        for n in 0..1000_u32 {
            let write = client.request(Command::Write, NO_FLAGS, u64::from(n) * 4, 4);
            bytes.extend(client.prepare(write));
            bytes.extend(n.to_be_bytes());
        }
        client.stream.write_all(&bytes).unwrap();
        for _ in 0..1000 {
            assert_eq!(client.answer().error, None);
        }
        let expected: Vec<u8> = (0..1000_u32).flat_map(u32::to_be_bytes).collect();
        let read = client.request(Command::Read, NO_FLAGS, 0, 4000);
        for byte in client.prepare(read) {
            client.stream.write_all(&[byte]).unwrap();
        }
        assert!(client.answer().data == expected, "{style:?}");
    }
}

#[test]
fn a_flush_on_one_connection_covers_writes_on_another() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![0; 1 << 20]).unwrap();
    let server = Server::serve(&[support::text(&path), "--workers", "2"]);
    let mut clients: Vec<Client> = STYLES.map(|style| server.client(style)).into();
    assert!(clients.iter().all(|client| client.flags.contains(TransmissionFlags::CAN_MULTI_CONN)));
    for n in 0..30_usize {
        let (writer, reader) = (n % 3, (n + 1) % 3);
        let data = vec![u8::try_from(n + 1).unwrap(); 8192];
        clients[writer].write(n as u64 * 4096, &data);
        clients[reader].flush();
        assert!(clients[reader].read(n as u64 * 4096, 8192) == data);
    }
}

#[test]
fn disconnect_finishes_what_is_in_flight() {
    let server = Server::serve(&["mem:1M", "--fault", "op=write,delay-ms=200,delay-rate=1"]);
    for style in STYLES {
        let mut client = server.client(style);
        let cookies: Vec<u64> = (0..10).map(|n| client.ask_write(NO_FLAGS, n * 512, &[5; 512])).collect();
        client.disconnect();
        let mut answered: Vec<u64> = (0..10).map(|_| client.answer().cookie).collect();
        answered.sort_unstable();
        assert_eq!(answered, cookies);
        assert!(client.answer_or_end().is_none(), "DISC has no answer");
        let mut other = server.client(style);
        assert_eq!(other.read(0, 5120), [5; 5120]);
    }
}

#[test]
fn the_end_of_the_server_is_told() {
    for style in STYLES {
        let mut server =
            Server::serve(&["mem:1M", "--fault", "op=read,offset=512K,len=512,delay-ms=700,delay-rate=1"]);
        let mut client = server.client(style);
        let slow = client.ask(Command::Read, NO_FLAGS, 512 << 10, 512);
        client.read(0, 512);
        server.signal(Signal::TERM);
        // The first few may still be before it in line.
        let refused = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(1));
            let error = client.call(Command::Read, NO_FLAGS, 0, 512).error;
            assert!(error.is_none() || error == Some(NbdError::Shutdown), "{error:?}");
            error.is_some()
        });
        assert!(refused, "{style:?}: never told");
        let answer = client.answer();
        assert_eq!((answer.cookie, answer.error), (slow, None), "what is in flight is finished");
        assert!(client.answer_or_end().is_none());
        assert_eq!(server.wait(Duration::from_secs(10)).unwrap().code(), Some(0));
    }
}
