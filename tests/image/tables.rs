//! Images whose tables contradict each other: no write of a guest lands on a table, whatever the entries say. And the last
//! cluster of a disk that ends within one.

use super::*;

const CLUSTER: u64 = 65536;
/// QCOW_OFLAG_COPIED and QCOW_OFLAG_ZERO.
const COPIED: u64 = 1 << 63;
const ZERO: u64 = 1;

/// The bytes of an image, and where its tables are.
struct Image(Vec<u8>);

impl Image {
    /// A disk of `size`, with data in its first MiB.
    fn new(place: &Place, size: &str) -> Image {
        let (raw, path) = (place.file("first.raw", &[7; 1 << 20]), place.path("new.qcow2"));
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&path)]);
        qemu_img(&["resize", "-q", "-f", "qcow2", text(&path), size]);
        Image(fs::read(&path).unwrap())
    }

    fn number(&self, at: u64) -> u64 {
        let at = usize::try_from(at).unwrap();
        u64::from_be_bytes(self.0[at..at + 8].try_into().unwrap())
    }

    fn put(&mut self, at: u64, number: u64) {
        let at = usize::try_from(at).unwrap();
        self.0[at..at + 8].copy_from_slice(&number.to_be_bytes());
    }

    fn l1(&self) -> u64 {
        self.number(40)
    }

    fn l2(&self) -> u64 {
        self.number(self.l1()) & 0x00ff_ffff_ffff_fe00
    }

    fn reftable(&self) -> u64 {
        self.number(48)
    }

    fn refblock(&self) -> u64 {
        self.number(self.reftable()) & (u64::MAX << 9)
    }

    fn cluster(&self, at: u64) -> &[u8] {
        let at = usize::try_from(at).unwrap();
        &self.0[at..at + 65536]
    }
}

/// Ends a server, well or not: what it could not bring to the file is an error to it.
fn end(mut server: Server) {
    server.signal(rustix::process::Signal::TERM);
    assert!(server.wait(support::LIMIT).is_some());
}

fn failed(answer: &support::Answer) {
    assert_eq!(answer.error, Some(nbd_proto::NbdError::Io));
}

#[test]
fn no_write_lands_on_a_table() {
    if !has_qemu_img("no_write_lands_on_a_table") {
        return;
    }
    let place = Place::new();
    let whole = Image::new(&place, "4M");
    let tables = [whole.l1(), whole.l2(), whole.reftable(), whole.refblock()];
    for (n, target) in tables.into_iter().enumerate() {
        for flags in [COPIED, 0, COPIED | ZERO] {
            println!("table {n} at {target:#x}, flags {flags:#x}");
            let mut image = Image(whole.0.clone());
            image.put(whole.l2() + 8, target | flags);
            let path = place.file("broken.qcow2", &image.0);
            let server = Server::serve(&[text(&path), "-f", "qcow2"]);
            let mut client = server.client(ReplyStyle::Structured);
            failed(&client.call_write(NO_FLAGS, CLUSTER + 100, &[9; 512]));
            failed(&client.call_write(NO_FLAGS, CLUSTER, &[9; 65536]));
            if flags & ZERO == 0 {
                failed(&client.call(Nbd::Trim, NO_FLAGS, CLUSTER, CLUSTER));
                failed(&client.call(Nbd::WriteZeroes, NO_FLAGS, CLUSTER, CLUSTER));
                failed(&client.call(Nbd::WriteZeroes, NO_FLAGS, CLUSTER + 512, 512));
            }
            // The others are as good as ever.
            client.write(2 * CLUSTER + 5, &[3; 700]);
            assert_eq!(client.read(2 * CLUSTER + 4, 2), [7, 3]);
            client.call(Nbd::Flush, NO_FLAGS, 0, 0);
            client.disconnect();
            let log = server.log();
            assert_eq!(log.lines().filter(|line| line.contains("the image is corrupt")).count(), 1, "{log}");
            end(server);
            let after = Image(fs::read(&path).unwrap());
            for table in tables {
                assert!(after.cluster(table) == image.cluster(table), "the table at {table:#x} has changed");
            }
        }
    }
}

#[test]
fn no_write_lands_on_a_table_of_a_snapshot() {
    if !has_qemu_img("no_write_lands_on_a_table_of_a_snapshot") {
        return;
    }
    let place = Place::new();
    let path = place.file("snapshot.qcow2", &Image::new(&place, "4M").0);
    qemu_img(&["snapshot", "-c", "before", text(&path)]);
    let whole = Image(fs::read(&path).unwrap());
    let snapshots = whole.number(64);
    for target in [snapshots, whole.number(snapshots)] {
        let mut image = Image(whole.0.clone());
        image.0.resize(image.0.len().next_multiple_of(65536), 0);
        image.put(whole.l2() + 8, target | COPIED);
        let path = place.file("broken.qcow2", &image.0);
        let server = Server::serve(&[text(&path)]);
        let mut client = server.client(ReplyStyle::Structured);
        failed(&client.call_write(NO_FLAGS, CLUSTER + 100, &[9; 512]));
        failed(&client.call(Nbd::Trim, NO_FLAGS, CLUSTER, CLUSTER));
        client.write(2 * CLUSTER + 5, &[3; 700]);
        client.flush();
        client.disconnect();
        end(server);
        let after = Image(fs::read(&path).unwrap());
        assert!(after.cluster(target) == image.cluster(target), "{target:#x}");
    }
}

#[test]
fn places_past_the_end_of_the_file_are_errors() {
    if !has_qemu_img("places_past_the_end_of_the_file_are_errors") {
        return;
    }
    let place = Place::new();
    let whole = Image::new(&place, "4M");
    for (target, flags) in [(1 << 30, COPIED), (1 << 45, COPIED), (1 << 55, COPIED), (1 << 55, COPIED | ZERO)]
    {
        println!("{target:#x}, flags {flags:#x}");
        let mut image = Image(whole.0.clone());
        image.put(whole.l2() + 8, target | flags);
        let path = place.file("broken.qcow2", &image.0);
        let server = Server::serve(&[text(&path), "-f", "qcow2"]);
        let mut client = server.client(ReplyStyle::Structured);
        failed(&client.call_write(NO_FLAGS, CLUSTER + 100, &[9; 512]));
        failed(&client.call_write(NO_FLAGS, CLUSTER, &[9; 65536]));
        if flags & ZERO == 0 {
            failed(&client.call(Nbd::Read, NO_FLAGS, CLUSTER, 512));
            failed(&client.call(Nbd::Trim, NO_FLAGS, CLUSTER, CLUSTER));
        }
        assert_eq!(client.read(0, 1), [7]);
        client.disconnect();
        assert!(server.log().contains("the image is corrupt"), "{}", server.log());
        end(server);
        assert_eq!(fs::metadata(&path).unwrap().len(), image.0.len() as u64);
    }
}

#[test]
fn tables_that_cannot_be_are_refused_for_writing() {
    if !has_qemu_img("tables_that_cannot_be_are_refused_for_writing") {
        return;
    }
    let place = Place::new();
    let whole = Image::new(&place, "1G");
    let (l1, l2) = (whole.l1(), whole.l2());
    for (at, value, word) in [
        (l1 + 8, l2 | COPIED, "two tables"),
        (l1, l1 | COPIED, "two tables"),
        (l1 + 8, 1 << 40 | COPIED, "where none can be"),
        (l1 + 8, (l2 + 512) | COPIED, "where none can be"),
        (whole.reftable() + 8, l2, "two tables"),
        // Its counter, and three beside it.
        ((whole.refblock() + l2 / CLUSTER * 2) & !7, 0, "counts as free"),
    ] {
        let mut image = Image(whole.0.clone());
        image.put(at, value);
        let path = place.file("broken.qcow2", &image.0);
        let log = Server::try_serve(&[text(&path)]).err().unwrap();
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains(word) && log.contains("qemu-img check") && log.contains("--read-only"), "{log}");
    }
}

/// An entry leads to a cluster that counts as free. Then a table comes there.
#[test]
fn a_table_that_comes_where_data_was_is_safe_from_it() {
    const TEST: &str = "a_table_that_comes_where_data_was_is_safe_from_it";
    if !has_qemu_img(TEST) || tool(TEST, "qemu-io", &["--version"]).is_none() {
        return;
    }
    let place = Place::new();
    let mut image = Image::new(&place, "1G");
    let counters =
        image.cluster(image.refblock()).as_chunks().0.iter().map(|counter| u16::from_be_bytes(*counter));
    let free = counters.take_while(|counter| *counter > 0).count() as u64 * CLUSTER;
    image.0.resize(image.0.len().max(usize::try_from(free + CLUSTER).unwrap()), 0);
    image.put(image.l2() + 8, free | COPIED);
    let path = place.file("broken.qcow2", &image.0);
    let server = Server::serve(&[text(&path)]);
    let mut client = server.client(ReplyStyle::Structured);
    // Known to the map from now on.
    client.write(CLUSTER, &[9; 4096]);
    client.write(CLUSTER, &[9; 4096]);
    // The first in its half GiB: a table is made.
    client.write(512 << 20, &[5; 65536]);
    client.flush();
    failed(&client.call_write(NO_FLAGS, CLUSTER, &[9; 4096]));
    failed(&client.call_write(NO_FLAGS, CLUSTER + 8192, &[9; 65536]));
    failed(&client.call(Nbd::Trim, NO_FLAGS, CLUSTER, CLUSTER));
    client.flush();
    client.disconnect();
    server.stop();
    let after = Image(fs::read(&path).unwrap());
    assert_eq!(after.number(after.l1() + 8), free | COPIED, "the table is where it was meant to come");
    let said =
        Command::new("qemu-io").args(["-r", "-f", "qcow2", "-c", "read -P 5 512M 64k", text(&path)]).output();
    let said = said.unwrap();
    assert!(!String::from_utf8_lossy(&said.stdout).contains("failed"), "{said:?}");
}

/// Whatever the last cluster was before: what is written into it is what it holds.
#[test]
fn the_last_cluster_of_a_disk_that_ends_within_it() {
    if !has_qemu_img("the_last_cluster_of_a_disk_that_ends_within_it") {
        return;
    }
    let place = Place::new();
    let size = 65536 + 34_816;
    let first = Random::new(0x5eed_500a).bytes(size);
    let half: Vec<u8> = (0..size).map(|n| if n % 2 == 0 { first[n] } else { 0 }).collect();
    let raw = place.file("first.raw", &half);
    for kind in ["plain", "compressed", "snapshot", "backing", "zero", "new", "data file"] {
        println!("{kind}");
        let (image, mut model) = (place.path("disk.qcow2"), half.clone());
        let _ = fs::remove_file(&image);
        let convert = ["convert", "-f", "raw", "-O", "qcow2"];
        match kind {
            "compressed" => drop(qemu_img(&[&convert[..], &["-c", text(&raw), text(&image)]].concat())),
            "backing" => {
                qemu_img(&["create", "-q", "-f", "qcow2", "-b", text(&raw), "-F", "raw", text(&image)]);
            }
            "new" | "zero" | "data file" => {
                model.fill(0);
                let data = format!("data_file={}", text(&place.path("disk.data")));
                let options = if kind == "data file" { &["-o", &data][..] } else { &[] };
                qemu_img(&[&["create", "-q", "-f", "qcow2"], options, &[text(&image), "100352"]].concat());
            }
            _ => drop(qemu_img(&[&convert[..], &[text(&raw), text(&image)]].concat())),
        }
        if kind == "snapshot" {
            qemu_img(&["snapshot", "-c", "before", text(&image)]);
        }
        let allowed = if kind == "data file" { "any" } else { "folder" };
        let server = Server::serve(&[text(&image), "--allow-backing", allowed]);
        let mut client = server.client(ReplyStyle::Structured);
        if kind == "zero" {
            assert_eq!(client.call(Nbd::WriteZeroes, CommandFlags::NO_HOLE, 0, size as u64).error, None);
        }
        for (start, len) in [(70_000, 5000), (size - 100, 100), (60_000, 8000)] {
            let data = &first[start..start + len];
            client.write(start as u64, data);
            model[start..start + len].copy_from_slice(data);
            client.flush();
            assert!(read_all(&mut client, size) == model, "{kind}: a write at {start}");
        }
        client.disconnect();
        server.stop();
        check(&image);
        place.compare("qcow2", &image, &model);
        // What lay past the end does not show when the disk grows.
        qemu_img(&["resize", "-q", "-f", "qcow2", text(&image), "128k"]);
        if kind != "backing" {
            model.resize(128 << 10, 0);
            place.compare("qcow2", &image, &model);
        }
    }
}
