//! A pool of volumes, which goes with its test, however that ends.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::mount::{UnmountFlags, unmount};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::mount::{missing, run};
use crate::support::{CONTROL_FOLDER, Loop, PROGRAM, text};

/// A pool, with a folder for its data planes' sockets and mounts.
pub(crate) struct Pool {
    pub(crate) folder: PathBuf,
    /// A file system of its own below it, which can share blocks.
    host: Option<(PathBuf, Loop)>,
    scratch: TempDir,
}

impl Pool {
    /// One on the file system that tests have.
    pub(crate) fn new() -> Pool {
        let scratch = tempfile::tempdir().unwrap();
        Pool { folder: scratch.path().join("pool"), host: None, scratch }.make()
    }

    /// One on an xfs of its own, with reflinks. None, said aloud, where that cannot be.
    pub(crate) fn with_reflinks(test: &str) -> Option<Pool> {
        if missing(test, &["mkfs.xfs"]) {
            return None;
        }
        let scratch = tempfile::tempdir().unwrap();
        let (image, point) = (scratch.path().join("host.img"), scratch.path().join("host"));
        File::create(&image).unwrap().set_len(2 << 30).unwrap();
        run("mkfs.xfs", &[&"-q", &"-m", &"reflink=1", &image]);
        fs::create_dir(&point).unwrap();
        let Some(device) = Loop::new(&image, &[]) else {
            eprintln!("SKIP: {test}: no loop devices here");
            return None;
        };
        run("mount", &[&device.0, &point]);
        Some(Pool { folder: point.join("pool"), host: Some((point, device)), scratch }.make())
    }

    fn make(self) -> Pool {
        self.ok(&["pool", "--make"]);
        self
    }

    /// `nbdbridge volume WORD... --pool`.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.arg("volume").arg(words[0]).arg("--pool").arg(&self.folder).args(&words[1..]);
        command.env(CONTROL_FOLDER, self.scratch.path().join("run")).env_remove("NBDBRIDGE_LOG");
        command
    }

    pub(crate) fn output(&self, words: &[&str]) -> Output {
        for _ in 0..100 {
            let output = self.command(words).output().unwrap();
            // The programs of btrfs look at all loop devices: another test may just have killed what one stands upon.
            if !String::from_utf8_lossy(&output.stderr).contains("Transport endpoint is not connected") {
                return output;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        panic!("{words:?}: a dead FUSE file is on this host (`nbdbridge devices` lists it)");
    }

    /// What it prints; it must succeed.
    pub(crate) fn ok(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same as JSON.
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        let words: Vec<_> = words.iter().copied().chain(["--json"]).collect();
        serde_json::from_str(&self.ok(&words)).unwrap()
    }

    /// The line in which it refuses.
    pub(crate) fn refusal(&self, words: &[&str]) -> String {
        let output = self.output(words);
        assert!(!output.status.success(), "{words:?}: {output:?}");
        // A warning may come before it.
        let said = String::from_utf8(output.stderr).unwrap();
        said.lines().last().unwrap().to_owned()
    }

    /// Makes a volume; `options` are separated by blanks.
    pub(crate) fn create(&self, name: &str, options: &str) {
        let mut words = vec!["create", name];
        for option in options.split(' ') {
            words.extend(["-o", option]);
        }
        self.ok(&words);
    }

    /// Mounts it, and says where.
    pub(crate) fn mount(&self, name: &str) -> PathBuf {
        PathBuf::from(self.ok(&["mount", name]).trim())
    }

    pub(crate) fn umount(&self, name: &str) {
        self.ok(&["umount", name]);
    }

    pub(crate) fn inspect(&self, name: &str) -> Value {
        let told = self.json(&["inspect", name]);
        told.as_array().map_or(told.clone(), |list| list[0].clone())
    }

    /// A path within a volume's folder.
    pub(crate) fn path(&self, name: &str, within: &str) -> PathBuf {
        self.folder.join(name).join(within)
    }

    /// Changes volume.json by hand.
    pub(crate) fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let path = self.path(name, "volume.json");
        let mut record = self.record(name);
        change(&mut record);
        fs::write(path, serde_json::to_vec(&record).unwrap()).unwrap();
    }

    pub(crate) fn record(&self, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(name, "volume.json")).unwrap()).unwrap()
    }

    /// What is in a volume's folder for snapshots; hidden ones too.
    pub(crate) fn snapshot_files(&self, name: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(name, "snapshots")).into_iter().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let folders = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        for name in folders.filter_map(|entry| entry.file_name().into_string().ok()) {
            if !name.starts_with('.') {
                let _ = self.command(&["rm", "--force", &name]).output();
            }
        }
        if let Some((point, device)) = self.host.take() {
            let _ = unmount(&point, UnmountFlags::DETACH);
            drop(device);
        }
    }
}

/// Bytes of a mounted file system.
pub(crate) fn capacity(point: &Path) -> u64 {
    let found = rustix::fs::statvfs(point).unwrap();
    found.f_blocks * found.f_frsize
}

/// A file of `len` bytes that are no zeroes, and durable.
pub(crate) fn write_file(path: &Path, len: usize, seed: u64) {
    let bytes = crate::support::Random::new(seed).bytes(len);
    fs::write(path, bytes).unwrap();
    File::open(path).unwrap().sync_all().unwrap();
}

/// Whether it is that file.
pub(crate) fn has_file(path: &Path, len: usize, seed: u64) -> bool {
    fs::read(path).is_ok_and(|bytes| bytes == crate::support::Random::new(seed).bytes(len))
}

/// What `xfs_repair -n` and the like find; a volume's device must be free.
pub(crate) fn assert_sound(pool: &Pool, name: &str) {
    let said = pool.output(&["fsck", name]);
    assert!(said.status.success(), "{name}: {said:?}; {}", text(&pool.folder));
}
