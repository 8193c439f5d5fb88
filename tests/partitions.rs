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
use support::{Loop, Server, lacks, refusal, run, text};

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
