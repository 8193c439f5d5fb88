//! Images with an entry of a table that cannot be right: it costs its own cluster and no other, and it stays as it is.

use nbd_proto::{NbdError, OptionCode};

use super::*;
use crate::support::{Answer, meta_data, need};

/// QCOW_OFLAG_COPIED and QCOW_OFLAG_COMPRESSED.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// Clusters of the disk, all in one L2 table; the first ones have data.
const CLUSTERS: usize = 48;
const WITH_DATA: usize = 32;

/// The cluster whose entry is damaged, at first.
const BAD: usize = 7;

/// An image whose cluster `n` is full of `n + 1`.
struct Disk {
    path: PathBuf,
    cluster: usize,
}

impl Disk {
    fn new(place: &Place, cluster: usize) -> Disk {
        let bytes: Vec<u8> = (0..CLUSTERS * cluster).map(|at| Disk::byte(at / cluster)).collect();
        let (raw, path) = (place.file("first.raw", &bytes), place.path("disk.qcow2"));
        let options = format!("cluster_size={cluster}");
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&path)]);
        Disk { path, cluster }
    }

    /// The first content of a cluster.
    fn byte(cluster: usize) -> u8 {
        if cluster < WITH_DATA { u8::try_from(cluster).unwrap() + 1 } else { 0 }
    }

    fn number(&self, at: u64) -> u64 {
        let bytes = fs::read(&self.path).unwrap();
        u64::from_be_bytes(*bytes[usize::try_from(at).unwrap()..].first_chunk().unwrap())
    }

    /// Where the entry of a cluster is.
    fn entry(&self, cluster: usize) -> u64 {
        let table = self.number(self.number(40)) & 0x00ff_ffff_ffff_fe00;
        table + 8 * cluster as u64
    }

    fn put(&self, at: u64, number: u64) {
        let mut bytes = fs::read(&self.path).unwrap();
        bytes[usize::try_from(at).unwrap()..][..8].copy_from_slice(&number.to_be_bytes());
        fs::write(&self.path, bytes).unwrap();
    }

    fn offset(&self, cluster: usize) -> u64 {
        (cluster * self.cluster) as u64
    }

    /// Reads a whole cluster and holds it against one byte.
    fn assert_reads(&self, client: &mut Client, cluster: usize, byte: u8, what: &str) {
        let read = client.read(self.offset(cluster), self.cluster as u64);
        assert!(read.iter().all(|found| *found == byte), "{what}: cluster {cluster}");
    }

    /// Has qemu-io read whole clusters.
    fn assert_qemu_reads(&self, clusters: impl Iterator<Item = (usize, u8)>, what: &str) {
        let commands: Vec<String> =
            clusters.map(|(n, byte)| format!("read -P {byte} {} {}", self.offset(n), self.cluster)).collect();
        let mut args = vec!["-r", "-f", "qcow2"];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        args.push(text(&self.path));
        let output = Command::new("qemu-io").args(&args).output().unwrap();
        assert!(output.status.success(), "{what}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

fn assert_fails(answer: &Answer, what: &str) {
    assert_eq!(answer.error, Some(NbdError::Io), "{what}");
}

/// Bytes that block status tells of, from a cluster to the end of the disk; None for an error.
fn told(server: &Server, disk: &Disk, from: usize, context: &str) -> Option<u64> {
    let mut negotiation = server.negotiate();
    assert!(negotiation.settle(ReplyStyle::Structured));
    negotiation.option(OptionCode::SetMetaContext, &meta_data("", &[context]));
    let mut client = negotiation.go(ReplyStyle::Structured, "");
    let len = disk.offset(CLUSTERS - from);
    let answer = client.call(Nbd::BlockStatus, NO_FLAGS, disk.offset(from), len);
    answer.error.is_none().then(|| answer.extents.iter().map(|(len, _)| len).sum())
}

/// Holds all that is asked about a disk with one bad entry against what it should be.
fn judge(server: &Server, disk: &Disk, bytes: &[u8], what: &str) {
    for context in ["base:allocation", "qemu:allocation-depth"] {
        let what = format!("{what}, {context}");
        assert_eq!(told(server, disk, 0, context), Some(disk.offset(BAD)), "{what}: before it");
        assert_eq!(told(server, disk, BAD, context), None, "{what}: at it");
        assert_eq!(
            told(server, disk, BAD + 1, context),
            Some(disk.offset(CLUSTERS - BAD - 1)),
            "{what}: behind it"
        );
    }
    let mut client = server.client(ReplyStyle::Structured);
    // Twice: the second time the map knows the way.
    for _ in 0..2 {
        for (cluster, byte) in bytes.iter().enumerate().filter(|(cluster, _)| *cluster != BAD) {
            disk.assert_reads(&mut client, cluster, *byte, what);
        }
        assert_fails(&client.call(Nbd::Read, NO_FLAGS, disk.offset(BAD) + 512, 512), what);
    }
    client.disconnect();
}

/// Writes to all neighbours of a bad entry, in each way that changes the table; nothing changes the entry itself.
fn write_around(server: &Server, disk: &Disk, bytes: &mut [u8], what: &str) {
    let mut client = server.client(ReplyStyle::Structured);
    let cluster = disk.cluster;
    let len = cluster as u64;
    let unwritten = WITH_DATA + 2;
    for (at, byte) in [(BAD - 1, 101), (BAD + 1, 102), (unwritten, 103), (unwritten + 1, 104)] {
        client.write(disk.offset(at), &vec![byte; cluster]);
        bytes[at] = byte;
    }
    for (command, at) in [(Nbd::Trim, BAD - 2), (Nbd::WriteZeroes, BAD + 2)] {
        assert_eq!(client.call(command, NO_FLAGS, disk.offset(at), len).error, None, "{what}");
        bytes[at] = 0;
    }
    // Part of a cluster that was trimmed.
    client.write(disk.offset(BAD - 2), &vec![0; 512]);
    for flags in [NO_FLAGS, CommandFlags::FUA] {
        assert_fails(&client.call_write(flags, disk.offset(BAD), &vec![9; cluster]), what);
        assert_fails(&client.call_write(flags, disk.offset(BAD) + 512, &[9; 512]), what);
        assert_fails(&client.call(Nbd::Trim, flags, disk.offset(BAD), len), what);
        assert_fails(&client.call(Nbd::WriteZeroes, flags, disk.offset(BAD), len), what);
    }
    client.flush();
    client.disconnect();
}

/// Entries that cannot be right, of an image with a cluster at `place` and of `length` bytes.
fn bad_entries(place: u64, length: u64, cluster: u64) -> Vec<(&'static str, u64)> {
    // The offset of a compressed cluster has the lower bits, the number of its sectors those above.
    let shift = 62 - (cluster.trailing_zeros() - 8);
    let most = (1 << 62) - (1 << shift);
    vec![
        ("an offset that is not aligned", COPIED | (place + 512)),
        ("a reserved bit above", COPIED | place | (1 << 60)),
        ("a reserved bit below", COPIED | place | (1 << 3)),
        ("all bits", u64::MAX),
        ("a place past the end of the file", COPIED | (1 << 40)),
        ("the last place that an entry can name", COPIED | (0x00ff_ffff_ffff_ffff & !(cluster - 1))),
        ("compressed, and past the end of the file", COMPRESSED | (length + cluster)),
        (
            "compressed, and longer than the file",
            COMPRESSED | most | (length.next_multiple_of(cluster) - 512),
        ),
        ("compressed and copied", COPIED | COMPRESSED | place),
    ]
}

#[test]
fn a_damaged_entry_costs_its_own_cluster_alone() {
    need!("a_damaged_entry_costs_its_own_cluster_alone", "qemu-img", "qemu-io");
    for cluster in [65536, 4096] {
        let place = Place::new();
        let disk = Disk::new(&place, cluster);
        let whole = fs::read(&disk.path).unwrap();
        let entry = disk.entry(BAD);
        let target = disk.number(entry) & !COPIED;
        for (what, bad) in bad_entries(target, whole.len() as u64, cluster as u64) {
            let what = format!("{what}, {bad:#x}, clusters of {cluster}");
            fs::write(&disk.path, &whole).unwrap();
            disk.put(entry, bad);
            let mut bytes: Vec<u8> = (0..CLUSTERS).map(Disk::byte).collect();
            let server = Server::serve(&[text(&disk.path), "-r", "-A"]);
            judge(&server, &disk, &bytes, &what);
            server.stop();
            let neighbours = |bytes: &[u8]| {
                bytes.iter().copied().enumerate().filter(|(n, _)| *n != BAD).collect::<Vec<_>>()
            };
            disk.assert_qemu_reads(neighbours(&bytes).into_iter(), &what);

            let server = Server::serve(&[text(&disk.path), "-A"]);
            judge(&server, &disk, &bytes, &what);
            write_around(&server, &disk, &mut bytes, &what);
            judge(&server, &disk, &bytes, &what);
            assert!(server.log().contains("the image is corrupt"), "{what}: {}", server.log());
            server.stop();
            assert_eq!(disk.number(entry), bad, "{what}: the entry was altered");
            disk.assert_qemu_reads(neighbours(&bytes).into_iter(), &what);
        }
    }
}

/// The table of a snapshot is copied when a cluster of it is written: with the bad entry in it.
#[test]
fn a_damaged_table_of_a_snapshot_is_copied_as_it_is() {
    need!("a_damaged_table_of_a_snapshot_is_copied_as_it_is", "qemu-img", "qemu-io");
    let place = Place::new();
    let disk = Disk::new(&place, 65536);
    qemu_img(&["snapshot", "-c", "before", text(&disk.path)]);
    let old = disk.entry(BAD);
    let bad = (disk.number(old) & !COPIED) + 512;
    disk.put(old, bad);
    let mut bytes: Vec<u8> = (0..CLUSTERS).map(Disk::byte).collect();
    let server = Server::serve(&[text(&disk.path), "-A"]);
    write_around(&server, &disk, &mut bytes, "a snapshot");
    judge(&server, &disk, &bytes, "a snapshot");
    server.stop();
    let new = disk.entry(BAD);
    assert!(new != old && disk.number(old) == bad && disk.number(new) & !COPIED == bad);
    let neighbours = bytes.iter().copied().enumerate().filter(|(n, _)| *n != BAD);
    disk.assert_qemu_reads(neighbours, "a snapshot");
}

#[test]
fn a_damaged_entry_of_a_backing_image_costs_its_own_cluster_alone() {
    need!("a_damaged_entry_of_a_backing_image_costs_its_own_cluster_alone", "qemu-img", "qemu-io");
    let place = Place::new();
    let disk = Disk::new(&place, 65536);
    let (entry, top) = (disk.entry(BAD), place.path("top.qcow2"));
    disk.put(entry, disk.number(entry) + 512);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", text(&top)]);
    let before = fs::read(&disk.path).unwrap();
    let mut bytes: Vec<u8> = (0..CLUSTERS).map(Disk::byte).collect();
    let server = Server::serve(&[text(&top), "-A"]);
    judge(&server, &disk, &bytes, "a backing image");
    let mut client = server.client(ReplyStyle::Structured);
    client.write(disk.offset(BAD - 1) + 100, &[0x77; 512]);
    assert_eq!(client.read(disk.offset(BAD - 1), 101)[99..], [bytes[BAD - 1], 0x77]);
    client.write(disk.offset(BAD - 1), &[0x55; 65536]);
    bytes[BAD - 1] = 0x55;
    client.disconnect();
    judge(&server, &disk, &bytes, "a backing image that is written over");
    server.stop();
    assert!(fs::read(&disk.path).unwrap() == before);
}

/// An entry of the L1 table: such an image is only read, and what lies behind the other tables is.
#[test]
fn a_damaged_l1_entry_costs_its_own_table_alone() {
    need!("a_damaged_l1_entry_costs_its_own_table_alone", "qemu-img");
    let place = Place::new();
    // A table of 512 entries for 2 MiB.
    let (raw, path) = (place.file("first.raw", &[7; 8 << 20]), place.path("disk.qcow2"));
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", text(&raw), text(&path)]);
    let disk = Disk { path, cluster: 2 << 20 };
    let entry = disk.number(40) + 8;
    let good = disk.number(entry);
    let top = place.path("top.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", text(&top)]);
    let (refcounts, l1) = (disk.number(48), disk.number(40));
    for bad in [
        good + 512,
        good | (1 << 58),
        good | 4,
        COPIED | (1 << 40),
        COPIED | refcounts,
        COPIED | l1,
        refcounts,
    ] {
        disk.put(entry, bad);
        for args in [&[text(&disk.path), "-r"][..], &[text(&disk.path), "-s"], &[text(&top)]] {
            let what = format!("{bad:#x}, {args:?}");
            let server = Server::serve(args);
            let mut client = server.client(ReplyStyle::Structured);
            for n in [0, 2, 3, 0] {
                disk.assert_reads(&mut client, n, 7, &what);
                assert_fails(&client.call(Nbd::Read, NO_FLAGS, (2 << 20) + 4096, 512), &what);
            }
            assert!(server.log().contains("the image is corrupt"), "{what}: {}", server.log());
            client.disconnect();
            server.stop();
        }
    }
}

/// An image file that was cut short: what is gone gives EIO, also where a table was that said what there is.
#[test]
fn what_a_cut_image_has_lost_is_an_error() {
    need!("what_a_cut_image_has_lost_is_an_error", "qemu-img");
    let place = Place::new();
    let disk = Disk::new(&place, 4096);
    let whole = fs::read(&disk.path).unwrap();
    let (l1, table) = (disk.number(40), disk.entry(0));
    let places: Vec<u64> = (0..CLUSTERS).map(|n| disk.number(disk.entry(n)) & !COPIED).collect();
    let top = place.path("top.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", text(&top)]);
    let cluster = disk.cluster as u64;
    for cut in [l1, l1 + 4, table, table + 20, table + 8 * 20, table + 4096, places[9], places[9] + 1000] {
        let cut_at = usize::try_from(cut).unwrap();
        fs::write(&disk.path, &whole[..cut_at]).unwrap();
        for args in [&[text(&disk.path), "-r"][..], &[text(&disk.path), "-s"], &[text(&top)]] {
            let server = Server::serve(args);
            let mut client = server.client(ReplyStyle::Structured);
            for (n, at) in places.iter().enumerate() {
                let what = format!("cut at {cut:#x}, {args:?}, cluster {n}");
                let gone = cut < l1 + 8 || cut < table + 8 * n as u64 + 8 || cut <= *at;
                let answer = client.call(Nbd::Read, NO_FLAGS, disk.offset(n), cluster);
                if gone {
                    assert_fails(&answer, &what);
                    continue;
                }
                assert_eq!(answer.error, None, "{what}");
                // As qemu has it, the last cluster may be there in part.
                let kept = usize::try_from((cut - at).min(cluster)).unwrap();
                assert!(answer.data[..kept].iter().all(|byte| *byte == Disk::byte(n)), "{what}");
                assert!(answer.data[kept..].iter().all(|byte| *byte == 0), "{what}");
            }
            assert!(server.log().contains("the image is corrupt"), "{args:?}: {}", server.log());
            client.disconnect();
            server.stop();
        }
        if cut < table + 4096 {
            assert!(support::refusal(&[text(&disk.path)]).contains("check -r all"));
        }
    }
}

#[test]
fn a_map_is_told_up_to_a_damaged_entry() {
    need!("a_map_is_told_up_to_a_damaged_entry", "qemu-img");
    let place = Place::new();
    let disk = Disk::new(&place, 65536);
    disk.put(disk.entry(BAD), disk.number(disk.entry(BAD)) + 512);
    let server = Server::serve(&[text(&disk.path), "-r"]);
    for source in [text(&disk.path), &server.uri("")] {
        let output = Command::new(support::PROGRAM).args(["info", "--map", source]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        let end = disk.offset(BAD).to_string();
        assert!(told.lines().any(|line| line.contains(&end) && line.contains("data")), "{source}: {told}");
        assert_eq!(output.status.code(), Some(1), "{source}");
        assert!(support::one_line(&output).contains(source), "{source}: {output:?}");
        let output =
            Command::new(support::PROGRAM).args(["info", "--map", "--json", source]).output().unwrap();
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
    }
}
