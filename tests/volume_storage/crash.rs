//! Whatever a crash leaves of a resize, a snapshot or a copy, the next command puts right: each state between two steps
//! is made by hand.

use std::fs::{self, File};

use serde_json::{Value, json};

use super::pool::{Pool, assert_sound, capacity, has_file, write_file};
use crate::support::mount::missing;

const MIB: u64 = 1 << 20;

/// A volume with a file in it, not in use.
fn volume(pool: &Pool, options: &str) -> u64 {
    pool.create("a", options);
    let point = pool.mount("a");
    write_file(&point.join("file"), 1 << 20, 8);
    let capacity = capacity(&point);
    pool.umount("a");
    capacity
}

/// It is sound, and so large; its file is there.
fn assert_whole(pool: &Pool, size: u64, at_least: u64) {
    assert_sound(pool, "a");
    let point = pool.mount("a");
    assert!(has_file(&point.join("file"), 1 << 20, 8));
    assert!(capacity(&point) >= at_least, "{} < {at_least}", capacity(&point));
    pool.umount("a");
    let record = pool.record("a");
    assert_eq!((&record["size"], &record["pending"]), (&size.into(), &Value::Null), "{record}");
    assert_eq!((&record["grow_fs"], &record["formatted"]), (&false.into(), &true.into()), "{record}");
}

#[test]
fn a_resize_cut_short_anywhere() {
    let test = "a_resize_cut_short_anywhere";
    if missing(test, &["mkfs.ext4", "mkfs.xfs", "qemu-img"]) {
        return;
    }
    for (fs, format) in [("ext4", "raw"), ("xfs", "qcow2")] {
        let pool = Pool::new();
        let before = volume(&pool, &format!("size=320M fs={fs} format={format} door=fuse"));
        let promise = |record: &mut Value| {
            record["size"] = (640 * MIB).into();
            record["grow_fs"] = true.into();
            record["pending"] = json!({ "resize": { "from": 320 * MIB } });
        };
        // Nothing but the promise: it is taken back.
        pool.edit("a", promise);
        assert_eq!(pool.inspect("a")["size"], 320 * MIB);
        assert_whole(&pool, 320 * MIB, before);
        // The disk has grown: so does the rest, at the next mount.
        pool.edit("a", promise);
        crate::support::mount::run(
            "qemu-img",
            &[&"resize", &"-q", &"-f", &format, &pool.path("a", &format!("disk.{format}")), &"640M"],
        );
        assert_eq!(pool.inspect("a")["size"], 640 * MIB);
        assert_whole(&pool, 640 * MIB, before + 280 * MIB);
        // The file system has grown as well, which was not written down.
        pool.edit("a", |record| record["grow_fs"] = true.into());
        assert_whole(&pool, 640 * MIB, before + 280 * MIB);
    }
}

/// The process died between the promise and the data plane's answer.
#[test]
fn a_resize_in_use_cut_short() {
    if missing("a_resize_in_use_cut_short", &["mkfs.xfs"]) {
        return;
    }
    let pool = Pool::new();
    let before = volume(&pool, "size=320M fs=xfs door=fuse");
    let point = pool.mount("a");
    pool.edit("a", |record| {
        record["size"] = (640 * MIB).into();
        record["grow_fs"] = true.into();
        record["pending"] = json!({ "resize": { "from": 320 * MIB } });
    });
    assert_eq!(pool.inspect("a")["size"], 640 * MIB);
    // Asked again, it comes to its end.
    assert!(pool.json(&["resize", "a", "640M"])["later"].is_null());
    assert!(capacity(&point) >= before + 280 * MIB);
    pool.umount("a");
    assert_whole(&pool, 640 * MIB, before + 280 * MIB);
}

#[test]
fn a_snapshot_cut_short_anywhere() {
    if missing("a_snapshot_cut_short_anywhere", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    let before = volume(&pool, "size=64M door=fuse");
    let pending = |record: &mut Value| record["pending"] = json!({ "snapshot": { "name": "s" } });
    let folder = pool.path("a", "snapshots");
    // Nothing but the plan.
    pool.edit("a", pending);
    assert_whole(&pool, 64 * MIB, before);
    // A part of the copy.
    pool.edit("a", pending);
    fs::create_dir_all(folder.join(".new")).unwrap();
    fs::write(folder.join(".new/disk.raw"), "part").unwrap();
    assert_whole(&pool, 64 * MIB, before);
    assert!(pool.snapshot_files("a").is_empty());
    // All of it, but for the last word.
    pool.ok(&["snapshot", "a", "s"]);
    pool.edit("a", pending);
    assert_whole(&pool, 64 * MIB, before);
    assert_eq!(pool.snapshot_files("a"), ["s"]);
    // One that was being removed: the next one of the name has the way free.
    fs::rename(folder.join("s"), folder.join(".gone")).unwrap();
    assert_eq!(pool.inspect("a")["snapshots"].as_array().unwrap().len(), 0);
    pool.ok(&["snapshot", "a", "s"]);
    pool.ok(&["snapshot", "a", "s", "--remove"]);
    assert!(pool.snapshot_files("a").is_empty());
}

#[test]
fn a_copy_cut_short_is_none() {
    if missing("a_copy_cut_short_is_none", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    let before = volume(&pool, "size=64M door=fuse");
    pool.ok(&["clone", "a", "b"]);
    for part in [0, 1 << 20, 64 << 20] {
        pool.edit("b", |record| {
            record["formatted"] = false.into();
            record["pending"] = json!({ "create": { "formatting": false } });
        });
        File::options().write(true).open(pool.path("b", "disk.raw")).unwrap().set_len(part).unwrap();
        assert!(pool.refusal(&["inspect", "b"]).contains("no volume is named `b`"));
        assert!(!pool.folder.join("b").exists());
        pool.ok(&["clone", "a", "b"]);
    }
    let point = pool.mount("b");
    assert!(has_file(&point.join("file"), 1 << 20, 8));
    pool.umount("b");
    assert_whole(&pool, 64 * MIB, before);
}
