//! `--growable`: the file becomes longer, and a raw image's also shorter.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::support::mount::{Mount, fuse, missing, run};
use crate::support::{PROGRAM, Random, eventually};

#[test]
fn a_growable_file_grows_with_what_is_written() {
    if missing("a_growable_file_grows_with_what_is_written", &[]) {
        return;
    }
    for source in ["disk.img", "mem:1000"] {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join("disk.img")).unwrap().set_len(1000).unwrap();
        let mut mount = Mount::at(folder, source, "file", &["--growable"]);
        let file = mount.open();
        let mut model = vec![0; 1000];
        let mut random = Random::new(11);
        for _ in 0..150 {
            let end = model.len() as u64;
            let offset = end.saturating_sub(random.below(5000)) + random.below(8000);
            let len = random.below(6000) + 1;
            match random.below(4) {
                0 | 1 => {
                    let data = random.bytes(len as usize);
                    file.write_all_at(&data, offset).unwrap();
                    model.resize(model.len().max((offset + len) as usize), 0);
                    model[offset as usize..(offset + len) as usize].copy_from_slice(&data);
                }
                2 => {
                    file.set_len(end + len).unwrap();
                    model.resize((end + len) as usize, 0);
                }
                _ => {
                    fallocate(&file, FallocateFlags::ZERO_RANGE, offset, len).unwrap();
                    model.resize(model.len().max((offset + len) as usize), 0);
                    model[offset as usize..(offset + len) as usize].fill(0);
                }
            }
            assert_eq!(file.metadata().unwrap().len(), model.len() as u64);
        }
        assert!(mount.read(0, model.len()) == model, "{source}");
        if source != "disk.img" {
            let shorter = file.set_len(model.len() as u64 - 1).unwrap_err();
            assert_eq!(shorter.raw_os_error(), Some(Errno::PERM.raw_os_error()));
        }
        file.set_len(model.len() as u64).unwrap();
        drop(file);
        mount.stop();
        if source == "disk.img" {
            assert!(std::fs::read(mount.join("disk.img")).unwrap() == model);
        }
    }
}

#[test]
fn a_raw_image_shrinks_too() {
    if missing("a_raw_image_shrinks_too", &["dd", "truncate"]) {
        return;
    }
    let mut mount = Mount::image(1 << 20, &["--growable"]);
    let (file, image) = (mount.open(), mount.join("disk.img"));
    file.write_all_at(&[7; 5000], 0).unwrap();
    run("truncate", &[&"-s", &"3000", &mount.path]);
    eventually("the new size is listed", || {
        let listed = run(PROGRAM, &[&"devices"]);
        let row = listed.lines().find(|line| line.starts_with(mount.path.to_str().unwrap()));
        row.is_some_and(|row| row.contains(" 2.9 KiB "))
    });
    assert_eq!(file.metadata().unwrap().len(), 3000);
    assert_eq!(fs::metadata(&image).unwrap().len(), 3000);
    assert_eq!(file.read_at(&mut [0; 100], 3000).unwrap(), 0, "that is its end now");
    file.set_len(5000).unwrap();
    assert!(mount.read(0, 5000) == [vec![7; 3000], vec![0; 2000]].concat(), "what was cut off is gone");
    let to = format!("of={}", mount.path.display());
    run("dd", &[&"if=/dev/zero", &to, &"bs=100", &"count=7", &"status=none"]);
    assert_eq!(file.metadata().unwrap().len(), 700);
    fs::write(&mount.path, "").unwrap();
    assert_eq!((file.metadata().unwrap().len(), fs::read(&mount.path).unwrap()), (0, Vec::new()));
    fs::write(&mount.path, "words").unwrap();
    drop(file);
    mount.stop();
    assert_eq!(fs::read(&image).unwrap(), b"words");
    // An image of nothing is one, too.
    fs::write(&image, "").unwrap();
    let mut mount = Mount::at(mount.kill(), "disk.img", "file", &["--growable"]);
    fs::write(&mount.path, "more").unwrap();
    mount.stop();
    assert_eq!(fs::read(&image).unwrap(), b"more");
}

/// Readers and writers at all lengths while the file becomes shorter and longer: no request sees what is not there, and
/// none brings back what was cut off.
#[test]
fn it_shrinks_under_load() {
    if missing("it_shrinks_under_load", &[]) {
        return;
    }
    const MOST: u64 = 256 << 10;
    for more in [&[][..], &["--fault", "seed=1,delay-ms=0,delay-rate=0.5"]] {
        let mut mount = Mount::image(MOST, &[&["--growable"], more].concat());
        let file = mount.open();
        std::thread::scope(|scope| {
            for n in 0..4 {
                let file = &file;
                scope.spawn(move || {
                    let mut random = Random::new(n);
                    for _ in 0..300 {
                        let (offset, len) = (random.below(MOST), 1 + random.below(8000));
                        match random.below(4) {
                            0 => file.write_all_at(&vec![9; len as usize], offset).unwrap(),
                            1 => file.set_len(offset).unwrap(),
                            2 => fallocate(file, FallocateFlags::ZERO_RANGE, offset, len).unwrap(),
                            _ => {
                                let mut found = vec![5; len as usize];
                                let count = file.read_at(&mut found, offset).unwrap();
                                assert!(found[..count].iter().all(|byte| matches!(byte, 0 | 9)));
                            }
                        }
                    }
                });
            }
        });
        let image = mount.join("disk.img");
        assert_eq!(file.metadata().unwrap().len(), fs::metadata(&image).unwrap().len());
        file.set_len(0).unwrap();
        file.set_len(MOST).unwrap();
        assert!(mount.read(0, MOST as usize).iter().all(|byte| *byte == 0), "all of it is new");
        drop(file);
        mount.stop();
    }
}

/// The kernel's caches behind another door do not hear of it.
#[test]
fn beside_another_door_it_only_grows() {
    if missing("beside_another_door_it_only_grows", &[]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    File::create(folder.path().join("disk.img")).unwrap().set_len(4096).unwrap();
    let mut command = fuse(folder.path());
    command.args(["disk.img", "file", "--growable", "--also-net", "-k", "sock"]);
    let mut mount = Mount::start_as(folder, &mut command, 2, 0);
    let file = mount.open();
    assert_eq!(file.set_len(1).unwrap_err().raw_os_error(), Some(Errno::PERM.raw_os_error()));
    file.set_len(5000).unwrap();
    drop(file);
    mount.stop();
}

#[test]
fn others_keep_their_size() {
    if missing("others_keep_their_size", &[]) {
        return;
    }
    let mount = Mount::image(4096, &[]);
    let file = mount.open();
    for size in [0, 4095, 4097] {
        let refused = file.set_len(size).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(Errno::PERM.raw_os_error()), "{size}");
    }
    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, 4097), Err(Errno::NOSPC));
    assert_eq!(fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 8192), Ok(()), "what there is of it");
    let truncating = File::options().write(true).truncate(true).open(&mount.path).unwrap_err();
    assert_eq!(truncating.raw_os_error(), Some(Errno::PERM.raw_os_error()));
    assert_eq!(mount.read(0, 4096), vec![0; 4096]);
}
