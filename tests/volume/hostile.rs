//! Volumes whose options or content come from somebody who means no good: nothing that they say reaches beyond the volume.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::json;

use crate::support::Server;
use crate::support::mount::run;
use crate::world::World;

/// The options of the mount at `point`: those of the mount and of its superblock.
fn mount_options(point: &Path) -> String {
    let table = String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned();
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
    let Some(world) = World::here(
        "no_superblock_decides_what_an_error_does_to_the_host",
        &["tune2fs", "mkfs.xfs", "mkfs.btrfs"],
    ) else {
        return;
    };
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
    let Some(world) =
        World::here("options_that_are_not_on_the_list_are_refused_with_it", &["mkfs.xfs", "mkfs.btrfs"])
    else {
        return;
    };
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
    let Some(world) = World::here("suid_and_dev_need_the_consent_of_the_pool", &[]) else { return };
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
    let Some(world) = World::here("what_is_recorded_and_not_allowed_any_more_can_be_set", &[]) else {
        return;
    };
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
    let Some(world) = World::here("a_journal_on_another_device_is_not_looked_for", &["debugfs", "losetup"])
    else {
        return;
    };
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

/// A pool with a sound volume and a snapshot of it, and a secret of the host's beside.
fn pool_with_secret(world: &World) -> PathBuf {
    world.ok("create v -o size=1M -o fs=none");
    world.ok("snapshot v s");
    let secret = world.join("secret");
    fs::write(&secret, "secret".repeat(4096)).unwrap();
    secret
}

/// Puts something else in the place of a path for a while.
fn replaced(path: &Path, make: impl FnOnce(&Path), work: impl FnOnce()) {
    let aside = path.with_file_name(".aside");
    fs::rename(path, &aside).unwrap();
    make(path);
    work();
    if path.symlink_metadata().unwrap().is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) }
        .unwrap();
    fs::rename(&aside, path).unwrap();
}

#[test]
fn no_link_fifo_or_file_of_others_is_opened_in_a_pool() {
    let Some(world) = World::here("no_link_fifo_or_file_of_others_is_opened_in_a_pool", &["mkfifo"]) else {
        return;
    };
    let secret = pool_with_secret(&world);
    let volume = world.volume("v");
    let elsewhere = world.join("elsewhere");
    run("cp", &[&"-r", &volume, &elsewhere]);
    // What is asked, and which of the places it has to reach.
    let all =
        ["mount v", "inspect v", "clone v new", "clone v@s new", "snapshot v t", "resize v 2M", "fsck v"];
    let refused = |lines: &[&str], what: &str| {
        for line in lines {
            let begun = std::time::Instant::now();
            let said = world.fails(line, 1);
            assert!(said.contains("pool/") && !said.contains("/proc/"), "{what}: {line}: {said}");
            assert!(begun.elapsed() < std::time::Duration::from_secs(20), "{what}: {line} waited");
        }
        assert_eq!(world.names(), ["v"], "{what}");
        world.ok("ls");
    };
    type Make<'a> = &'a dyn Fn(&Path);
    let link = |path: &Path| std::os::unix::fs::symlink(&secret, path).unwrap();
    let fifo = |path: &Path| drop(run("mkfifo", &[&path]));
    let folder = |path: &Path| fs::create_dir(path).unwrap();
    let others = |path: &Path| {
        fs::copy(path.with_file_name(".aside"), path).unwrap();
        std::os::unix::fs::chown(path, Some(65534), None).unwrap();
    };
    let kinds: [(&str, Make<'_>); 4] =
        [("link", &link), ("fifo", &fifo), ("folder", &folder), ("others", &others)];
    for (what, make) in kinds {
        replaced(&volume.join("disk.raw"), make, || refused(&all, what));
        replaced(&volume.join("volume.json"), make, || refused(&all, what));
        replaced(&volume.join("snapshots/s/disk.raw"), make, || refused(&["clone v@s new"], what));
        replaced(&volume.join("snapshots/s/snapshot.json"), make, || refused(&["clone v@s new"], what));
    }
    // Links to folders, to sound ones too.
    for (path, target, lines) in [
        (
            volume.join("snapshots"),
            elsewhere.join("snapshots"),
            &["inspect v", "clone v@s new", "snapshot v t"][..],
        ),
        (volume.join("snapshots/s"), elsewhere.join("snapshots/s"), &["clone v@s new"]),
        (volume.clone(), elsewhere.clone(), &all),
    ] {
        let link = |path: &Path| std::os::unix::fs::symlink(&target, path).unwrap();
        replaced(&path, link, || refused(lines, path.to_str().unwrap()));
    }
    world.assert_idle();
    assert_eq!(fs::read_to_string(&secret).unwrap(), "secret".repeat(4096));
    assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 3);
    // It is sound as it was.
    world.ok("clone v@s new");
    world.mount("v");
    world.ok("umount v");
}

#[test]
fn what_is_made_and_removed_in_a_pool_stays_in_it() {
    let Some(world) = World::here("what_is_made_and_removed_in_a_pool_stays_in_it", &["mkfifo", "mount"])
    else {
        return;
    };
    let secret = pool_with_secret(&world);
    let (pool, volume) = (world.join("pool"), world.volume("v"));
    let link = |path: PathBuf| std::os::unix::fs::symlink(&secret, path).unwrap();
    let kept = || assert_eq!(fs::read_to_string(&secret).unwrap(), "secret".repeat(4096));
    // Where a record, settings and a snapshot are written before they are renamed.
    link(volume.join(".volume.json.new"));
    world.ok("limit v iops-total=7000");
    assert_eq!(world.inspect("v")["limits"]["iops-total"], 7000);
    link(pool.join("..pool.json.new"));
    world.ok("pool --default-size 2M");
    link(volume.join("snapshots/.new"));
    world.ok("snapshot v t");
    link(volume.join("snapshots/.gone"));
    world.ok("snapshot v t --remove");
    kept();
    // What is left of a crash, by its name.
    link(pool.join(".new-a"));
    link(pool.join(".gone-a-1-1"));
    run("mkfifo", &[&pool.join(".new-b")]);
    run("mkfifo", &[&pool.join(".gone-b-1-1")]);
    assert_eq!(world.names(), ["v"]);
    for name in [".new-a", ".gone-a-1-1", ".new-b", ".gone-b-1-1"] {
        assert!(pool.join(name).symlink_metadata().is_err(), "{name}");
    }
    kept();
    // A link in the place of a volume is a broken one, which can be removed.
    let other = world.join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("file"), "kept").unwrap();
    std::os::unix::fs::symlink(&other, pool.join("link")).unwrap();
    assert!(world.ok("ls").lines().any(|line| line.starts_with("link ") && line.contains("symbolic link")));
    assert!(world.fails("rm link", 1).contains("--force"));
    world.ok("rm link --force");
    assert_eq!(fs::read(other.join("file")).unwrap(), b"kept");
    // Nor is what is mounted in one removed.
    let inside = volume.join("inside");
    fs::create_dir(&inside).unwrap();
    run("mount", &[&"--bind", &other, &inside]);
    let output = world.call("rm v");
    assert_eq!(fs::read(other.join("file")).unwrap(), b"kept", "{output:?}");
    let inside = if inside.exists() {
        inside
    } else {
        let gone =
            fs::read_dir(&pool).unwrap().flatten().find(|entry| entry.file_name() != ".pool.json").unwrap();
        gone.path().join("inside")
    };
    run("umount", &[&inside]);
    assert_eq!(world.names(), Vec::<String>::new());
    world.assert_idle();
}

#[test]
fn a_data_plane_opens_its_disk_as_the_pool_does() {
    let Some(world) = World::here("a_data_plane_opens_its_disk_as_the_pool_does", &["qemu-img", "mkfifo"])
    else {
        return;
    };
    let secret = pool_with_secret(&world);
    let volume = world.volume("v");
    let attach = |name: &str, format: &str| {
        let mut command = world.command(&["attach", "--door=fuse", "-f", format, "--beneath"]);
        let output = command.arg(world.join("pool")).arg("--").arg(volume.join(name)).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        let line = crate::support::one_line(&output);
        assert!(!line.contains("/proc/"), "{name}: {line}");
        line
    };
    std::os::unix::fs::symlink(&secret, volume.join("link")).unwrap();
    std::os::unix::fs::symlink("disk.raw", volume.join("inner")).unwrap();
    run("mkfifo", &[&volume.join("fifo")]);
    for (name, why) in [
        ("link", "symbolic link"),
        ("inner", "symbolic link"),
        ("fifo", "no regular file"),
        ("../../secret", "mounted there"),
        ("none", "No such file"),
    ] {
        for format in ["raw", "qcow2"] {
            let line = attach(name, format);
            assert!(line.contains(why), "{name}: {line}");
        }
    }
    // A qcow2 stands alone: neither a backing file nor a data file beside it is opened, whatever it is.
    // qemu-img makes a data file where it runs, whatever folder the image is in.
    let data = format!("data_file={},data_file_raw=on", volume.join("others.raw").display());
    for (name, make) in [
        ("backed", &["-F", "raw", "-b", "disk.raw"][..]),
        ("waits", &["-u", "-F", "qcow2", "-b", "fifo"]),
        ("data", &["-o", &data]),
    ] {
        let path = volume.join(name);
        let mut words: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&"create", &"-q", &"-f", &"qcow2"];
        words.extend(make.iter().map(|word| word as &dyn AsRef<std::ffi::OsStr>));
        words.extend([&path as &dyn AsRef<std::ffi::OsStr>, &"1M"]);
        run("qemu-img", &words);
        let line = attach(name, "qcow2");
        assert!(line.contains("names another file"), "{name}: {line}");
        if name == "data" {
            break;
        }
        // So it is for a volume whose disk it is.
        world.ok("create q -o size=1M -o fs=none -o format=qcow2");
        let disk = world.volume("q").join("disk.qcow2");
        fs::copy(&path, &disk).unwrap();
        for line in ["mount q", "resize q 2M"] {
            let said = world.fails(line, 1);
            assert!(
                said.contains("names another file") && said.contains("disk.qcow2"),
                "{name}: {line}: {said}"
            );
        }
        world.ok("rm q");
    }
    // A FIFO as a backing file makes nobody wait, in a pool or not.
    let output = world.command(&["info", volume.join("waits").to_str().unwrap()]).output().unwrap();
    assert!(!output.stdout.is_empty() || !output.stderr.is_empty());
}

#[test]
fn a_mount_point_is_no_link() {
    let Some(world) = World::here("a_mount_point_is_no_link", &["mount"]) else { return };
    world.ok("create a -o size=64M");
    let (target, root) = (world.join("target"), world.join("points"));
    fs::create_dir(&target).unwrap();
    fs::create_dir(&root).unwrap();
    std::os::unix::fs::symlink(&target, root.join("a")).unwrap();
    let mount = format!("mount a --mount-root {}", root.display());
    let line = world.fails(&mount, 1);
    assert!(line.contains("points/a: cannot be mounted on") && line.contains("symbolic link"), "{line}");
    // So it is where volumes are mounted without that.
    let pool = fs::read_dir(world.join("run/volumes")).unwrap().next().unwrap().unwrap().path();
    std::os::unix::fs::symlink(&target, pool.join("a")).unwrap();
    assert!(world.fails("mount a", 1).contains("symbolic link"));
    fs::remove_file(pool.join("a")).unwrap();
    // What is mounted there already is somebody else's.
    fs::remove_file(root.join("a")).unwrap();
    fs::create_dir(root.join("a")).unwrap();
    run("mount", &[&"--bind", &target, &root.join("a")]);
    let line = world.fails(&mount, 1);
    assert!(line.contains("another file system is mounted there"), "{line}");
    run("umount", &[&root.join("a")]);
    // A file is none either; and the folder of all may be reached by a link of whoever says so.
    fs::remove_dir(root.join("a")).unwrap();
    fs::write(root.join("a"), "").unwrap();
    assert!(world.fails(&mount, 1).contains("is no folder"));
    fs::remove_file(root.join("a")).unwrap();
    assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    world.assert_idle();
    let named = world.join("named");
    std::os::unix::fs::symlink(&root, &named).unwrap();
    let path = world.ok(&format!("mount a --mount-root {}", named.display()));
    assert_eq!(Path::new(path.trim_end()), root.join("a"));
    world.ok("umount a");
}
