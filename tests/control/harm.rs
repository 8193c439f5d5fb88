//! What must not matter: garbage, crowds and slow clients on the control socket, other users, dead and silent servers.

use super::*;

#[test]
fn garbage_and_slow_clients_harm_nobody() {
    let here = Here::new();
    let server = here.serve(&["mem:1M"]);
    let socket = here.socket(&server);
    let before = server.resident();
    let mut client = server.client(ReplyStyle::Simple);
    for garbage in
        [&[0xff; 4096][..], b"\r\n\r\n\r\n", b"GET", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00", b""]
    {
        let mut stream = connect(&socket);
        let _ = stream.write_all(garbage);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let head = String::from_utf8_lossy(&answer);
        assert!(
            answer.is_empty() || head.starts_with("HTTP/1.1 4") || head.starts_with("HTTP/1.0 4"),
            "{head}"
        );
        client.read(0, 512);
    }
    let endless = raw(&socket, &[b"GET / HTTP/1.1\r\nx: ", &vec![b'a'; 4 << 20][..]].concat());
    assert!(endless.is_empty() || endless.starts_with(b"HTTP/1.1 4"), "{endless:?}");

    // More than are let in: half a head each, a body that does not come, nothing at all.
    let body = b"POST /v1/resize HTTP/1.1\r\nHost: x\r\nContent-Length: 20\r\n\r\n{\"size\"";
    let starts: [&[u8]; 4] = [b"GET /v1/ins", b"GET /v1/instance HTTP/1.1\r\nHost: x\r\n", b"", body];
    let mut held: Vec<UnixStream> = (0..40)
        .map(|n| {
            let mut stream = connect(&socket);
            let _ = stream.write_all(starts[n % starts.len()]);
            stream
        })
        .collect();
    let begun = Instant::now();
    for n in 0..2000 {
        client.write(n % 200 * 4096, &[1; 4096]);
    }
    assert!(begun.elapsed() < LIMIT);
    assert!(server.resident() - before < 16 << 20, "{} bytes", server.resident() - before);
    // They lose their places one after the other, and who has something to ask gets one.
    for (n, stream) in held.iter_mut().enumerate() {
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"), "{n}: {answer:?}");
    }
    assert_eq!(here.ask_json(&["ps", "--json"])[0]["pid"], server.id());
    client.read(0, 512);
    server.stop();
}

/// Far more than are let in, and none of them asks: `ps` waits for an answer for five seconds only.
#[test]
fn a_crowd_that_asks_nothing_makes_room() {
    let here = Here::new();
    let server = here.serve(&["mem:1M", "-x", "disk"]);
    let socket = here.socket(&server);
    let mut crowd: Vec<_> = (0..200).map(|_| connect(&socket)).collect();
    for stream in &mut crowd {
        let _ = stream.write_all(b"GET /v1/instance HTTP/1.1\r\n");
    }
    assert_eq!(here.ask_json(&["ps", "--json"])[0]["pid"], server.id());
    assert_eq!(here.ask(&["throttle", "disk", "iops-total=9"]), "iops-total=9\n");
    server.stop();
}

#[test]
fn other_users_are_refused() {
    let here = Here::new();
    let server = here.serve(&["mem:1M"]);
    let (folder, socket) =
        (fs::metadata(here.folder()).unwrap(), fs::metadata(here.socket(&server)).unwrap());
    assert_eq!((folder.mode() & 0o7777, socket.mode() & 0o7777), (0o700, 0o600));
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: other_users_are_refused: only root can be another user");
        return;
    }
    fs::set_permissions(here.0.path(), PermissionsExt::from_mode(0o755)).unwrap();
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(args).env(CONTROL_FOLDER, here.folder()).uid(65534).gid(65534).stdin(Stdio::null());
        command.output()
    };
    let Ok(output) = as_nobody(&["ps"]) else {
        eprintln!("SKIP: other_users_are_refused: another user cannot run {PROGRAM}");
        return;
    };
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(one_line(&output).contains("no permission"), "{output:?}");
    // Whatever became of the modes, it asks who comes.
    fs::set_permissions(here.folder(), PermissionsExt::from_mode(0o755)).unwrap();
    fs::set_permissions(here.socket(&server), PermissionsExt::from_mode(0o666)).unwrap();
    let output = as_nobody(&["ps", "--json"]).unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "[]", "{output:?}");
    assert!(one_line(&output).contains("does not answer"), "{output:?}");
    here.ask(&["ps"]);
}

#[test]
fn the_dead_are_forgotten_and_the_silent_named() {
    let here = Here::new();
    let mut killed = here.serve(&["mem:1M", "-x", "killed"]);
    let stopped = here.serve(&["mem:1M", "-x", "stopped"]);
    let alive = here.serve(&["mem:1M", "-x", "alive"]);
    killed.child.kill().unwrap();
    killed.child.wait().unwrap();
    let (left, odd) = (here.socket(&killed), here.folder().join("4000000001.sock"));
    assert!(left.exists());
    // One that hangs up on whoever comes, and what is no socket of ours at all.
    let _listener = {
        let listener = UnixListener::bind(&odd).unwrap();
        let other = listener.try_clone().unwrap();
        std::thread::spawn(move || other.incoming().for_each(drop));
        listener
    };
    fs::write(here.folder().join("notes.txt"), "").unwrap();
    stopped.signal(Signal::STOP);
    let output = here.run(&["ps", "--json"]);
    stopped.signal(Signal::CONT);
    assert!(output.status.success(), "{output:?}");
    let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(shown.as_array().unwrap().len(), 1, "{shown}");
    assert_eq!(shown[0]["pid"], alive.id());
    let lines = String::from_utf8(output.stderr).unwrap();
    assert_eq!(lines.lines().count(), 2, "{lines}");
    assert!(lines.contains(&format!("process {} does not answer", stopped.id())), "{lines}");
    assert!(lines.contains("process 4000000001 does not answer"), "{lines}");
    assert!(!left.exists() && odd.exists() && here.folder().join("notes.txt").exists());
    here.ask(&["throttle", "alive"]);
}

#[test]
fn without_a_place_for_its_socket_it_serves() {
    let here = Here::new();
    fs::write(here.folder(), "").unwrap();
    let no_parent = here.0.path().join("no/folder");
    let too_long = here.0.path().join("x".repeat(120));
    for folder in [here.folder(), no_parent, too_long, "/proc/nbdbridge".into()] {
        let server = Server::serve_in(&folder, &["mem:1M"]);
        server.assert_alive();
        let log = server.log();
        assert_eq!(log.lines().count(), 1, "{log}");
        assert!(log.contains("no control socket") && log.contains(text(&folder)), "{log}");
        server.stop();
    }
}

#[test]
fn it_goes_on_while_the_server_ends() {
    let here = Here::new();
    let mut server = here.serve(&["mem:1M", "--fault", "delay-ms=500,op=flush"]);
    let mut client: Client = server.client(ReplyStyle::Simple);
    client.ask(Nbd::Flush, NO_FLAGS, 0, 0);
    eventually("the flush is in flight", || {
        here.ask_json(&["ps", "--json"])[0]["doors"][0]["clients"][0]["in_flight"] == 1
    });
    server.signal(Signal::TERM);
    assert_eq!(http(&here.socket(&server), "GET", "/v1/instance", "").0, 200);
    assert_eq!(client.answer().error, None);
    assert_eq!(server.wait(LIMIT).unwrap().code(), Some(0));
    assert_eq!(fs::read_dir(here.folder()).unwrap().count(), 0);
}

#[test]
fn fork_has_the_socket_of_the_child() {
    let here = Here::new();
    let (socket, pid) = (here.0.path().join("sock"), here.0.path().join("pid"));
    let mut command = net(&["mem:1M", "-k", text(&socket), "--fork", "--pid-file", text(&pid)]);
    let output = command.env(CONTROL_FOLDER, here.folder()).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    let pid = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    assert_eq!(here.ask_json(&["ps", "--json"])[0]["pid"], pid);
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    eventually("it ends and removes its socket", || fs::read_dir(here.folder()).unwrap().count() == 0);
}
