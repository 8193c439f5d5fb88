//! A pool in a folder of its own, with a place for run-time state of its own. When it goes, nothing may be left of its
//! volumes: no mount, no device, no process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::mount::{missing, nbdbridge};
use crate::support::{CONTROL_FOLDER, eventually, one_line};

/// A pool.
pub(crate) struct World {
    pub(crate) folder: TempDir,
}

/// Says aloud why a test is skipped, where this host cannot run it.
pub(crate) fn skip(test: &str, programs: &[&str]) -> bool {
    if !Path::new("/dev/loop-control").exists() {
        eprintln!("SKIP: {test}: there are no loop devices here");
        return true;
    }
    missing(test, &[&["mkfs.ext4", "e2fsck", "umount"], programs].concat())
}

impl World {
    /// A new world for a test; None, said aloud, where this host lacks what the test needs.
    pub(crate) fn here(test: &str, programs: &[&str]) -> Option<World> {
        (!skip(test, programs)).then(World::new)
    }

    pub(crate) fn new() -> World {
        World { folder: tempfile::tempdir().unwrap() }
    }

    /// A path in the world's folder.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The folder of a volume.
    pub(crate) fn volume(&self, name: &str) -> PathBuf {
        self.join("pool").join(name)
    }

    /// `nbdbridge WORD...`.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = nbdbridge(self.folder.path(), words);
        command.env(CONTROL_FOLDER, self.join("run")).env("NBDBRIDGE_POOL", self.join("pool"));
        command
    }

    /// `nbdbridge volume WORD...`, with words apart by blanks.
    pub(crate) fn call(&self, line: &str) -> Output {
        let words: Vec<_> = line.split_whitespace().collect();
        self.command(&[&["volume"], &words[..]].concat()).output().unwrap()
    }

    /// The same, which must succeed; gives what it printed.
    pub(crate) fn ok(&self, line: &str) -> String {
        let output = self.call(line);
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same as JSON.
    pub(crate) fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.ok(&format!("{line} --json"))).unwrap()
    }

    /// All that is known of one volume.
    pub(crate) fn inspect(&self, name: &str) -> Value {
        self.json(&format!("inspect {name}"))[0].clone()
    }

    /// The same, which must fail with this status and one line; gives that.
    pub(crate) fn fails(&self, line: &str, status: i32) -> String {
        let output = self.call(line);
        assert_eq!(output.status.code(), Some(status), "{line}: {output:?}");
        assert!(output.stdout.is_empty(), "{line}: {output:?}");
        one_line(&output)
    }

    /// Mounts a volume; gives the folder.
    pub(crate) fn mount(&self, name: &str) -> PathBuf {
        PathBuf::from(self.ok(&format!("mount {name}")).trim_end())
    }

    /// The names that `ls` shows.
    pub(crate) fn names(&self) -> Vec<String> {
        let all = self.json("ls");
        all.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
    }

    /// The data plane of a volume: its process.
    pub(crate) fn plane(&self, name: &str) -> Pid {
        let device = self.inspect(name)["device"].as_str().unwrap().to_owned();
        let output = self.command(&["ps", "--json"]).output().unwrap();
        let servers: Value = serde_json::from_slice(&output.stdout).unwrap();
        let is_it = |server: &&Value| server["doors"][0]["places"][0]["at"] == device.as_str();
        let server = servers.as_array().unwrap().iter().find(is_it).expect("no data plane");
        Pid::from_raw(i32::try_from(server["pid"].as_i64().unwrap()).unwrap()).unwrap()
    }

    /// Kills it, and waits until it is gone.
    pub(crate) fn kill_plane(&self, name: &str) {
        let plane = self.plane(name);
        kill_process(plane, Signal::KILL).unwrap();
        let gone = || !Path::new(&format!("/proc/{}", plane.as_raw_nonzero())).exists();
        eventually("the data plane ends", gone);
    }

    /// Data planes of this world.
    pub(crate) fn planes(&self) -> Vec<u32> {
        let pool = self.folder.path().to_str().unwrap().as_bytes().to_vec();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let numbers = processes.filter_map(|process| process.file_name().to_str()?.parse::<u32>().ok());
        numbers
            .filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let has = |word: &[u8]| line.windows(word.len()).any(|window| window == word);
                has(b"attach\0") && has(&pool)
            })
            .collect()
    }

    /// Mounts below its folder.
    pub(crate) fn mounts(&self) -> Vec<PathBuf> {
        let table = String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned();
        let points = table.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
        points.filter(|point| point.starts_with(self.folder.path()) && *point != self.join("pool")).collect()
    }

    /// Nothing is attached or mounted, and nothing half made.
    pub(crate) fn assert_idle(&self) {
        assert_eq!(self.mounts(), Vec::<PathBuf>::new());
        eventually("all data planes end", || self.planes().is_empty());
        let pool = fs::read_dir(self.join("pool")).into_iter().flatten().flatten();
        let half: Vec<_> = pool.map(|entry| entry.file_name()).filter(|name| is_half(name)).collect();
        assert!(half.is_empty(), "{half:?}");
        let volumes = fs::read_dir(self.join("run/volumes")).into_iter().flatten().flatten();
        for folder in volumes {
            let left = fs::read_dir(folder.path().join(".state")).into_iter().flatten().flatten();
            let left: Vec<_> = left.map(|entry| entry.file_name()).collect();
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

fn is_half(name: &std::ffi::OsStr) -> bool {
    let name = name.to_str().unwrap();
    name.starts_with(".new") || name.starts_with(".gone")
}

impl Drop for World {
    fn drop(&mut self) {
        let well = !std::thread::panicking();
        if well {
            for name in self.names() {
                self.ok(&format!("rm {name}"));
            }
            self.assert_idle();
        }
        for point in self.mounts().into_iter().rev() {
            let _ = unmount(&point, UnmountFlags::DETACH);
        }
        for pid in self.planes() {
            let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = unmount(self.join("pool"), UnmountFlags::DETACH);
    }
}
