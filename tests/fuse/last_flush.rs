//! A disk whose last flush fails: whoever ends it is told.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::process::Signal;

use crate::support::mount::{Mount, is_mounted, missing, nbdbridge, run};
use crate::support::{PROGRAM, one_line};

const MAY_BE_LOST: &str = "what was written since the last one may be lost";

fn skip(test: &str) -> bool {
    if !Path::new("/dev/loop-control").exists() {
        eprintln!("SKIP: {test}: there are no loop devices here");
        return true;
    }
    missing(test, &["umount"])
}

/// A file whose syncs fail, as storage that is broken.
fn broken() -> Mount {
    Mount::image(8 << 20, &["-f", "raw", "--fault", "op=flush,errno=EIO,error-every=1"])
}

#[test]
fn detach_of_a_file_tells() {
    const TEST: &str = "detach_of_a_file_tells";
    if skip(TEST) {
        return;
    }
    for force in [false, true] {
        let below = broken();
        let mut command = nbdbridge(below.folder.path(), &["fuse", "file", "above", "-f", "raw"]);
        let folder = tempfile::tempdir().unwrap();
        let mut above = Mount::start(folder, &mut command, 1);
        above.open().write_all_at(&[7; 4096], 0).unwrap();
        let mut detach = nbdbridge(above.folder.path(), &["detach".as_ref(), above.path.as_os_str()]);
        if force {
            detach.arg("--force");
        }
        let ended = detach.output().unwrap();
        assert_eq!(ended.status.code(), Some(1), "{ended:?}");
        let line = one_line(&ended);
        assert!(line.contains(MAY_BE_LOST) && line.contains("Input/output error"), "{line}");
        let status = above.server.wait(std::time::Duration::from_secs(30)).expect("it ends");
        assert_eq!(status.code(), Some(1), "{}", above.log());
        assert!(!is_mounted(&above.path));
    }
}

#[test]
fn detach_of_a_device_tells() {
    const TEST: &str = "detach_of_a_device_tells";
    if skip(TEST) {
        return;
    }
    let below = broken();
    let words = ["attach", "file", "-f", "raw", "--door", "fuse"];
    let output = nbdbridge(below.folder.path(), &words).output().unwrap();
    let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
    // Through the page cache, which is written when the device is closed.
    fs::File::options().write(true).open(&device).unwrap().write_all_at(&[7; 65536], 0).unwrap();
    let ended = nbdbridge(below.folder.path(), &["detach".as_ref(), device.as_os_str()]).output().unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let line = one_line(&ended);
    assert!(line.contains(MAY_BE_LOST) && line.contains(device.to_str().unwrap()), "{line}");
    assert!(!run(PROGRAM, &[&"devices"]).contains(&format!("{} ", device.display())));
    let reports = fs::read_dir("/run/nbdbridge").unwrap().flatten();
    let unread = reports.filter(|file| file.file_name().to_str().unwrap().starts_with("ended-")).count();
    assert_eq!(unread, 0, "the report was read");
}

/// Whoever ends the server by a signal has its exit status.
#[test]
fn a_signal_and_an_unmount_tell() {
    const TEST: &str = "a_signal_and_an_unmount_tell";
    if skip(TEST) {
        return;
    }
    for by_signal in [true, false] {
        let below = broken();
        let mut command = nbdbridge(below.folder.path(), &["fuse", "file", "above", "-f", "raw"]);
        let mut above = Mount::start(tempfile::tempdir().unwrap(), &mut command, 1);
        above.open().write_all_at(&[7; 4096], 0).unwrap();
        if by_signal {
            above.server.signal(Signal::TERM);
        } else {
            run("umount", &[&above.path]);
        }
        let status = above.server.wait(std::time::Duration::from_secs(30)).expect("it ends");
        assert_eq!(status.code(), Some(1), "{}", above.log());
        assert!(above.log().contains("cannot flush"), "{}", above.log());
    }
    // Reports that nobody has asked for are small, and few.
    for report in fs::read_dir("/run/nbdbridge").unwrap().flatten() {
        if report.file_name().to_str().unwrap().starts_with("ended-") {
            let _ = fs::remove_file(report.path());
        }
    }
}
