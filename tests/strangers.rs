//! Control sockets of other users: listed, never believed.

// Clippy's exception for tests does not reach their helpers.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use support::{CONTROL_FOLDER, PROGRAM, Server, one_line, text};

/// Users that own nothing here.
const STRANGER: u32 = 54_321;
const USER: u32 = 54_322;

/// Folders that users can reach; None where the test cannot become them.
fn world(test: &str) -> Option<tempfile::TempDir> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: {test}: only root can run servers of other users");
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o755)).unwrap();
    Some(folder)
}

fn folder_of(world: &Path, name: &str, user: u32) -> PathBuf {
    let folder = world.join(name);
    fs::create_dir(&folder).unwrap();
    chown(&folder, Some(user), Some(user)).unwrap();
    fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).unwrap();
    folder
}

/// A command as a user, whose control folder is `folder`.
fn command(user: u32, folder: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(words).env(CONTROL_FOLDER, folder).uid(user).gid(user).current_dir("/");
    command.stdin(Stdio::null());
    command
}

fn ask(user: u32, folder: &Path, words: &[&str]) -> Output {
    command(user, folder, words).output().unwrap()
}

fn serve(user: u32, folder: &Path, name: &str) -> Server {
    let socket = folder.join(format!("nbd-{name}"));
    Server::start(&mut command(user, folder, &["net", "mem:1M", "-k", text(&socket), "-x", name]), 1)
}

#[test]
fn root_sees_servers_of_others_and_does_nothing_with_them() {
    let Some(world) = world("root_sees_servers_of_others_and_does_nothing_with_them") else { return };
    let folder = folder_of(world.path(), "control", STRANGER);
    let server = serve(STRANGER, &folder, "theirs");
    let listed = ask(0, &folder, &["ps"]);
    let said = String::from_utf8(listed.stdout).unwrap();
    let row = said.lines().find(|line| line.contains("theirs")).unwrap_or_else(|| panic!("{said}"));
    let cells: Vec<_> = row.split_whitespace().collect();
    assert_eq!(cells[..3], [&server.id().to_string(), &STRANGER.to_string(), "theirs"]);
    let json = ask(0, &folder, &["ps", "--json"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(
        (json[0]["user"].as_u64(), json[0]["pid"].as_u64()),
        (Some(STRANGER.into()), Some(server.id().into()))
    );
    let pid = server.id().to_string();
    for words in [
        &["throttle", "theirs", "iops-total=1"][..],
        &["throttle", &pid, "iops-total=1"],
        &["resize", "theirs", "2M"],
        &["stats", "theirs"],
    ] {
        let refused = ask(0, &folder, words);
        assert_eq!(refused.status.code(), Some(1), "{words:?}: {refused:?}");
        assert!(one_line(&refused).contains(&format!("of user {STRANGER} says")), "{refused:?}");
    }
    // Its own user is believed.
    assert!(ask(STRANGER, &folder, &["throttle", "theirs", "iops-total=7"]).status.success());
    server.stop();
}

#[test]
fn a_folder_of_another_user_is_not_used() {
    let Some(world) = world("a_folder_of_another_user_is_not_used") else { return };
    let folder = folder_of(world.path(), "control", STRANGER);
    let server = serve(STRANGER, &folder, "theirs");
    // The server closed it; its owner opens it, and lets everybody connect.
    fs::set_permissions(&folder, PermissionsExt::from_mode(0o777)).unwrap();
    let socket = folder.join(format!("{}.sock", server.id()));
    fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
    for words in [&["ps"][..], &["stats"], &["throttle", "theirs"]] {
        let refused = ask(USER, &folder, words);
        assert_eq!((refused.status.code(), refused.stdout.len()), (Some(1), 0), "{refused:?}");
        assert!(one_line(&refused).contains(&format!("belongs to user {STRANGER}")), "{refused:?}");
    }
    server.stop();
}

#[test]
fn a_socket_of_another_user_in_ones_own_folder_is_not_asked() {
    let Some(world) = world("a_socket_of_another_user_in_ones_own_folder_is_not_asked") else { return };
    let (theirs, own) = (folder_of(world.path(), "theirs", STRANGER), folder_of(world.path(), "own", USER));
    let server = serve(STRANGER, &theirs, "theirs");
    let mine = serve(USER, &own, "mine");
    let socket = own.join(format!("{}.sock", server.id()));
    fs::rename(theirs.join(format!("{}.sock", server.id())), &socket).unwrap();
    fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
    for owner in [STRANGER, USER] {
        // Whoever owns the file: it is the process that counts.
        chown(&socket, Some(owner), Some(owner)).unwrap();
        let listed = ask(USER, &own, &["ps"]);
        let said = String::from_utf8(listed.stdout.clone()).unwrap();
        assert!(said.contains("mine") && !said.contains("theirs"), "{listed:?}");
        assert!(one_line(&listed).contains("another user listens there, and is not asked"), "{listed:?}");
        let refused = ask(USER, &own, &["stats", "theirs"]);
        assert_eq!(refused.status.code(), Some(1), "{refused:?}");
    }
    mine.stop();
    drop(server);
}

/// A note of an attachment that a living process, `pid`, is said to serve at `file`.
fn note(pid: u32, file: &Path) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let started: u64 = fields.split_ascii_whitespace().nth(19).unwrap().parse().unwrap();
    serde_json::json!({
        "pid": pid, "started": started, "source": "/none", "file": text(file), "made": null,
        "device": null, "size": 512, "read_only": false,
    })
    .to_string()
}

/// A process that nobody should end before its test does.
struct Sleeper(std::process::Child);

impl Sleeper {
    fn is_alive(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What others have written down of attachments is said, and nothing is done for it: neither a signal is sent nor a file
/// removed, and no command waits.
#[test]
fn notes_of_others_are_not_believed() {
    let Some(world) = world("notes_of_others_are_not_believed") else { return };
    let file = world.path().join("file");
    let mut sleeper = Sleeper(Command::new("sleep").arg("600").spawn().unwrap());
    let written = note(sleeper.0.id(), &file);
    // A user, with a folder of his own that another one has made, and with his own and another's note in it.
    for (owner_of_folder, owner_of_note) in [(USER, USER), (STRANGER, USER), (USER, STRANGER)] {
        let run = folder_of(world.path(), &format!("run-{owner_of_folder}-{owner_of_note}"), USER);
        let folder = run.join("nbdbridge");
        fs::create_dir(&folder).unwrap();
        let path = folder.join("fuse-1-0.json");
        fs::write(&path, &written).unwrap();
        chown(&path, Some(owner_of_note), None).unwrap();
        std::os::unix::fs::symlink(&path, folder.join("fuse-2-0.json")).unwrap();
        let fifo = folder.join("fuse-3-0.json");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o666.into(), 0).unwrap();
        chown(&fifo, Some(USER), None).unwrap();
        chown(&folder, Some(owner_of_folder), None).unwrap();
        let ask = |words: &[&str]| {
            let mut command = Command::new("timeout");
            command.args(["-s", "KILL", "30", PROGRAM]).args(words).env("XDG_RUNTIME_DIR", &run);
            command.uid(USER).gid(USER).current_dir("/").stdin(Stdio::null()).output().unwrap()
        };
        let listed = ask(&["devices"]);
        assert_eq!(listed.status.code(), Some(0), "{listed:?}");
        let (rows, said) =
            (String::from_utf8_lossy(&listed.stdout), String::from_utf8_lossy(&listed.stderr).into_owned());
        let is_believed = owner_of_folder == USER && owner_of_note == USER;
        // Once, and not by the link.
        assert_eq!(rows.matches(text(&file)).count(), usize::from(is_believed), "{listed:?}");
        if !is_believed {
            assert!(said.contains("belongs to user 54321, and is not believed"), "{said}");
            let refused = ask(&["detach", "--force", text(&file)]);
            assert_eq!(refused.status.code(), Some(1), "{refused:?}");
        }
        assert!(sleeper.is_alive(), "a stranger's note ended a process");
        assert!(path.exists());
    }
    // Root's, too.
    let path = Path::new("/run/nbdbridge").join(format!("fuse-{}-strange.json", std::process::id()));
    fs::create_dir_all("/run/nbdbridge").unwrap();
    fs::write(&path, &written).unwrap();
    chown(&path, Some(STRANGER), None).unwrap();
    let refused = Command::new(PROGRAM).args(["detach", "--force", text(&file)]).output().unwrap();
    fs::remove_file(&path).unwrap();
    assert!(sleeper.is_alive(), "a stranger's note ended a process");
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
}
