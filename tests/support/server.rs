//! The server as a child process, which ends with its test, however that ends.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use nbd_proto::ReplyStyle;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use super::{Client, Negotiation, Stream};

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_nbdbridge");

/// Where control sockets are made and looked for.
pub(crate) const CONTROL_FOLDER: &str = "NBDBRIDGE_RUNTIME_DIR";

/// A running server.
pub(crate) struct Server {
    pub(crate) child: Child,
    /// What it said when it was ready.
    pub(crate) lines: Vec<String>,
    folder: Option<TempDir>,
}

impl Server {
    /// Starts it, and waits for this many lines.
    pub(crate) fn start(command: &mut Command, lines: usize) -> Server {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let lines = stdout.lines().take(lines).map(Result::unwrap).collect();
        Server { child, lines, folder: None }
    }

    /// Serves SOURCE, the first of `args`, on a Unix socket of its own; with `-p 0` among them on TCP as well.
    pub(crate) fn serve(args: &[&str]) -> Server {
        Server::serve_by(&mut net(args), args).unwrap_or_else(|log| panic!("it did not start: {log}"))
    }

    /// The same, or what it says where it does not start.
    pub(crate) fn try_serve(args: &[&str]) -> Result<Server, String> {
        Server::serve_by(&mut net(args), args)
    }

    /// The same with a limit on open files.
    pub(crate) fn serve_with_files(files: u32, args: &[&str]) -> Server {
        let mut command = Command::new("sh");
        let script = format!("ulimit -n {files}; exec \"$0\" net \"$@\"");
        command.args(["-c", &script, PROGRAM]).args(args).stdin(Stdio::null());
        Server::serve_by(&mut command, args).unwrap_or_else(|log| panic!("it did not start: {log}"))
    }

    fn serve_by(command: &mut Command, args: &[&str]) -> Result<Server, String> {
        let folder = tempfile::tempdir().unwrap();
        command.arg("-k").arg(folder.path().join("sock"));
        // Killed at the end of a test, it leaves its control socket behind.
        command.env(CONTROL_FOLDER, folder.path().join("control"));
        command.stderr(File::create(folder.path().join("log")).unwrap());
        let count = |word| args.iter().filter(|arg| **arg == word).count();
        let exports = usize::from(!args[0].starts_with('-')) + count("--export");
        let mut server = Server::start(command, exports * (1 + count("-p")));
        server.folder = Some(folder);
        if server.lines.is_empty() { Err(server.log()) } else { Ok(server) }
    }

    /// The same with its control socket in `folder`, as `CONTROL_FOLDER` names it to all commands.
    pub(crate) fn serve_in(folder: &Path, args: &[&str]) -> Server {
        Server::try_serve_in(folder, args).unwrap_or_else(|log| panic!("it did not start: {log}"))
    }

    /// The same, or the log of a server that did not start.
    pub(crate) fn try_serve_in(folder: &Path, args: &[&str]) -> Result<Server, String> {
        let mut command = Command::new("sh");
        let script = format!("export {CONTROL_FOLDER}=\"$0\"; exec {PROGRAM} net \"$@\"");
        command.args(["-c", &script, text(folder)]).args(args).stdin(Stdio::null());
        Server::serve_by(&mut command, args)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.as_ref().unwrap().path().join("sock")
    }

    /// The TCP address it listens on.
    pub(crate) fn address(&self) -> SocketAddr {
        let line = self.lines.iter().find_map(|line| line.split("nbd://").nth(1)).unwrap();
        line.split(['/', ' ']).next().unwrap().parse().unwrap()
    }

    /// The URI of the export called `name` at the Unix socket.
    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", text(&self.socket()))
    }

    /// What it wrote to stderr.
    pub(crate) fn log(&self) -> String {
        let path = self.folder.as_ref().map(|folder| folder.path().join("log"));
        path.map_or_else(String::new, |path| fs::read_to_string(path).unwrap())
    }

    /// A bare connection.
    pub(crate) fn stream(&self) -> Stream {
        Stream::unix(&self.socket()).unwrap()
    }

    /// A connection whose greeting has been exchanged.
    pub(crate) fn negotiate(&self) -> Negotiation {
        Negotiation::begin(self.stream())
    }

    /// A client of the default export, with `base:allocation` where the style has it.
    pub(crate) fn client(&self, style: ReplyStyle) -> Client {
        self.negotiate().enter(style, "")
    }

    /// Proof that it serves: a new client is let in and its read is answered.
    pub(crate) fn assert_alive(&self) {
        self.assert_alive_at(0);
    }

    pub(crate) fn assert_alive_at(&self, offset: u64) {
        let mut client = self.client(ReplyStyle::Structured);
        assert_eq!(client.read(offset, 512).len(), 512);
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Bytes of memory that it has resident.
    pub(crate) fn resident(&self) -> u64 {
        resident_bytes(self.id())
    }

    /// The most that it has had resident.
    pub(crate) fn peak(&self) -> u64 {
        status_bytes(self.id(), "VmHWM:")
    }

    /// Processor time that it has used.
    pub(crate) fn processor_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        // Fields 14 and 15, counted from 1, of which two are cut off; in hundredths of a second.
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let start = Instant::now();
        loop {
            let status = self.child.try_wait().unwrap();
            if status.is_some() || start.elapsed() > limit {
                return status;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Ends it in good order.
    pub(crate) fn stop(self) {
        self.stop_within(Duration::from_secs(20));
    }

    pub(crate) fn stop_within(mut self, limit: Duration) {
        self.signal(Signal::TERM);
        let status = self.wait(limit).expect("it does not end");
        assert_eq!(status.code(), Some(0), "{}", self.log());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let log = self.log();
        assert!(std::thread::panicking() || !log.contains("panicked at"), "the server panicked: {log}");
    }
}

/// The command that serves with these arguments.
pub(crate) fn net<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.arg("net").args(args).env_remove("NBDBRIDGE_LOG").stdin(Stdio::null());
    command
}

/// Bytes of memory that a process has resident.
pub(crate) fn resident_bytes(id: u32) -> u64 {
    status_bytes(id, "VmRSS:")
}

/// A size that the kernel tells of a process.
fn status_bytes(id: u32, name: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// Waits until it holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn one_line(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    text
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}
