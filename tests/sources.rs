//! Random requests against every kind of source, checked against a model: the same bytes come back from each, odd
//! sizes and offsets included, and in the end the file holds them.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};

use nbd_proto::{Command, CommandFlags, NbdError, OptionCode, ReplyStyle};
use support::{Client, Loop, NO_FLAGS, Negotiation, Random, STYLES, Server, go_data, refusal, text};

#[test]
fn a_start_that_fails_leaves_no_image_behind() {
    let folder = tempfile::tempdir().unwrap();
    for (name, format) in [("new.img", "raw"), ("new.qcow2", "qcow2")] {
        let image = folder.path().join(name);
        let args = [text(&image), "--create", "1M", "-f", format];
        refusal(&args);
        assert!(!image.exists(), "the socket's folder does not exist");
        refusal(&[&args[..], &["--export", "b=/nonexistent/image"]].concat());
        assert!(!image.exists());
        Server::serve(&args).stop();
        refusal(&args);
        assert!(image.exists(), "it was there before");
    }
}

#[test]
fn one_file_for_two_uses_is_called_that() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    fs::write(&image, [0; 8192]).unwrap();
    let (image, export) = (text(&image), format!("b={}", text(&image)));
    let line = refusal(&[image, "--export", &export]);
    assert!(line.contains("this process has it open already") && !line.contains("another process"), "{line}");
    Server::serve(&[image, "--export", &export, "-r"]).stop();
    assert!(refusal(&[image, "--overlay", image]).contains("is the image itself"));
}

#[test]
fn refusals_of_the_system_are_told_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, [1; 4096]).unwrap();
    let line = refusal(&[text(&file.join("below")), "-f", "raw"]);
    assert_eq!(line.matches("os error").count(), 1, "{line}");
    let line = refusal(&[text(&file), "-r", "-f", "vmdk"]);
    assert!(line.contains("is not a vmdk image"), "{line}");
}

/// The minimum block that the server demands.
fn min_block(negotiation: &mut Negotiation) -> u64 {
    let replies = negotiation.option(OptionCode::Info, &go_data("", &[3]));
    let sizes = replies.iter().find(|(_, data)| data.starts_with(&[0, 3])).unwrap();
    u64::from(u32::from_be_bytes(sizes.1[2..6].try_into().unwrap()))
}

/// Does random things in every style; gives what must be there then.
fn exercise(server: &Server, mut model: Vec<u8>, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    for style in STYLES {
        let block = min_block(&mut server.negotiate());
        let mut client = server.client(style);
        assert_eq!(client.size, model.len() as u64);
        for _ in 0..60 {
            step(&mut client, &mut random, block, &mut model);
        }
        client.flush();
    }
    model
}

fn step(client: &mut Client, random: &mut Random, block: u64, model: &mut [u8]) {
    let size = model.len() as u64;
    let most = random.pick(&[16, 5000, 70_000, 600_000]).min(size - 1);
    let offset = random.below(size - most) / block * block;
    let length = ((random.below(most) + 1).next_multiple_of(block)).min(size - offset);
    let (start, end) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
    let fua = if random.below(4) == 0 { CommandFlags::FUA } else { NO_FLAGS };
    match random.below(6) {
        0 | 1 => {
            let data = random.bytes(end - start);
            assert_eq!(client.call_write(fua, offset, &data).error, None, "{offset} {length}");
            model[start..end].copy_from_slice(&data);
        }
        2 => {
            let hole = if random.below(2) == 0 { CommandFlags::NO_HOLE } else { NO_FLAGS };
            assert_eq!(client.call(Command::WriteZeroes, fua | hole, offset, length).error, None);
            model[start..end].fill(0);
        }
        3 => {
            assert_eq!(client.call(Command::Trim, fua, offset, length).error, None);
            // What is trimmed reads as anything; here it is either as before, or zeroes, byte for byte.
            let now = client.read(offset, length);
            let legal = now.iter().zip(&model[start..end]).all(|(now, before)| *now == 0 || now == before);
            assert!(legal, "a trim of {length} at {offset} made new data");
            model[start..end].copy_from_slice(&now);
        }
        _ => {
            assert!(client.read(offset, length) == model[start..end], "{offset} {length} {:?}", client.style);
        }
    }
}

fn image(place: &str, size: usize) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
    let folder = tempfile::tempdir_in(place).unwrap();
    let path = folder.path().join("disk.img");
    let content = Random::new(0x5eed_6000).bytes(size);
    fs::write(&path, &content).unwrap();
    (folder, path, content)
}

fn check_file(path: &Path, expected: &[u8]) {
    assert!(fs::read(path).unwrap() == expected, "the file holds something else");
}

#[test]
fn memory() {
    for size in [65_536, 1_000_003, 4 << 20] {
        let server = Server::serve(&[&format!("mem:{size}")]);
        exercise(&server, vec![0; size], 0x5eed_6001);
    }
}

/// Images of even and odd sizes in a folder of `place`, served with these flags.
fn check_files(place: &str, flags: &[&str], seed: u64) {
    for size in [1_048_576, 1_000_003, 1_000_448] {
        let (_folder, path, content) = image(place, size);
        let server = match Server::try_serve(&[&[text(&path)], flags].concat()) {
            Ok(server) => server,
            // Direct I/O of an odd size may be refused, in one line.
            Err(log) if flags.iter().any(|flag| ["none", "directsync"].contains(flag)) => {
                assert!(size % 512 != 0 && log.lines().count() == 1, "{flags:?} {size}: {log}");
                continue;
            }
            Err(log) => panic!("{flags:?} {size}: {log}"),
        };
        let model = exercise(&server, content, seed);
        server.stop();
        check_file(&path, &model);
    }
}

#[test]
fn files_on_tmpfs() {
    check_files("/dev/shm", &[], 0x5eed_6010);
    check_files("/dev/shm", &["--aio", "threads"], 0x5eed_6011);
}

#[test]
fn files_on_disk() {
    check_files("/var/tmp", &[], 0x5eed_6012);
    check_files("/var/tmp", &["--aio", "threads"], 0x5eed_6013);
    check_files("/var/tmp", &["--aio", "io_uring"], 0x5eed_6014);
    check_files("/var/tmp", &["--discard", "ignore"], 0x5eed_6015);
}

#[test]
fn files_past_the_page_cache() {
    check_files("/var/tmp", &["--cache", "none"], 0x5eed_6016);
    check_files("/var/tmp", &["--cache", "none", "--aio", "threads"], 0x5eed_6017);
}

#[test]
fn files_in_the_other_cache_modes() {
    check_files("/var/tmp", &["--cache", "directsync"], 0x5eed_6018);
    check_files("/var/tmp", &["--cache", "writethrough"], 0x5eed_6019);
    check_files("/var/tmp", &["--cache", "unsafe"], 0x5eed_601a);
}

#[test]
fn part_of_a_file() {
    for offset in [512, 1_000, 65_536] {
        let (_folder, path, content) = image("/var/tmp", 2_000_000);
        let server = Server::serve(&[text(&path), "-o", &offset.to_string()]);
        let model = exercise(&server, content[offset..].to_vec(), 0x5eed_6003);
        server.stop();
        check_file(&path, &[&content[..offset], &model[..]].concat());
    }
}

#[test]
fn unaligned_requests_of_a_source_with_blocks() {
    let (_folder, path, content) = image("/var/tmp", 1 << 20);
    let server = Server::serve(&[text(&path), "--cache", "none"]);
    let block = min_block(&mut server.negotiate());
    for style in STYLES {
        let mut client = server.client(style);
        for (offset, length) in [(1, 512), (0, 511), (4095, 2), (512, 1000)] {
            let answer = client.call(Command::Read, NO_FLAGS, offset, length);
            let (start, end) = (usize::try_from(offset).unwrap(), usize::try_from(offset + length).unwrap());
            if block == 1 {
                assert!(answer.data == content[start..end]);
            } else {
                assert_eq!(answer.error, Some(NbdError::Inval), "{style:?} {offset} {length}");
            }
            let answer = client.call_write(NO_FLAGS, offset, &content[start..end]);
            assert_eq!(answer.error, (block > 1).then_some(NbdError::Inval));
        }
        assert!(client.read(0, 1 << 20) == content);
    }
}

#[test]
fn empty_images() {
    let (_folder, path, _) = image("/var/tmp", 0);
    for source in ["mem:0", text(&path)] {
        let server = Server::serve(&[source]);
        for style in STYLES {
            let mut client = server.client(style);
            assert_eq!(client.size, 0);
            assert_eq!(client.call(Command::Read, NO_FLAGS, 0, 1).error, Some(NbdError::Inval));
            assert_eq!(client.call_write(NO_FLAGS, 0, &[1]).error, Some(NbdError::NoSpc));
            client.flush();
        }
    }
}

#[test]
fn a_block_device() {
    let (_folder, path, content) = image("/var/tmp", 4 << 20);
    let Some(device) = Loop::new(&path, &[]) else {
        eprintln!("SKIP: a_block_device: no loop devices here");
        return;
    };
    let mut model = content;
    for flags in [&[][..], &["--cache", "none"]] {
        let server = Server::serve(&[&[&device.0[..]], flags].concat());
        model = exercise(&server, model, 0x5eed_6004);
        server.stop();
    }
    drop(device);
    check_file(&path, &model);
}

/// The file is made shorter behind the server's back: reads fail, and everybody lives on.
#[test]
fn an_image_that_shrinks() {
    for place in ["/dev/shm", "/var/tmp"] {
        let (_folder, path, content) = image(place, 4 << 20);
        let server = Server::serve(&[text(&path)]);
        for style in STYLES {
            fs::write(&path, &content).unwrap();
            let mut client = server.client(style);
            assert!(client.read(0, 4 << 20) == content);
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
            for (offset, length) in [(2 << 20, 4096), (2 << 20, 1 << 20), (0, 4 << 20)] {
                let mut client = server.client(style);
                client.ask(Command::Read, NO_FLAGS, offset, length);
                // An error, zeroes where the data was, or the end of this connection; never old data.
                if let Some(answer) = client.answer_or_end() {
                    let kept = if offset == 0 { 1 << 20 } else { 0 };
                    let zero = answer.data.iter().skip(kept).all(|byte| *byte == 0);
                    assert!(answer.error.is_some() || zero, "{place} {style:?}");
                }
            }
            let mut client = server.client(ReplyStyle::Structured);
            assert!(client.read(0, 4096) == content[..4096]);
        }
    }
}
