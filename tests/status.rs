//! Holes: as hole chunks of a read, and as extents of block status, over memory and over files with known holes.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nbd_proto::{Command, CommandFlags, NbdError, ReplyStyle};
use support::{Client, NO_FLAGS, Server, text};

const MIB: u64 = 1 << 20;
const CHUNKS: [ReplyStyle; 2] = [ReplyStyle::Structured, ReplyStyle::Extended];

/// `NBD_STATE_HOLE | NBD_STATE_ZERO`.
const HOLE: u64 = 3;

/// The layout of the test images: each MiB as data or as a hole.
const LAYOUT: [bool; 12] = [false, true, true, false, false, false, true, false, true, true, true, false];

fn content() -> Vec<u8> {
    LAYOUT.iter().flat_map(|data| vec![if *data { 0xd5 } else { 0 }; 1 << 20]).collect()
}

fn make_image(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(12 * MIB).unwrap();
    for (n, data) in LAYOUT.iter().enumerate() {
        if *data {
            file.write_all_at(&[0xd5; 1 << 20], n as u64 * MIB).unwrap();
        }
    }
}

/// A server with the layout in memory, on tmpfs and on disk.
fn serve() -> (Server, Vec<tempfile::TempDir>) {
    let places: Vec<_> =
        ["/dev/shm", "/var/tmp"].iter().map(|place| tempfile::tempdir_in(place).unwrap()).collect();
    let exports: Vec<String> = places
        .iter()
        .zip(["shm", "disk"])
        .map(|(folder, name)| {
            let path = folder.path().join("disk.img");
            make_image(&path);
            format!("{name}={}", text(&path))
        })
        .collect();
    let server = Server::serve(&["mem:12M", "-x", "mem", "--export", &exports[0], "--export", &exports[1]]);
    let mut client = server.negotiate().enter(ReplyStyle::Structured, "mem");
    for (n, _) in LAYOUT.iter().enumerate().filter(|(_, data)| **data) {
        client.write(n as u64 * MIB, &[0xd5; 1 << 20]);
    }
    (server, places)
}

fn state_at(offset: u64) -> u64 {
    if LAYOUT[usize::try_from(offset / MIB).unwrap()] { 0 } else { HOLE }
}

#[test]
fn holes_are_read_as_holes() {
    let (server, _places) = serve();
    let content = content();
    for style in CHUNKS {
        for name in ["mem", "shm", "disk"] {
            let mut client = server.negotiate().enter(style, name);
            for (offset, length) in
                [(0, 12 * MIB), (3 * MIB, 3 * MIB), (512, 2 * MIB), (MIB - 1, 2), (3 * MIB + 17, 4099)]
            {
                let answer = client.call(Command::Read, NO_FLAGS, offset, length);
                let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
                assert!(answer.data == content[range], "{name} {offset} {length}");
                let holes: u64 = answer.pieces.iter().filter(|piece| piece.2).map(|piece| piece.1).sum();
                let zeroes: u64 = (offset..offset + length).filter(|at| state_at(*at) == HOLE).count() as u64;
                // How fine holes are told is the server's choice, and so is what it tells of a file on disk whose
                // pages are in memory; not to tell of whole MiB elsewhere would be a waste.
                if length >= MIB && name != "disk" {
                    assert!(holes >= zeroes.saturating_sub(2 * MIB), "{name}: {:?}", answer.pieces);
                }
                assert!(holes <= zeroes);
            }
            let whole = client.call(Command::Read, CommandFlags::DF, 0, 12 * MIB);
            assert_eq!((whole.error, whole.pieces.len()), (None, 1), "{name}");
            assert!(whole.data == content, "{name}");
        }
    }
    // Simple replies have no holes: the client takes exactly the bytes it asked for.
    for name in ["mem", "shm", "disk"] {
        let mut client = server.negotiate().enter(ReplyStyle::Simple, name);
        assert!(client.read(0, 12 * MIB) == content, "{name}");
    }
}

/// The whole range by as many requests as it takes.
fn walk(client: &mut Client, flags: CommandFlags, start: u64, end: u64) -> Vec<(u64, u64)> {
    let (mut at, mut extents) = (start, Vec::new());
    while at < end {
        let answer = client.call(Command::BlockStatus, flags, at, end - at);
        assert_eq!(answer.error, None);
        for (length, state) in answer.extents {
            extents.push((at, state));
            at += length;
        }
    }
    extents
}

#[test]
fn block_status_tells_the_layout() {
    let (server, _places) = serve();
    for style in CHUNKS {
        for name in ["mem", "shm", "disk"] {
            let mut client = server.negotiate().enter(style, name);
            for flags in [NO_FLAGS, CommandFlags::REQ_ONE] {
                for (start, end) in [(0, 12 * MIB), (MIB + 512, 7 * MIB), (3 * MIB + 1, 3 * MIB + 2)] {
                    let extents = walk(&mut client, flags, start, end);
                    let mut boundaries = extents.iter().map(|(at, state)| {
                        assert_eq!(*state, state_at(*at), "{name} {style:?} at {at}");
                        *at
                    });
                    assert_eq!(boundaries.next(), Some(start));
                    for at in (start / MIB + 1..end.div_ceil(MIB)).map(|n| n * MIB) {
                        let told = extents.iter().any(|(start, _)| *start == at);
                        let changes = state_at(at) != state_at(at - 1);
                        assert!(told || !changes, "{name}: nothing told of the change at {at}: {extents:?}");
                    }
                }
            }
            for (offset, length) in [(12 * MIB, 1), (0, 12 * MIB + 1), (u64::MAX, 2)] {
                let answer = client.call(Command::BlockStatus, NO_FLAGS, offset, length);
                assert_eq!(answer.error, Some(NbdError::Inval), "{name} {offset}");
            }
            assert_eq!(client.read(0, 512), [0; 512]);
        }
    }
}

#[test]
fn block_status_without_contexts() {
    let server = Server::serve(&["mem:1M"]);
    let mut simple = server.client(ReplyStyle::Simple);
    let answer = simple.call(Command::BlockStatus, NO_FLAGS, 0, 512);
    assert_eq!(answer.error, Some(NbdError::Inval));
    for style in CHUNKS {
        let mut negotiation = server.negotiate();
        negotiation.settle(style);
        let mut client = negotiation.go(style, "");
        for length in [512, 1 << 20] {
            let answer = client.call(Command::BlockStatus, NO_FLAGS, 0, length);
            assert_eq!(answer.error, Some(NbdError::Inval), "{style:?}");
        }
        assert_eq!(client.read(0, 512), [0; 512]);
    }
}

/// CVE-2025-47711 and -47712: lengths near 2^32, and the extent that is one too long.
#[test]
fn block_status_near_4_gib() {
    const GIB4: u64 = 1 << 32;
    let server = Server::serve(&["mem:1T", "--export", "null=null:7E"]);
    for name in ["", "null"] {
        for style in CHUNKS {
            let mut client = server.negotiate().enter(style, name);
            for length in [GIB4 - 1, GIB4 - 512, GIB4 - 65536, GIB4 - 4096 + 1] {
                for offset in [0, 1, 512, GIB4 - 1, GIB4] {
                    for flags in [NO_FLAGS, CommandFlags::REQ_ONE] {
                        let answer = client.call(Command::BlockStatus, flags, offset, length);
                        assert_eq!(answer.error, None, "{style:?} {offset} {length}");
                        let told: u64 = answer.extents.iter().map(|extent| extent.0).sum();
                        assert!(told <= (1 << 40).max(client.size) - offset);
                    }
                }
            }
        }
        let mut client = server.negotiate().enter(ReplyStyle::Extended, name);
        for length in [GIB4, GIB4 + 1, 1 << 40] {
            let answer = client.call(Command::BlockStatus, CommandFlags::REQ_ONE, 0, length);
            assert_eq!((answer.error, answer.extents.len()), (None, 1));
            assert_eq!(answer.extents[0].0, length, "one hole, told whole with 64 bits");
        }
        let size = client.size;
        assert_eq!(walk(&mut client, NO_FLAGS, 0, size).len(), 1);
    }
}

#[test]
fn more_extents_than_an_answer_holds() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("disk.img");
    let file = File::create(&path).unwrap();
    let size = 10_000 * 8192;
    file.set_len(size).unwrap();
    (0..10_000).for_each(|n| file.write_all_at(&[1; 4096], n * 8192).unwrap());
    let server = Server::serve(&[text(&path)]);
    for style in CHUNKS {
        let mut client = server.client(style);
        let extents = walk(&mut client, NO_FLAGS, 0, size);
        assert_eq!(extents.len(), 20_000);
        for (n, (at, state)) in extents.iter().enumerate() {
            assert_eq!((*at, *state), (n as u64 * 4096, if n % 2 == 0 { 0 } else { HOLE }));
        }
        // The same as chunks of a read.
        let data = client.read(0, 16 * MIB);
        assert!(data.chunks(4096).enumerate().all(|(n, page)| page == [u8::from(n % 2 == 0); 4096]));
    }
}
