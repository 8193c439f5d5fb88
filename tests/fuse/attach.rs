//! `nbdbridge attach`: a block device over a source; here by a loop device over a FUSE file.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;

use crate::support::mount::{Mount, missing, nbdbridge, run};
use crate::support::{PROGRAM, eventually, one_line};

/// An image in a folder, attached in the foreground; its log is in the folder.
fn attach(size: u64) -> Mount {
    let folder = tempfile::tempdir().unwrap();
    fs::File::create(folder.path().join("disk.img")).unwrap().set_len(size).unwrap();
    let mut command = nbdbridge(folder.path(), &["attach", "--foreground", "disk.img"]);
    Mount::start(folder, &mut command, 1)
}

fn skip(test: &str) -> bool {
    if !Path::new("/dev/loop-control").exists() {
        eprintln!("SKIP: {test}: there are no loop devices here");
        return true;
    }
    missing(test, &["mkfs.ext4", "mount", "umount"])
}

#[test]
fn a_file_system_on_an_attached_image() {
    const TEST: &str = "a_file_system_on_an_attached_image";
    if skip(TEST) {
        return;
    }
    let mut mount = attach(64 << 20);
    let (device, place) = (mount.path.clone(), mount.join("place"));
    assert!(device.to_str().unwrap().starts_with("/dev/loop"), "{}", device.display());
    let name = device.file_name().unwrap().to_str().unwrap().to_owned();
    let setting =
        |name: &str, file: &str| fs::read_to_string(format!("/sys/block/{name}/loop/{file}")).unwrap();
    assert_eq!((setting(&name, "dio").trim(), setting(&name, "partscan").trim()), ("1", "0"));
    run("mkfs.ext4", &[&"-q", &device]);
    fs::create_dir(&place).unwrap();
    run("mount", &[&device, &place]);
    fs::write(place.join("hello"), "data").unwrap();
    // In use it stays: detach says so, and a signal waits.
    let refused = nbdbridge(mount.folder.path(), &["detach".as_ref(), device.as_os_str()]).output().unwrap();
    assert!(one_line(&refused).contains("is in use (mounted at "), "{refused:?}");
    mount.server.signal(Signal::TERM);
    eventually("it says why it stays", || mount.log().contains("is in use (mounted at "));
    assert!(mount.server.is_running());
    fs::write(place.join("more"), "data").unwrap();
    run("umount", &[&place]);
    let status = mount.server.wait(std::time::Duration::from_secs(20)).expect("it ends when it is free");
    assert_eq!(status.code(), Some(0), "{}", mount.log());
    assert!(!Path::new(&format!("/sys/block/{name}/loop")).exists(), "the device is free");
    run("fsck.ext4", &[&"-fn", &mount.join("disk.img")]);
}

/// What is in the way is the mount, and not the device that stands on the file.
#[test]
fn a_forced_end_blames_the_mount_alone() {
    const TEST: &str = "a_forced_end_blames_the_mount_alone";
    if skip(TEST) {
        return;
    }
    let mut mount = attach(16 << 20);
    let (device, place) = (mount.path.clone(), mount.join("place"));
    run("mkfs.ext4", &[&"-q", &device]);
    fs::create_dir(&place).unwrap();
    run("mount", &[&device, &place]);
    let words = ["detach".as_ref(), "--force".as_ref(), device.as_os_str()];
    let ended = nbdbridge(mount.folder.path(), &words).output().unwrap();
    run("umount", &[&"-l", &place]);
    assert!(ended.status.success() && ended.stderr.is_empty(), "{ended:?}");
    assert!(mount.server.wait(std::time::Duration::from_secs(20)).is_some());
    let (log, shown) = (mount.log(), device.display().to_string());
    assert!(log.contains(&format!("{shown}: is in use (mounted at {}", place.display())), "{log}");
    assert!(log.contains(&format!("{shown}: still in use: its users get an error")), "{log}");
    assert!(!log.contains("in use by"), "{log}");
}

#[test]
fn attach_devices_detach() {
    const TEST: &str = "attach_devices_detach";
    if skip(TEST) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("disk.img"), vec![5; 1 << 20]).unwrap();
    let output = nbdbridge(folder.path(), &["attach", "disk.img", "--read-only"]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end());
    let mut bytes = [0; 512];
    fs::File::open(&device).unwrap().read_exact_at(&mut bytes, 4096).unwrap();
    assert_eq!(bytes, [5; 512]);
    let name = device.file_name().unwrap().to_str().unwrap();
    assert_eq!(fs::read_to_string(format!("/sys/block/{name}/ro")).unwrap().trim(), "1");
    let listed = run(PROGRAM, &[&"devices"]);
    let image = folder.path().join("disk.img").display().to_string();
    let row = listed.lines().find(|line| line.ends_with(&image)).unwrap_or_default();
    let start = format!("{} ", device.display());
    assert!(row.starts_with(&start) && row.contains(" loop ") && row.contains(" read-only "), "{listed}");
    run(PROGRAM, &[&"detach", &device]);
    assert!(!run(PROGRAM, &[&"devices"]).contains(&image));
    assert!(!Path::new(&format!("/sys/block/{name}/loop")).exists());
    let refused = nbdbridge(folder.path(), &["detach".as_ref(), device.as_os_str()]).output().unwrap();
    assert!(one_line(&refused).contains("was not attached by nbdbridge"), "{refused:?}");
}

/// Each sees the other one's steps, and must not take them for failures.
#[test]
fn two_that_detach_at_a_time() {
    if skip("two_that_detach_at_a_time") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for round in 0..6 {
        let disk = folder.path().join("disk.img");
        fs::write(&disk, vec![5; 1 << 20]).unwrap();
        let words: &[&str] = if round % 2 == 0 {
            &["attach", "disk.img", "-f", "raw", "--door", "fuse"]
        } else {
            &["fuse", "disk.img", "file", "-f", "raw", "--fork"]
        };
        let output = nbdbridge(folder.path(), words).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let place = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim_end());
        fs::OpenOptions::new().write(true).open(&place).unwrap().write_all_at(&[6; 65536], 0).unwrap();
        let detach = || {
            let mut command = nbdbridge(folder.path(), &["detach".as_ref(), place.as_os_str()]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
        };
        let both = [detach(), detach()].map(|child| child.wait_with_output().unwrap());
        let well = both.iter().filter(|output| output.status.success()).count();
        assert_eq!(well, 1, "{both:?}");
        let other = both.iter().find(|output| !output.status.success()).unwrap();
        let line = one_line(other);
        let expected =
            ["by another process meanwhile", "was not attached by", "nothing to detach", "no device or file"];
        assert!(expected.iter().any(|expected| line.contains(expected)), "{line}");
        assert_eq!(fs::read(&disk).unwrap()[..65536], [6; 65536]);
        let _ = fs::remove_file(folder.path().join("file"));
    }
}

#[test]
fn what_has_no_sector_is_no_device() {
    if skip("what_has_no_sector_is_no_device") {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let refused = nbdbridge(folder.path(), &["attach", "mem:100"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert!(one_line(&refused).contains("mem:100: of 100 bytes no block device"), "{refused:?}");
}

#[test]
fn what_a_killed_attachment_has_left_is_cleared() {
    const TEST: &str = "what_a_killed_attachment_has_left_is_cleared";
    if skip(TEST) {
        return;
    }
    let mut mount = attach(1 << 20);
    let device = mount.path.clone();
    let backing = Command::new("losetup").args(["-n", "-O", "BACK-FILE"]).arg(&device).output().unwrap();
    let backing = PathBuf::from(String::from_utf8(backing.stdout).unwrap().trim());
    mount.server.child.kill().unwrap();
    mount.server.child.wait().unwrap();
    let listed = run(PROGRAM, &[&"devices"]);
    let row = listed.lines().find(|line| line.starts_with(&format!("{} ", device.display())));
    assert!(row.is_some_and(|row| row.contains(" dead ")), "{listed}");
    run(PROGRAM, &[&"detach", &device]);
    assert!(!backing.exists() && !backing.parent().unwrap().exists(), "{}", backing.display());
    let name = device.file_name().unwrap().to_str().unwrap();
    assert!(!Path::new(&format!("/sys/block/{name}/loop")).exists());
}
