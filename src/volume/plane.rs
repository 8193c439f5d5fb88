//! Data planes: the process that serves a volume's disk as a block device, one for each volume in use. It is this
//! program's own `attach`, in a session (and under systemd in a scope) of its own, so that it outlives whoever started
//! it, and is found again by what it serves.

use std::cell::Cell;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::bounded::{Patience, output_unless};
use super::options::DiskFormat;
use super::{DoorChoice, Name, Provision, Record};
use crate::attach::{backing_file, describe_use, detach as detach_loop, in_use};
use crate::attachment::{Attachment, is_stopped, started};
use crate::cli::parse_source;
use crate::control::{self, Served};
use crate::detach::{self, Ended};
use crate::fuse;
use crate::ublk::{self, Server};

/// A device that has just been unmounted may be looked at by others for a moment.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device, and the process that serves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plane {
    pub(crate) device: PathBuf,
    /// Nobody can write through it.
    pub(crate) read_only: bool,
    /// The process. A successor has another one.
    pid: u32,
    /// In clock ticks, as process numbers are used again.
    started: u64,
    /// What tells the device from others that have its number before or after.
    mark: String,
}

/// How a data plane is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Serves,
    /// Its process has died, and requests wait for a successor.
    Recovers,
    /// Its process has died, and its requests fail.
    Dead,
}

impl Plane {
    /// Starts one for the volume `name`, whose disk is `source`, below the folder `pool`.
    ///
    /// # Errors
    /// What it says itself, in one line.
    pub(super) fn start(
        name: &Name,
        record: &Record,
        pool: &Path,
        source: &OsString,
        read_only: bool,
    ) -> Result<Self> {
        let mut command = in_scope(name);
        command.args(words(record, pool, source, read_only)).current_dir("/").stdin(Stdio::null());
        let said = launch(&mut command, name, "attached", Some(source))?;
        let device = said.lines().find(|line| line.starts_with("/dev/"));
        let device = device.with_context(|| format!("volume `{name}`: attach names no device"))?;
        Plane::of(PathBuf::from(device), read_only)
    }

    /// Starts a successor for one whose process has died, and that of its supervisor.
    ///
    /// # Errors
    /// What it says itself, in one line.
    pub(super) fn recover(&self, name: &Name) -> Result<Self> {
        let id = ublk_name(&self.device).and_then(|device| device.strip_prefix("/dev/ublkb"));
        let id = id.with_context(|| format!("{}: cannot be recovered", self.device.display()))?;
        let mut command = in_scope(name);
        command.args(["ublk", "--fork", "--recover", id]).current_dir("/").stdin(Stdio::null());
        launch(&mut command, name, "recovered", None)?;
        // It has a supervisor of its own.
        Plane::of(self.device.clone(), self.read_only)
    }

    /// Finds one that serves `source`, or is about to, and that no volume is known to have: whoever started it did not live
    /// to tell.
    pub(super) fn find(source: &OsString, read_only: bool, known: &[PathBuf]) -> Option<Self> {
        let wanted = parse_source(source.clone()).ok()?.global();
        let until = Instant::now() + PATIENCE;
        loop {
            // It may come up between the two looks.
            let coming = is_attaching(source);
            let served = control::served().ok()?.into_iter().filter(|served| served.source == wanted);
            let devices = served.flat_map(|served| served.places).map(|place| place.as_path().to_owned());
            let mut planes = devices
                .filter(|place| place.starts_with("/dev") && !known.contains(place))
                .filter_map(|device| Plane::of(device, read_only).ok());
            // Somebody may have attached the same remote disk by hand.
            let ours = planes.find(|plane| is_told_to_attach(format!("/proc/{}", plane.pid), source));
            match ours {
                Some(plane) => return Some(plane),
                None if !coming || Instant::now() >= until => return None,
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn of(device: PathBuf, read_only: bool) -> Result<Self> {
        let server =
            server(&device).with_context(|| format!("{}: its process has ended", device.display()))?;
        let started = started(server.pid).unwrap_or(0);
        Ok(Plane { device, read_only, pid: server.pid, started, mark: server.mark })
    }

    /// How it is.
    pub(crate) fn life(&self) -> Life {
        match self.server() {
            Some(server) if server.live => Life::Serves,
            Some(_) if ublk_name(&self.device).is_some() => Life::Recovers,
            _ => Life::Dead,
        }
    }

    fn is_running(&self) -> bool {
        started(self.pid).is_some_and(|since| since == self.started)
    }

    /// Its process has died, and so has the mount namespace that its file was in, as a container's does: nobody knows the
    /// file by a name any more.
    fn is_left(&self) -> bool {
        !self.is_running() && backing_file(&self.device).is_some_and(|file| file == Path::new("/"))
    }

    /// Who serves the device, as long as that is ours.
    fn server(&self) -> Option<Server> {
        server(&self.device).filter(|server| server.mark == self.mark)
    }

    /// The door, for people.
    pub(crate) fn door(&self) -> &'static str {
        if ublk_name(&self.device).is_some() { "ublk" } else { "fuse and loop" }
    }

    /// Returns what becomes of the volume when the process dies, for people; `loses` where that loses writes.
    pub(crate) fn guarantee(&self, loses: bool) -> &'static str {
        if ublk_name(&self.device).is_some() && !loses {
            "when its data plane dies another one takes over, and nothing is lost"
        } else {
            "when its data plane dies its users get I/O errors until it is mounted again; what was flushed is kept"
        }
    }

    /// Asks the process why a crash of it would lose writes that were answered and not flushed; None where it would not.
    pub(crate) fn loss_after_crash(&self) -> Option<String> {
        if is_stopped(self.pid) {
            return None;
        }
        let served = control::served_by(self.pid).into_iter().find(|served| served.is_at(&self.device));
        served.and_then(|served| served.loss_after_crash)
    }

    /// Notices another process in the place of the first. True where there is one.
    pub(super) fn follow(&mut self) -> bool {
        match self.server() {
            Some(server) if server.live && server.pid != self.pid => {
                self.pid = server.pid;
                self.started = started(server.pid).unwrap_or(0);
                true
            }
            _ => false,
        }
    }

    /// What its control socket tells; None where it does not answer.
    pub(crate) fn ask(&self) -> Option<Served> {
        let here = |served: Vec<Served>| served.into_iter().find(|served| served.is_at(&self.device));
        here(control::served_by(self.pid)).or_else(|| here(control::served().ok()?))
    }

    /// Whether somebody has the device for himself: it is mounted, in whatever namespace, or part of another device.
    pub(crate) fn is_in_use(&self) -> bool {
        match (self.server(), self.life()) {
            (None, _) => false,
            // To open a device that waits for its process would be to wait, too.
            (Some(_), life) => life == Life::Recovers || in_use(&self.device),
        }
    }

    /// Words for that use.
    pub(crate) fn describe_use(&self) -> String {
        describe_use(&self.device)
    }

    /// Ends it, and tells whether what was written is durable. With `force` although it is in use, or dead.
    ///
    /// # Errors
    /// One line; it may not have ended.
    pub(super) fn stop(&self, force: bool) -> Result<Ended> {
        let mut how = Ended::Whole;
        let until = Instant::now() + PATIENCE;
        loop {
            let ended = match self.server() {
                Some(server) => {
                    let force = force || !server.live && ublk_name(&self.device).is_none();
                    detach::end(&self.device, force)
                }
                // The device is not ours any more, and may be another one's; our image is, as long as the process is there.
                None if self.is_running() => Err(anyhow!("process {} does not end", self.pid)),
                None if self.is_left() => {
                    detach_loop(&self.device).map(|()| Ended::Whole).context("a device without a file")
                }
                None => Ok(Ended::Whole),
            };
            match ended {
                Err(error) if Instant::now() >= until => return Err(error),
                Ok(ended) => {
                    if let Ended::Lost(_) = ended {
                        how = ended;
                    }
                    if !self.is_running() || Instant::now() >= until {
                        return Ok(how);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// Clears what data planes of `source` have left that were killed, also before anybody knew of their device.
pub(super) fn sweep(source: &OsStr) {
    let shown = match parse_source(source.to_owned()) {
        Ok(source) => fuse::shown(&source),
        Err(_) => return,
    };
    detach::sweep(|attachment| attachment.source.as_os_str() == shown);
}

/// Who serves the device of this path, and since when.
pub(super) fn server(device: &Path) -> Option<Server> {
    if let Some(name) = ublk_name(device) {
        return ublk::server(name);
    }
    // What is written down of a device may be of an earlier one: the file that it stands upon now tells.
    let (attachment, _) = Attachment::of_device(device)?;
    Some(Server {
        pid: attachment.pid,
        live: attachment.is_alive(),
        mark: format!("{} {}", attachment.file.display(), attachment.started),
    })
}

fn ublk_name(device: &Path) -> Option<&str> {
    device.to_str().filter(|name| ublk::is_name(name))
}

/// Whether a process has been told to attach `source` for a volume.
fn is_attaching(source: &OsString) -> bool {
    !attaching(source).is_empty()
}

/// The processes that have been told to attach `source` for a volume.
fn attaching(source: &OsString) -> Vec<u32> {
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let ours = processes.filter(|process| is_told_to_attach(process.path(), source));
    ours.filter_map(|process| process.file_name().to_str()?.parse().ok()).collect()
}

/// Whether the process, a folder of /proc, was started with [`words`] for `source`.
fn is_told_to_attach(process: impl AsRef<Path>, source: &OsString) -> bool {
    let line = std::fs::read(process.as_ref().join("cmdline")).unwrap_or_default();
    let mut words = line.strip_suffix(b"\0").unwrap_or(&line).split(|byte| *byte == 0);
    let ends = [words.next_back(), words.next_back()] == [Some(source.as_encoded_bytes()), Some(b"--")];
    ends && words.any(|word| word == b"attach")
}

/// The command line of the process.
fn words(record: &Record, pool: &Path, source: &OsString, read_only: bool) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["attach".into()];
    let mut add = |word: &str| words.push(word.into());
    add(match record.options.door {
        DoorChoice::Auto => "--door=auto",
        DoorChoice::Ublk => "--door=ublk",
        DoorChoice::Fuse => "--door=fuse",
    });
    match record.format {
        // What is in the first sector of a volume is its user's business.
        Some(DiskFormat::Raw) => add("--format=raw"),
        Some(DiskFormat::Qcow2) => add("--format=qcow2"),
        None => {}
    }
    if record.options.provision == Provision::Thick {
        add("--discard=ignore");
    }
    if record.limits.is_limited() {
        add(&format!("--throttle={}", record.limits));
    }
    if read_only {
        add("--read-only");
    }
    if record.format.is_some() {
        let mut word = OsString::from("--beneath=");
        word.push(pool);
        words.push(word);
    }
    words.push("--".into());
    words.push(source.clone());
    words
}

/// Starts a data plane, and gives what it said when it served. One of `source` that is stopped while it comes up is ended.
fn launch(command: &mut Command, name: &Name, what: &str, source: Option<&OsString>) -> Result<String> {
    let ended = Cell::new(None);
    let stopped = || source.into_iter().flat_map(attaching).find(|pid| is_stopped(*pid));
    let patience = Patience::new(|| stopped().is_some());
    let look = || {
        if patience.is_over()
            && let Some(pid) = stopped()
            && let Some(process) = i32::try_from(pid).ok().and_then(Pid::from_raw)
        {
            // Whoever waits for it to serve clears away what it has made, and ends.
            let _ = kill_process(process, Signal::KILL);
            ended.set(Some(pid));
        }
        false
    };
    let output = output_unless(command, &look).unwrap_or_else(|| Err(std::io::Error::other("left alone")));
    let output = output.with_context(|| format!("{:?}: cannot be started", command.get_program()))?;
    if let Some(pid) = ended.get() {
        bail!(
            "volume `{name}`: cannot be {what}: process {pid} was stopped while it came up, and has been ended"
        );
    }
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let line = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it says nothing");
        bail!("volume `{name}`: cannot be {what}: {}", line.trim_start_matches("nbdbridge: "));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// This program, apart from whatever service asks for it.
fn in_scope(name: &Name) -> Command {
    let program = program();
    // What systemd's own tools look at (sd_booted(3)), and root's way to it.
    let has_systemd = Path::new("/run/systemd/system").is_dir() && Path::new("/run/systemd/private").exists();
    if !has_systemd {
        return Command::new(program);
    }
    let mut command = Command::new("systemd-run");
    command.args(["--scope", "--quiet", "--collect", "--slice=nbdbridge-volumes.slice"]);
    command.arg(format!("--description=nbdbridge volume {name}")).arg("--").arg(program);
    command
}

/// Where this program is; where it has been replaced meanwhile, itself.
fn program() -> PathBuf {
    match std::env::current_exe() {
        Ok(path) if path.exists() => path,
        _ => PathBuf::from("/proc/self/exe"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::{FsKind, Options};

    fn words_of(pairs: &[(&str, &str)], format: Option<DiskFormat>, read_only: bool) -> Vec<String> {
        let options = Options::parse(pairs.iter().copied()).unwrap();
        let record = Record::new(options, 1 << 30, FsKind::Ext4, format);
        let words = words(&record, Path::new("/"), &OsString::from("/a b"), read_only);
        words.into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    #[test]
    fn the_command_line_says_all_that_the_record_does() {
        let plain = words_of(&[], Some(DiskFormat::Raw), false);
        assert_eq!(plain, ["attach", "--door=auto", "--format=raw", "--beneath=/", "--", "/a b"]);
        let pairs = [("door", "fuse"), ("provision", "thick"), ("iops-total", "7"), ("bps-read", "1M")];
        let all = words_of(&pairs, Some(DiskFormat::Raw), true);
        let limits = "--throttle=iops-total=7,bps-read=1048576";
        let expected = [
            "attach",
            "--door=fuse",
            "--format=raw",
            "--discard=ignore",
            limits,
            "--read-only",
            "--beneath=/",
            "--",
            "/a b",
        ];
        assert_eq!(all, expected);
        let remote = words_of(&[("source", "nbd://h/x"), ("door", "ublk")], None, false);
        assert_eq!(remote, ["attach", "--door=ublk", "--", "/a b"]);
    }

    #[test]
    fn a_process_that_attaches_is_seen() {
        let source = OsString::from("/such a disk.raw");
        let mut command = Command::new("sh");
        command.args(["-c", "read line", "attach", "--"]).arg(&source).stdin(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let until = Instant::now() + PATIENCE;
        while !is_attaching(&source) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(is_attaching(&source) && !is_attaching(&OsString::from("/such a disk")));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
