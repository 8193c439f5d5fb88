//! The first and the last moments of a server: what tells that it is ready, signals that come while it starts, signals
//! that come twice, and sockets that are passed in.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nbd_proto::{Command as NbdCommand, CommandFlags, ReplyStyle};
use rustix::process::{Pid, Signal, kill_process};
use support::mount::{fuse, is_mounted, missing, nbdbridge};
use support::{LIMIT, Negotiation, PROGRAM, Server, Stream, eventually, need, net, one_line, run, text};

/// A child that ends with its test.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Running {
        Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// Looks as often as it can, since the moment passes quickly.
    fn watch(&mut self, what: &str, mut holds: impl FnMut() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(self.0.try_wait().unwrap().is_none(), "it ended before: {what}");
            assert!(start.elapsed() < LIMIT, "{what}");
            std::thread::yield_now();
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    fn exit_code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < LIMIT, "it does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn names(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap();
    names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

#[test]
fn the_pid_file_says_that_clients_can_connect() {
    for _ in 0..10 {
        let folder = tempfile::tempdir().unwrap();
        let (socket, pid) = (folder.path().join("sock"), folder.path().join("pid"));
        let mut server = Running::start(&mut net(&["mem:1M", "-k", text(&socket), "--pid-file", text(&pid)]));
        server.watch("the pid file", || pid.exists());
        UnixStream::connect(&socket).unwrap();
        assert_eq!(fs::read_to_string(&pid).unwrap(), format!("{}\n", server.0.id()));
        server.signal(Signal::TERM);
        assert_eq!(server.exit_code(), Some(0));
        assert_eq!(names(folder.path()), [""; 0]);
    }
}

#[test]
fn the_pid_file_says_that_the_file_is_mounted() {
    if missing("the_pid_file_says_that_the_file_is_mounted", &[]) {
        return;
    }
    for _ in 0..6 {
        let folder = tempfile::tempdir().unwrap();
        let (file, pid) = (folder.path().join("file"), folder.path().join("pid"));
        let mut server =
            Running::start(fuse(folder.path()).args(["mem:1M", "file", "--pid-file", text(&pid)]));
        server.watch("the pid file", || pid.exists());
        assert_eq!(fs::metadata(&file).unwrap().len(), 1 << 20, "an empty file is seen");
        server.signal(Signal::TERM);
        assert_eq!(server.exit_code(), Some(0));
        assert_eq!(names(folder.path()), [""; 0]);
    }
}

#[test]
fn a_pid_file_that_cannot_be_written_opens_no_door() {
    let folder = tempfile::tempdir().unwrap();
    let (link, target) = (folder.path().join("link"), folder.path().join("target"));
    fs::write(&target, "").unwrap();
    symlink(&target, &link).unwrap();
    for (pid, why) in [
        (link.as_path(), "is a symbolic link"),
        (Path::new("/dev/null"), "is not an ordinary file"),
        (Path::new("/proc/pid"), "cannot write the process number there"),
        (Path::new("/nowhere/pid"), "cannot write the process number there: No such file"),
    ] {
        let socket = folder.path().join("sock");
        let output = net(&["mem:1M", "-k", text(&socket), "--pid-file", text(pid)]).output().unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{output:?}");
        assert!(one_line(&output).contains(&format!("{}: {why}", text(pid))), "{output:?}");
    }
    assert_eq!(fs::read_to_string(&target).unwrap(), "");
    assert_eq!(names(folder.path()).len(), 2);
}

#[test]
fn a_signal_while_the_listener_opens_leaves_nothing() {
    for signal in [Signal::TERM, Signal::INT, Signal::TERM] {
        let folder = tempfile::tempdir().unwrap();
        let (socket, pid) = (folder.path().join("sock"), folder.path().join("pid"));
        let image = folder.path().join("disk.img");
        let words = [text(&image), "--create", "1M", "-k", text(&socket), "--pid-file", text(&pid)];
        let mut server = Running::start(&mut net(&words));
        server.watch("the socket", || socket.exists());
        server.signal(signal);
        assert_eq!(server.exit_code(), Some(0));
        // The image may stay where the server was ready in time.
        assert!(names(folder.path()).iter().all(|name| name == "disk.img"), "{:?}", names(folder.path()));
    }
}

#[test]
fn an_image_that_was_made_goes_with_a_start_that_is_ended() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    // The second source keeps the start waiting.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let other = format!("b=nbd://{}/", silent.local_addr().unwrap());
    let socket = folder.path().join("sock");
    let words = ["--export", &format!("a={}", text(&image)), "--export", &other, "--create", "1M"];
    let mut server = Running::start(net(&words).args(["-k", text(&socket)]));
    server.watch("the image", || image.exists());
    server.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(100));
    drop(silent);
    server.exit_code();
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn a_signal_while_a_file_is_mounted_leaves_nothing() {
    if missing("a_signal_while_a_file_is_mounted_leaves_nothing", &[]) {
        return;
    }
    for n in 0..8 {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().canonicalize().unwrap().join("file");
        let mut server = Running::start(fuse(folder.path()).args(["mem:1M", "file", "--pid-file", "pid"]));
        server.watch("the mount", || is_mounted(&file));
        std::thread::sleep(Duration::from_micros(300 * n));
        server.signal(if n % 2 == 0 { Signal::TERM } else { Signal::INT });
        assert_eq!(server.exit_code(), Some(0));
        let left = is_mounted(&file);
        let _ = rustix::mount::unmount(&file, rustix::mount::UnmountFlags::DETACH);
        assert!(!left, "it is still mounted");
        assert_eq!(names(folder.path()), [""; 0]);
    }
}

#[test]
fn a_signal_while_a_device_is_attached_leaves_nothing() {
    if missing("a_signal_while_a_device_is_attached_leaves_nothing", &[])
        || !Path::new("/dev/loop-control").exists()
    {
        return;
    }
    for n in 0..4 {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("disk.img");
        fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let words = ["attach", "--door", "fuse", "--foreground", "disk.img"];
        let mut server = Running::start(&mut nbdbridge(folder.path(), &words));
        let own = format!("/run/nbdbridge/attach-{}", server.0.id());
        let file = Path::new(&own).join("disk.img");
        server.watch("the mount", || is_mounted(&file));
        std::thread::sleep(Duration::from_millis(2 * n));
        server.signal(Signal::TERM);
        assert_eq!(server.exit_code(), Some(0));
        assert!(!is_mounted(&file) && !Path::new(&own).exists(), "something is left in {own}");
        let devices = fs::read_dir("/sys/block").unwrap().flatten();
        let mut backing =
            devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
        assert!(!backing.any(|path| path.starts_with(&own)), "a loop device is left over {own}");
    }
}

#[test]
fn a_signal_while_the_volume_daemon_starts_leaves_nothing() {
    for _ in 0..4 {
        let folder = tempfile::tempdir().unwrap();
        let (pool, socket) = (folder.path().join("pool"), folder.path().join("x.sock"));
        let words = ["volumed", "--pool", text(&pool), "--docker-socket", text(&socket)];
        let mut daemon = Running::start(&mut nbdbridge(folder.path(), &words));
        daemon.watch("the socket", || socket.exists());
        daemon.signal(Signal::TERM);
        assert_eq!(daemon.exit_code(), Some(0));
        assert_eq!(names(folder.path()), ["pool"]);
    }
}

#[test]
fn a_door_that_does_not_open_closes_the_others() {
    if missing("a_door_that_does_not_open_closes_the_others", &[]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().canonicalize().unwrap().join("file");
    let words = ["mem:1M", "file", "--also-net", "--socket", "/nowhere/sock"];
    let output = fuse(folder.path()).args(words).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!is_mounted(&file));
    assert_eq!(names(folder.path()), [""; 0]);
}

/// A wrapper that passes a signal on, and a group that gets it as well.
#[test]
fn two_signals_at_once_are_one() {
    let mut server = Server::serve(&["mem:1M", "--fault", "op=read,delay-ms=1500,delay-rate=1"]);
    let mut client = server.client(ReplyStyle::Structured);
    client.ask(NbdCommand::Read, CommandFlags::default(), 0, 512);
    std::thread::sleep(Duration::from_millis(100));
    for (signal, pause) in [(Signal::TERM, 1), (Signal::TERM, 1), (Signal::INT, 500), (Signal::TERM, 0)] {
        server.signal(signal);
        std::thread::sleep(Duration::from_millis(pause));
    }
    assert_eq!(client.answer().error, None, "what was in flight is not finished");
    assert_eq!(server.wait(LIMIT).unwrap().code(), Some(0), "{}", server.log());
}

#[test]
fn a_forced_end_keeps_what_was_answered() {
    need!("a_forced_end_keeps_what_was_answered", "qemu-img", "qemu-io");
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "16M"]);
    let mut server = Server::serve(&[text(&image), "--fault", "op=read,hang-every=1"]);
    let mut client = server.client(ReplyStyle::Structured);
    for n in 0..32 {
        client.write(n * 128 * 1024, &[7; 65536]);
    }
    // For ever in flight: the end would wait for it.
    client.ask(NbdCommand::Read, CommandFlags::default(), 0, 512);
    server.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(2300));
    assert!(server.is_running());
    server.signal(Signal::TERM);
    assert_eq!(server.wait(LIMIT).unwrap().code(), Some(1), "{}", server.log());
    let said = server.log();
    drop(server);
    for n in 0..32 {
        let read = format!("read -P 7 {}k 64k", n * 128);
        let out = run("qemu-io", &["-f", "qcow2", "-r", "-c", &read, text(&image)]);
        assert!(!out.contains("failed"), "block {n} is lost: {out}{said}");
    }
}

/// Starts the server with a socket as stdin and stdout, as inetd does.
fn by_inetd(socket: OwnedFd, words: &[&str]) -> Running {
    let mut command = net(words);
    let other = || Stdio::from(socket.try_clone().unwrap());
    Running(command.stdin(other()).stdout(other()).stderr(other()).spawn().unwrap())
}

#[test]
fn a_connection_as_stdin_is_served_once() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let far = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (near, _) = listener.accept().unwrap();
    let (one, other) = UnixStream::pair().unwrap();
    for (near, far) in [(OwnedFd::from(near), Stream::Tcp(far)), (OwnedFd::from(one), Stream::Unix(other))] {
        let mut server = by_inetd(near, &["mem:1M", "-vvv"]);
        far.limit(LIMIT);
        let mut client = Negotiation::begin(far).enter(ReplyStyle::Structured, "");
        client.write(0, &[3; 512]);
        assert_eq!(client.read(0, 512), [3; 512]);
        assert!(server.0.try_wait().unwrap().is_none());
        client.disconnect();
        assert_eq!(server.exit_code(), Some(0));
    }
    // One that is gone before it is served does not keep the server.
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    assert_eq!(by_inetd(near.into(), &["mem:1M"]).exit_code(), Some(0));
}

#[test]
fn a_listener_as_stdin_is_served() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut command = net(&["mem:1M", "--once"]);
    let mut server = Running(command.stdin(OwnedFd::from(listener)).stdout(Stdio::null()).spawn().unwrap());
    let mut client = Negotiation::begin(Stream::tcp(address).unwrap()).enter(ReplyStyle::Simple, "");
    assert_eq!(client.read(0, 512), [0; 512]);
    client.disconnect();
    assert_eq!(server.exit_code(), Some(0));
}

#[test]
fn a_connection_from_systemd_is_served_once() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut command = Command::new("sh");
    let script = r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" net mem:1M 3<&0 </dev/null"#;
    command.args(["-c", script, PROGRAM]).stdin(OwnedFd::from(near)).stdout(Stdio::piped());
    let mut server = Running(command.spawn().unwrap());
    let far = Stream::Unix(far);
    far.limit(LIMIT);
    let mut client = Negotiation::begin(far).enter(ReplyStyle::Extended, "");
    assert_eq!(client.read(0, 512), [0; 512]);
    client.disconnect();
    assert_eq!(server.exit_code(), Some(0));
    let mut said = String::new();
    std::io::Read::read_to_string(&mut server.0.stdout.take().unwrap(), &mut said).unwrap();
    assert_eq!(said, "");
}

/// nbdcopy starts the server by socket activation, and both write to one stdout.
#[test]
fn a_pipeline_gets_the_image_and_nothing_else() {
    need!("a_pipeline_gets_the_image_and_nothing_else", "nbdcopy");
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("r.img");
    let bytes: Vec<u8> = (0..1_u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(&image, &bytes).unwrap();
    let words = ["--", "[", PROGRAM, "net", text(&image), "-f", "raw", "-r", "]", "-"];
    let output = Command::new("timeout").args(["60", "nbdcopy"]).args(words).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout == bytes, "{} bytes came, {} were there", output.stdout.len(), bytes.len());
}

#[test]
fn a_background_server_does_not_take_stdin() {
    let folder = tempfile::tempdir().unwrap();
    let (near, _far) = UnixStream::pair().unwrap();
    let socket = folder.path().join("sock");
    let output = net(&["mem:1M", "-k", text(&socket), "--fork", "--pid-file", "pid"])
        .current_dir(folder.path())
        .stdin(OwnedFd::from(near))
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    UnixStream::connect(&socket).unwrap();
    let pid: i32 = fs::read_to_string(folder.path().join("pid")).unwrap().trim().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    eventually("it ends", || names(folder.path()).is_empty());
}
