//! A world for one test, and what is done in it: the daemon, calls to it, and the proof that nothing is left.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::http;
use crate::support::{PROGRAM, Server, run, try_run};

/// Names the test that is to be run, in its world.
const TEST: &str = "NBDBRIDGE_WORLD_TEST";

/// Names the folder on the host's disk that it has.
const FOLDER: &str = "NBDBRIDGE_WORLD_FOLDER";

/// Where the daemon listens.
pub(crate) const SOCKET: &str = "/run/docker/plugins/nbdbridge.sock";

/// The image that both engines have.
pub(crate) const IMAGE: &str = "localhost/busybox";

/// Engines at the same time would take each other's cores.
static ONE_WORLD: Mutex<()> = Mutex::new(());

/// The world, or the end of the test.
macro_rules! world {
    ($name:literal) => {
        match crate::world::World::enter(concat!(module_path!(), "::", $name)) {
            Some(world) => world,
            None => return,
        }
    };
}

/// Where a test is.
pub(crate) struct World {
    folder: PathBuf,
    daemon: Option<Server>,
    dockerd: Option<Server>,
    /// Loop devices of ours that there have been: number, device that the file is on, file.
    loops: Mutex<Vec<String>>,
}

impl World {
    /// Runs the test of this path in a new world, and fails where it does; in there, gives the world.
    pub(crate) fn enter(path: &str) -> Option<World> {
        let (_, path) = path.split_once("::").unwrap();
        if std::env::var(TEST).is_ok_and(|test| test == path) {
            return Some(World::found());
        }
        let _one = ONE_WORLD.lock().unwrap_or_else(PoisonError::into_inner);
        let name = path.rsplit("::").next().unwrap();
        if crate::support::mount::missing(name, &["unshare", "mkfs.ext4", "losetup"]) {
            return None;
        }
        let root = env!("CARGO_MANIFEST_DIR");
        let prepared = Command::new("tests/engines/prepare").current_dir(root).output().unwrap();
        if !prepared.status.success() {
            let said = String::from_utf8_lossy(&prepared.stderr);
            eprintln!("SKIP: {name}: {}", said.lines().last().unwrap_or("tests/engines/prepare failed"));
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let output = Command::new("timeout")
            .args(["-k", "5", "100", "tests/engines/world"])
            .arg(std::env::current_exe().unwrap())
            .args([path, "--exact", "--nocapture", "--test-threads=1"])
            .env(TEST, path)
            .env(FOLDER, folder.path())
            .env_remove("NBDBRIDGE_LOG")
            .current_dir(root)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        for line in said.lines().chain(String::from_utf8_lossy(&output.stderr).lines()) {
            // Set apart, so that nobody counts the test twice.
            eprintln!("{}{line}", if line.starts_with("SKIP: ") { "" } else { "    " });
        }
        assert!(output.status.success(), "{path}: {}", output.status);
        assert!(said.contains("1 passed"), "{path}: no test has this name");
        None
    }

    fn found() -> World {
        let folder = PathBuf::from(std::env::var_os(FOLDER).unwrap());
        fs::create_dir_all("/etc/containers/containers.conf.d").unwrap();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        fs::copy(
            root.join("contrib/containers/containers.conf"),
            "/etc/containers/containers.conf.d/nbdbridge.conf",
        )
        .unwrap();
        World { folder, daemon: None, dockerd: None, loops: Mutex::default() }
    }

    /// A path in a folder on the host's disk.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub(crate) fn pool(&self) -> PathBuf {
        self.join("pool")
    }

    /// Starts the daemon; once it has said where it listens, it does.
    pub(crate) fn start_daemon(&mut self) {
        assert!(self.daemon.is_none());
        let log = File::options().create(true).append(true).open(self.join("daemon.log")).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["volumed", "-v", "--pool"]).arg(self.pool()).stdin(Stdio::null()).stderr(log);
        let server = Server::start(&mut command, 1);
        assert_eq!(server.lines, [SOCKET], "{}", self.daemon_log());
        self.daemon = Some(server);
    }

    pub(crate) fn daemon_log(&self) -> String {
        fs::read_to_string(self.join("daemon.log")).unwrap_or_default()
    }

    /// Ends the daemon by a signal, and gives its exit status, if it has one.
    pub(crate) fn end_daemon(&mut self, signal: Signal) -> Option<i32> {
        let mut daemon = self.daemon.take().unwrap();
        daemon.signal(signal);
        daemon.wait(Duration::from_secs(40)).expect("the daemon does not end").code()
    }

    /// A call that must succeed.
    pub(crate) fn call(&self, call: &str, body: &Value) -> Value {
        let (status, answer) = self.try_call(call, body);
        assert_eq!((status, &answer["Err"]), (200, &json!("")), "{call} {body}: {answer}");
        answer
    }

    pub(crate) fn try_call(&self, call: &str, body: &Value) -> (u16, Value) {
        let result = http::call(Path::new(SOCKET), call, body.to_string().as_bytes());
        self.note_loops();
        result
    }

    /// A call that must fail; gives the line that says why.
    pub(crate) fn refused(&self, call: &str, body: &Value) -> String {
        let (status, answer) = self.try_call(call, body);
        assert_eq!(status, 500, "{call} {body}: {answer}");
        let line = answer["Err"].as_str().unwrap().to_owned();
        assert!(!line.is_empty() && line.lines().count() == 1, "{line}");
        line
    }

    /// What the daemon knows of a volume.
    pub(crate) fn status(&self, name: &str) -> Value {
        self.call("VolumeDriver.Get", &json!({ "Name": name }))["Volume"]["Status"].clone()
    }

    /// Names of the volumes that there are.
    pub(crate) fn volumes(&self) -> Vec<String> {
        let answer = self.call("VolumeDriver.List", &json!({}));
        let volumes = answer["Volumes"].as_array().unwrap();
        volumes.iter().map(|volume| volume["Name"].as_str().unwrap().to_owned()).collect()
    }

    /// Runs podman, which must succeed, and gives what it said.
    pub(crate) fn podman(&self, args: &[&str]) -> String {
        let said = run("podman", args).trim_end().to_owned();
        self.note_loops();
        said
    }

    /// Gives podman its image.
    pub(crate) fn podman_image(&self) {
        self.podman(&["import", "--quiet", "/run/world/image.tar", IMAGE]);
    }

    /// Starts dockerd, and gives it its image where it has none.
    pub(crate) fn start_dockerd(&mut self) {
        let log = File::options().create(true).append(true).open(self.join("dockerd.log")).unwrap();
        let mut command = Command::new("dockerd");
        command.stdin(Stdio::null()).stderr(log);
        self.dockerd = Some(Server::start(&mut command, 0));
        let start = Instant::now();
        while !try_run("docker", &["version"]).status.success() {
            let log = || fs::read_to_string(self.join("dockerd.log")).unwrap();
            assert!(start.elapsed().as_secs() < 30, "dockerd does not start: {}", log());
            std::thread::sleep(Duration::from_millis(100));
        }
        if !try_run("docker", &["image", "inspect", IMAGE]).status.success() {
            self.docker(&["import", "/run/world/image.tar", IMAGE]);
        }
    }

    /// kill -9 of dockerd, and of nothing else.
    pub(crate) fn kill_dockerd(&mut self) {
        let mut dockerd = self.dockerd.take().unwrap();
        dockerd.signal(Signal::KILL);
        dockerd.wait(Duration::from_secs(10)).expect("it does not die");
    }

    /// Runs docker, which must succeed, and gives what it said.
    pub(crate) fn docker(&self, args: &[&str]) -> String {
        let said = run("docker", args).trim_end().to_owned();
        self.note_loops();
        said
    }

    /// Remembers the loop devices that stand upon FUSE files of this world's.
    fn note_loops(&self) {
        let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap()).into_owned();
        let ours: Vec<&str> = mounts
            .lines()
            .filter(|line| line.contains(" - fuse.nbdbridge "))
            .filter_map(|line| line.split(' ').nth(2))
            .collect();
        let mut noted = self.loops.lock().unwrap();
        for row in loops() {
            let device = row.split_whitespace().nth(1).unwrap_or_default();
            if ours.contains(&device) && !noted.contains(&row) {
                noted.push(row);
            }
        }
    }

    /// Processes of nbdbridge that are no daemon: data planes.
    pub(crate) fn planes(&self) -> Vec<u32> {
        let daemon = self.daemon.as_ref().map(Server::id);
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
        numbers
            .filter(|pid| {
                fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "nbdbridge")
                    && fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
            })
            .filter(|pid| Some(*pid) != daemon)
            .collect()
    }

    /// Mounts of volumes and of what they stand upon.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let mounts = String::from_utf8_lossy(&fs::read("/proc/self/mountinfo").unwrap()).into_owned();
        let is_ours = |line: &&str| line.contains(" /run/nbdbridge/") || line.contains(" - fuse.nbdbridge ");
        mounts.lines().filter(is_ours).map(str::to_owned).collect()
    }

    /// Nothing is attached, mounted or running, beside the daemon.
    pub(crate) fn assert_clean(&self) {
        let start = Instant::now();
        loop {
            let noted = self.loops.lock().unwrap().clone();
            let left: Vec<String> = loops().into_iter().filter(|row| noted.contains(row)).collect();
            let (planes, mounts) = (self.planes(), self.mounts());
            if left.is_empty() && planes.is_empty() && mounts.is_empty() {
                break;
            }
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "left: loops {left:?}, processes {planes:?}, mounts {mounts:?}"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!self.daemon_log().contains("panicked at"), "{}", self.daemon_log());
    }

    /// Ends every process but this one and those that it stands upon, as the end of a host does.
    pub(crate) fn kill_all(&mut self) {
        let spared = [1, std::process::id()];
        loop {
            let entries = fs::read_dir("/proc").unwrap().flatten();
            let others: Vec<i32> = entries
                .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
                .filter(|pid| !spared.contains(pid))
                .filter(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty()))
                .filter_map(|pid| i32::try_from(pid).ok())
                .collect();
            if others.is_empty() {
                break;
            }
            for pid in others {
                let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.daemon = None;
        self.dockerd = None;
    }

    /// The loop devices of ours that there have been, as /dev/loopN.
    pub(crate) fn loop_devices(&self) -> Vec<String> {
        let noted = self.loops.lock().unwrap();
        let there = loops();
        noted
            .iter()
            .filter(|row| there.contains(row))
            .filter_map(|row| row.split_whitespace().next().map(str::to_owned))
            .collect()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("daemon's log:\n{}", self.daemon_log());
            let dockerd = fs::read_to_string(self.join("dockerd.log")).unwrap_or_default();
            let last: Vec<&str> = dockerd.lines().rev().take(30).collect();
            eprintln!("dockerd's log, backwards:\n{}", last.join("\n"));
        }
        // Processes and mounts end with the world. Loop devices are the host's.
        self.kill_all();
        for mount in self.mounts().iter().rev() {
            let point = mount.split(' ').nth(4).unwrap();
            let _ = Command::new("umount").args(["-l", point]).status();
        }
        for device in self.loop_devices() {
            let _ = Command::new("losetup").args(["-d", &device]).status();
        }
    }
}

/// A line for each loop device that is set up: its name, the device that its file is on, the file.
fn loops() -> Vec<String> {
    run("losetup", &["--list", "--noheadings", "--raw", "--output", "NAME,BACK-MAJ:MIN,BACK-FILE"])
        .lines()
        .map(str::to_owned)
        .collect()
}
