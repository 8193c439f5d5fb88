//! The programs that people use on disk files: dd, cp, qemu-img, mkfs, fio, fsx.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::support::mount::{Mount, missing, run};
use crate::support::{Random, text};

const MIB: u64 = 1 << 20;

/// Half of it data, half holes, in turns.
fn half_full(mount: &Mount) {
    let image = File::options().write(true).open(mount.join("disk.img")).unwrap();
    let mut random = Random::new(3);
    for at in (0..32 * MIB).step_by(2 * MIB as usize) {
        image.write_all_at(&random.bytes(MIB as usize), at).unwrap();
    }
}

#[test]
fn dd_and_cp_and_qemu_img() {
    if missing("dd_and_cp_and_qemu_img", &["dd", "cp", "cmp"]) {
        return;
    }
    let mut mount = Mount::image(32 * MIB + 4096, &[]);
    half_full(&mount);
    let (image, copy) = (mount.join("disk.img"), mount.join("copy"));
    for flag in ["iflag=fullblock", "iflag=direct"] {
        let from = format!("if={}", text(&mount.path));
        run("dd", &[&from, &format!("of={}", text(&copy)), &"bs=1M", &flag, &"status=none"]);
        run("cmp", &[&image, &copy]);
    }
    fs::remove_file(&copy).unwrap();
    run("cp", &[&"--sparse=auto", &mount.path, &copy]);
    run("cmp", &[&image, &copy]);
    let (blocks, original) = (fs::metadata(&copy).unwrap().blocks(), fs::metadata(&image).unwrap().blocks());
    assert!(blocks <= original, "holes stay holes: {blocks} and {original} blocks");
    if !missing("dd_and_cp_and_qemu_img (qemu-img)", &["qemu-img"]) {
        run("qemu-img", &[&"compare", &"-f", &"raw", &"-F", &"raw", &"-s", &mount.path, &copy]);
        let map = run("qemu-img", &[&"map", &"--output=json", &"-f", &"raw", &mount.path]);
        assert_eq!(map, run("qemu-img", &[&"map", &"--output=json", &"-f", &"raw", &copy]));
    }
    // And back, over what is there.
    let to = format!("of={}", text(&mount.path));
    for flag in ["conv=notrunc,fsync", "oflag=direct"] {
        let conv = if flag.starts_with("conv") { "oflag=sync" } else { "conv=notrunc" };
        run("dd", &[&"if=/dev/urandom", &to, &"bs=64K", &"count=64", &flag, &conv, &"status=none"]);
        run("cmp", &[&image, &mount.path]);
    }
    mount.stop();
}

/// The tree that is copied: this project's sources.
fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("bridge")
}

/// mkfs, mount, copy a tree, compare, check, on a loop device that losetup makes over the file.
fn a_file_system_over_losetup(test: &str, mkfs: &[&str], fsck: &[&str]) {
    if missing(test, &["losetup", "mount", "diff", mkfs[0], fsck[0]]) {
        return;
    }
    struct Loop(String, PathBuf);
    impl Drop for Loop {
        fn drop(&mut self) {
            let _ = Command::new("umount").args(["-q", text(&self.1)]).status();
            let _ = Command::new("losetup").args(["--detach", &self.0]).status();
        }
    }
    let mut mount = Mount::image(400 * MIB, &[]);
    let place = mount.join("place");
    fs::create_dir(&place).unwrap();
    let device = run("losetup", &[&"--find", &"--show", &"--direct-io=on", &mount.path]);
    let device = Loop(device.trim().to_owned(), place.clone());
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
    arguments.extend(mkfs[1..].iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
    arguments.push(&device.0);
    run(mkfs[0], &arguments);
    for _ in 0..2 {
        run("mount", &[&"-o", &"discard", &device.0, &place]);
        let tree = place.join("tree");
        if tree.exists() {
            run("diff", &[&"-r", &sources(), &tree]);
            fs::remove_dir_all(&tree).unwrap();
        } else {
            run("cp", &[&"-r", &sources(), &tree]);
            run("diff", &[&"-r", &sources(), &tree]);
        }
        run("umount", &[&place]);
        let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
        arguments.extend(fsck[1..].iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
        arguments.push(&device.0);
        run(fsck[0], &arguments);
    }
    drop(device);
    mount.stop();
    // What reached the image is the same file system.
    let image = mount.join("disk.img");
    let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
    arguments.extend(fsck[1..].iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
    arguments.push(&image);
    run(fsck[0], &arguments);
}

#[test]
fn ext4_over_losetup() {
    a_file_system_over_losetup("ext4_over_losetup", &["mkfs.ext4", "-q"], &["fsck.ext4", "-fn"]);
}

#[test]
fn xfs_over_losetup() {
    a_file_system_over_losetup("xfs_over_losetup", &["mkfs.xfs", "-q"], &["xfs_repair", "-n"]);
}

#[test]
fn fio_finds_what_it_wrote() {
    if missing("fio_finds_what_it_wrote", &["fio"]) {
        return;
    }
    for (engine, more) in [
        ("io_uring", &[][..]),
        ("libaio", &[]),
        ("io_uring", &["--fault", "seed=1,delay-ms=1,delay-rate=0.02"]),
    ] {
        let mut mount = Mount::image(32 * MIB, more);
        let file = format!("--filename={}", text(&mount.path));
        run(
            "fio",
            &[
                &"--name=verify",
                &file,
                &format!("--ioengine={engine}"),
                &"--direct=1",
                &"--rw=randwrite",
                &"--bsrange=4k-128k",
                &"--iodepth=32",
                &"--verify=crc32c",
                &"--randseed=17",
                &"--size=32M",
                &format!("--aux-path={}", text(mount.folder.path())),
            ],
        );
        mount.stop();
    }
}

/// fsx: a hundred thousand seeded operations, each read compared with what was written. Shared mappings are not for files
/// with direct I/O. In block `mode` the size stays.
fn a_hundred_thousand_operations(test: &str, mut mount: Mount, mode: &str, more: &str) {
    const SEED: &str = "20240607";
    let Some(fsx) = fsx(test) else { return };
    let file = mount.join("fsx.toml");
    let weights = "[weights]\nread = 10.0\nwrite = 10.0\npunch_hole = 5.0\nfsync = 0.1\nfdatasync = 0.1\n\
                   sendfile = 2.0\ncopy_file_range = 2.0\nmapread = 0.0\nmapwrite = 0.0\n";
    let sizes = "[opsize]\nmax = 65536\nmin = 0\nalign = 1\n";
    fs::write(&file, format!("{mode}{sizes}{weights}{more}")).unwrap();
    eprintln!("seed {SEED}");
    let output = Command::new(&fsx)
        .args(["-f".as_ref(), file.as_os_str(), "-S".as_ref(), SEED.as_ref()])
        .args(["-N".as_ref(), "100000".as_ref(), "-P".as_ref(), mount.folder.path().as_os_str()])
        .arg(&mount.path)
        .output()
        .unwrap();
    assert!(output.status.success(), "seed {SEED}: {}", String::from_utf8_lossy(&output.stderr));
    mount.stop();
}

/// Where fsx is; None, said aloud, where it is not.
fn fsx(test: &str) -> Option<PathBuf> {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/bin/fsx");
    let fsx = std::env::var_os("NBDBRIDGE_FSX").map_or(tools, PathBuf::from);
    if !fsx.exists() {
        eprintln!("SKIP: {test}: there is no {} (contrib/test installs it)", fsx.display());
    }
    Some(fsx).filter(|fsx| fsx.exists())
}

#[test]
fn fsx_is_content() {
    const TEST: &str = "fsx_is_content";
    if !missing(TEST, &[]) {
        let mode = "blockmode = true\nnosizechecks = true\n";
        a_hundred_thousand_operations(TEST, Mount::image(MIB, &[]), mode, "truncate = 0.0\n");
    }
}

/// From an empty file on, which becomes longer and shorter, and is closed and opened.
#[test]
fn fsx_is_content_where_it_truncates() {
    const TEST: &str = "fsx_is_content_where_it_truncates";
    if !missing(TEST, &[]) {
        let more = "truncate = 5.0\nposix_fallocate = 1.0\nclose_open = 0.5\n";
        a_hundred_thousand_operations(TEST, Mount::image(MIB, &["--growable"]), "flen = 1048576\n", more);
    }
}
