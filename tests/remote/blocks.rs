//! Servers that take only whole blocks, of 512 bytes to 64 KiB: every door asks them for whole blocks, however requests
//! are cut. nbdkit's policy filter answers EINVAL to anything else.

use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use nbd_proto::{Command as NbdCommand, CommandFlags, ReplyStyle};

use super::{MIB, Peer};
use crate::support::mount::{Mount, missing, nbdbridge};
use crate::support::{Client, NO_FLAGS, Random, STYLES, Server, need};

const SIZE: usize = 8 * MIB;
const BLOCKS: [usize; 4] = [512, 4096, 8192, 65_536];

fn strict(block: usize) -> Peer {
    let minimum = format!("blocksize-minimum={block}");
    let policy = ["blocksize-preferred=64K", "blocksize-maximum=32M", "blocksize-error-policy=error"];
    Peer::nbdkit(&[&["--filter=blocksize-policy", "memory", "8M", &minimum], &policy[..]].concat())
}

/// A range of whole blocks, up to 2 MiB long.
fn range(random: &mut Random, block: usize) -> (usize, usize) {
    let len = block * (1 + random.index(2 * MIB / block));
    let start = block * random.index((SIZE - len) / block + 1);
    (start, len)
}

#[test]
fn requests_are_cut_at_blocks() {
    need!("requests_are_cut_at_blocks", "nbdkit");
    for block in BLOCKS {
        let peer = strict(block);
        let server = Server::serve(&[&peer.uri()]);
        let mut random = Random::new(0x5eed_7201);
        for style in STYLES {
            let mut model = vec![0; SIZE];
            let mut client = server.client(style);
            client.write(0, &model);
            for round in 0..12 {
                let (start, len) = range(&mut random, block);
                let flags = if round % 3 == 0 { CommandFlags::FUA } else { NO_FLAGS };
                if round % 6 == 5 {
                    let answer = client.call(NbdCommand::WriteZeroes, flags, start as u64, len as u64);
                    assert_eq!(answer.error, None, "{block} {style:?} {start} {len}");
                    model[start..start + len].fill(0);
                } else {
                    let data = random.bytes(len);
                    let answer = client.call_write(flags, start as u64, &data);
                    assert_eq!(answer.error, None, "{block} {style:?} {start} {len}");
                    model[start..start + len].copy_from_slice(&data);
                }
            }
            assert!(client.read(0, SIZE as u64) == model, "{block} {style:?}");
            short_of_memory(client, &model, block);
        }
    }
}

/// More reads in flight than a connection has memory for: they are done in small pieces.
fn short_of_memory(mut client: Client, model: &[u8], block: usize) {
    let mut asked = Vec::new();
    for n in 0..24 {
        let (start, len) = (block * n, 2 * MIB - 65_536);
        let cookie = client.ask(NbdCommand::Read, NO_FLAGS, start as u64, len as u64);
        asked.push((cookie, start, len));
    }
    for _ in 0..asked.len() {
        let answer = client.answer();
        let (_, start, len) = asked.iter().find(|(cookie, ..)| *cookie == answer.cookie).unwrap();
        assert_eq!(answer.error, None, "{block} {start}");
        assert!(answer.data == model[*start..start + len], "{block} {start}");
    }
}

/// Reads and writes of any place and length, in units of `unit`, against a model.
fn any_place(path: &Path, unit: usize, direct: bool, block: usize) {
    let flags = if direct { libc::O_DIRECT } else { 0 };
    let file = std::fs::File::options().read(true).write(true).custom_flags(flags).open(path).unwrap();
    let mut random = Random::new(0x5eed_7202);
    let mut model = vec![0; SIZE];
    // O_DIRECT needs memory at an address that suits it.
    let mut memory = vec![0; MIB + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    for _ in 0..60 {
        let len = unit * (1 + random.index(if unit == 1 { 200_000 } else { MIB / unit }));
        let start = unit * random.index((SIZE - len) / unit + 1);
        let data = random.bytes(len);
        memory[skip..skip + len].copy_from_slice(&data);
        file.write_all_at(&memory[skip..skip + len], start as u64)
            .unwrap_or_else(|error| panic!("{block} {start} {len}: {error}"));
        model[start..start + len].copy_from_slice(&data);
        let from = start.saturating_sub(unit);
        let part = &mut memory[skip..][..(len + unit).min(SIZE - from).min(MIB)];
        file.read_exact_at(part, from as u64).unwrap();
        assert!(*part == model[from..from + part.len()], "{block} {start} {len}");
    }
    file.sync_all().unwrap();
}

#[test]
fn a_file_and_a_device_of_any_unit_over_blocks() {
    const TEST: &str = "a_file_and_a_device_of_any_unit_over_blocks";
    need!("a_file_and_a_device_of_any_unit_over_blocks", "nbdkit");
    if missing(TEST, &["losetup"]) {
        return;
    }
    for block in BLOCKS {
        let peer = strict(block);
        let mut mount = Mount::at(tempfile::tempdir().unwrap(), &peer.uri(), "file", &[]);
        any_place(&mount.path, 1, false, block);
        mount.stop();
        drop(mount);

        for door in ["fuse", "auto"] {
            let (folder, peer) = (tempfile::tempdir().unwrap(), strict(block));
            let mut command = nbdbridge(folder.path(), &["attach", "--foreground", "--door", door]);
            let device = Mount::start(folder, command.arg(peer.uri()), 1);
            // Blocks of more than a page are for FUSE and a loop device, also where there is ublk.
            assert!(block <= 4096 || device.path.to_string_lossy().starts_with("/dev/loop"), "{block}");
            // By ublk, a device's own blocks.
            let unit =
                if device.path.to_string_lossy().starts_with("/dev/loop") { 512 } else { block.max(512) };
            any_place(&device.path, unit, true, block);
        }
    }
}

#[test]
fn a_part_of_whole_blocks_is_served_and_another_one_is_refused() {
    need!("a_part_of_whole_blocks_is_served_and_another_one_is_refused", "nbdkit");
    let peer = strict(8192);
    let uri = peer.uri();
    let server = Server::serve(&[&uri, "--offset", "8K", "--size", "1M"]);
    let mut client = server.client(ReplyStyle::Structured);
    client.write(0, &vec![3; MIB]);
    assert!(client.read(0, MIB as u64) == vec![3; MIB]);
    for part in [["--offset", "4K"], ["--size", "1028K"]] {
        let said = Server::try_serve(&[&[uri.as_str()], &part[..]].concat()).err().unwrap();
        assert!(said.contains("blocks of 8192 bytes") && said.lines().count() == 1, "{said}");
    }
}
