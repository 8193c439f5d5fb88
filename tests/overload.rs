//! Peers that take more than their share: of time, of descriptors, of memory, of the disk. Everybody else goes on.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::{Command, CommandFlags, NbdError, OptionCode, ReplyStyle, put_option};
use support::{NO_FLAGS, Negotiation, STYLES, Server, Stream, eventually, text};

const MIB: u64 = 1 << 20;

#[test]
fn a_slow_handshake_is_cut_off() {
    let server = Server::serve(&["mem:1M", "--handshake-limit", "600ms"]);
    let mut idle = server.client(ReplyStyle::Structured);
    let start = Instant::now();
    let mut silent = server.stream();
    let mut slow = server.negotiate();
    let mut option = Vec::new();
    put_option(OptionCode::Unknown(50), &[0; 1000], &mut option);
    // A byte now and then must not buy time.
    let cut_off = option.iter().position(|byte| {
        thread::sleep(Duration::from_millis(10));
        slow.stream.write_all(&[*byte]).is_err()
    });
    assert!(cut_off.is_some(), "a trickle of bytes is waited for without end");
    assert!(start.elapsed() > Duration::from_millis(550), "too early: {:?}", start.elapsed());
    assert!(start.elapsed() < Duration::from_millis(2500), "too late: {:?}", start.elapsed());
    assert!(silent.is_closed());
    assert_eq!(idle.read(0, 512), [0; 512], "one that is in may be idle");
}

#[test]
fn floods_of_options() {
    let exports: Vec<String> = (0..20).map(|n| format!("{}{n}=null:1M", "x".repeat(4000))).collect();
    let mut args = vec!["mem:1M", "--handshake-limit", "1500ms"];
    exports.iter().for_each(|export| args.extend(["--export", export]));
    let server = Server::serve(&args);
    server.assert_alive();
    let before = server.resident();
    let mut other = server.client(ReplyStyle::Structured);
    for option in [OptionCode::List, OptionCode::Unknown(50), OptionCode::ListMetaContext] {
        let mut bytes = Vec::new();
        (0..100_000).for_each(|_| put_option(option, b"", &mut bytes));
        // Without reading the answers: 80 KB for each LIST.
        let mut floods: Vec<Negotiation> = (0..8).map(|_| server.negotiate()).collect();
        for flood in &mut floods {
            flood.stream.limit(Duration::from_millis(100));
            let _ = flood.stream.write_all(&bytes);
        }
        assert_eq!(other.read(0, 512), [0; 512]);
        let cost = server.resident().saturating_sub(before);
        assert!(cost < 8 << 20, "{option:?}: {} KiB for 8 floods", cost >> 10);
        for flood in &mut floods {
            eventually("the flood is cut off", || flood.stream.refuses_bytes());
        }
        // With reading: the number of options has a limit.
        let mut reading = server.negotiate();
        let mut sender = reading.stream.again();
        let sending = thread::spawn(move || sender.write_all(&bytes).is_err());
        let mut replies = 0;
        while reading.reply().is_some() {
            replies += 1;
        }
        assert!(replies < 50_000, "{option:?}: {replies} replies");
        assert!(sending.join().unwrap());
    }
}

/// A client in the midst of a large write holds no more than what it has sent lately.
#[test]
fn sixteen_that_trickle_large_writes_do_not_stop_a_seventeenth() {
    for fault in ["op=write,delay-ms=1,delay-rate=1", "op=flush,delay-ms=1,delay-rate=1"] {
        let server = Server::serve(&["mem:64M", "--memory-budget", "128M", "--fault", fault]);
        let mut tricklers: Vec<_> = (0..16).map(|n| server.client(STYLES[n % 3])).collect();
        for client in &mut tricklers {
            let write = client.request(Command::Write, NO_FLAGS, 32 * MIB, 32 * MIB);
            let header = client.prepare(write);
            client.stream.write_all(&header).unwrap();
            client.stream.write_all(&vec![1; 700_000]).unwrap();
        }
        for style in STYLES {
            let start = Instant::now();
            let mut client = server.client(style);
            client.write(0, &vec![3; 32 << 20]);
            for trickler in &mut tricklers {
                trickler.stream.write_all(&[1; 100]).unwrap();
            }
            assert!(client.read(0, 32 * MIB) == vec![3; 32 << 20]);
            assert!(start.elapsed() < Duration::from_secs(8), "{style:?}: {:?}", start.elapsed());
        }
        assert!(server.resident() < 350 << 20, "{} MiB", server.resident() >> 20);
        // And in the end each of them gets its answer.
        let mut last = tricklers.pop().unwrap();
        last.stream.write_all(&vec![1; (32 << 20) - 700_300]).unwrap();
        assert_eq!(last.answer().error, None);
    }
}

/// Reads that storage answers at once are work all the same, and others get their turn between them.
#[test]
fn large_reads_do_not_starve_others() {
    for source in ["mem:1G", "null:1G"] {
        let server = Server::serve(&[source, "--workers", "1"]);
        let mut other = server.client(ReplyStyle::Structured);
        let mut greedy = server.client(ReplyStyle::Structured);
        for n in 0..128 {
            greedy.ask(Command::Read, NO_FLAGS, n % 16, 32 * MIB);
        }
        for _ in 0..3 {
            let start = Instant::now();
            other.read(0, 512);
            assert!(
                start.elapsed() < Duration::from_secs(3),
                "{source}: {:?} for 512 bytes",
                start.elapsed()
            );
        }
    }
}

/// A server whose whole budget waits for clients who do not read.
fn with_greedy_clients() -> (Server, Vec<support::Client>) {
    let server = Server::serve(&["mem:64M", "--memory-budget", "128M"]);
    server.client(ReplyStyle::Simple).write(0, &vec![3; 32 << 20]);
    let mut greedy: Vec<_> = (0..24).map(|n| server.client(STYLES[n % 3])).collect();
    for client in &mut greedy {
        for n in 0..64 {
            client.ask(Command::Read, NO_FLAGS, n % 32 * MIB, MIB);
        }
    }
    thread::sleep(Duration::from_millis(300));
    (server, greedy)
}

#[test]
fn greedy_clients_do_not_keep_new_ones_out() {
    let (server, _greedy) = with_greedy_clients();
    for style in STYLES {
        let start = Instant::now();
        let mut late = server.client(style);
        assert!(late.read(MIB, 4096) == [3; 4096]);
        late.write(40 * MIB, &[1; 4096]);
        late.write(41 * MIB, &[1; 2 << 20]);
        assert!(late.read(0, 2 * MIB) == vec![3; 2 << 20]);
        if style != ReplyStyle::Simple {
            let whole = late.call(Command::Read, CommandFlags::DF, 0, 2 * MIB);
            assert!(whole.data == vec![3; 2 << 20]);
        }
        late.flush();
        assert!(start.elapsed() < Duration::from_secs(5), "{style:?}: {:?}", start.elapsed());
    }
}

#[test]
fn more_connections_than_descriptors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    std::fs::write(&path, vec![4; 8 << 20]).unwrap();
    let server = Server::serve_with_files(64, &[text(&path), "-p", "0", "--handshake-limit", "60s"]);
    let mut early = server.client(ReplyStyle::Structured);
    let unix: Vec<Stream> = (0..100).map(|_| server.stream()).collect();
    let tcp: Vec<Stream> = (0..100).map(|_| Stream::tcp(server.address()).unwrap()).collect();
    thread::sleep(Duration::from_millis(200));
    let before = server.processor_time();
    thread::sleep(Duration::from_millis(600));
    let used = server.processor_time() - before;
    assert!(used < Duration::from_millis(250), "accept spins: {used:?} of processor time");
    // Who is in goes on, with operations that are new to this server too.
    early.write(0, &[9; 4096]);
    early.flush();
    assert!(early.read(4096, 4 * MIB) == vec![4; 4 << 20]);
    assert_eq!(early.call(Command::WriteZeroes, NO_FLAGS, 4096, 4096).error, None);
    assert_eq!(early.call(Command::BlockStatus, NO_FLAGS, 0, 8 * MIB).error, None);
    drop((unix, tcp));
    server.assert_alive();
    Negotiation::begin(Stream::tcp(server.address()).unwrap()).enter(ReplyStyle::Extended, "").flush();
    server.stop();
}

/// A file system of this many bytes, until it is dropped; None where mounting is not allowed.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(bytes: u64) -> Option<Mount> {
        let folder = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "none"]).arg(folder.path());
        let done = mount.stderr(std::process::Stdio::null()).status();
        done.is_ok_and(|status| status.success()).then(|| Mount(folder))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_enospc_and_room_helps() {
    let Some(mount) = Mount::new(4 << 20) else {
        eprintln!("SKIP: a_full_disk_is_enospc_and_room_helps: cannot mount a tmpfs here");
        return;
    };
    let path = mount.path().join("disk.img");
    for aio in ["auto", "threads"] {
        let server = Server::serve(&[text(&path), "--create", "16M", "--aio", aio]);
        for style in STYLES {
            let mut client = server.client(style);
            let mut stored = Vec::new();
            let full = (0..16).find(|n| {
                let answer = client.call_write(NO_FLAGS, n * MIB, &[7; 1 << 20]);
                let full = answer.error == Some(NbdError::NoSpc);
                assert!(full || answer.error.is_none(), "{:?}", answer.error);
                if !full {
                    stored.push(n * MIB);
                }
                full
            });
            assert!(full.is_some_and(|n| n >= 2), "{style:?} {aio}: full after {full:?} MiB");
            let small = client.call_write(NO_FLAGS, 15 * MIB, &[7; 65536]);
            assert!(matches!(small.error, None | Some(NbdError::NoSpc)));
            for offset in stored {
                assert!(client.read(offset, MIB) == vec![7; 1 << 20], "{style:?}: lost");
            }
            assert_eq!(client.call(Command::Trim, NO_FLAGS, 0, 16 * MIB).error, None);
            client.write(8 * MIB, &[8; 1 << 20]);
            assert_eq!(client.call(Command::Trim, NO_FLAGS, 0, 16 * MIB).error, None);
            client.flush();
        }
        server.stop();
    }
}
