//! Volumes whose options or content come from somebody who means no good: nothing that they say reaches beyond the volume.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::json;

use crate::support::Server;
use crate::support::mount::run;
use crate::world::{World, skip};

/// The options of the mount at `point`: those of the mount and of its superblock.
fn mount_options(point: &Path) -> String {
    let table = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = table.lines().rfind(|line| line.split(' ').nth(1) == point.to_str()).unwrap();
    format!(",{},", line.split(' ').nth(3).unwrap())
}

/// What an error does to the ext4 mounted at `point`, as the kernel says.
fn on_error(world: &World, name: &str) -> String {
    let device = world.inspect(name)["device"].as_str().unwrap().to_owned();
    let path = PathBuf::from("/proc/fs/ext4").join(device.trim_start_matches("/dev/")).join("options");
    let options = fs::read_to_string(path).unwrap();
    options.lines().filter(|line| line.starts_with("errors=")).collect::<Vec<_>>().join(" ")
}

#[test]
fn no_superblock_decides_what_an_error_does_to_the_host() {
    if skip("no_superblock_decides_what_an_error_does_to_the_host", &["tune2fs", "mkfs.xfs", "mkfs.btrfs"]) {
        return;
    }
    let world = World::new();
    world.ok("create own -o size=64M -o mount-options=noatime");
    let disk = world.volume("own").join("disk.raw");
    for change in [&["-e", "panic"][..], &["-E", "mount_opts=errors=panic"], &["-e", "continue"]] {
        let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
        words.extend(change.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
        words.push(&disk);
        run("tune2fs", &words);
        let options = mount_options(&world.mount("own"));
        assert!(
            [",nosuid,", ",nodev,", ",noatime,"].iter().all(|option| options.contains(option)),
            "{options}"
        );
        assert_eq!(on_error(&world, "own"), "errors=remount-ro", "{change:?}");
        world.ok("umount own");
    }
    // A remote disk is its owner's: the superblock says what he likes. So does one that is only read.
    let (image, socket) = (world.join("remote.img"), world.join("remote.sock"));
    run("truncate", &[&"-s", &"64M", &image]);
    run("mkfs.ext4", &[&"-q", &"-F", &"-e", &"panic", &image]);
    let mut command = world.command(&["net", "-f", "raw", "-k"]);
    let _server = Server::start(command.arg(&socket).arg(&image).stdin(Stdio::null()), 1);
    for (name, more) in [("remote", ""), ("read", " -o read-only=true")] {
        world.ok(&format!("create {name} -o source=nbd+unix:///?socket={}{more}", socket.display()));
        let options = mount_options(&world.mount(name));
        assert!(options.contains(",nosuid,") && options.contains(",nodev,"), "{options}");
        assert_eq!(on_error(&world, name), "errors=remount-ro");
        world.ok(&format!("umount {name}"));
        world.ok(&format!("rm {name}"));
    }
    for (fs, size) in [("xfs", "320M"), ("btrfs", "128M")] {
        world.ok(&format!("create {fs} -o fs={fs} -o size={size}"));
        let options = mount_options(&world.mount(fs));
        assert!(options.contains(",nosuid,") && options.contains(",nodev,"), "{options}");
        world.ok(&format!("umount {fs}"));
    }
}

#[test]
fn options_that_are_not_on_the_list_are_refused_with_it() {
    if skip("options_that_are_not_on_the_list_are_refused_with_it", &["mkfs.xfs", "mkfs.btrfs"]) {
        return;
    }
    let world = World::new();
    let aside = world.join("aside");
    fs::write(&aside, vec![7; 16 << 20]).unwrap();
    let refused = |options: &str, part: &str| {
        let mut command = world.command(&["volume", "create", "a"]);
        command.args(options.split(';').flat_map(|option| ["-o", option]));
        let output = command.output().unwrap();
        let line = crate::support::one_line(&output);
        assert_eq!(output.status.code(), Some(1), "{options}: {line}");
        assert!(line.contains(part), "{options}: {line}");
    };
    for option in
        ["errors=panic", "noatime,errors=panic", "errors=continue", "journal_path=/dev/sda", "data=x", "x"]
    {
        refused(&format!("size=64M;mount-options={option}"), "with fs=ext4 there are defaults, rw, ");
    }
    for option in ["fatal_errors=panic", "device=/dev/sda", "degraded", "errors=remount-ro"] {
        refused(&format!("size=128M;fs=btrfs;mount-options={option}"), "with fs=btrfs there are ");
    }
    for option in ["logdev=/dev/sda", "rtdev=sda", "norecovery"] {
        refused(&format!("size=320M;fs=xfs;mount-options={option}"), "with fs=xfs there are ");
    }
    let uuid = "device=UUID=0c1c6a9c-8bd5-4b06-a1ac-8c1ec5fd6a3c";
    for words in [
        "-e panic",
        "-epanic",
        "-qe panic",
        &format!("-b 1024 -J{uuid}"),
        &format!("-J size=4,{uuid}"),
        "-J device=LABEL=x",
        "-O journal_dev",
        "-E offset=1048576",
        aside.to_str().unwrap(),
        "-n",
        "--no-such",
    ] {
        refused(&format!("size=64M;mkfs-options={words}"), "with fs=ext4 there are -b N, ");
    }
    refused("size=320M;fs=xfs;mkfs-options=-l logdev=x,size=64m", "with fs=xfs there are ");
    refused("size=128M;fs=btrfs;mkfs-options=--rootdir /etc", "with fs=btrfs there are ");
    assert!(fs::read(&aside).unwrap().iter().all(|byte| *byte == 7));
    assert_eq!(world.names(), Vec::<String>::new());
    world.assert_idle();
}

#[test]
fn suid_and_dev_need_the_consent_of_the_pool() {
    if skip("suid_and_dev_need_the_consent_of_the_pool", &[]) {
        return;
    }
    let world = World::new();
    world.ok("pool --make");
    let line = world.fails("create a -o size=64M -o mount-options=suid", 1);
    assert!(line.contains("nosuid") && line.contains("volume pool --allow suid"), "{line}");
    assert!(world.fails("create a -o size=64M -o mount-options=noatime,dev", 1).contains("--allow dev"));
    assert!(world.fails("pool --allow root", 2).contains("suid, dev"));
    world.ok("pool --allow suid,dev");
    assert_eq!(world.json("pool")["settings"]["allow"], json!(["suid", "dev"]));
    world.ok("create a -o size=64M -o mount-options=suid,dev");
    world.ok("create b -o size=64M");
    for (name, safe) in [("a", false), ("b", true)] {
        let options = mount_options(&world.mount(name));
        assert_eq!((options.contains(",nosuid,"), options.contains(",nodev,")), (safe, safe), "{options}");
        world.ok(&format!("umount {name}"));
    }
    // The pool takes it back.
    world.ok("pool --allow none");
    assert!(world.fails("mount a", 1).contains("volume set a -o mount-options="));
    world.ok("set a -o mount-options=noatime");
    assert!(mount_options(&world.mount("a")).contains(",nosuid,"));
    world.ok("umount a");
}

#[test]
fn what_is_recorded_and_not_allowed_any_more_can_be_set() {
    if skip("what_is_recorded_and_not_allowed_any_more_can_be_set", &[]) {
        return;
    }
    let world = World::new();
    world.ok("create a -o size=64M");
    fs::write(world.mount("a").join("file"), "data").unwrap();
    world.ok("umount a");
    let path = world.volume("a").join("volume.json");
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["options"]["mount-options"] = json!("noatime,errors=panic");
    record["options"]["mkfs-options"] = json!("-e panic");
    fs::write(&path, record.to_string()).unwrap();
    assert_eq!(world.names(), ["a"]);
    assert_eq!(world.inspect("a")["health"], "ok");
    let line = world.fails("mount a", 1);
    assert!(line.contains("`errors=panic` is not allowed"), "{line}");
    assert!(line.contains("nbdbridge volume set a -o mount-options=OPTIONS"), "{line}");
    world.assert_idle();
    assert!(world.fails("set a -o mount-options=errors=panic", 1).contains("is not allowed"));
    assert!(world.fails("set a -o size=1G", 2).contains("only mount-options"));
    world.fails("set a", 2);
    assert_eq!(world.ok("set a -o mount-options=noatime"), "a: mount-options=noatime\n");
    let point = world.mount("a");
    assert!(mount_options(&point).contains(",noatime,"));
    assert_eq!(fs::read(point.join("file")).unwrap(), b"data");
    world.ok("umount a");
    world.ok("set a -o mount-options=");
    assert!(!world.inspect("a")["options"].as_object().unwrap().contains_key("mount-options"));
}

#[test]
fn a_journal_on_another_device_is_not_looked_for() {
    if skip("a_journal_on_another_device_is_not_looked_for", &["debugfs", "losetup"]) {
        return;
    }
    let world = World::new();
    let journal = world.join("journal");
    let uuid = "0c1c6a9c-8bd5-4b06-a1ac-8c1ec5fd6a3c";
    run("truncate", &[&"-s", &"16M", &journal]);
    run("mkfs.ext4", &[&"-q", &"-F", &"-b", &"1024", &"-O", &"journal_dev", &"-U", &uuid, &journal]);
    let before = fs::read(&journal).unwrap();
    world.ok("create a -o size=64M");
    let disk = world.volume("a").join("disk.raw");
    run("debugfs", &[&"-w", &"-R", &"ssv journal_inum 0", &disk]);
    run("debugfs", &[&"-w", &"-R", &format!("ssv journal_uuid {uuid}"), &disk]);
    let path = world.volume("a").join("volume.json");
    let text = fs::read_to_string(&path).unwrap();
    for unclean in ["false", "true"] {
        fs::write(&path, text.replace("\"unclean\": false", &format!("\"unclean\": {unclean}"))).unwrap();
        for line in ["mount a", "fsck a", "fsck a --repair"] {
            let said = world.fails(line, 1);
            assert!(said.contains("has its journal on another device"), "{line}: {said}");
        }
    }
    world.assert_idle();
    assert!(fs::read(&journal).unwrap() == before);
}
