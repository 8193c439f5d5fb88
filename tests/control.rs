//! The control socket and the commands that use it, on servers with clients: what they show and change, and that
//! nothing done to the socket, well or badly, harms who is served.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

#[path = "control/harm.rs"]
mod harm;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use nbd_proto::{Command as Nbd, NbdError, ReplyStyle};
use rustix::process::Signal;
use serde_json::{Value, json};
use support::{CONTROL_FOLDER, Client, LIMIT, NO_FLAGS, PROGRAM, Server, eventually, net, one_line, text};
use tempfile::TempDir;

/// A folder of control sockets, and commands that look there.
struct Here(TempDir);

impl Here {
    fn new() -> Here {
        Here(tempfile::tempdir().unwrap())
    }

    fn folder(&self) -> PathBuf {
        self.0.path().join("control")
    }

    fn serve(&self, args: &[&str]) -> Server {
        Server::serve_in(&self.folder(), args)
    }

    fn socket(&self, server: &Server) -> PathBuf {
        self.folder().join(format!("{}.sock", server.id()))
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(PROGRAM);
        command.args(args).env(CONTROL_FOLDER, self.folder()).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// What a command prints that must succeed.
    fn ask(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn ask_json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ask(args)).unwrap()
    }

    /// The one line of a command that must fail with this status.
    fn refusal(&self, args: &[&str], status: i32) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {output:?}");
        assert!(output.stdout.is_empty(), "{args:?}: {output:?}");
        one_line(&output)
    }
}

/// Sends bytes, and gives all that comes back until the end; the send may fail, as the server may have hung up.
fn raw(socket: &Path, request: &[u8]) -> Vec<u8> {
    let mut stream = connect(socket);
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(LIMIT)).unwrap();
    stream.set_write_timeout(Some(LIMIT)).unwrap();
    stream
}

/// A whole exchange as curl has it: the status and the JSON of the answer.
fn http(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n");
    let answer = String::from_utf8(raw(socket, (head + body).as_bytes())).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(head.contains("application/json"), "{head}");
    (status, serde_json::from_str(body).unwrap())
}

#[test]
fn ps_shows_servers_exports_and_clients() {
    let here = Here::new();
    assert!(String::from_utf8(here.run(&["ps"]).stderr).unwrap().contains("no nbdbridge is running"));
    assert_eq!(here.ask_json(&["ps", "--json"]), json!([]));
    let one = here.serve(&["mem:3M", "-x", "one", "-D", "words", "--throttle", "iops-read=100"]);
    let many = here.serve(&["null:1G", "--export", "b=mem:1M", "-r", "-p", "0"]);
    let mut client = one.client(ReplyStyle::Structured);
    client.write(0, &[1; 4096]);
    let table = here.ask(&["ps"]);
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    let words = |id: u32, name: &str| -> Vec<String> {
        let start = format!("{id} {name} ");
        let plain = lines.iter().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "));
        let line =
            plain.into_iter().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{table}"));
        line.split(' ').map(str::to_owned).collect()
    };
    assert_eq!(words(one.id(), "one")[2..6], ["3", "MiB", "rw", "1"], "{table}");
    assert!(table.contains(&one.uri("one")) && table.contains("mem:3145728"), "{table}");
    assert_eq!(words(many.id(), "-")[2..6], ["1", "GiB", "ro", "0"], "{table}");
    assert_eq!(words(many.id(), "b")[2..6], ["1", "MiB", "ro", "0"], "{table}");

    let all = here.ask_json(&["ps", "--json"]);
    let shown = |id: u32| all.as_array().unwrap().iter().find(|server| server["pid"] == id).unwrap();
    let server = shown(one.id());
    assert_eq!(server["version"], env!("CARGO_PKG_VERSION"));
    let export = json!({"name": "one", "description": "words", "source": "mem:3145728", "size": 3 << 20,
                        "read_only": false, "loss_after_crash": null, "limits": {"iops-read": 100}, "groups": {}});
    assert_eq!(server["exports"], json!([export]));
    let door = &server["doors"][0];
    assert_eq!(door["kind"], "net");
    assert_eq!(door["places"], json!([{"export": "one", "at": one.uri("one")}]));
    let clients = door["clients"].as_array().unwrap();
    assert_eq!(clients.len(), 1);
    assert_eq!(clients[0]["peer"], format!("unix, pid {}", std::process::id()));
    assert_eq!((&clients[0]["export"], &clients[0]["in_flight"]), (&json!("one"), &json!(0)));
    // The handshake is not among them; the write's header is.
    let bytes = |what: &str| clients[0][what].as_u64().unwrap();
    assert!((4096 + 28..5000).contains(&bytes("received_bytes")), "{clients:?}");
    assert!((20..1000).contains(&bytes("sent_bytes")), "{clients:?}");
    assert_eq!(shown(many.id())["doors"][0]["places"].as_array().unwrap().len(), 4);

    client.disconnect();
    eventually("the client is gone", || {
        here.ask_json(&["ps", "--json"])[0]["doors"][0]["clients"] == json!([])
            && here.ask_json(&["ps", "--json"])[1]["doors"][0]["clients"] == json!([])
    });
    one.stop();
    assert_eq!(here.ask_json(&["ps", "--json"]).as_array().unwrap().len(), 1);
    many.stop();
    assert_eq!(fs::read_dir(here.folder()).unwrap().count(), 0);
}

#[test]
fn requests_in_flight_are_told() {
    let here = Here::new();
    let server = here.serve(&["mem:1M", "--fault", "hang-rate=1,op=flush"]);
    let mut client = server.client(ReplyStyle::Simple);
    for _ in 0..3 {
        client.ask(Nbd::Flush, NO_FLAGS, 0, 0);
    }
    eventually("three requests are in flight", || {
        here.ask_json(&["ps", "--json"])[0]["doors"][0]["clients"][0]["in_flight"] == 3
    });
}

#[test]
fn stats_count_what_clients_did() {
    let here = Here::new();
    let server = here.serve(&["mem:1M", "-x", "a", "--export", "b=mem:1M"]);
    assert_eq!(here.ask(&["stats", "b"]), format!("{}:b  mem:1048576\nno requests yet\n", server.id()));
    let mut client = server.negotiate().enter(ReplyStyle::Extended, "a");
    for n in 0..10 {
        client.write(n * 4096, &[7; 4096]);
        client.read(n * 4096, 8192);
    }
    assert_eq!(client.call(Nbd::Read, NO_FLAGS, 1 << 20, 1).error, Some(NbdError::Inval));
    client.flush();
    let stats = here.ask_json(&["stats", "--json"]);
    let of = |name: &str| stats.as_array().unwrap().iter().find(|stats| stats["export"] == name).unwrap();
    assert_eq!(of("a")["pid"], server.id());
    let count = |operation: &str, what: &str| of("a")["operations"][operation][what].as_u64().unwrap();
    assert_eq!([count("read", "count"), count("read", "errors"), count("read", "bytes")], [11, 1, 10 * 8192]);
    assert_eq!(
        [count("write", "count"), count("write", "errors"), count("write", "bytes")],
        [10, 0, 10 * 4096]
    );
    assert_eq!((count("flush", "count"), count("trim", "count")), (1, 0));
    assert_eq!(of("b")["operations"]["read"]["count"], 0);
    let read = &of("a")["operations"]["read"];
    let buckets = read["histogram"].as_array().unwrap();
    assert_eq!(buckets.iter().map(|bucket| bucket["count"].as_u64().unwrap()).sum::<u64>(), 11);
    let [p50, p99] = ["p50", "p99"].map(|share| read["latency_us"][share].as_u64().unwrap());
    assert!(p50 > 0 && p50 <= p99, "{read}");
    let text = here.ask(&["stats", "a"]);
    let line = text.lines().find(|line| line.starts_with("read")).unwrap();
    assert!(line.split_whitespace().collect::<Vec<_>>().join(" ").starts_with("read 11 80 KiB 1 "), "{text}");
    assert!(!text.contains("trim"), "{text}");
}

#[test]
fn limits_change_while_clients_wait() {
    let here = Here::new();
    // What is asked for would take ten minutes.
    let server = here.serve(&["mem:1M", "-x", "disk", "--throttle", "iops-total=1"]);
    let mut client = server.client(ReplyStyle::Simple);
    let asked: Vec<_> = (0..100).map(|n| client.ask(Nbd::Read, NO_FLAGS, n * 512, 512)).collect();
    assert_eq!(here.ask(&["throttle", "disk"]), "iops-total=1\n");
    let line = here.refusal(&["throttle", "disk", "iops-read=5"], 1);
    assert!(line.contains("iops-total excludes"), "{line}");
    let line = here.refusal(&["throttle", "disk", "ops=5"], 1);
    assert!(line.contains("unknown throttle key `ops`; there are iops-total, iops-read"), "{line}");
    assert!(here.refusal(&["throttle", "disk", "iops-total"], 2).contains("KEY=VALUE"));
    assert!(here.refusal(&["throttle", "disk", "bps-total=lots"], 1).contains("no size"));
    assert_eq!(here.ask(&["throttle", "disk"]), "iops-total=1\n", "a refusal changes nothing");
    let changed = here.ask(&["throttle", "disk", "iops-total=1000000", "bps-read=50M,bps-read-max=1G"]);
    assert_eq!(changed, "bps-read=52428800\nbps-read-max=1073741824\niops-total=1000000\n");
    for _ in asked {
        assert_eq!(client.answer().error, None);
    }
    let left = here.ask_json(&["throttle", "disk", "iops-total=0", "--json"]);
    assert_eq!(left["limits"], json!({"bps-read": 52_428_800, "bps-read-max": 1_073_741_824}));
    assert_eq!(here.ask(&["throttle", "disk", "off"]), "no limits\n");
    client.read(0, 512);
}

#[test]
fn limits_of_groups_are_shown_changed_and_lifted() {
    let here = Here::new();
    let both = "group=both,export=a,export=b,iops-total=1";
    let server = here.serve(&[
        "mem:1M",
        "-x",
        "a",
        "--export",
        "b=mem:1M",
        "--export",
        "c=mem:1M",
        "--throttle",
        both,
    ]);
    let mut client = server.negotiate().enter(ReplyStyle::Simple, "a");
    let asked: Vec<_> = (0..100).map(|n| client.ask(Nbd::Read, NO_FLAGS, n * 512, 512)).collect();
    assert_eq!(here.ask(&["throttle", "b"]), "no limits of its own\ngroup=both iops-total=1\n");
    assert_eq!(here.ask(&["throttle", "c"]), "no limits\n");
    assert_eq!(
        here.ask(&["throttle", "a", "off"]),
        "no limits of its own\ngroup=both iops-total=1\n",
        "its own"
    );
    let changed = here.ask(&["throttle", "b", "group=both", "bps-read=1G", "iops-total=2"]);
    assert_eq!(changed, "no limits of its own\ngroup=both bps-read=1073741824\ngroup=both iops-total=2\n");
    let all = here.ask_json(&["throttle", "a", "--json"]);
    assert_eq!(all["groups"], json!({"both": {"bps-read": 1 << 30, "iops-total": 2}}), "for all of them");
    let line = here.refusal(&["throttle", "a", "group=bth", "off"], 1);
    assert!(line.contains("in no group `bth`; its groups: `both`"), "{line}");
    assert!(here.refusal(&["throttle", "a", "group=both"], 2).contains("or `off`"));
    assert!(here.refusal(&["throttle", "a", "group=both,group=c,off"], 2).contains("one group at a time"));
    assert_eq!(
        here.ask(&["throttle", "b", "group=both,off"]),
        "no limits of its own\ngroup=both no limits\n"
    );
    for _ in asked {
        assert_eq!(client.answer().error, None);
    }
}

#[test]
fn an_export_grows_under_load() {
    let here = Here::new();
    let image = here.0.path().join("disk.img");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let fixed = Server::serve(&["mem:1M"]);
    let server = here.serve(&[text(&image), "--export", &format!("gone={}", fixed.uri(""))]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut writer = server.client(ReplyStyle::Structured);
        let stop = &stop;
        let load = scope.spawn(move || {
            let mut writes = 0_u64;
            while !stop.load(Relaxed) {
                writer.write(writes % 256 * 4096, &[9; 4096]);
                writes += 1;
            }
            (writer, writes)
        });
        for mebibytes in 2..10 {
            let size = format!("{mebibytes}M");
            assert!(here.ask(&["resize", text(&image), &size]).contains(&format!("is {mebibytes} MiB now")));
            let mut client = server.client(ReplyStyle::Simple);
            assert_eq!(client.size, mebibytes << 20);
            client.write((mebibytes << 20) - 4096, &[3; 4096]);
        }
        stop.store(true, Relaxed);
        let (mut writer, writes) = load.join().unwrap();
        assert!(writes > 0);
        assert_eq!(writer.read((9 << 20) - 4096, 4096), [3; 4096], "an old client may use what is new");
    });
    assert_eq!(fs::metadata(&image).unwrap().len(), 9 << 20);
    assert_eq!(here.ask_json(&["resize", text(&image), "9M", "--json"])["old_size"], 9 << 20);
    assert!(here.refusal(&["resize", text(&image), "1M"], 1).contains("only grows"));
    assert!(here.refusal(&["resize", "gone", "2M"], 1).contains("cannot grow"));
    assert!(here.refusal(&["resize", "gone", "much"], 2).contains("not a size"));
    server.stop();
    let server = here.serve(&[text(&image), "-r"]);
    assert!(here.refusal(&["resize", text(&image), "20M"], 1).contains("read-only"));
    server.stop();
}

#[test]
fn it_is_clear_which_export_is_meant() {
    let here = Here::new();
    assert!(here.refusal(&["throttle", "disk"], 1).contains("no nbdbridge is running"));
    let one = here.serve(&["mem:1M", "-x", "disk"]);
    let two = here.serve(&["mem:2M", "-x", "disk"]);
    let line = here.refusal(&["resize", "disk", "4M"], 1);
    for id in [one.id(), two.id()] {
        assert!(line.contains("say which: ") && line.contains(&format!("{id}:disk (mem:")), "{line}");
    }
    here.ask(&["resize", &format!("{}:disk", two.id()), "4M"]);
    here.ask(&["resize", &one.id().to_string(), "5M"]);
    here.ask(&["resize", &one.uri("disk"), "6M"]);
    assert_eq!(
        (one.client(ReplyStyle::Simple).size, two.client(ReplyStyle::Simple).size),
        (6 << 20, 4 << 20)
    );
    let many = here.serve(&["mem:1M", "-x", "p", "--export", "q=mem:1M"]);
    let pid = many.id().to_string();
    let line = here.refusal(&["throttle", &pid], 1);
    assert!(line.contains(&format!("{pid} has 2 exports; say which: {pid}:p (mem:")), "{line}");
    let shown = here.ask(&["stats", &pid]);
    let [p, q] =
        ["p", "q"].map(|name| shown.contains(&format!("{pid}:{name}  mem:1048576\nno requests yet")));
    assert!(p && q && shown.lines().count() == 5, "{shown}");
    many.stop();
    let line = here.refusal(&["stats", "dsk"], 1);
    assert!(
        line.contains("no export `dsk`; there is ") && line.contains(&format!("{}:disk", one.id())),
        "{line}"
    );
}

#[test]
fn the_routes_answer_in_json_whatever_is_asked() {
    let here = Here::new();
    let server = here.serve(&["mem:1M", "-x", "a b/c", "--export", "d=mem:1M"]);
    let socket = here.socket(&server);
    let (status, instance) = http(&socket, "GET", "/v1/instance", "");
    assert_eq!((status, &instance["pid"]), (200, &json!(server.id())));
    let (status, limits) = http(&socket, "PATCH", "/v1/throttle?export=a%20b%2Fc", r#"{"bps-total": "2M"}"#);
    assert_eq!(
        (status, limits),
        (200, json!({"export": "a b/c", "groups": {}, "limits": {"bps-total": 2 << 20}}))
    );
    let (status, resized) = http(&socket, "POST", "/v1/resize?export=d", r#"{"size": 2097152}"#);
    assert_eq!(
        (status, resized),
        (200, json!({"export": "d", "fixed": [], "old_size": 1 << 20, "size": 2 << 20}))
    );
    let (status, limits) = http(&socket, "DELETE", "/v1/throttle?export=a+b/c", "");
    assert_eq!((status, limits), (200, json!({"export": "a b/c", "groups": {}, "limits": {}})));
    assert_eq!(http(&socket, "GET", "/v1/stats", "").1.as_array().unwrap().len(), 2);
    assert_eq!(http(&socket, "GET", "/v1/stats?export=d", "").1.as_array().unwrap().len(), 1);
    let long = format!(r#"{{"iops-total": "{}"}}"#, "1".repeat(20_000));
    for (method, path, body, status, words) in [
        ("GET", "/", "", 404, "/v1/instance"),
        ("GET", "/v1/nothing", "", 404, "/v1/instance"),
        ("DELETE", "/v1/instance", "", 405, "GET reads"),
        ("GET", "/v1/throttle", "", 400, "say which"),
        ("GET", "/v1/throttle?export=x", "", 404, "no export `x` here; there is `a b/c`, `d`"),
        ("GET", "/v1/throttle?export=d&export=d", "", 400, "export"),
        ("PATCH", "/v1/throttle?export=d", "", 400, "body"),
        ("PATCH", "/v1/throttle?export=d&group=g", "{}", 404, "in no group `g`; its groups: none"),
        ("PATCH", "/v1/throttle?export=d", "[1]", 400, "body"),
        ("PATCH", "/v1/throttle?export=d", "{\"iops-total\": [1]}", 400, "iops-total: a number"),
        ("PATCH", "/v1/throttle?export=d", "{\"iops-total\": -1}", 400, "no whole number"),
        ("PATCH", "/v1/throttle?export=d", "{\"iops-total=1,bps-read\": 1}", 400, "no throttle key"),
        ("PATCH", "/v1/throttle?export=d", "{\"iops-total\": \"1,bps-read=1\"}", 400, "a number is needed"),
        ("PATCH", "/v1/throttle?export=d", &long, 413, "length limit"),
        ("POST", "/v1/resize?export=d", "{\"size\": -1}", 400, "body"),
        ("POST", "/v1/resize?export=d", "{\"size\": 5}", 400, "only grows"),
    ] {
        let (found, answer) = http(&socket, method, path, body);
        let line = answer["error"].as_str().unwrap();
        assert!(found == status && line.contains(words), "{method} {path} {body}: {found} {answer}");
        assert_eq!(line.lines().count(), 1, "{line}");
    }
    assert_eq!(http(&socket, "GET", "/v1/throttle?export=d", "").1["limits"], json!({}));
}
