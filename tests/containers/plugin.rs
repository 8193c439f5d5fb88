//! The protocol, without an engine: every call, every refusal, rude clients, the socket and the daemon's life.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::json;

use crate::http::{self, connect, request};
use crate::support::{PROGRAM, eventually, one_line, run, text};
use crate::world::{SOCKET, World};

#[test]
fn every_call() {
    let mut world = world!("every_call");
    world.start_daemon();
    assert_eq!(world.call("Plugin.Activate", &json!({}))["Implements"], json!(["VolumeDriver"]));
    // dockerd sends no body at all here.
    let (status, _) = http::call(Path::new(SOCKET), "Plugin.Activate", b"");
    assert_eq!(status, 200);
    let answer = world.call("VolumeDriver.Capabilities", &json!({}));
    assert_eq!(answer["Capabilities"], json!({ "Scope": "local" }));
    assert_eq!(world.volumes(), [""; 0]);

    // The daemon goes by what a pool is set to meanwhile.
    let pool = world.pool();
    run(PROGRAM, &["volume", "pool", "--pool", pool.to_str().unwrap(), "--default-size=96M"]);

    // Options may be null or absent, and podman's `timeout` is among them.
    world.call("VolumeDriver.Create", &json!({ "Name": "plain" }));
    world.call("VolumeDriver.Create", &json!({ "Name": "plain", "Opts": null }));
    world.call("VolumeDriver.Create", &json!({ "Name": "plain", "Opts": {} }));
    assert_eq!(world.status("plain")["size"], json!(96 << 20));
    let options = json!({ "size": "64M", "iops-total": "5000", "timeout": "30" });
    world.call("VolumeDriver.Create", &json!({ "Name": "data", "Opts": options }));
    // The same again, in other words.
    let equal = json!({ "size": "65536K", "iops-total": "5000" });
    world.call("VolumeDriver.Create", &json!({ "Name": "data", "Opts": equal }));
    let line = world.refused("VolumeDriver.Create", &json!({ "Name": "data", "Opts": { "size": "128M" } }));
    assert!(line.contains("`data`") && line.contains("exists"), "{line}");
    assert_eq!(world.volumes(), ["data", "plain"]);

    let volume = &world.call("VolumeDriver.Get", &json!({ "Name": "data" }))["Volume"];
    assert_eq!((&volume["Name"], &volume["Mountpoint"]), (&json!("data"), &json!("")));
    assert!(volume["CreatedAt"].as_str().unwrap().ends_with('Z'), "{volume}");
    let status = &volume["Status"];
    assert_eq!((&status["size"], &status["health"]), (&json!(64 << 20), &json!("ok")));
    assert_eq!(status["limits"]["iops-total"], json!(5000));
    assert!(status["allocated"].as_u64().unwrap() > 0, "its file system is made: {status}");
    assert_eq!((&status["references"], &status["device"]), (&json!(0), &json!(null)));
    assert_eq!(status["filesystem"]["type"], json!("ext4"));

    let which = json!({ "Name": "data", "ID": "a" });
    assert_eq!(world.call("VolumeDriver.Path", &which)["Mountpoint"], json!(""));
    let mounted = world.call("VolumeDriver.Mount", &which)["Mountpoint"].clone();
    let point = Path::new(mounted.as_str().unwrap());
    fs::write(point.join("x"), "hello").unwrap();
    assert_eq!(world.call("VolumeDriver.Path", &which)["Mountpoint"], mounted);
    let status = world.status("data");
    assert!(status["device"].as_str().unwrap().starts_with("/dev/"), "{status}");
    assert!(status["filesystem"]["usage"]["used"].as_u64().unwrap() > 0, "{status}");
    assert!(status["door"].is_string() && status["guarantee"].is_string(), "{status}");

    // Counted for each ID: `docker cp` mounts and unmounts with that of the running container.
    let planes = world.planes();
    for id in ["a", "b"] {
        assert_eq!(
            world.call("VolumeDriver.Mount", &json!({ "Name": "data", "ID": id }))["Mountpoint"],
            mounted
        );
    }
    assert_eq!(world.planes(), planes, "one that is mounted costs nothing more");
    assert_eq!(world.status("data")["holders"], json!({ "a": 2, "b": 1 }));
    for id in ["a", "unknown", "a"] {
        world.call("VolumeDriver.Unmount", &json!({ "Name": "data", "ID": id }));
        assert_eq!(fs::read(point.join("x")).unwrap(), b"hello");
    }
    assert_eq!(world.status("data")["references"], json!(1));
    world.call("VolumeDriver.Unmount", &json!({ "Name": "data", "ID": "b" }));
    world.assert_clean();
    assert_eq!(world.status("data")["references"], json!(0));

    for name in ["data", "plain"] {
        world.call("VolumeDriver.Remove", &json!({ "Name": name }));
    }
    assert_eq!(world.volumes(), [""; 0]);
    assert_eq!(world.end_daemon(Signal::TERM), Some(0));
    assert!(!Path::new(SOCKET).exists());
    world.assert_clean();
}

#[test]
fn refusals_are_status_500_and_one_line() {
    let mut world = world!("refusals_are_status_500_and_one_line");
    world.start_daemon();
    for call in ["Get", "Path", "Mount", "Unmount", "Remove"] {
        let line = world.refused(&format!("VolumeDriver.{call}"), &json!({ "Name": "nowhere", "ID": "a" }));
        assert!(line.contains("`nowhere`"), "{call}: {line}");
    }
    for (name, options, part) in [
        ("../x", json!({}), "no name"),
        ("a/b", json!({}), "no name"),
        ("", json!({}), "no name"),
        ("x", json!({ "size": "0" }), "size=0"),
        ("x", json!({ "size": "1000000T" }), "more than"),
        ("x", json!({ "siez": "1G" }), "unknown option `siez`; there are size"),
        ("x", json!({ "fs": "ntfs" }), "ext4"),
        ("x", json!({ "size": 7 }), "not what is wanted"),
    ] {
        let line = world.refused("VolumeDriver.Create", &json!({ "Name": name, "Opts": options }));
        assert!(line.contains(part), "{name} {options}: {line}");
    }
    let socket = Path::new(SOCKET);
    for body in [&b""[..], b"{", b"null", b"[]", b"{\"Name\":7}", b"\xff\xfe", &[b'x'; 1 << 20]] {
        let (status, answer) = http::call(socket, "VolumeDriver.Get", body);
        let line = answer["Err"].as_str().unwrap();
        assert!(status == 500 && !line.is_empty() && line.lines().count() == 1, "{status} {line}");
    }
    let (status, answer) = http::call(socket, "VolumeDriver.Nothing", b"{}");
    assert!(status == 404 && answer["Err"].as_str().unwrap().contains("not a call"), "{answer}");
    assert_eq!(world.volumes(), [""; 0]);

    // One that is damaged is told of, and hinders no other.
    for name in ["bad", "good"] {
        world.call("VolumeDriver.Create", &json!({ "Name": name, "Opts": { "size": "64M" } }));
    }
    fs::write(world.pool().join("bad/volume.json"), "{").unwrap();
    let line = world.refused("VolumeDriver.Mount", &json!({ "Name": "bad", "ID": "a" }));
    assert!(line.contains("broken"), "{line}");
    let health = world.status("bad")["health"].as_str().unwrap().to_owned();
    assert!(health.contains("broken"), "{health}");
    assert_eq!(world.volumes(), ["bad", "good"]);
    world.call("VolumeDriver.Mount", &json!({ "Name": "good", "ID": "a" }));
    world.call("VolumeDriver.Unmount", &json!({ "Name": "good", "ID": "a" }));
    world.assert_clean();
}

#[test]
fn slow_and_rude_clients_hinder_nobody() {
    let mut world = world!("slow_and_rude_clients_hinder_nobody");
    world.start_daemon();
    let socket = Path::new(SOCKET);
    let whole = request("VolumeDriver.List", b"{}");
    let mut open = Vec::new();
    for number in 0..300_usize {
        let mut stream = connect(socket);
        match number % 4 {
            0 => {}
            1 => stream.write_all(&whole[..number % whole.len()]).unwrap(),
            // They may be cut off at once.
            2 => drop(stream.write_all(&[0; 100])),
            _ => drop(
                stream.write_all(b"POST /VolumeDriver.List HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n"),
            ),
        }
        open.push(stream);
        if number % 50 == 0 {
            assert_eq!(world.volumes(), [""; 0]);
        }
    }
    assert_eq!(world.volumes(), [""; 0]);
    // Half a request, then the rest: who is only slow is served.
    let mut slow = connect(socket);
    slow.write_all(&whole[..20]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    slow.write_all(&whole[20..]).unwrap();
    let mut answer = String::new();
    slow.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    drop(open);
    world.assert_clean();
}

#[test]
fn a_mount_that_nobody_waited_for_is_undone() {
    let mut world = world!("a_mount_that_nobody_waited_for_is_undone");
    world.start_daemon();
    world.call("VolumeDriver.Create", &json!({ "Name": "a", "Opts": { "size": "64M" } }));
    let mount = request("VolumeDriver.Mount", br#"{"Name":"a","ID":"x"}"#);
    let undone = |world: &World| {
        eventually("the mount is not undone", || world.status("a")["references"] == json!(0));
        world.assert_clean();
    };
    // Gone at once, a moment later, and when the answer is there but not read.
    for wait in [0, 1, 5, 20, 60] {
        let mut stream = connect(Path::new(SOCKET));
        stream.write_all(&mount).unwrap();
        std::thread::sleep(Duration::from_millis(wait));
        drop(stream);
        undone(&world);
    }
    let mut stream = connect(Path::new(SOCKET));
    stream.write_all(&mount).unwrap();
    poll(&mut [PollFd::new(&stream, PollFlags::IN)], None).unwrap();
    assert_eq!(world.status("a")["references"], json!(1));
    drop(stream);
    undone(&world);
    // Who has the answer keeps the mount, with the connection or without.
    world.call("VolumeDriver.Mount", &json!({ "Name": "a", "ID": "x" }));
    assert_eq!(world.status("a")["holders"], json!({ "x": 1 }));
    // And one that goes away takes no other's.
    let mut stream = connect(Path::new(SOCKET));
    stream.write_all(&mount).unwrap();
    drop(stream);
    eventually("the second mount is not undone", || world.status("a")["holders"] == json!({ "x": 1 }));
    world.call("VolumeDriver.Unmount", &json!({ "Name": "a", "ID": "x" }));
    world.assert_clean();
}

#[test]
fn the_socket_and_the_daemons_life() {
    let mut world = world!("the_socket_and_the_daemons_life");
    world.start_daemon();
    assert_eq!(fs::metadata(SOCKET).unwrap().mode() & 0o7777, 0o600);
    let second = Command::new(PROGRAM).args(["volumed", "--pool"]).arg(world.pool()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(one_line(&second).contains("another process listens there"));

    world.call("VolumeDriver.Create", &json!({ "Name": "a", "Opts": { "size": "64M" } }));
    let mount = json!({ "Name": "a", "ID": "x" });
    let point = world.call("VolumeDriver.Mount", &mount)["Mountpoint"].clone();
    let planes = world.planes();
    assert!(!planes.is_empty());
    for signal in [Signal::TERM, Signal::KILL] {
        let status = world.end_daemon(signal);
        assert_eq!(status, (signal == Signal::TERM).then_some(0));
        // One that was killed leaves its socket, which nobody minds.
        assert_eq!(Path::new(SOCKET).exists(), signal == Signal::KILL);
        assert_eq!(world.planes(), planes);
        fs::write(Path::new(point.as_str().unwrap()).join("x"), "still there").unwrap();
        world.start_daemon();
        assert_eq!(world.call("VolumeDriver.Path", &mount)["Mountpoint"], point);
        assert_eq!(world.status("a")["holders"], json!({ "x": 1 }));
    }
    world.call("VolumeDriver.Unmount", &mount);
    world.assert_clean();
    world.end_daemon(Signal::TERM);

    // The socket is systemd's: the daemon neither makes nor removes it.
    let path = world.join("passed.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let script = r#"LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" volumed --pool "$1" 3<&0 </dev/null"#;
    let mut command = Command::new("sh");
    command.args(["-c", script, PROGRAM, text(&world.pool())]);
    command.stdin(std::os::fd::OwnedFd::from(listener.try_clone().unwrap()));
    let mut passed = crate::support::Server::start(command.stderr(Stdio::null()), 1);
    assert_eq!(passed.lines, [text(&path)]);
    let (status, answer) = http::call(&path, "VolumeDriver.List", b"{}");
    assert_eq!((status, &answer["Volumes"][0]["Name"]), (200, &json!("a")));
    passed.signal(Signal::TERM);
    assert_eq!(passed.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
    assert!(path.exists() && !Path::new(SOCKET).exists());
    world.assert_clean();
}

/// Makes the holders of a volume old.
fn age_holders(name: &str) {
    let folder = fs::read_dir("/run/nbdbridge/volumes").unwrap().next().unwrap().unwrap().path();
    let file = folder.join(".state").join(name);
    let mut state: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    assert!(state["held_at"].as_u64().unwrap() > 60);
    state["held_at"] = json!(0);
    fs::write(&file, state.to_string()).unwrap();
}

#[test]
fn removal_in_use_loses_nothing() {
    let mut world = world!("removal_in_use_loses_nothing");
    // As systemd has it.
    run("mount", &["--make-shared", "/run"]);
    world.start_daemon();
    world.call("VolumeDriver.Create", &json!({ "Name": "a", "Opts": { "size": "64M" } }));
    let mount = json!({ "Name": "a", "ID": "x" });
    let point = world.call("VolumeDriver.Mount", &mount)["Mountpoint"].as_str().unwrap().to_owned();
    fs::write(Path::new(&point).join("x"), "precious").unwrap();

    // The engine has its answer, and not mounted it into a container yet.
    for _ in 0..2 {
        let line = world.refused("VolumeDriver.Remove", &json!({ "Name": "a" }));
        assert!(line.contains("`a` is in use: mounted at ") && line.contains("for x, since "), "{line}");
    }
    assert_eq!(fs::read(Path::new(&point).join("x")).unwrap(), b"precious");
    // As if that had been a while ago, as with the counts of an engine that was killed.
    age_holders("a");

    // As a container has it: in a mount namespace of its own, at another place.
    let script = r#"mount --make-rprivate / && mount --bind "$0" /mnt && umount "$0" && echo there && exec sleep 1000"#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, &point]).stdin(Stdio::null());
    let mut user = crate::support::Server::start(&mut command, 1);
    let line = world.refused("VolumeDriver.Remove", &json!({ "Name": "a" }));
    assert!(line.contains("`a` is in use") && line.contains("mounted at /mnt in sleep"), "{line}");
    assert_eq!(fs::read(Path::new(&point).join("x")).unwrap(), b"precious");
    assert_eq!(world.status("a")["holders"], json!({ "x": 1 }), "a refusal changes nothing");

    // A file that is open on the host is a use as well.
    user.signal(Signal::KILL);
    user.wait(Duration::from_secs(10)).unwrap();
    let open = fs::File::open(Path::new(&point).join("x")).unwrap();
    let line = world.refused("VolumeDriver.Remove", &json!({ "Name": "a" }));
    assert!(line.contains("`a` is in use"), "{line}");
    drop(open);

    // A service with mounts of its own sees it, and does not use it.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "slave", "sh", "-c", "echo there && exec sleep 1000"]);
    let other = crate::support::Server::start(command.stdin(Stdio::null()), 1);
    let sees = || fs::read_to_string(format!("/proc/{}/mountinfo", other.id())).unwrap().contains(&point);
    assert!(sees());

    // Nobody has it any more, whatever the counts say: its engine was killed.
    assert_eq!(world.status("a")["holders"], json!({ "x": 1 }));
    world.call("VolumeDriver.Remove", &json!({ "Name": "a" }));
    assert!(!sees());
    assert_eq!(world.volumes(), [""; 0]);
    world.assert_clean();
}

#[test]
fn counts_of_a_dead_engine_end_with_the_next_unmount() {
    let mut world = world!("counts_of_a_dead_engine_end_with_the_next_unmount");
    world.start_daemon();
    world.call("VolumeDriver.Create", &json!({ "Name": "a", "Opts": { "size": "64M" } }));
    let mount = |id: &str| json!({ "Name": "a", "ID": id });
    world.call("VolumeDriver.Mount", &mount("dead"));
    for id in ["one", "two"] {
        world.call("VolumeDriver.Mount", &mount(id));
    }
    // It may be about to start its container.
    world.call("VolumeDriver.Unmount", &mount("one"));
    assert_eq!(world.status("a")["holders"], json!({ "dead": 1, "two": 1 }));
    // As if that had been a while ago.
    age_holders("a");
    world.call("VolumeDriver.Unmount", &mount("two"));
    world.assert_clean();
    assert_eq!(world.status("a")["references"], json!(0));
}

#[test]
fn a_volume_that_hangs_holds_up_nobody_else() {
    let mut world = world!("a_volume_that_hangs_holds_up_nobody_else");
    world.start_daemon();
    for name in ["hangs", "works"] {
        world.call("VolumeDriver.Create", &json!({ "Name": name, "Opts": { "size": "64M" } }));
    }
    // As somebody who works on it, and does not come to an end.
    let folder = fs::File::open(world.pool().join("hangs")).unwrap();
    flock(&folder, FlockOperation::LockExclusive).unwrap();
    let mount = request("VolumeDriver.Mount", br#"{"Name":"hangs","ID":"x"}"#);
    let mut waiting = Vec::new();
    for _ in 0..70 {
        let mut stream = connect(Path::new(SOCKET));
        stream.write_all(&mount).unwrap();
        waiting.push(stream);
    }
    // So many wait, and no more.
    let mut answer = String::new();
    waiting.pop().unwrap().read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 500 ") && answer.contains("64 requests wait"), "{answer}");
    // It can be looked at, and others can be used.
    assert_eq!(world.status("hangs")["references"], json!(0));
    assert_eq!(world.volumes(), ["hangs", "works"]);
    let works = json!({ "Name": "works", "ID": "x" });
    world.call("VolumeDriver.Mount", &works);
    world.call("VolumeDriver.Unmount", &works);
    world.call("VolumeDriver.Remove", &works);
    // Whoever has lost patience meanwhile gets nothing mounted; the last one is still there, and does.
    let mut patient = waiting.remove(40);
    drop(waiting);
    flock(&folder, FlockOperation::Unlock).unwrap();
    answer.clear();
    patient.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\"Mountpoint\":\"/"), "{answer}");
    eventually("the mounts of the others are not undone", || {
        world.status("hangs")["holders"] == json!({ "x": 1 })
    });
    world.call("VolumeDriver.Unmount", &json!({ "Name": "hangs", "ID": "x" }));
    world.assert_clean();
}
