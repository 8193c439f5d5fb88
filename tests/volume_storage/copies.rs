//! Snapshots and copies, also of volumes in use.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use super::pool::{Pool, assert_sound, capacity, has_file, write_file};
use crate::support::mount::missing;

/// Numbered lines, each durable before the next; until told to stop. Gives their count.
fn write_lines(path: &Path, stop: &AtomicBool) -> u64 {
    let mut file = File::create(path).unwrap();
    let mut count = 0;
    while !stop.load(Relaxed) {
        writeln!(file, "{count}").unwrap();
        file.sync_data().unwrap();
        count += 1;
    }
    count
}

/// How many lines there are; they must be the first ones, and whole.
fn count_lines(path: &Path) -> u64 {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "a torn line");
    let mut count = 0;
    for line in text.lines() {
        assert_eq!(line, count.to_string());
        count += 1;
    }
    count
}

/// Writes to a volume while snapshots are taken of it, and mounts copies of them beside it.
fn under_a_writer(pool: &Pool, fs: &str, format: &str, reflink: bool) {
    pool.create("a", &format!("size=320M fs={fs} format={format} door=fuse"));
    let point = pool.mount("a");
    write_file(&point.join("large"), 12 << 20, 5);
    let stop = AtomicBool::new(false);
    let lines = point.join("lines");
    thread::scope(|scope| {
        let writer = scope.spawn(|| write_lines(&lines, &stop));
        let mut seen = 0;
        for name in ["s1", "s2"] {
            thread::sleep(std::time::Duration::from_millis(30));
            let told = pool.json(&["snapshot", "a", name]);
            assert_eq!((&told["name"], &told["reflink"]), (&name.into(), &reflink.into()), "{told}");
            let copy = format!("of-{name}");
            pool.ok(&["clone", &format!("a@{name}"), &copy]);
            let other = pool.mount(&copy);
            assert!(has_file(&other.join("large"), 12 << 20, 5));
            let count = count_lines(&other.join("lines"));
            assert!(count >= seen, "an older state: {count} lines after {seen}");
            seen = count;
            // It is a volume like others.
            write_file(&other.join("new"), 1 << 20, 6);
            assert!(!point.join("new").exists());
            assert_eq!(pool.inspect(&copy)["parent"], format!("a@{name}"));
        }
        stop.store(true, Relaxed);
        assert!(seen > 0 && writer.join().unwrap() >= seen);
    });
    let listed = &pool.inspect("a")["snapshots"];
    let names: Vec<_> = listed.as_array().unwrap().iter().map(|one| one["name"].clone()).collect();
    assert_eq!(names, ["s1", "s2"]);
    // Nothing needs the snapshots.
    pool.ok(&["snapshot", "a", "s1", "--remove"]);
    assert_eq!(pool.snapshot_files("a"), ["s2"]);
    for name in ["of-s1", "of-s2"] {
        pool.umount(name);
        assert_sound(pool, name);
    }
    pool.umount("a");
    assert_sound(pool, "a");
    pool.ok(&["rm", "a"]);
    let other = pool.mount("of-s2");
    assert!(has_file(&other.join("large"), 12 << 20, 5) && has_file(&other.join("new"), 1 << 20, 6));
}

#[test]
fn snapshots_under_a_writer_by_reflink() {
    let test = "snapshots_under_a_writer_by_reflink";
    let Some(pool) = Pool::with_reflinks(test) else { return };
    under_a_writer(&pool, "xfs", "raw", true);
}

#[test]
fn snapshots_under_a_writer_by_copying() {
    if missing("snapshots_under_a_writer_by_copying", &["mkfs.ext4"]) {
        return;
    }
    under_a_writer(&Pool::new(), "ext4", "qcow2", false);
}

#[test]
fn snapshots_of_btrfs_under_a_writer() {
    if missing("snapshots_of_btrfs_under_a_writer", &["mkfs.btrfs", "btrfstune"]) {
        return;
    }
    under_a_writer(&Pool::new(), "btrfs", "raw", false);
}

#[test]
fn a_copy_can_be_larger() {
    if missing("a_copy_can_be_larger", &["mkfs.ext4", "mkfs.xfs"]) {
        return;
    }
    let pool = Pool::new();
    for (fs, format) in [("ext4", "qcow2"), ("xfs", "raw")] {
        let (name, copy) = (fs.to_owned(), format!("{fs}-copy"));
        pool.create(&name, &format!("size=320M fs={fs} format={format} door=fuse"));
        let point = pool.mount(&name);
        write_file(&point.join("file"), 2 << 20, 7);
        let before = capacity(&point);
        pool.create(&copy, &format!("from={name} size=640M door=fuse mode=0751"));
        let told = pool.inspect(&copy);
        assert_eq!((&told["fs"], &told["format"]), (&fs.into(), &format.into()));
        let other = pool.mount(&copy);
        assert!(capacity(&other) > before + (280 << 20), "{copy}");
        assert!(has_file(&other.join("file"), 2 << 20, 7));
        assert_eq!(mode(&other), 0o751);
        // Equal options make nothing new.
        pool.create(&copy, &format!("from={name} size=640M door=fuse mode=0751"));
        pool.umount(&name);
        pool.umount(&copy);
        assert_sound(&pool, &copy);
    }
}

fn mode(path: &Path) -> u32 {
    std::os::unix::fs::PermissionsExt::mode(&path.metadata().unwrap().permissions()) & 0o7777
}

#[test]
fn what_snapshots_and_copies_refuse() {
    if missing("what_snapshots_and_copies_refuse", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    pool.create("a", "size=32M door=fuse");
    pool.create("blocks", "size=32M fs=none door=fuse");
    pool.ok(&["snapshot", "a", "s"]);
    pool.mount("blocks");
    let long = "x".repeat(300);
    for (words, part) in [
        (vec!["snapshot", "a", "s"], "has a snapshot `s` already"),
        (vec!["snapshot", "a", "../s"], "is no name"),
        (vec!["snapshot", "a", ".new"], "is no name"),
        (vec!["snapshot", "a", &long], "is no name"),
        (vec!["snapshot", "a", "t", "--remove"], "no snapshot `t`; there is s"),
        (vec!["snapshot", "none", "s"], "no volume is named `none`"),
        (vec!["snapshot", "blocks", "s"], "which cannot be frozen"),
        (vec!["clone", "a@t", "b"], "no snapshot `t`; there is s"),
        (vec!["clone", "none", "b"], "no volume is named `none`"),
        (vec!["clone", "blocks", "b"], "which cannot be frozen"),
        (vec!["clone", "a", "blocks"], "exists with other options"),
        (vec!["create", "b", "-o", "from=a", "-o", "format=qcow2"], "has the format of its origin"),
        (vec!["create", "b", "-o", "from=a@s", "-o", "size=16M"], "a copy only grows"),
        (vec!["create", "b", "-o", "from=a", "-o", "size=900T"], "may still be promised"),
    ] {
        let line = pool.refusal(&words);
        assert!(line.contains(part), "{words:?}: {line}");
    }
    assert_eq!(pool.snapshot_files("a"), ["s"]);
    assert!(pool.snapshot_files("blocks").is_empty());
    assert!(!pool.folder.join("b").exists());
    // The longest name is one.
    let longest = "x".repeat(255);
    pool.ok(&["snapshot", "a", &longest]);
    pool.ok(&["snapshot", "a", &longest, "--remove"]);
    // What a snapshot takes is promised.
    let promised = |pool: &Pool| pool.json(&["pool"])["space"]["promised"].as_u64().unwrap();
    let before = promised(&pool);
    pool.ok(&["snapshot", "a", "t"]);
    assert!(promised(&pool) > before);
    pool.ok(&["snapshot", "a", "t", "--remove"]);
    assert_eq!(promised(&pool), before);
    pool.ok(&["pool", "--reserve", "100%"]);
    assert!(
        pool.refusal(&["snapshot", "a", "t"]).contains("more than the 0 bytes that may still be promised")
    );
    // A damaged one is not listed, and can be removed.
    fs::write(pool.path("a", "snapshots/s/snapshot.json"), "{").unwrap();
    assert_eq!(pool.inspect("a")["snapshots"].as_array().unwrap().len(), 0);
    assert!(pool.refusal(&["snapshot", "a", "s"]).contains("already"));
    pool.ok(&["snapshot", "a", "s", "--remove"]);
    assert!(pool.snapshot_files("a").is_empty());
}
