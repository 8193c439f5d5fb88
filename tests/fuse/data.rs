//! What is stored, what is a hole, and that other doors' writes are seen.

use std::ffi::OsStr;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command;

use nbd_proto::ReplyStyle;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::support::mount::{Mount, fuse, missing, nbdbridge, run};
use crate::support::{Negotiation, PROGRAM, Random, Stream, text};

const MIB: u64 = 1 << 20;

/// Random reads, writes, holes, zeroes and reservations against a copy in memory; with delays, so that the slow path
/// takes part.
#[test]
fn random_requests_against_a_model() {
    if missing("random_requests_against_a_model", &[]) {
        return;
    }
    for args in [&[][..], &["--fault", "seed=1,delay-ms=0,delay-rate=0.5"], &["--cache", "none"]] {
        let mut mount = Mount::image(3 * MIB + 4096 + 77, args);
        let file = mount.open();
        let size = file.metadata().unwrap().len();
        let mut model = vec![0; size as usize];
        let mut random = Random::new(7);
        for _ in 0..400 {
            let offset = random.below(size);
            let len = random.below(300_000).min(size - offset);
            let range = offset as usize..(offset + len) as usize;
            match random.below(6) {
                0 | 1 => {
                    let data = random.bytes(len as usize);
                    file.write_all_at(&data, offset).unwrap();
                    model[range].copy_from_slice(&data);
                }
                2 => {
                    let mut found = vec![0; len as usize];
                    file.read_exact_at(&mut found, offset).unwrap();
                    assert!(found == model[range], "{args:?}: {len} bytes at {offset}");
                }
                3 if len > 0 => {
                    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(&file, mode, offset, len).unwrap();
                    model[range].fill(0);
                }
                4 if len > 0 => {
                    fallocate(&file, FallocateFlags::ZERO_RANGE, offset, len).unwrap();
                    model[range].fill(0);
                }
                5 if len > 0 => fallocate(&file, FallocateFlags::KEEP_SIZE, offset, len).unwrap(),
                _ => file.sync_data().unwrap(),
            }
        }
        file.sync_all().unwrap();
        drop(file);
        assert!(mount.read(0, size as usize) == model);
        mount.stop();
        assert!(std::fs::read(mount.join("disk.img")).unwrap() == model, "{args:?}");
    }
}

#[test]
fn space_is_what_the_image_takes() {
    if missing("space_is_what_the_image_takes", &[]) {
        return;
    }
    // Of a slice nobody can tell it cheaply: it is counted by block status.
    for args in [&[][..], &["--offset", "1M"]] {
        let mount = Mount::image(64 * MIB, args);
        let file = mount.open();
        let blocks = || file.metadata().unwrap().blocks();
        assert_eq!(blocks(), 0, "all of it is a hole");
        file.write_all_at(&vec![1; 2 * MIB as usize], 8 * MIB).unwrap();
        assert_eq!(blocks() * 512, 2 * MIB);
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 8 * MIB, MIB).unwrap();
        assert_eq!(blocks() * 512, MIB);
        if args.is_empty() {
            fallocate(&file, FallocateFlags::empty(), 0, 4 * MIB).unwrap();
            assert_eq!(blocks() * 512, 5 * MIB, "reserved");
        }
        assert_eq!(file.metadata().unwrap().len(), 64 * MIB - if args.is_empty() { 0 } else { MIB });
    }
}

#[test]
fn data_and_holes_are_found() {
    if missing("data_and_holes_are_found", &[]) {
        return;
    }
    let mount = Mount::image(64 * MIB, &[]);
    let file = mount.open();
    for at in [4, 5, 20] {
        file.write_all_at(&vec![7; MIB as usize], at * MIB).unwrap();
    }
    let data = |from: u64| seek(&file, SeekFrom::Data(from)).map(|place| place / MIB);
    let hole = |from: u64| seek(&file, SeekFrom::Hole(from)).map(|place| place / MIB);
    assert_eq!((data(0), hole(0)), (Ok(4), Ok(0)));
    assert_eq!((data(4 * MIB + 1), hole(4 * MIB + 1)), (Ok(4), Ok(6)));
    assert_eq!((data(6 * MIB), hole(20 * MIB)), (Ok(20), Ok(21)));
    assert_eq!((data(21 * MIB), hole(63 * MIB)), (Err(Errno::NXIO), Ok(63)));
    assert_eq!((data(64 * MIB), hole(64 * MIB)), (Err(Errno::NXIO), Err(Errno::NXIO)));
    // The end of a file is a hole, also where it ends with data.
    file.write_all_at(&[7], 64 * MIB - 1).unwrap();
    assert_eq!(hole(64 * MIB - 1), Ok(64));
}

/// What is data: where it begins, how long it is, and whether it is any.
type Run = (u64, u64, bool);

/// Neighbours of one kind become one.
fn runs(all: impl IntoIterator<Item = Run>) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (offset, len, data) in all {
        match runs.last_mut() {
            Some((begin, before, kind)) if *kind == data => {
                assert_eq!(*begin + *before, offset);
                *before += len;
            }
            _ => runs.push((offset, len, data)),
        }
    }
    runs
}

/// Lines of `OFFSET LENGTH KIND`, as `nbdinfo --map` and `nbdbridge info --map` have them.
fn columns(text: &str) -> Vec<Run> {
    let fields = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let numbered = fields.filter(|fields| fields.len() >= 3 && fields[0].parse::<u64>().is_ok());
    let number = |text: &str| text.parse().unwrap();
    numbered.map(|fields| (number(fields[0]), number(fields[1]), fields.contains(&"data"))).collect()
}

/// `qemu-img map` of a file.
fn mapped(args: &[&dyn AsRef<OsStr>]) -> Vec<Run> {
    let json = run("qemu-img", &[&[&"map" as &dyn AsRef<OsStr>, &"--output=json"], args].concat());
    let all: Vec<serde_json::Value> = serde_json::from_str(&json).unwrap();
    let number = |one: &serde_json::Value, key: &str| one[key].as_u64().unwrap();
    runs(all.iter().map(|one| (number(one, "start"), number(one, "length"), one["data"] == true)))
}

/// The same by lseek(2).
fn sought(file: &File) -> Vec<Run> {
    let size = file.metadata().unwrap().len();
    let (mut all, mut place) = (Vec::new(), 0);
    while place < size {
        let data = seek(file, SeekFrom::Data(place)).unwrap_or(size);
        if data > place {
            assert_eq!(seek(file, SeekFrom::Hole(place)), Ok(place));
            all.push((place, data - place, false));
        }
        if data < size {
            let hole = seek(file, SeekFrom::Hole(data)).unwrap();
            all.push((data, hole - data, true));
            place = hole;
        } else {
            place = size;
        }
    }
    all
}

/// What lseek(2) finds, the other door's block status, our map and qemu's are one.
#[test]
fn a_sparse_qcow2_has_the_same_holes_for_everybody() {
    const TEST: &str = "a_sparse_qcow2_has_the_same_holes_for_everybody";
    if missing(TEST, &["qemu-img", "qemu-io", "nbdinfo"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.qcow2");
    run("qemu-img", &[&"create", &"-q", &"-f", &"qcow2", &image, &"64M"]);
    let commands = ["write -P 7 1M 3M", "write 20M 64K", "write -z 30M 1M", "write 40M 4M", "discard 41M 1M"];
    let mut args: Vec<&dyn AsRef<OsStr>> = vec![&"-f", &"qcow2", &image];
    for command in &commands {
        args.extend([&"-c" as &dyn AsRef<OsStr>, command]);
    }
    args.extend([&"-c" as &dyn AsRef<OsStr>, &"write -P 1 65472K 64K"]);
    run("qemu-io", &args);
    let expected = mapped(&[&"-f", &"qcow2", &image]);
    let data: Vec<_> = expected.iter().filter(|(_, _, data)| *data).map(|(at, ..)| at / MIB).collect();
    assert_eq!(data, [1, 20, 40, 42, 63]);
    let ours = |source: &dyn AsRef<OsStr>| runs(columns(&run(PROGRAM, &[&"info", &"--map", source])));
    assert_eq!(ours(&image), expected);
    let socket = folder.path().join("sock");
    let mut command = fuse(folder.path());
    command.args(["disk.qcow2", "file", "--also-net", "-k", "sock"]);
    let mut mount = Mount::start_as(folder, &mut command, 2, 0);
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    assert_eq!(sought(&mount.open()), expected);
    assert_eq!(runs(columns(&run("nbdinfo", &[&"--map", &uri]))), expected);
    assert_eq!(ours(&uri), expected);
    assert_eq!(mapped(&[&"-f", &"raw", &"-U", &mount.path]), expected);
    mount.stop();
}

/// One export through two doors: what NBD calls a hole is one for lseek(2), and each sees what the other writes.
#[test]
fn both_doors_show_the_same() {
    if missing("both_doors_show_the_same", &["nbdinfo"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = File::create(folder.path().join("disk.img")).unwrap();
    image.set_len(32 * MIB).unwrap();
    for at in [1, 2, 9, 31] {
        image.write_all_at(&vec![7; MIB as usize], at * MIB).unwrap();
    }
    let socket = folder.path().join("sock");
    let mut command = nbdbridge(folder.path(), &["net", "disk.img", "-k", "sock"]);
    command.args(["--also-fuse", "file", "--multi-writer"]);
    let mut mount = Mount::start(folder, &mut command, 2);
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    let map = Command::new("nbdinfo").args(["--map", &uri]).output().unwrap();
    let file = mount.open();
    let told = runs(columns(&String::from_utf8(map.stdout).unwrap()));
    assert_eq!(told.iter().map(|(_, len, _)| len).sum::<u64>(), 32 * MIB);
    assert_eq!(sought(&file), told);
    let mut client = Negotiation::begin(Stream::unix(&socket).unwrap()).enter(ReplyStyle::Structured, "");
    for n in 0..20_u8 {
        client.write(u64::from(n) * 5000, &[n; 700]);
        assert_eq!(mount.read(u64::from(n) * 5000, 700), [n; 700]);
        file.write_all_at(&[n + 100; 700], u64::from(n) * 5000).unwrap();
        assert_eq!(client.read(u64::from(n) * 5000, 700), [n + 100; 700]);
    }
    drop((client, file));
    mount.stop();
}

#[test]
fn the_second_door_is_read_only_by_default() {
    if missing("the_second_door_is_read_only_by_default", &[]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = nbdbridge(folder.path(), &["net", "mem:1M", "-k", "sock", "--also-fuse", "file"]);
    let mut mount = Mount::start(folder, &mut command, 2);
    let refused = File::options().write(true).open(&mount.path).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(mount.read(0, 512), [0; 512]);
    mount.stop();
}

#[test]
fn the_end_of_the_file_is_an_end() {
    if missing("the_end_of_the_file_is_an_end", &[]) {
        return;
    }
    let mount = Mount::image(MIB + 10, &[]);
    let file = mount.open();
    let mut bytes = [0; 100];
    assert_eq!(file.read_at(&mut bytes, MIB).unwrap(), 10);
    assert_eq!(file.read_at(&mut bytes, MIB + 10).unwrap(), 0);
    assert_eq!(file.read_at(&mut bytes, 1 << 40).unwrap(), 0);
    assert_eq!(file.write_at(&bytes, MIB).unwrap(), 10, "what has room is stored");
    let full = file.write_at(&bytes, MIB + 10).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::StorageFull);
    assert_eq!(file.metadata().unwrap().len(), MIB + 10);
}
