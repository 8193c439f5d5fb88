//! Mounting, ending, being killed; users who are not root.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::mount::{Mount, fuse, is_mounted, missing, nbdbridge, run};
use crate::support::{PROGRAM, eventually, one_line};

/// The account `nobody`: fusermount3 wants a name.
const USER: u32 = 65_534;

#[test]
fn a_new_file_goes_and_one_that_was_there_stays() {
    if missing("a_new_file_goes_and_one_that_was_there_stays", &[]) {
        return;
    }
    let mut mount = Mount::image(1 << 20, &[]);
    assert_eq!(mount.path, mount.join("file").canonicalize().unwrap());
    assert_eq!(fs::metadata(&mount.path).unwrap().len(), 1 << 20);
    mount.stop();
    assert!(!mount.join("file").exists());
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("there"), "before").unwrap();
    fs::set_permissions(folder.path().join("there"), fs::Permissions::from_mode(0o640)).unwrap();
    let mut mount = Mount::at(folder, "mem:1M", "there", &[]);
    let found = fs::metadata(&mount.path).unwrap();
    assert_eq!((found.len(), found.mode()), (1 << 20, 0o100_640), "mode and owner are taken over");
    mount.stop();
    assert_eq!(fs::read(mount.join("there")).unwrap(), b"before");
}

#[test]
fn an_image_is_mounted_over_itself_and_recovered_after_a_kill() {
    if missing("an_image_is_mounted_over_itself_and_recovered_after_a_kill", &[]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    fs::write(&image, vec![1; 1 << 20]).unwrap();
    // From a byte on, so that the file and what it covers differ.
    let mut mount = Mount::at(folder, "disk.img", "disk.img", &["--offset", "512K"]);
    assert_eq!(fs::metadata(&image).unwrap().len(), 512 << 10);
    mount.open().write_all_at(&[2; 4096], 0).unwrap();
    mount.server.child.kill().unwrap();
    mount.server.child.wait().unwrap();
    assert_eq!(fs::metadata(&image).unwrap_err().kind(), ErrorKind::NotConnected);
    let listed = nbdbridge(mount.folder.path(), &["devices"]).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let row = listed.lines().find(|line| line.starts_with(mount.path.to_str().unwrap()));
    assert!(row.is_some_and(|row| row.contains(" dead ")), "{listed}");
    // The next one finds the dead mount, and what was answered.
    let again =
        fuse(mount.folder.path()).args(["disk.img", "disk.img", "--fork", "--pid-file", "pid"]).output();
    let again = again.unwrap();
    assert!(again.status.success(), "{again:?}");
    let mut begin = vec![0; (512 << 10) + 1];
    File::open(&image).unwrap().read_exact_at(&mut begin, 0).unwrap();
    assert_eq!((begin[0], begin[512 << 10]), (1, 2));
    run(PROGRAM, &[&"detach", &image]);
    assert!(!is_mounted(&image) && !mount.join("pid").exists());
    assert_eq!(fs::metadata(&image).unwrap().len(), 1 << 20);
}

#[test]
fn detach_clears_what_a_killed_server_has_left() {
    if missing("detach_clears_what_a_killed_server_has_left", &[]) {
        return;
    }
    let mut mount = Mount::image(1 << 20, &[]);
    mount.server.child.kill().unwrap();
    mount.server.child.wait().unwrap();
    run(PROGRAM, &[&"detach", &mount.path]);
    assert!(!is_mounted(&mount.path) && !mount.join("file").exists());
    let refused = nbdbridge(mount.folder.path(), &["detach", "file"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(one_line(&refused).contains("is no device or file of nbdbridge's"));
}

/// That a file was made for it is remembered when its server is killed, whoever comes next.
#[test]
fn a_new_file_goes_after_a_kill_too() {
    if missing("a_new_file_goes_after_a_kill_too", &["umount"]) {
        return;
    }
    let killed = || {
        let mount = Mount::image(1 << 20, &[]);
        let path = mount.path.clone();
        (mount.kill(), path)
    };
    // Another server, and another one that is killed as well.
    let (mut folder, path) = killed();
    for _ in 0..2 {
        folder = Mount::at(folder, "disk.img", "file", &[]).kill();
    }
    let mut mount = Mount::at(folder, "disk.img", "file", &[]);
    mount.stop();
    assert!(!path.exists());
    // Somebody unmounts it by hand.
    let (_folder, path) = killed();
    run("umount", &[&path]);
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    run(PROGRAM, &[&"detach", &path]);
    assert!(!path.exists());
    // And puts something there, which is not ours.
    let (folder, path) = killed();
    run("umount", &[&path]);
    fs::write(&path, "words").unwrap();
    let refused = nbdbridge(folder.path(), &["detach", "file"]).output().unwrap();
    assert!(one_line(&refused).contains("is no device or file of nbdbridge's"), "{refused:?}");
    let mut mount = Mount::at(folder, "disk.img", "file", &[]);
    mount.stop();
    assert_eq!(fs::read(path).unwrap(), b"words");
}

#[test]
fn a_busy_file_is_unmounted_lazily_and_its_data_is_safe() {
    if missing("a_busy_file_is_unmounted_lazily_and_its_data_is_safe", &[]) {
        return;
    }
    let mut mount = Mount::image(1 << 20, &["--drain-timeout", "60"]);
    let file = mount.open();
    file.write_all_at(b"before", 0).unwrap();
    let refused = nbdbridge(mount.folder.path(), &["detach", "file"]).output().unwrap();
    assert!(one_line(&refused).contains("is in use by"), "{refused:?}");
    mount.server.signal(Signal::TERM);
    eventually("it is unmounted", || !is_mounted(&mount.path));
    assert!(mount.server.is_running(), "its user is still there");
    file.write_all_at(b"after", 100).unwrap();
    drop(file);
    let status = mount.server.wait(Duration::from_secs(20)).expect("it ends with its last user");
    assert_eq!(status.code(), Some(0), "{}", mount.log());
    assert!(mount.log().contains("is in use by"), "{}", mount.log());
    let image = fs::read(mount.join("disk.img")).unwrap();
    assert_eq!((&image[..6], &image[100..105]), (&b"before"[..], &b"after"[..]));
    // One who never closes it does not keep the server, or its data from the disk.
    let mut mount = Mount::image(1 << 20, &["--drain-timeout", "100ms"]);
    let file = mount.open();
    file.write_all_at(b"before", 0).unwrap();
    mount.stop();
    assert_eq!(&fs::read(mount.join("disk.img")).unwrap()[..6], b"before");
    assert_eq!(file.read_at(&mut [0], 0).unwrap_err().kind(), ErrorKind::NotConnected);
}

#[test]
fn it_ends_when_somebody_unmounts_it() {
    if missing("it_ends_when_somebody_unmounts_it", &["umount"]) {
        return;
    }
    let mut mount = Mount::image(1 << 20, &[]);
    mount.open().write_all_at(b"data", 0).unwrap();
    run("umount", &[&mount.path]);
    let status = mount.server.wait(Duration::from_secs(20)).expect("it ends");
    assert_eq!(status.code(), Some(0), "{}", mount.log());
    assert_eq!(&fs::read(mount.join("disk.img")).unwrap()[..4], b"data");
}

#[test]
fn fork_prints_the_file_and_detach_ends_it() {
    if missing("fork_prints_the_file_and_detach_ends_it", &[]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let args = ["mem:64M", "file", "--fork", "--pid-file", "pid"];
    let output = fuse(folder.path()).args(args).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let file = folder.path().join("file").canonicalize().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().trim_end(), file.to_str().unwrap());
    let pid = fs::read_to_string(folder.path().join("pid")).unwrap();
    let listed = run(PROGRAM, &[&"devices"]);
    let row = listed.lines().find(|line| line.contains(file.to_str().unwrap())).unwrap_or_default();
    for cell in [pid.trim(), "fuse", "64 MiB", "serving", "mem:"] {
        assert!(row.contains(cell), "{cell}: {listed}");
    }
    run(PROGRAM, &[&"detach", &file]);
    assert!(!is_mounted(&file) && !file.exists());
    assert!(!run(PROGRAM, &[&"devices"]).contains(file.to_str().unwrap()));
}

/// /dev/fuse with the mode that udev gives it, for as long as this lives: a bare /dev may have it for root alone.
struct OpenDevice(fs::Permissions);

impl OpenDevice {
    fn new() -> Self {
        let before = fs::metadata("/dev/fuse").unwrap().permissions();
        fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
        OpenDevice(before)
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let _ = fs::set_permissions("/dev/fuse", self.0.clone());
    }
}

/// A user mounts through fusermount3; nobody else gets in, and SIGTERM cleans up.
#[test]
fn an_ordinary_user_mounts_too() {
    if missing("an_ordinary_user_mounts_too", &["fusermount3", "setpriv"]) {
        return;
    }
    let _device = OpenDevice::new();
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let home = folder.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::write(home.join("disk.img"), vec![3; 1 << 20]).unwrap();
    // The program's folder may not let others in.
    fs::copy(PROGRAM, home.join("nbdbridge")).unwrap();
    for path in [&home, &home.join("disk.img")] {
        chown(path, Some(USER), Some(USER)).unwrap();
    }
    let id = USER.to_string();
    let user = |args: &[&str]| {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", &id, "--regid", &id, "--clear-groups"]);
        command.args(args).current_dir(&home).env("XDG_RUNTIME_DIR", home.join("run"));
        command
    };
    let file = home.join("file");
    let mut mount = Mount::start(folder, &mut user(&["./nbdbridge", "fuse", "disk.img", "file"]), 1);
    let found = user(&["dd", "if=file", "bs=64K", "status=none"]).output().unwrap();
    assert!(found.status.success() && found.stdout == vec![3; 1 << 20], "{:?}", found.status);
    let written = user(&["dd", "if=/dev/zero", "of=file", "bs=4K", "count=1", "conv=notrunc,fsync"]).output();
    assert!(written.unwrap().status.success());
    assert_eq!(File::open(&file).unwrap_err().kind(), ErrorKind::PermissionDenied, "not even root");
    let listed = user(&["./nbdbridge", "devices"]).output().unwrap();
    assert!(String::from_utf8(listed.stdout).unwrap().contains("serving"));
    let ended = user(&["./nbdbridge", "detach", "file"]).output().unwrap();
    assert!(ended.status.success(), "{ended:?}");
    assert_eq!(mount.server.wait(Duration::from_secs(20)).unwrap().code(), Some(0), "{}", mount.log());
    assert!(!is_mounted(&file) && !file.exists());
    let image = fs::read(home.join("disk.img")).unwrap();
    assert_eq!((image[4095], image[4096]), (0, 3));
    // By signal, and without the program that mounts.
    let mut mount = Mount::start(
        tempfile::tempdir().unwrap(),
        &mut user(&["./nbdbridge", "fuse", "disk.img", "file"]),
        1,
    );
    mount.stop();
    let refused = user(&["./nbdbridge", "fuse", "disk.img", "file"]).env("PATH", "/nowhere").output();
    // setpriv is found by its own PATH only where the child's is set by it.
    let refused = refused.unwrap_or_else(|_| {
        let mut command = user(&["env", "PATH=/nowhere", "./nbdbridge", "fuse", "disk.img", "file"]);
        command.output().unwrap()
    });
    assert!(one_line(&refused).contains("there is no fusermount3"), "{refused:?}");
    assert!(!file.exists(), "what was made for it is removed");
}

#[test]
fn a_signal_during_the_mount_is_not_lost() {
    if missing("a_signal_during_the_mount_is_not_lost", &[]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let args = ["mem:1M", "file", "--fork", "--pid-file", "pid"];
    assert!(fuse(folder.path()).args(args).status().unwrap().success());
    let file = folder.path().join("file").canonicalize().unwrap();
    let pid = fs::read_to_string(folder.path().join("pid")).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    eventually("it ends and cleans up", || !file.exists() && !folder.path().join("pid").exists());
}

#[test]
fn what_was_answered_on_a_fresh_qcow2_image_survives_a_kill() {
    if missing("what_was_answered_on_a_fresh_qcow2_image_survives_a_kill", &["qemu-img", "fio"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.qcow2");
    run("qemu-img", &[&"create", &"-q", &"-f", &"qcow2", &image, &"32M"]);
    let mut mount = Mount::at(folder, "disk.qcow2", "file", &[]);
    let file = format!("--filename={}", mount.path.display());
    let job = [
        "--name=x",
        "--rw=randwrite",
        "--bs=4k",
        "--size=16M",
        "--randseed=7",
        "--direct=1",
        "--verify=crc32c",
    ];
    let fio = |more: &[&str]| {
        let mut args: Vec<&dyn AsRef<std::ffi::OsStr>> = vec![&file];
        args.extend(job.iter().chain(more).map(|word| word as &dyn AsRef<std::ffi::OsStr>));
        run("fio", &args)
    };
    // Every write is answered when fio ends, and none was flushed.
    fio(&["--do_verify=0", "--verify_state_save=0"]);
    for _ in 0..2 {
        mount = Mount::at(mount.kill(), "disk.qcow2", "file", &[]);
        fio(&["--verify_only", "--verify_fatal=1", "--verify_state_save=0"]);
    }
    mount.stop();
    run("qemu-img", &[&"check", &"-q", &image]);
}
