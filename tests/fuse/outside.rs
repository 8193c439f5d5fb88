//! Files and devices that somebody unmounts or detaches by hand: what `devices` and `detach` say of them is true.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::mount::{Mount, is_mounted, missing, nbdbridge, run};
use crate::support::{PROGRAM, eventually, one_line};

fn skip(test: &str) -> bool {
    if !Path::new("/dev/loop-control").exists() {
        eprintln!("SKIP: {test}: there are no loop devices here");
        return true;
    }
    missing(test, &["umount", "losetup"])
}

/// The row of `devices` for a path.
fn row(path: &Path) -> Option<String> {
    let listed = run(PROGRAM, &[&"devices"]);
    let start = format!("{} ", path.display());
    listed.lines().find(|line| line.starts_with(&start)).map(str::to_owned)
}

#[test]
fn a_file_that_is_unmounted_lazily_while_it_is_open() {
    const TEST: &str = "a_file_that_is_unmounted_lazily_while_it_is_open";
    if skip(TEST) {
        return;
    }
    let mut mount = Mount::image(1 << 20, &[]);
    let (path, user) = (mount.path.clone(), mount.open());
    run("umount", &[&"-l", &path]);
    assert!(row(&path).is_some_and(|row| row.contains(" unmounted ")), "{:?}", row(&path));
    let refused = nbdbridge(mount.folder.path(), &["detach".as_ref(), path.as_os_str()]).output().unwrap();
    let line = one_line(&refused);
    let who = format!("(process {})", std::process::id());
    assert!(line.contains("is unmounted, but still in use by") && line.contains(&who), "{line}");
    user.write_all_at(b"still served", 0).unwrap();
    // What is mounted there next is another's, and stays when the first one ends.
    let mut next = nbdbridge(mount.folder.path(), &["fuse", "mem:1M", "file"]);
    let next = Mount::start(tempfile::tempdir().unwrap(), &mut next, 1);
    assert_eq!(next.path, path);
    drop(user);
    let status = mount.server.wait(Duration::from_secs(30)).expect("it ends when nobody has it open");
    assert_eq!(status.code(), Some(0), "{}", mount.log());
    assert!(is_mounted(&path) && row(&path).is_some_and(|row| row.contains(" serving ")));
    run(PROGRAM, &[&"detach", &path]);
    assert_eq!((is_mounted(&path), row(&path)), (false, None));
}

#[test]
fn a_plain_unmount_ends_the_server() {
    const TEST: &str = "a_plain_unmount_ends_the_server";
    if skip(TEST) {
        return;
    }
    let mut mount = Mount::image(1 << 20, &[]);
    run("umount", &[&mount.path]);
    let status = mount.server.wait(Duration::from_secs(30)).expect("it ends");
    assert_eq!((status.code(), row(&mount.path)), (Some(0), None), "{}", mount.log());
    let words = ["detach".as_ref(), mount.path.as_os_str()];
    let refused = nbdbridge(mount.folder.path(), &words).output().unwrap();
    assert!(one_line(&refused).contains("is no device or file of nbdbridge's"), "{refused:?}");
}

#[test]
fn a_device_whose_file_is_unmounted_lazily_is_served() {
    const TEST: &str = "a_device_whose_file_is_unmounted_lazily_is_served";
    if skip(TEST) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = nbdbridge(folder.path(), &["attach", "--door", "fuse", "mem:1M"]).output().unwrap();
    let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    let name = device.file_name().unwrap().to_str().unwrap();
    let file = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap();
    run("umount", &[&"-l", &file.trim()]);
    assert!(row(&device).is_some_and(|row| row.contains(" serving ")), "{:?}", row(&device));
    fs::File::options().write(true).open(&device).unwrap().write_all_at(b"served", 0).unwrap();
    run(PROGRAM, &[&"detach", &device]);
    assert_eq!(row(&device), None);
    assert!(!Path::new(&format!("/sys/block/{name}/loop")).exists());
}

#[test]
fn a_device_that_is_detached_by_hand_ends_its_server() {
    const TEST: &str = "a_device_that_is_detached_by_hand_ends_its_server";
    if skip(TEST) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let output = nbdbridge(folder.path(), &["attach", "--door", "fuse", "mem:1M"]).output().unwrap();
    let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    run("losetup", &[&"-d", &device]);
    eventually("it ends", || row(&device).is_none());
}
