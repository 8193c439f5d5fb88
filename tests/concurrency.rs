//! The properties that make many requests on one connection worth it: reader and writer at the same time, answers
//! out of order and never mixed up, any number in flight up to a cap, and memory that stays bounded.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::HashMap;
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::{Command, CommandFlags, ReplyStyle, Request};
use support::{Client, NO_FLAGS, Random, STYLES, Server, Stream, eventually};

const MIB: u64 = 1 << 20;

/// Reads of the first 4 KiB come late.
const LATE: [&str; 3] = ["mem:64M", "--fault", "op=read,offset=0,len=4096,delay-ms=400,delay-rate=1"];

#[test]
fn a_late_read_does_not_hold_back_a_later_one() {
    let server = Server::serve(&LATE);
    for style in STYLES {
        let mut client = server.client(style);
        let late = client.ask(Command::Read, NO_FLAGS, 0, 4096);
        let others: Vec<u64> = vec![
            client.ask(Command::Read, NO_FLAGS, 8192, 4096),
            client.ask_write(NO_FLAGS, MIB, &[1; 200_000]),
            client.ask(Command::Read, NO_FLAGS, MIB, 4 * MIB),
            client.ask(Command::Flush, NO_FLAGS, 0, 0),
        ];
        let mut answered: Vec<u64> = (0..5).map(|_| client.answer().cookie).collect();
        assert_eq!(answered.pop(), Some(late), "{style:?}");
        answered.sort_unstable();
        assert_eq!(answered, others, "{style:?}");
    }
}

#[test]
fn as_many_as_are_allowed_wait_at_the_same_time() {
    let server = Server::serve(&LATE);
    for style in STYLES {
        let mut client = server.client(style);
        let start = Instant::now();
        for _ in 0..128 {
            client.ask(Command::Read, NO_FLAGS, 0, 4096);
        }
        (0..128).for_each(|_| assert_eq!(client.answer().error, None));
        // One after another they would take 51 seconds.
        assert!(start.elapsed() >= Duration::from_millis(400) && start.elapsed() < Duration::from_secs(5));
    }
}

/// A peer that answers in order of its sends would stop here: both directions are full, and each side waits for the
/// other to read.
#[test]
fn reading_and_writing_at_the_same_time() {
    let mut random = Random::new(0x5eed_2001);
    let data = random.bytes(32 << 20);
    let server = Server::serve(&["mem:64M", "-p", "0"]);
    for (n, style) in STYLES.into_iter().enumerate() {
        let stream = if n == 1 { Stream::tcp(server.address()).unwrap() } else { server.stream() };
        let mut client = support::Negotiation::begin(stream).enter(style, "");
        client.write(0, &data);
        let mut requests = Vec::new();
        for _ in 0..2 {
            let read = client.request(Command::Read, NO_FLAGS, 0, 32 * MIB);
            requests.push((client.prepare(read), false));
            let write = client.request(Command::Write, NO_FLAGS, 32 * MIB, 32 * MIB);
            requests.push((client.prepare(write), true));
        }
        let mut sender = client.stream.again();
        // The sender reads nothing; the receiver below begins when the socket is full in both directions.
        let data_sent = data.clone();
        let sending = thread::spawn(move || {
            for (header, payload) in requests {
                sender.write_all(&header).unwrap();
                if payload {
                    sender.write_all(&data_sent).unwrap();
                }
            }
        });
        thread::sleep(Duration::from_millis(100));
        for _ in 0..4 {
            let answer = client.answer();
            assert_eq!(answer.error, None);
            assert!(answer.data.is_empty() || answer.data == data, "{style:?}");
        }
        sending.join().unwrap();
        assert!(client.read(32 * MIB, 32 * MIB) == data, "{style:?}");
    }
}

/// What the disk holds at `offset`, so that every answer can be checked.
fn word(offset: u64) -> u64 {
    (offset / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

#[test]
fn answers_are_never_mixed_up() {
    const SIZE: u64 = 16 << 20;
    let fault = "op=read,delay-ms=3,delay-rate=0.3,seed=5";
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.img");
    let content: Vec<u8> = (0..SIZE / 8).flat_map(|n| word(n * 8).to_be_bytes()).collect();
    std::fs::write(&path, &content).unwrap();
    let file = format!("file={}", support::text(&path));
    let faulty = Server::serve(&["mem:16M", "--export", &file, "--fault", fault]);
    let fast = Server::serve(&["mem:16M", "--export", &file, "--no-lock"]);
    for server in [&faulty, &fast] {
        server.client(ReplyStyle::Simple).write(0, &content);
    }
    thread::scope(|scope| {
        for (n, style) in STYLES.into_iter().enumerate() {
            for (server, name) in [(&faulty, ""), (&faulty, "file"), (&fast, ""), (&fast, "file")] {
                let (content, seed) = (&content, 0x5eed_2002 + n as u64);
                scope.spawn(move || mix(server.negotiate().enter(style, name), content, seed));
            }
        }
    });
}

/// Reads of all sizes, and writes of what is there already, with many in flight.
fn mix(mut client: Client, content: &[u8], seed: u64) {
    let mut random = Random::new(seed);
    let mut reads: HashMap<u64, std::ops::Range<usize>> = HashMap::new();
    let mut in_flight = 0;
    for _ in 0..400 {
        while in_flight >= 32 {
            check(&mut client, &mut reads, content);
            in_flight -= 1;
        }
        let most = random.pick(&[8, 600, 20_000, 300_000]);
        let length = 1 + random.index(most);
        let start = random.index(content.len() - length);
        let (offset, range) = (start as u64, start..start + length);
        in_flight += 1;
        if random.below(3) > 0 {
            let whole = client.style != ReplyStyle::Simple && random.below(4) == 0;
            let flags = if whole { CommandFlags::DF } else { NO_FLAGS };
            reads.insert(client.ask(Command::Read, flags, offset, length as u64), range);
        } else if length < 100_000 {
            client.ask_write(NO_FLAGS, offset, &content[range]);
        } else {
            client.ask(Command::Flush, NO_FLAGS, 0, 0);
        }
    }
    for _ in 0..in_flight {
        check(&mut client, &mut reads, content);
    }
    assert!(reads.is_empty());
}

fn check(client: &mut Client, reads: &mut HashMap<u64, std::ops::Range<usize>>, content: &[u8]) {
    let answer = client.answer();
    assert_eq!(answer.error, None);
    if let Some(range) = reads.remove(&answer.cookie) {
        assert!(answer.data == content[range.clone()], "{:?}: wrong data of {range:?}", client.style);
    }
}

/// Bytes that the server has left in its receive queue: what the client could send beyond what it takes in.
fn assert_stops_taking_in(client: &mut Client, what: &str) {
    let junk = client.request(Command::WriteZeroes, NO_FLAGS, 0, 0);
    let mut bytes = Vec::new();
    let mut header = Vec::new();
    junk.encode(client.style.extended(), &mut header);
    while bytes.len() < 8 << 20 {
        bytes.extend_from_slice(&header);
    }
    let sent = client.stream.send_until_blocked(&bytes, Duration::from_millis(300));
    assert!(sent < 2 << 20, "{what}: took in {sent} bytes");
}

#[test]
fn the_cap_on_requests_in_flight_slows_the_sender() {
    let server = Server::serve(&[
        "mem:64M",
        "--max-in-flight",
        "4",
        "--fault",
        "op=read,offset=0,len=4096,hang-every=1",
    ]);
    for style in STYLES {
        let mut client = server.client(style);
        for _ in 0..3 {
            client.ask(Command::Read, NO_FLAGS, 0, 4096);
        }
        // The fourth place is still free, and serves one after another.
        (0..50).for_each(|n| assert_eq!(client.read(8192 + n, 100), [0; 100]));
        client.ask(Command::Read, NO_FLAGS, 0, 4096);
        // The fifth is not taken in.
        client.ask(Command::Read, NO_FLAGS, 8192, 100);
        client.stream.limit(Duration::from_millis(100));
        assert!(!client.has_answer(), "{style:?}: a fifth request was taken in");
        let before = server.resident();
        assert_stops_taking_in(&mut client, "four in flight");
        assert!(server.resident() < before + (4 << 20), "{style:?}: what is not taken in costs memory");
        // Others do not notice.
        server.assert_alive_at(8192);
    }
}

#[test]
fn a_client_that_never_reads_costs_its_budget_and_is_cut_off() {
    let server = Server::serve(&["mem:64M", "--memory-budget", "128M", "--send-timeout", "1500ms"]);
    let mut other = server.client(ReplyStyle::Structured);
    other.write(0, &vec![0xaa; 32 << 20]);
    let before = server.resident();
    for style in STYLES {
        let mut client = server.client(style);
        let read = client.request(Command::Read, NO_FLAGS, 0, 32 * MIB);
        let mut bytes = Vec::new();
        for n in 0..10_000 {
            Request { cookie: n, ..read }.encode(style.extended(), &mut bytes);
        }
        let start = Instant::now();
        client.stream.send_until_blocked(&bytes, Duration::from_millis(300));
        let (mut peak, mut served) = (0, 0);
        while start.elapsed() < Duration::from_millis(1200) {
            other.write(40 * MIB, &[1; 4096]);
            served += 1;
            peak = peak.max(server.resident());
            thread::sleep(Duration::from_millis(5));
        }
        assert!(served >= 5, "{style:?}: others went on slowly: {served}");
        // A quarter of the budget, what threads keep of used buffers (20 MiB), and something for the allocator.
        let cost = peak.saturating_sub(before);
        assert!(cost < 60 << 20, "{style:?}: one client that never reads costs {} MiB", cost >> 20);
        eventually("it is cut off", || client.stream.refuses_bytes());
        assert!(start.elapsed() > Duration::from_millis(1400), "{style:?}: cut off too early");
        assert_eq!(other.read(40 * MIB, 4096), [1; 4096]);
    }
}
