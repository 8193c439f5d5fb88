//! Larger volumes.

use std::os::unix::fs::MetadataExt;

use super::pool::{Pool, assert_sound, capacity, has_file, write_file};
use crate::support::mount::missing;

const MIB: u64 = 1 << 20;

#[test]
fn xfs_grows_while_it_is_used() {
    if missing("xfs_grows_while_it_is_used", &["mkfs.xfs", "xfs_growfs"]) {
        return;
    }
    let pool = Pool::new();
    for format in ["raw", "qcow2"] {
        pool.create(format, &format!("size=320M fs=xfs door=fuse format={format}"));
        let point = pool.mount(format);
        write_file(&point.join("before"), 5 << 20, 1);
        let before = capacity(&point);
        let told = pool.json(&["resize", format, "640M"]);
        assert_eq!((&told["old_size"], &told["size"]), (&(320 * MIB).into(), &(640 * MIB).into()));
        assert!(told["later"].is_null(), "{told}");
        assert!(capacity(&point) > before + 280 * MIB);
        write_file(&point.join("after"), 5 << 20, 2);
        // The size that it has is no error.
        assert!(pool.ok(&["resize", format, "640M"]).contains("640 MiB"));
        pool.umount(format);
        assert_eq!(pool.inspect(format)["size"], 640 * MIB);
        let point = pool.mount(format);
        assert!(capacity(&point) > before + 280 * MIB);
        assert!(has_file(&point.join("before"), 5 << 20, 1) && has_file(&point.join("after"), 5 << 20, 2));
        pool.umount(format);
        assert_sound(&pool, format);
    }
}

#[test]
fn each_file_system_grows_while_nobody_uses_it() {
    let test = "each_file_system_grows_while_nobody_uses_it";
    if missing(test, &["mkfs.ext4", "resize2fs"]) {
        return;
    }
    let pool = Pool::new();
    for (fs, format, maker) in
        [("ext4", "raw", "mkfs.ext4"), ("ext4", "qcow2", "mkfs.ext4"), ("btrfs", "raw", "mkfs.btrfs")]
    {
        if missing(test, &[maker]) {
            continue;
        }
        let name = format!("{fs}-{format}");
        pool.create(&name, &format!("size=256M fs={fs} door=fuse format={format}"));
        let point = pool.mount(&name);
        write_file(&point.join("file"), 3 << 20, 3);
        let before = capacity(&point);
        pool.umount(&name);
        let told = pool.json(&["resize", &name, "512M"]);
        assert!(told["later"].is_null(), "{told}");
        assert!(pool.inspect(&name)["mounted"].is_null(), "it stays mounted");
        let point = pool.mount(&name);
        assert!(capacity(&point) > before + 200 * MIB, "{name}");
        assert!(has_file(&point.join("file"), 3 << 20, 3), "{name}");
        pool.umount(&name);
    }
}

/// Without CAP_SYS_RESOURCE the kernel lets nobody grow a mounted ext4.
#[test]
fn a_mounted_ext4_grows_at_once_or_at_its_next_mount() {
    if missing("a_mounted_ext4_grows_at_once_or_at_its_next_mount", &["mkfs.ext4", "resize2fs"]) {
        return;
    }
    let pool = Pool::new();
    pool.create("a", "size=64M door=fuse");
    let point = pool.mount("a");
    write_file(&point.join("file"), 1 << 20, 4);
    let before = capacity(&point);
    let told = pool.json(&["resize", "a", "128M"]);
    match told["later"].as_str() {
        None => assert!(capacity(&point) > before + 50 * MIB),
        Some(why) => {
            assert!(why.contains("resize2fs"), "{why}");
            assert_eq!(capacity(&point), before);
        }
    }
    pool.umount("a");
    let point = pool.mount("a");
    assert!(capacity(&point) > before + 50 * MIB);
    assert!(has_file(&point.join("file"), 1 << 20, 4));
    pool.umount("a");
    assert_sound(&pool, "a");
}

#[test]
fn what_a_resize_refuses() {
    if missing("what_a_resize_refuses", &["mkfs.ext4"]) {
        return;
    }
    let pool = Pool::new();
    pool.create("a", "size=64M fs=none provision=thick");
    pool.create("r", "from=a read-only=true");
    let before = pool.record("a");
    for (words, part) in [
        (["a", "32M"], "never shrinks"),
        (["a", "70000001"], "multiple of 4096"),
        (["a", "900T"], "may still be promised"),
        (["r", "128M"], "is read-only"),
        (["none", "64M"], "no volume is named `none`"),
    ] {
        let line = pool.refusal(&["resize", words[0], words[1]]);
        assert!(line.contains(part), "{words:?}: {line}");
    }
    assert_eq!(pool.record("a"), before);
    // The space of a thick one is reserved.
    pool.ok(&["resize", "a", "96M"]);
    let disk = pool.path("a", "disk.raw").metadata().unwrap();
    assert_eq!(disk.len(), 96 * MIB);
    assert!(disk.blocks() * 512 >= 96 * MIB);
}
