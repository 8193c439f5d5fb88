//! FUSE files of nbdbridge's, which go with their test, however that ends.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use tempfile::TempDir;

use super::{PROGRAM, Server};

/// A mounted file, or an attached device, and the folder that all of it is in.
pub(crate) struct Mount {
    pub(crate) server: Server,
    /// What it printed: where the file or device is.
    pub(crate) path: PathBuf,
    pub(crate) folder: TempDir,
}

impl Mount {
    /// Mounts a new sparse image of `size` bytes, `folder/disk.img`, at `folder/file`.
    pub(crate) fn image(size: u64, args: &[&str]) -> Mount {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join("disk.img")).unwrap().set_len(size).unwrap();
        Mount::at(folder, "disk.img", "file", args)
    }

    /// Mounts `source` at `file`, both within the folder.
    pub(crate) fn at(folder: TempDir, source: &str, file: &str, args: &[&str]) -> Mount {
        let mut command = fuse(folder.path());
        command.args([source, file]).args(args);
        Mount::start(folder, &mut command, 1)
    }

    /// Starts a command that prints the path in the last of its first `lines` lines.
    pub(crate) fn start(folder: TempDir, command: &mut Command, lines: usize) -> Mount {
        Mount::start_as(folder, command, lines, lines - 1)
    }

    /// Starts a command that prints so many lines, and the path in the one with this index.
    pub(crate) fn start_as(folder: TempDir, command: &mut Command, lines: usize, path: usize) -> Mount {
        let log = File::create(folder.path().join("log")).unwrap();
        let server = Server::start(command.stderr(log), lines);
        let path = server.lines.get(path).cloned();
        let mount = Mount { server, path: PathBuf::from(path.unwrap_or_default()), folder };
        assert_eq!(mount.server.lines.len(), lines, "it did not start: {}", mount.log());
        mount
    }

    /// Kills it, and leaves all that it leaves, for the next one in the same folder.
    pub(crate) fn kill(mut self) -> TempDir {
        self.server.child.kill().unwrap();
        self.server.child.wait().unwrap();
        // What is mounted there from now on is another's.
        self.path = PathBuf::new();
        let empty = tempfile::tempdir().unwrap();
        fs::copy(self.join("log"), empty.path().join("log")).unwrap();
        std::mem::replace(&mut self.folder, empty)
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// A path within the folder.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub(crate) fn open(&self) -> File {
        File::options().read(true).write(true).open(&self.path).unwrap()
    }

    pub(crate) fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        File::open(&self.path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    /// Ends it in good order.
    pub(crate) fn stop(&mut self) {
        self.server.signal(Signal::TERM);
        let status = self.server.wait(std::time::Duration::from_secs(30)).expect("it does not end");
        assert_eq!(status.code(), Some(0), "{}", self.log());
        assert!(!is_mounted(&self.path), "it is still mounted");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = self.server.child.kill();
        let _ = self.server.child.wait();
        if self.path.starts_with("/dev/") {
            let mut command = nbdbridge(self.folder.path(), &["detach", "--force"]);
            let _ = command.arg(&self.path).stderr(Stdio::null()).status();
        }
        while is_mounted(&self.path) {
            let _ = unmount(&self.path, UnmountFlags::DETACH);
        }
        let log = self.log();
        assert!(std::thread::panicking() || !log.contains("panicked at"), "it panicked: {log}");
    }
}

/// `nbdbridge fuse` in a folder.
pub(crate) fn fuse(folder: &Path) -> Command {
    nbdbridge(folder, &["fuse"])
}

/// `nbdbridge` in a folder.
pub(crate) fn nbdbridge<S: AsRef<OsStr>>(folder: &Path, args: &[S]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(args).current_dir(folder).env_remove("NBDBRIDGE_LOG").stdin(Stdio::null());
    command
}

/// Whether something is mounted on this very path.
pub(crate) fn is_mounted(path: &Path) -> bool {
    let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned();
    mounts.lines().any(|line| line.split(' ').nth(1) == path.to_str())
}

/// Says aloud why a test is skipped, where root, /dev/fuse or one of these programs is missing.
pub(crate) fn missing(test: &str, programs: &[&str]) -> bool {
    let why = if !rustix::process::geteuid().is_root() {
        "only root can mount here".to_owned()
    } else if !Path::new("/dev/fuse").exists() {
        "there is no /dev/fuse here".to_owned()
    } else {
        let path = std::env::var("PATH").unwrap_or_default();
        let there = |program: &&&str| path.split(':').any(|folder| Path::new(folder).join(program).exists());
        match programs.iter().find(|program| !there(program)) {
            Some(program) => format!("there is no {program} here"),
            None => return false,
        }
    };
    eprintln!("SKIP: {test}: {why}");
    true
}

/// Runs a program, which must succeed; gives what it printed.
pub(crate) fn run(program: &str, args: &[&dyn AsRef<OsStr>]) -> String {
    let output = Command::new(program).args(args.iter().map(|arg| arg.as_ref())).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let more = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {}\n{said}{more}", output.status);
    said
}
