//! Memory that an image decides about: compressed clusters and tables.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nbd_proto::{Command, ReplyStyle};

use super::MIB;
use super::support::{Client, NO_FLAGS, Server, lacks, run, text};

const CLUSTER: u64 = 2 << 20;

/// Bytes of the disk for which one table of a 2 MiB cluster stands.
const TABLE_REACH: u64 = CLUSTER / 8 * CLUSTER;

/// What a budget of 128 MiB allows, with what tests have seen the allocator keep on top.
const ALLOWED: u64 = 96 * MIB;

/// The bytes that a server takes beside what it took idle, while six clients read 512 bytes at each offset.
fn cost_of_reads(image: &Path, offsets: &[u64], expected: impl Fn(u64) -> u8) -> u64 {
    let server = Server::serve(&[text(image), "-f", "qcow2", "-r", "--memory-budget", "128M"]);
    let mut clients: Vec<Client> = (0..6).map(|_| server.client(ReplyStyle::Simple)).collect();
    let before = server.resident();
    let asked: Vec<Vec<(u64, u64)>> = clients
        .iter_mut()
        .map(|client| {
            offsets.iter().map(|at| (client.ask(Command::Read, NO_FLAGS, at + 512, 512), *at)).collect()
        })
        .collect();
    for (client, asked) in clients.iter_mut().zip(asked) {
        for _ in &asked {
            let answer = client.answer();
            let (_, at) = asked.iter().find(|(cookie, _)| *cookie == answer.cookie).unwrap();
            assert_eq!(answer.error, None);
            assert_eq!(answer.data, [expected(*at); 512]);
        }
    }
    let cost = server.peak() - before;
    server.stop();
    cost
}

#[test]
fn compressed_clusters() {
    if lacks("compressed_clusters", &["qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (plain, image) = (folder.path().join("plain"), folder.path().join("image"));
    let clusters = 24;
    let mut bytes = Vec::new();
    for n in 1..=clusters {
        bytes.extend(std::iter::repeat_n(n, 2 << 20));
    }
    std::fs::write(&plain, bytes).unwrap();
    run(
        "qemu-img",
        &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=2M", text(&plain), text(&image)],
    );
    // Every entry claims the longest input that there is: 4 MiB.
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let number = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let table = number(number(40)) & 0x00ff_ffff_ffff_fe00;
    for n in 0..u64::from(clusters) {
        let at = table + 8 * n;
        file.write_all_at(&(number(at) | (0x1fff << 49)).to_be_bytes(), at).unwrap();
    }
    file.set_len(64 << 20).unwrap();
    let offsets: Vec<u64> = (0..u64::from(clusters)).map(|n| n * CLUSTER).collect();
    let cost = cost_of_reads(&image, &offsets, |at| u8::try_from(at / CLUSTER + 1).unwrap());
    assert!(cost < ALLOWED, "{} MiB with a budget of 128 MiB", cost >> 20);
}

#[test]
fn tables_that_are_read() {
    if lacks("tables_that_are_read", &["qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = folder.path().join("image");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", text(&image), "64T"]);
    // Tables that are holes of the file: all that they name reads as zeroes.
    let file = OpenOptions::new().read(true).write(true).open(&image).unwrap();
    let mut l1 = [0; 8];
    file.read_exact_at(&mut l1, 40).unwrap();
    let tables = 128;
    for n in 0..tables {
        file.write_all_at(&((1 << 63) | ((64 + n) * CLUSTER)).to_be_bytes(), u64::from_be_bytes(l1) + 8 * n)
            .unwrap();
    }
    file.set_len((64 + tables) * CLUSTER).unwrap();
    let offsets: Vec<u64> = (0..tables).map(|n| n * TABLE_REACH).collect();
    let cost = cost_of_reads(&image, &offsets, |_| 0);
    assert!(cost < ALLOWED, "{} MiB with a budget of 128 MiB", cost >> 20);

    // One request that has all of them loaded.
    let server = Server::serve(&[text(&image), "-f", "qcow2", "-r", "--memory-budget", "128M"]);
    let before = server.resident();
    let mut client = server.negotiate();
    assert!(client.settle(ReplyStyle::Structured));
    client.select_allocation("");
    let mut client = client.go(ReplyStyle::Structured, "");
    let mut at = 0;
    while at < tables * TABLE_REACH {
        let len = (tables * TABLE_REACH - at).min(1 << 31);
        assert_eq!(client.call(Command::BlockStatus, NO_FLAGS, at, len).error, None);
        at += TABLE_REACH;
    }
    let cost = server.peak() - before;
    assert!(cost < ALLOWED, "{} MiB with a budget of 128 MiB", cost >> 20);
}

#[test]
fn tables_that_are_made() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = folder.path().join("image");
    let args = ["create", "-f", "qcow2", "--cluster-size", "2M", text(&image), "64T"];
    run(env!("CARGO_BIN_EXE_nbdbridge"), &args);
    let server = Server::serve(&[text(&image), "-f", "qcow2", "--memory-budget", "128M"]);
    let before = server.resident();
    let mut clients: Vec<Client> = (0..6).map(|_| server.client(ReplyStyle::Simple)).collect();
    let tables = 40;
    for n in 0..tables {
        clients[n % 6].ask_write(NO_FLAGS, n as u64 * TABLE_REACH, &[7; 512]);
    }
    for n in 0..tables {
        assert_eq!(clients[n % 6].answer().error, None);
    }
    for n in 0..tables {
        assert_eq!(clients[(n + 1) % 6].read(n as u64 * TABLE_REACH, 512), [7; 512]);
    }
    let cost = server.peak() - before;
    drop(clients);
    server.stop();
    // New tables are in the cache, kept back, and copied while they are committed.
    assert!(cost < 128 * MIB, "{} MiB with a budget of 128 MiB", cost >> 20);
    if !lacks("tables_that_are_made", &["qemu-img"]) {
        run("qemu-img", &["check", "-q", "-f", "qcow2", text(&image)]);
    }
}

/// Makes an image with an L1 table of 16 MiB, most of which is a hole of its file.
fn image_with_large_table(folder: &Path, name: &str, backing: &[&str]) -> PathBuf {
    let image = folder.join(name);
    let args = ["create", "-q", "-u", "-f", "qcow2", "-o", "cluster_size=4096"];
    run("qemu-img", &[&args, backing, &[text(&image), "4T"]].concat());
    image
}

#[test]
fn tables_that_stay_loaded() {
    if lacks("tables_that_stay_loaded", &["qemu-img"]) {
        return;
    }
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let one = image_with_large_table(folder.path(), "0", &[]);
    let mut top = one.clone();
    for n in 1..8 {
        let below = (n - 1).to_string();
        top = image_with_large_table(folder.path(), &n.to_string(), &["-b", &below, "-F", "qcow2"]);
    }
    let refused = |args: &[&str]| {
        let told = Server::try_serve(&[args, &["-f", "qcow2", "--memory-budget", "128M"]].concat());
        let told = told.err().expect("a server that holds more than its budget");
        assert!(told.contains("--memory-budget") && told.lines().count() == 1, "{told}");
    };
    refused(&[text(&top), "-r"]);
    refused(&[text(&top)]);
    let exports: Vec<String> = (0..8).map(|n| format!("{n}={}", text(&one))).collect();
    let exports: Vec<&str> = exports.iter().flat_map(|export| ["--export", export]).collect();
    refused(&[&exports[..], &["-r"]].concat());

    let server = Server::serve(&[text(&one), "-f", "qcow2", "--memory-budget", "128M"]);
    server.assert_alive();
    server.stop();
    let server = Server::serve(&[text(&top), "-f", "qcow2", "--memory-budget", "1G"]);
    server.assert_alive();
    server.stop();

    // What is known of the tables that it names takes more than the table itself.
    let file = OpenOptions::new().read(true).write(true).open(&one).unwrap();
    let mut l1 = [0; 8];
    file.read_exact_at(&mut l1, 40).unwrap();
    let named: Vec<u8> =
        (0..2_u64 << 20).flat_map(|n| ((1 << 63) | ((8192 + n) * 4096)).to_be_bytes()).collect();
    file.write_all_at(&named, u64::from_be_bytes(l1)).unwrap();
    file.set_len((8192 + (2 << 20)) * 4096).unwrap();
    refused(&[text(&one), "-r"]);
    let server = Server::serve(&[text(&one), "-f", "qcow2", "-r", "--memory-budget", "512M"]);
    server.assert_alive();
    server.stop();
}
