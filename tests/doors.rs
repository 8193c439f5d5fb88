//! Several doors to one export: which of them may write, and that they share what is counted, limited and told.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use nbd_proto::{NbdError, ReplyStyle, TransmissionFlags};
use serde_json::Value;
use support::{CONTROL_FOLDER, Client, NO_FLAGS, Negotiation, PROGRAM, Server, Stream, text};
use tempfile::TempDir;

/// A server with two doors: a file, and a Unix socket for NBD.
struct Both {
    server: Server,
    _mount: Mount,
    folder: TempDir,
}

/// Takes away what a server left that was killed.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let mounts =
            String::from_utf8_lossy(&std::fs::read("/proc/self/mountinfo").unwrap_or_default()).into_owned();
        if mounts.contains(text(&self.0)) {
            let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
        }
    }
}

impl Both {
    /// `words` is all between `nbdbridge` and the socket; FILE stands for the file. None where there is no FUSE.
    fn start(test: &str, words: &[&str]) -> Option<Both> {
        if File::open("/dev/fuse").is_err() {
            eprintln!("SKIP: {test}: no /dev/fuse that can be opened");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        let mut command = Command::new(PROGRAM);
        command.args(words.iter().map(|word| if *word == "FILE" { text(&file) } else { word }));
        command.arg("-k").arg(folder.path().join("sock")).stdin(Stdio::null());
        command.env(CONTROL_FOLDER, folder.path().join("control")).env_remove("NBDBRIDGE_LOG");
        let server = Server::start(&mut command, 2);
        assert_eq!(server.lines.len(), 2, "it did not start");
        Some(Both { server, _mount: Mount(file), folder })
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("file")
    }

    fn client(&self) -> Client {
        let stream = Stream::unix(&self.folder.path().join("sock")).unwrap();
        Negotiation::begin(stream).enter(ReplyStyle::Structured, "disk")
    }

    fn write_file(&self, offset: u64, data: &[u8]) -> std::io::Result<()> {
        OpenOptions::new().write(true).open(self.file())?.write_all_at(data, offset)
    }

    fn read_file(&self, offset: u64) -> Vec<u8> {
        let mut data = vec![0; 4096];
        File::open(self.file()).unwrap().read_exact_at(&mut data, offset).unwrap();
        data
    }

    fn ask(&self, args: &[&str]) -> String {
        let mut command = Command::new(PROGRAM);
        command.args(args).env(CONTROL_FOLDER, self.folder.path().join("control"));
        let output = command.output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[test]
fn the_commands_own_door_writes_and_the_other_reads() {
    let test = "the_commands_own_door_writes_and_the_other_reads";
    let Some(both) = Both::start(test, &["fuse", "mem:1M", "FILE", "-x", "disk", "--also-net"]) else {
        return;
    };
    let mut client = both.client();
    assert!(client.flags.contains(TransmissionFlags::READ_ONLY));
    assert_eq!(client.call_write(NO_FLAGS, 0, &[1; 512]).error, Some(NbdError::Perm));
    both.write_file(4096, &[5; 4096]).unwrap();
    assert_eq!(client.read(4096, 4096), [5; 4096]);
    drop(client);
    both.server.stop();

    let Some(both) = Both::start(test, &["net", "mem:1M", "-x", "disk", "--also-fuse", "FILE"]) else {
        return;
    };
    let mut client = both.client();
    assert!(!client.flags.contains(TransmissionFlags::READ_ONLY));
    client.write(0, &[6; 4096]);
    assert_eq!(both.read_file(0), [6; 4096]);
    assert!(both.write_file(0, &[1; 512]).is_err());
    drop(client);
    both.server.stop();
}

#[test]
fn a_second_door_that_is_closed_takes_the_first_with_it_not() {
    let test = "a_second_door_that_is_closed_takes_the_first_with_it_not";
    let Some(both) = Both::start(test, &["net", "mem:1M", "-x", "disk", "--also-fuse", "FILE"]) else {
        return;
    };
    let mut client = both.client();
    assert!(Command::new("umount").arg(both.file()).status().unwrap().success());
    // A server that ended with it would be gone by then.
    std::thread::sleep(Duration::from_millis(300));
    client.write(0, &[7; 4096]);
    assert_eq!(client.read(0, 4096), [7; 4096]);
    drop(client);
    both.server.stop();
}

#[test]
fn with_multi_writer_both_write() {
    let words = ["net", "mem:1M", "-x", "disk", "--also-fuse", "FILE", "--multi-writer"];
    let Some(both) = Both::start("with_multi_writer_both_write", &words) else { return };
    let mut client = both.client();
    both.write_file(0, &[1; 4096]).unwrap();
    client.write(4096, &[2; 4096]);
    assert_eq!((client.read(0, 4096), both.read_file(4096)), (vec![1; 4096], vec![2; 4096]));
    drop(client);
    both.server.stop();
}

#[test]
fn doors_share_counters_limits_and_size() {
    let words = ["fuse", "mem:1M", "FILE", "-x", "disk", "--also-net"];
    let Some(both) = Both::start("doors_share_counters_limits_and_size", &words) else { return };
    let mut client = both.client();
    let file = both.file().to_str().unwrap().to_owned();
    let operations = || -> Value {
        let stats: Value = serde_json::from_str(&both.ask(&["stats", &file, "--json"])).unwrap();
        assert_eq!(stats.as_array().unwrap().len(), 1, "{stats}");
        stats[0]["operations"].clone()
    };
    // The door looks at its own file before it is ready.
    let before = operations();
    client.read(0, 4096);
    both.write_file(0, &[1; 4096]).unwrap();
    let after = operations();
    let grown = |name: &str| after[name]["count"].as_u64().unwrap() - before[name]["count"].as_u64().unwrap();
    assert_eq!((grown("read"), grown("write")), (1, 1), "{before} {after}");

    let table = both.ask(&["ps"]);
    assert_eq!(table.lines().count(), 2, "{table}");
    assert!(table.contains(&format!("{file} nbd+unix:///disk?socket=")) && table.contains(" rw "), "{table}");
    let all: Value = serde_json::from_str(&both.ask(&["ps", "--json"])).unwrap();
    let kinds: Vec<_> = all[0]["doors"].as_array().unwrap().iter().map(|door| &door["kind"]).collect();
    assert_eq!(kinds, ["fuse", "net"]);

    both.ask(&["throttle", &file, "iops-total=1000000"]);
    assert_eq!(both.ask(&["throttle", "disk"]), "iops-total=1000000\n");
    both.ask(&["resize", "disk", "3M"]);
    assert_eq!(both.client().size, 3 << 20);
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 3 << 20);
    both.write_file((3 << 20) - 4096, &[9; 4096]).unwrap();
    assert_eq!(client.read((3 << 20) - 4096, 4096), [9; 4096]);
    drop(client);
    both.server.stop();
}

#[test]
fn a_size_that_is_no_multiple_of_512_is_exact() {
    const TEST: &str = "a_size_that_is_no_multiple_of_512_is_exact";
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    let content: Vec<u8> = (0..5333_u32).map(|n| n.to_le_bytes()[0]).collect();
    std::fs::write(&image, &content).unwrap();
    let words = ["fuse", "-f", "raw", text(&image), "FILE", "--also-net", "-x", "disk", "--multi-writer"];
    let Some(both) = Both::start(TEST, &words) else { return };
    assert_eq!(both.file().metadata().unwrap().len(), 5333);
    let told = Command::new(PROGRAM).args(["info", "--json", &both.server.lines[1]]).output().unwrap();
    let told: Value = serde_json::from_slice(&told.stdout).unwrap();
    assert_eq!(told["exports"][0]["size"], 5333, "{told}");
    // The last byte, which is in no whole block, through one door and the other.
    OpenOptions::new().write(true).open(both.file()).unwrap().write_all_at(&[0xee], 5332).unwrap();
    let mut client = both.client();
    assert_eq!(client.read(5330, 3), [content[5330], content[5331], 0xee]);
    drop(client);
    both.server.stop();
    assert_eq!(std::fs::read(&image).unwrap().len(), 5333);
}
