//! `--growable`: the file becomes longer, never shorter.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::support::Random;
use crate::support::mount::{Mount, missing};

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
        let shorter = file.set_len(model.len() as u64 - 1).unwrap_err();
        assert_eq!(shorter.raw_os_error(), Some(Errno::PERM.raw_os_error()));
        file.set_len(model.len() as u64).unwrap();
        drop(file);
        mount.stop();
        if source == "disk.img" {
            assert!(std::fs::read(mount.join("disk.img")).unwrap() == model);
        }
    }
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
