//! Journals that cannot be had, or that are lost while the image is served: writes go on, and everybody can see that a
//! crash would lose some.

use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, statvfs};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;

use super::journal::World;
use super::*;
use crate::support::CONTROL_FOLDER;
use crate::support::mount::{Mount, fuse, missing};

/// Records that a journal has room for, and some more.
const RECORDS: usize = (64 << 10) + 1000;

/// The journals' folder as a small file system; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    /// None where nothing can be mounted here.
    fn new(folder: PathBuf) -> Option<Small> {
        fs::create_dir(&folder).unwrap();
        mount("none", &folder, "tmpfs", MountFlags::empty(), Some(c"size=4m,mode=0700")).ok()?;
        Some(Small(folder))
    }

    /// Takes the space of the journal's headers away, and all other space.
    fn spoil(&self) {
        let names = fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().path());
        let journal = names.into_iter().find(|path| text(path).ends_with(".journal")).unwrap();
        let file = rustix::fs::open(&journal, OFlags::RDWR, Mode::empty()).unwrap();
        fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, 8192).unwrap();
        let room = statvfs(&self.0).unwrap();
        fs::write(self.0.join("ballast"), vec![1; usize::try_from(room.f_bavail * room.f_frsize).unwrap()])
            .unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// What a command says on stdout, with the control sockets of these servers.
fn ask(control: &Path, args: &[&str]) -> String {
    let mut command = Command::new(support::PROGRAM);
    let output = command.args(args).env(CONTROL_FOLDER, control).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What `ps --json` tells of the only export.
fn loss(control: &Path) -> serde_json::Value {
    let all: serde_json::Value = serde_json::from_str(&ask(control, &["ps", "--json"])).unwrap();
    all[0]["exports"][0]["loss_after_crash"].clone()
}

#[test]
fn a_full_journal_that_cannot_be_begun_anew_is_given_up() {
    const TEST: &str = "a_full_journal_that_cannot_be_begun_anew_is_given_up";
    if !has_qemu_img(TEST) {
        return;
    }
    let mut world = World::with_size(0x5eed_a650, "cluster_size=512", RECORDS * 512);
    let Some(small) = Small::new(world.control()) else {
        eprintln!("SKIP: {TEST}: cannot mount a tmpfs here");
        return;
    };
    let server = world.serve(&[]);
    let mut client = server.client(ReplyStyle::Structured);
    client.write(0, &[1; 512]);
    world.model[..512].fill(1);
    assert_eq!(loss(&world.control()), serde_json::Value::Null);
    small.spoil();
    // A cluster and a record each.
    let mut asked = 0;
    for (n, part) in world.model.chunks_mut(512).enumerate().skip(1) {
        part.fill(u8::try_from(n % 255).unwrap() + 1);
        client.ask_write(NO_FLAGS, n as u64 * 512, part);
        asked += 1;
        if asked == 64 {
            (0..std::mem::take(&mut asked)).for_each(|_| assert_eq!(client.answer().error, None));
        }
    }
    (0..asked).for_each(|_| assert_eq!(client.answer().error, None));
    client.flush();
    world.compare(&mut client, "after the journal was given up");
    assert_eq!(server.log().matches("the journal cannot be written and is given up").count(), 1);
    assert!(loss(&world.control()).as_str().unwrap().contains("its journal cannot be written"));
    // What was flushed survives, and the next open says that something else may be missing.
    client.write(0, &[2; 512]);
    client.flush();
    world.model[..512].fill(2);
    journal::kill(server);
    drop(small);
    let server = world.serve(&[]);
    assert!(server.log().contains("was not closed in good order"), "{}", server.log());
    world.compare(&mut server.client(ReplyStyle::Structured), "after a kill");
    server.stop();
    check(&world.image);
    assert!(fs::read(&world.image).unwrap()[88..96] == [0; 8], "a clean end leaves no mark");
}

#[test]
fn a_journal_that_was_given_up_leaves_a_clean_image_at_the_end() {
    const TEST: &str = "a_journal_that_was_given_up_leaves_a_clean_image_at_the_end";
    if !has_qemu_img(TEST) {
        return;
    }
    let mut world = World::with_size(0x5eed_a651, "cluster_size=64k", 12 << 20);
    let Some(small) = Small::new(world.control()) else {
        eprintln!("SKIP: {TEST}: cannot mount a tmpfs here");
        return;
    };
    let mut server = world.serve(&[]);
    let mut client = server.client(ReplyStyle::Structured);
    world.change(&mut client, 20);
    small.spoil();
    client.flush();
    world.change(&mut client, 40);
    world.compare(&mut client, "without a journal");
    drop(client);
    server.signal(Signal::TERM);
    assert_eq!(server.wait(support::LIMIT).unwrap().code(), Some(0), "{}", server.log());
    assert_eq!(world.journals(), 0);
    drop(small);
    check(&world.image);
    assert!(fs::read(&world.image).unwrap()[88..96] == [0; 8], "a clean end leaves no mark");
    let server = world.serve(&[]);
    world.compare(&mut server.client(ReplyStyle::Structured), "opened again");
    server.stop();
}

/// `ps` says which exports lose answered writes in a crash, and why.
#[test]
fn ps_tells_what_a_crash_would_lose() {
    if !has_qemu_img("ps_tells_what_a_crash_would_lose") {
        return;
    }
    for (options, flags, reason) in [
        ("cluster_size=64k", &[][..], None),
        ("compat=0.10", &[], Some("an image of version 2 has no journal; `qemu-img amend")),
        ("compat=0.10", &["-r"], None),
        ("cluster_size=64k", &["-s"], Some("a temporary overlay")),
    ] {
        let world = World::new(0x5eed_a652, options, false);
        let server = world.serve(flags);
        let told = loss(&world.control());
        let table = ask(&world.control(), &["ps"]);
        match reason {
            None => {
                assert_eq!(told, serde_json::Value::Null);
                assert_eq!(table.lines().count(), 2, "{table}");
            }
            Some(reason) => {
                assert!(told.as_str().unwrap().contains(reason), "{told}");
                let line = table.lines().nth(2).unwrap();
                assert!(line.starts_with(&format!("{}:", server.id())), "{table}");
                assert!(line.contains("do not survive a crash") && line.contains(reason), "{table}");
            }
        }
        server.stop();
    }
}

#[test]
fn devices_tell_what_a_crash_would_lose() {
    const TEST: &str = "devices_tell_what_a_crash_would_lose";
    if missing(TEST, &["qemu-img"]) {
        return;
    }
    for (options, loses) in [("compat=1.1", false), ("compat=0.10", true)] {
        let world = World::new(0x5eed_a653, options, false);
        let folder = tempfile::tempdir().unwrap();
        let mut command = fuse(folder.path());
        command.args([text(&world.image), "file"]).env(CONTROL_FOLDER, world.control());
        let mut mount = Mount::start(folder, &mut command, 1);
        let rows: serde_json::Value =
            serde_json::from_str(&ask(&world.control(), &["devices", "--json"])).unwrap();
        let is_ours = |row: &&serde_json::Value| row["path"].as_str() == mount.path.to_str();
        let row = rows.as_array().unwrap().iter().find(is_ours).unwrap();
        assert_eq!(row["loss_after_crash"].is_string(), loses, "{row}");
        let table = ask(&world.control(), &["devices"]);
        let line = format!("{}: writes that are answered and not flushed", text(&mount.path));
        assert_eq!(table.contains(&line), loses, "{table}");
        mount.stop();
    }
}
