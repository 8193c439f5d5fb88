//! Partitions as sfdisk and sgdisk make them.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command as Program, Stdio};

use nbd_proto::ReplyStyle;
use support::{Loop, PROGRAM, Server, lacks, refusal, run, text};

const MIB: u64 = 1 << 20;

fn sfdisk(path: &Path, script: &str) {
    let mut child = Program::new("sfdisk")
        .args(["-q", "--no-reread", "--no-tell-kernel", text(path)])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{script}");
}

/// Serves each of the partitions (number, start, length, in bytes), writes into it, and looks where that went.
fn check_partitions(path: &Path, expected: &[(u32, u64, u64)], others: &str) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    for (number, start, len) in expected {
        let server = Server::serve(&[text(path), "-P", &number.to_string()]);
        let mut client = server.client(ReplyStyle::Structured);
        assert_eq!(client.size, *len, "partition {number}");
        let mark = [u8::try_from(*number).unwrap(); 512];
        client.write(0, &mark);
        client.write(len - 512, &mark);
        for place in [*start, start + len - 512] {
            let mut found = [0; 512];
            file.read_exact_at(&mut found, place).unwrap();
            assert_eq!(found, mark, "partition {number}");
        }
        server.stop();
    }
    let told = run(PROGRAM, &["info", text(path)]);
    for (number, start, _) in expected {
        let line = |line: &str| {
            line.trim_start().starts_with(&format!("{number} "))
                && line.contains(&format!(" from byte {start},"))
        };
        assert!(told.lines().any(line), "{told}");
    }
    let line = refusal(&[text(path), "-P", "99"]);
    assert!(line.ends_with(&format!("has no partition 99; {others}\n")), "{line}");
}

#[test]
fn partitions_as_sfdisk_and_sgdisk_make_them() {
    if lacks("partitions_as_sfdisk_and_sgdisk_make_them", &["sfdisk", "sgdisk"]) {
        return;
    }
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = folder.path().join("disk.img");
    let fresh = || File::create(&path).unwrap().set_len(64 * MIB).unwrap();
    fresh();
    // 2 is the extended one, which holds 5 and 6.
    let script: String = [
        (1, "start=2048, size=8192, type=83"),
        (2, "start=12288, size=81920, type=5"),
        (3, "start=98304, size=4096, type=c"),
        (5, "start=14336, size=10240, type=83"),
        (6, "start=28672, size=4096, type=82"),
    ]
    .iter()
    .map(|(number, place)| format!("{}{number} : {place}\n", text(&path)))
    .collect();
    sfdisk(&path, &format!("label: dos\n{script}"));
    let sectors = |list: &[(u32, u64, u64)]| -> Vec<_> {
        list.iter().map(|(number, start, len)| (*number, start * 512, len * 512)).collect()
    };
    let expected = sectors(&[(1, 2048, 8192), (3, 98_304, 4096), (5, 14_336, 10_240), (6, 28_672, 4096)]);
    check_partitions(&path, &expected, "there are 1, 3, 5 and 6");

    fresh();
    run("sgdisk", &["-n", "1:2048:+8M", "-n", "7:40960:+1M", "-c", "7:seven", text(&path)]);
    let expected = sectors(&[(1, 2048, 16_384), (7, 40_960, 2048)]);
    check_partitions(&path, &expected, "there are 1 and 7");
    // Its first sectors are gone: the copy at the end is there.
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 16_384], 512).unwrap();
    let server = Server::serve(&[text(&path), "-P", "7", "-s"]);
    assert_eq!(server.client(ReplyStyle::Structured).size, MIB);
    assert!(server.log().contains("the copy at the end"), "{}", server.log());
    drop(server);
    // The end is gone as well.
    file.set_len(32 * MIB).unwrap();
    let line = refusal(&[text(&path), "-P", "7"]);
    assert!(line.contains("broken GPT"), "{line}");

    // Sectors of 4096 bytes, which only a device tells sgdisk of.
    fresh();
    match Loop::new(&path, &["--sector-size", "4096"]) {
        Some(device) => {
            run("sgdisk", &["-n", "1:256:+2M", &device.0]);
            drop(device);
            check_partitions(&path, &[(1, MIB, 2 * MIB)], "there is only 1");
        }
        None => eprintln!(
            "SKIP: partitions_as_sfdisk_and_sgdisk_make_them: no loop device with sectors of 4096 bytes"
        ),
    }
    let line = refusal(&["mem:1M", "-P", "1"]);
    assert!(line.contains("mem:1048576: has no partition table"), "{line}");
}

/// A boot record with one partition.
fn one_partition(path: &Path, start: u32, len: u32) {
    let mut boot = [0; 512];
    boot[450] = 0x83;
    boot[454..458].copy_from_slice(&start.to_le_bytes());
    boot[458..462].copy_from_slice(&len.to_le_bytes());
    boot[510..].copy_from_slice(&[0x55, 0xaa]);
    let file = File::create(path).unwrap();
    file.set_len(64 * MIB).unwrap();
    file.write_all_at(&boot, 0).unwrap();
    for sector in [512, 4096] {
        file.write_all_at(&u64::to_le_bytes(sector), sector * u64::from(start)).unwrap();
    }
}

/// What a partition's start says of the sectors that were counted.
fn counted(args: &[&str]) -> u64 {
    let server = Server::serve(&[args, &["-r", "-P", "1"]].concat());
    let mut client = server.client(ReplyStyle::Structured);
    let told = u64::from_le_bytes(client.read(0, 4096)[..8].try_into().unwrap());
    assert_eq!(client.size, told * 1000);
    client.disconnect();
    server.stop();
    told
}

#[test]
fn mbr_counts_in_the_sectors_of_the_device() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = folder.path().join("disk.img");
    one_partition(&path, 64, 1000);
    assert_eq!(counted(&[text(&path)]), 512);
    assert_eq!(counted(&[text(&path), "--sector-size", "4096"]), 4096);
    // The smallest request that a server takes says nothing about the table.
    if !lacks("mbr_counts_in_the_sectors_of_the_device", &["nbdkit"]) {
        let socket = folder.path().join("nbdkit.sock");
        let mut server = Program::new("nbdkit")
            .args(["-f", "-U", text(&socket), "--filter=blocksize-policy", "file", text(&path)])
            .args(["blocksize-minimum=4096", "blocksize-preferred=4096", "blocksize-maximum=1M"])
            .spawn()
            .unwrap();
        support::eventually("nbdkit listens", || socket.exists());
        let uri = format!("nbd+unix:///?socket={}", text(&socket));
        assert_eq!(counted(&[&uri]), 512);
        assert_eq!(counted(&[&uri, "--sector-size", "4096"]), 4096);
        server.kill().unwrap();
        server.wait().unwrap();
    }
    match Loop::new(&path, &["--sector-size", "4096"]) {
        Some(device) => {
            assert_eq!(counted(&[&device.0]), 4096);
            assert_eq!(counted(&[&device.0, "--sector-size", "512"]), 512);
            assert!(run(PROGRAM, &["info", &device.0]).contains("from byte 262144,"));
        }
        None => eprintln!("SKIP: mbr_counts_in_the_sectors_of_the_device: no loop device"),
    }
    assert!(run(PROGRAM, &["info", text(&path)]).contains("from byte 32768,"));
    assert!(run(PROGRAM, &["info", text(&path), "--sector-size", "4096"]).contains("from byte 262144,"));
    let output = Program::new(PROGRAM).args(["net", text(&path), "-P", "1", "--sector-size", "520"]).output();
    let line = support::one_line(&output.unwrap());
    assert!(line.contains("512, 1024, 2048 or 4096"), "{line}");
}

/// An image that ends before its extended partition still has the others, and says why that one is missing.
#[test]
fn an_image_that_is_cut_before_its_extended_partition() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = folder.path().join("disk.img");
    one_partition(&path, 64, 1000);
    let file = File::options().write(true).open(&path).unwrap();
    let mut entry = [0; 16];
    entry[4] = 5;
    entry[8..12].copy_from_slice(&1_000_000_u32.to_le_bytes());
    entry[12..].copy_from_slice(&1000_u32.to_le_bytes());
    file.write_all_at(&entry, 462).unwrap();
    assert_eq!(counted(&[text(&path)]), 512);
    let line = refusal(&[text(&path), "-P", "5"]);
    assert!(
        line.contains("there is only 1; the list of its logical partitions goes on past the end"),
        "{line}"
    );
    assert!(refusal(&[text(&path), "-P", "2"]).contains("is an extended one"));
    assert!(run(PROGRAM, &["info", text(&path)]).contains("flaw:"));
    let told: serde_json::Value =
        serde_json::from_str(&run(PROGRAM, &["info", "--json", text(&path)])).unwrap();
    let table = &told["partition-table"];
    assert_eq!(table["extended"], serde_json::json!([2]));
    assert!(table["flaw"].as_str().unwrap().contains("past the end"), "{told}");
}
