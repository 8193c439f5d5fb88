//! The server as a process: what it prints when it is ready, going to the background, its files, the two
//! protocols of systemd, and how it ends. What clients see of it is tested elsewhere.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, getsid, kill_process, test_kill_process};
use support::{PROGRAM, Server, eventually, net, one_line, text};

#[test]
fn it_says_where_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, pid) = (folder.path().join("a b.sock"), folder.path().join("pid"));
    let mut command = net(&["mem:1M", "-p", "0", "-k", text(&socket), "-x", "a b", "--pid-file", text(&pid)]);
    let server = Server::start(&mut command, 2);
    let unix = format!("nbd+unix:///a%20b?socket={}", text(&socket).replace(' ', "%20"));
    assert!(server.lines.iter().any(|line| line.contains(&unix)), "{:?}", server.lines);
    let tcp = server.lines.iter().find_map(|line| line.split("nbd://").nth(1)).unwrap();
    TcpStream::connect(tcp.split('/').next().unwrap()).unwrap();
    UnixStream::connect(&socket).unwrap();
    assert_eq!(fs::read_to_string(&pid).unwrap(), format!("{}\n", server.child.id()));
    server.stop();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn fork_returns_when_clients_can_connect() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, pid_file) = (folder.path().join("sock"), folder.path().join("pid"));
    // `output` waits for the end of both streams: the background process must let go of them.
    let output =
        net(&["mem:1M", "-k", text(&socket), "--fork", "--pid-file", text(&pid_file)]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    UnixStream::connect(&socket).unwrap();
    assert!(String::from_utf8_lossy(&output.stdout).contains("nbd+unix:///?socket="), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let pid = fs::read_to_string(&pid_file).unwrap().trim().parse().ok().and_then(Pid::from_raw).unwrap();
    assert_eq!(getsid(Some(pid)).unwrap(), pid, "a session of its own");
    kill_process(pid, Signal::TERM).unwrap();
    eventually("the server removes its files", || fs::read_dir(folder.path()).unwrap().count() == 0);
    eventually("the server ends", || {
        // In a container nobody may be there to bury it.
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        test_kill_process(pid).is_err() || state.contains(") Z ")
    });
}

#[test]
fn fork_hands_on_what_went_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("no/disk.img");
    let output = net(&[text(&missing), "-p", "0", "--fork"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(one_line(&output).contains(text(&missing)), "{output:?}");
    let pid_file = folder.path().join("no/pid");
    let output = net(&["mem:1M", "-p", "0", "--fork", "--pid-file", text(&pid_file)]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(one_line(&output).contains(text(&pid_file)), "{output:?}");
}

/// In the moment in which the server is ready and its parent has not heard of it yet, too.
#[test]
fn a_signal_to_who_waits_ends_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let (socket, pid_file) = (folder.path().join("sock"), folder.path().join("pid"));
    for _ in 0..50 {
        let mut parent = net(&["mem:1M", "-k", text(&socket), "--fork", "--pid-file", text(&pid_file)])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = Pid::from_child(&parent);
        let children = format!("/proc/{pid}/task/{pid}/children");
        eventually("there are two", || {
            fs::read_to_string(&children).is_ok_and(|children| !children.is_empty())
                || parent.try_wait().unwrap().is_some()
        });
        // It may have heard already.
        let _ = kill_process(pid, Signal::STOP);
        eventually("the server is ready", || {
            fs::read_to_string(&pid_file).is_ok_and(|text| text.ends_with('\n'))
        });
        let server = Pid::from_raw(fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap()).unwrap();
        let _ = kill_process(pid, Signal::TERM);
        let _ = kill_process(pid, Signal::CONT);
        let status = parent.wait().unwrap();
        let late = status.success();
        if late {
            kill_process(server, Signal::TERM).unwrap();
        }
        eventually("the server ends", || fs::read_dir(folder.path()).unwrap().count() == 0);
        if !late {
            assert_eq!(status.signal(), Some(Signal::TERM.as_raw()), "{status}");
            return;
        }
    }
    panic!("the parent was too quick each time");
}

#[test]
fn a_socket_from_systemd_and_a_server_in_the_background() {
    let folder = tempfile::tempdir().unwrap();
    let pid_file = folder.path().join("pid");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let output =
        activated(listener.into(), &format!("--fork --pid-file {}", text(&pid_file))).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let mut client = TcpStream::connect(address).unwrap();
    let mut greeting = [0; 18];
    client.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let greeted = client.read_exact(&mut greeting);
    let server = Pid::from_raw(fs::read_to_string(&pid_file).unwrap().trim().parse().unwrap()).unwrap();
    kill_process(server, Signal::TERM).unwrap();
    eventually("the server removes its files", || !pid_file.exists());
    greeted.unwrap();
    assert!(greeting.starts_with(b"NBDMAGIC"));
}

/// Starts the server as systemd would, with stdin as the passed socket.
fn activated(socket: OwnedFd, args: &str) -> Command {
    let mut command = Command::new("sh");
    let script = format!(r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" net mem:1M {args} 3<&0 </dev/null"#);
    command.args(["-c", &script, PROGRAM]).stdin(Stdio::from(socket));
    command
}

#[test]
fn a_socket_from_systemd_and_words_back() {
    let folder = tempfile::tempdir().unwrap();
    let notify = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    notify.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut command = activated(listener.into(), "");
    let server = Server::start(command.env("NOTIFY_SOCKET", folder.path().join("notify")), 0);
    let mut word = [0; 64];
    let length = notify.recv(&mut word).unwrap();
    assert_eq!(&word[..length], b"READY=1");
    TcpStream::connect(address).unwrap();
    server.stop();
    let length = notify.recv(&mut word).unwrap();
    assert_eq!(&word[..length], b"STOPPING=1");
}

#[test]
fn sockets_from_systemd_that_will_not_do() {
    let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
    let output = activated(listener(), "-p 0").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "a socket from both sides: {output:?}");
    one_line(&output);
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let output = activated(file, "").output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(one_line(&output).contains("not a listening or connected stream socket"), "{output:?}");
}
