//! What is refused, in one line or with which errno.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::support::mount::{Mount, fuse, missing};
use crate::support::one_line;

#[test]
fn what_cannot_be_mounted_is_said_in_one_line() {
    if missing("what_cannot_be_mounted_is_said_in_one_line", &[]) {
        return;
    }
    let mount = Mount::image(1 << 20, &[]);
    fs::create_dir(mount.join("folder")).unwrap();
    for (args, status, words) in [
        (&["mem:1M", "folder"][..], 1, "folder: is a directory; give a regular file"),
        (&["mem:1M", "no/file"], 1, "no/file: its folder does not exist; make it first"),
        (&["mem:1M", "/dev/null"], 1, "/dev/null: is not a regular file"),
        (&["mem:1M", "file"], 1, "file: is served by nbdbridge already"),
        (&["no.img", "new"], 1, "no.img: no such file"),
        (
            &["mem:1M", "new", "--growable", "--size", "64K"],
            2,
            "--growable: mem:1048576 cannot grow as it is opened here; leave it out",
        ),
        (&["mem:1M", "new", "--growable", "-r"], 2, "--growable: mem:1048576 is read-only; leave it out"),
        (&["mem:1M"], 2, "<FILE>"),
        (&["mem:1M", "new", "--threads", "0"], 2, "--threads"),
    ] {
        let output = fuse(mount.folder.path()).args(args).output().unwrap();
        assert_eq!(output.status.code(), Some(status), "{args:?}: {output:?}");
        let line = one_line(&output);
        assert!(line.starts_with("nbdbridge: ") && line.contains(words), "{args:?}: {line}");
        assert!(!mount.join("new").exists(), "{args:?}");
    }
}

#[test]
fn a_read_only_file_is_one() {
    if missing("a_read_only_file_is_one", &[]) {
        return;
    }
    let mut mount = Mount::image(1 << 20, &["--read-only"]);
    for options in [File::options().write(true), File::options().read(true).write(true)] {
        assert_eq!(options.open(&mount.path).unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    }
    let file = File::open(&mount.path).unwrap();
    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 512), Err(Errno::BADF));
    file.sync_all().unwrap();
    assert_eq!(mount.read(0, 512), [0; 512]);
    drop(file);
    mount.stop();
}

#[test]
fn errors_of_the_storage_arrive_as_they_are() {
    if missing("errors_of_the_storage_arrive_as_they_are", &[]) {
        return;
    }
    for (rule, errno) in [
        ("op=write,errno=ENOSPC", Errno::NOSPC),
        ("op=write,errno=EDQUOT", Errno::DQUOT),
        ("op=read,errno=EIO", Errno::IO),
        ("op=flush,errno=ETIMEDOUT", Errno::TIMEDOUT),
        ("op=write-zeroes,errno=EOPNOTSUPP", Errno::OPNOTSUPP),
    ] {
        let mount = Mount::image(1 << 20, &["--fault", &format!("seed=1,error-rate=1,{rule}")]);
        let file = mount.open();
        for _ in 0..2 {
            let result = match rule.split([',', '=']).nth(1) {
                Some("read") => file.read_at(&mut [0; 512], 0).map(drop),
                Some("write") => file.write_at(&[1; 512], 0).map(drop),
                Some("flush") => file.sync_all(),
                _ => fallocate(&file, FallocateFlags::ZERO_RANGE, 0, 4096).map_err(Into::into),
            };
            assert_eq!(result.unwrap_err().raw_os_error(), Some(errno.raw_os_error()), "{rule}");
        }
    }
    let mount = Mount::image(1 << 20, &[]);
    let file = mount.open();
    for mode in [FallocateFlags::COLLAPSE_RANGE, FallocateFlags::INSERT_RANGE] {
        assert_eq!(fallocate(&file, mode, 0, 4096), Err(Errno::OPNOTSUPP));
    }
}

/// Requests that storage does not finish keep neither others nor the end.
#[test]
fn what_hangs_keeps_nobody_else() {
    if missing("what_hangs_keeps_nobody_else", &[]) {
        return;
    }
    let args = ["--fault", "seed=1,op=read,offset=512K,len=4096,hang-rate=1", "--drain-timeout", "200ms"];
    let mut mount = Mount::image(1 << 20, &args);
    let file = mount.open();
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let file = file.try_clone().unwrap();
            std::thread::spawn(move || file.read_at(&mut [0; 512], 512 << 10))
        })
        .collect();
    for n in 0..100 {
        file.write_all_at(&[n; 512], 0).unwrap();
        assert_eq!(mount.read(0, 512), [n; 512]);
    }
    mount.stop();
    for reader in readers {
        let error = reader.join().unwrap().unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::NotConnected), "{error}");
    }
}
