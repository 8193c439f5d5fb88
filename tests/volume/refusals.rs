//! Bad input: one line each, exit status 2 for what makes no sense and 1 for what cannot be, and nothing left behind.

use std::fs;
use std::process::{Command, Stdio};

use crate::support::mount::{nbdbridge, run};
use crate::support::{PROGRAM, one_line};
use crate::world::World;

#[test]
fn words_that_make_no_sense() {
    let Some(world) = World::here("words_that_make_no_sense", &[]) else { return };
    for name in ["../x", "a/b", "..", ".a", "-", "a%2f", &"x".repeat(256)] {
        let line = world.fails(&format!("create -o size=64M -- {name}"), 2);
        assert!(line.contains("is no name for a volume"), "{line}");
    }
    for (options, part) in [
        ("-o size=0", "no size holds nothing"),
        ("-o size=9E", "too large"),
        ("-o size=64M -o colour=red", "unknown option `colour`; there are size, fs, format"),
        ("-o size=64M -o fs=ntfs", "there are ext4, xfs, btrfs and none"),
        ("-o size=64M -o provision=thick -o format=qcow2", "needs format=raw"),
        ("-o size=64M -o read-only", "stays so"),
        ("-o source=/etc/passwd", "a remote export is wanted"),
    ] {
        let line = world.fails(&format!("create a {options}"), 2);
        assert!(line.contains(part), "{options}: {line}");
    }
    // This makes sense.
    assert!(world.fails("create a -o size=4E", 1).contains("more than the "));
    let longest = "x".repeat(255);
    world.ok(&format!("create {longest} -o size=64M"));
    world.mount(&longest);
    world.ok(&format!("umount {longest}"));
    // What is there goes all the same.
    world.ok("create a -o size=64M");
    world.ok("create c -o size=64M");
    assert!(world.fails("rm a b c", 1).contains("no volume is named `b` there"));
    for line in ["mount b", "umount b", "rm b", "inspect b", "limit b iops-total=1", "fsck b"] {
        let said = world.fails(line, 1);
        assert!(said.contains("no volume is named `b` there"), "{line}: {said}");
    }
    assert_eq!(world.names(), [longest]);
}

#[test]
fn a_name_is_given_away_once() {
    let Some(world) = World::here("a_name_is_given_away_once", &[]) else { return };
    world.ok("create a -o size=64M");
    let line = world.fails("create a -o size=128M -o uid=5", 1);
    assert!(line.contains("exists with other options (size, uid)"), "{line}");
    assert_eq!(world.inspect("a")["size"], 64 << 20);
    // At the same time: of six wishes of three kinds one kind comes true.
    let start = |n: usize| {
        let size = format!("size={}M", 64 + 4 * (n % 3));
        let mut command = world.command(&["volume", "create", "b", "-o", &size]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let children: Vec<_> = (0..6).map(start).collect();
    let outputs: Vec<_> = children.into_iter().map(|child| child.wait_with_output().unwrap()).collect();
    let won: Vec<_> = (0..6).filter(|n| outputs[*n].status.success()).collect();
    assert!(won.len() == 2 && won[0] + 3 == won[1], "{outputs:?}");
    let made = outputs.iter().filter(|output| String::from_utf8_lossy(&output.stdout).contains("b: made: "));
    assert_eq!(made.count(), 1);
    for output in outputs.iter().filter(|output| !output.status.success()) {
        assert!(one_line(output).contains("exists with other options (size)"));
    }
    world.mount("b");
    world.ok("umount b");
}

#[test]
fn what_is_in_use_stays() {
    let Some(world) = World::here("what_is_in_use_stays", &[]) else { return };
    world.ok("create a -o size=64M");
    let point = world.mount("a");
    fs::write(point.join("file"), "precious").unwrap();
    for line in ["rm a", "fsck a", "fsck a --repair"] {
        let said = world.fails(line, 1);
        assert!(said.contains("volume `a` is in use: mounted at ") && said.contains("by hand"), "{said}");
    }
    let open = fs::File::open(point.join("file")).unwrap();
    let said = world.fails("umount a", 1);
    assert!(said.contains("volume `a` is in use: files in "), "{said}");
    assert!(said.contains(&format!("(process {})", std::process::id())), "{said}");
    assert_eq!(fs::read(point.join("file")).unwrap(), b"precious");
    drop(open);
    world.ok("umount a");
    assert_eq!(fs::read(world.mount("a").join("file")).unwrap(), b"precious");
    // Told to, it goes from below its users.
    let open = fs::File::open(point.join("file")).unwrap();
    world.ok("rm a --force");
    drop(open);
    assert_eq!(world.names(), Vec::<String>::new());
    world.assert_idle();
}

#[test]
fn one_that_is_broken_harms_no_other() {
    let Some(world) = World::here("one_that_is_broken_harms_no_other", &[]) else { return };
    world.ok("create good -o size=64M");
    world.ok("create bad -o size=64M");
    let path = world.volume("bad").join("volume.json");
    let text = fs::read_to_string(&path).unwrap();
    for damage in
        [text[..text.len() / 2].to_owned(), text.replace("\"schema\": 1", "\"schema\": 99"), String::new()]
    {
        fs::write(&path, damage).unwrap();
        let listed = world.ok("ls");
        let row = listed.lines().find(|line| line.starts_with("bad ")).unwrap();
        assert!(row.contains("volume `bad` is broken: "), "{listed}");
        assert_eq!(world.names(), ["bad", "good"]);
        for line in ["mount bad", "inspect bad", "rm bad", "create bad -o size=64M"] {
            assert!(world.fails(line, 1).contains("volume `bad` is broken: "), "{line}");
        }
        world.mount("good");
        world.ok("umount good");
    }
    fs::write(&path, &text).unwrap();
    world.mount("bad");
    world.ok("umount bad");
    // What a copied folder can hold: a pipe, for whose other end nobody waits, and a link to another disk.
    fs::remove_file(&path).unwrap();
    run("mkfifo", &[&path]);
    assert!(world.fails("mount bad", 1).contains("is no regular file"));
    assert_eq!(world.names(), ["bad", "good"]);
    fs::remove_file(&path).unwrap();
    fs::write(&path, &text).unwrap();
    let (disk, aside) = (world.volume("bad").join("disk.raw"), world.join("aside"));
    fs::rename(&disk, &aside).unwrap();
    std::os::unix::fs::symlink(&aside, &disk).unwrap();
    assert!(world.fails("mount bad", 1).contains("disk.raw: is no regular file"));
    fs::remove_file(&disk).unwrap();
    fs::rename(&aside, &disk).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(world.fails("rm bad", 1).contains("--force"));
    assert!(world.volume("bad").join("disk.raw").exists());
    world.ok("rm bad --force");
    assert_eq!(world.names(), ["good"]);
}

#[test]
fn a_missing_program_is_named_with_its_package() {
    const TEST: &str = "a_missing_program_is_named_with_its_package";
    let Some(world) = World::here(TEST, &["unshare", "mount"]) else { return };
    for (fs, program, package) in [
        ("ext4", "mkfs.ext4", "e2fsprogs"),
        ("xfs", "mkfs.xfs", "xfsprogs"),
        ("btrfs", "mkfs.btrfs", "btrfs-progs"),
    ] {
        // Where these programs are, there is nothing for a while.
        let script = "for folder in /usr/sbin /sbin /usr/local/sbin; do mount -t tmpfs none $folder; done; \
                      exec \"$0\" volume create a --pool \"$1\" -o size=320M -o fs=$2";
        let mut command = Command::new("unshare");
        command.args(["-m", "sh", "-c", script, PROGRAM]).arg(world.join("pool")).arg(fs);
        let output = command.output().unwrap();
        if output.status.code() != Some(1) {
            eprintln!("SKIP: {TEST}: no mounts of one's own here: {output:?}");
            return;
        }
        let line = one_line(&output);
        assert!(line.contains(&format!("there is no {program} here")), "{line}");
        assert!(line.contains(&format!("apt-get install {package}")), "{line}");
    }
    assert_eq!(world.names(), Vec::<String>::new());
}

#[test]
fn a_door_that_is_not_there() {
    const TEST: &str = "a_door_that_is_not_there";
    let Some(world) = World::here(TEST, &[]) else { return };
    if std::path::Path::new("/dev/ublk-control").exists() {
        eprintln!("SKIP: {TEST}: there is ublk here");
        return;
    }
    let line = world.fails("create a -o size=64M -o door=ublk", 1);
    assert!(line.contains("this host has no ublk"), "{line}");
    fs::write(world.join("disk"), [0; 4096]).unwrap();
    let output = nbdbridge(world.folder.path(), &["attach", "--door", "ublk", "disk"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("this kernel has no ublk"), "{output:?}");
    world.ok("create a -o size=64M -o door=fuse");
    assert_eq!(world.inspect("a")["options"]["door"], "fuse");
}
