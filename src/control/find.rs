//! Which processes serve here, and which of their exports a person means.
//!
//! EXPORT is, in this order: a name; `PID:NAME`, or `PID` where it has one export; where an export is found (a device,
//! a mounted file, a URI); its source. The first of these that fits decides.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use tokio::task::JoinSet;

use super::client::{self, CallError};
use super::folder::{self, Found};
use super::peer::Peer;
use super::wire::{ExportInfo, Instance};
use crate::os_text::OsText;

/// Sockets of other users in one folder that are asked at most.
const MOST_FOREIGN: usize = 64;

/// Names listed in an error.
const LISTED: usize = 8;

/// A process that answers.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) socket: PathBuf,
    /// The number of the user who runs it.
    pub(super) user: u32,
    pub(super) instance: Instance,
}

/// All that is here.
#[derive(Debug, Default)]
pub(super) struct Servers {
    /// In the order of their process numbers.
    pub(super) servers: Vec<Server>,
    /// Those of other users, for root to see: what they say of themselves, with the kernel's word for the process. Nothing
    /// is ever looked for among them.
    pub(super) foreign: Vec<Server>,
    /// A line for each that does not answer, or is not asked.
    pub(super) silent: Vec<String>,
}

/// One export of one process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target<'a> {
    pub(super) server: &'a Server,
    pub(super) export: &'a ExportInfo,
}

/// Where root's servers are, and beside it those that a service manager runs.
const RUN: &str = "/run";

/// The folders in which this user may find servers.
fn folders() -> Vec<PathBuf> {
    let own = folder::path();
    let more = if own.parent() == Some(Path::new(RUN)) { of_services(Path::new(RUN)) } else { Vec::new() };
    std::iter::once(own).chain(more).collect()
}

/// `nbdbridge-NAME`, which a service manager makes for each service; nobody but root makes any in /run.
fn of_services(run: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(run).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    let is_one = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"nbdbridge-")) && path.is_dir()
    };
    let mut folders: Vec<_> = entries.filter(is_one).collect();
    folders.sort();
    folders
}

/// Asks all that are here. Sockets of processes that are gone are removed.
///
/// # Errors
/// One line for a folder that cannot be looked into.
pub(super) async fn servers() -> Result<Servers> {
    let mut asked = JoinSet::new();
    let mut found = Servers::default();
    for folder in folders() {
        let sockets = folder::sockets(&folder)?;
        let foreign = sockets.iter().filter(|socket| !socket.trusted).count();
        if foreign > MOST_FOREIGN {
            let more = foreign - MOST_FOREIGN;
            found.silent.push(format!("{}: {more} more sockets of another user", folder.display()));
        }
        let (own, others): (Vec<_>, Vec<_>) = sockets.into_iter().partition(|socket| socket.trusted);
        for socket in own.into_iter().chain(others.into_iter().take(MOST_FOREIGN)) {
            asked.spawn(ask(socket));
        }
    }
    for answer in asked.join_all().await {
        match answer {
            Answer::Own(server) => found.servers.push(server),
            Answer::Foreign(server) => found.foreign.push(server),
            Answer::Silent(line) => found.silent.push(line),
            Answer::Gone => {}
        }
    }
    found.servers.sort_by_key(|server| server.instance.pid);
    found.foreign.sort_by_key(|server| server.instance.pid);
    found.silent.sort();
    Ok(found)
}

/// What came of asking at a socket.
enum Answer {
    Own(Server),
    Foreign(Server),
    Silent(String),
    Gone,
}

async fn ask(Found { pid, path: socket, trusted }: Found) -> Answer {
    let shown = socket.display();
    if trusted {
        match client::get::<Instance>(&socket, "/v1/instance").await {
            Ok(instance) => {
                let user = std::fs::symlink_metadata(&socket).map_or(0, |found| found.uid());
                return Answer::Own(Server { socket, user, instance });
            }
            Err(CallError::Gone) => return Answer::Gone,
            Err(CallError::Refused(why) | CallError::Silent(why)) => {
                return Answer::Silent(format!("process {pid} does not answer at {shown}: {why}"));
            }
            // Shown below, where that may be.
            Err(CallError::Foreign(_)) => {}
        }
    }
    if !rustix::process::geteuid().is_root() {
        return Answer::Silent(format!("{shown}: another user listens there, and is not asked"));
    }
    match client::get_foreign::<Instance>(&socket, "/v1/instance").await {
        Ok((Peer { uid, pid: by_kernel }, instance)) => {
            let instance = Instance { pid: by_kernel.unwrap_or(pid), ..instance };
            Answer::Foreign(Server { socket, user: uid, instance })
        }
        Err(CallError::Refused(why) | CallError::Silent(why)) => {
            Answer::Silent(format!("another user's server does not answer at {shown}: {why}"))
        }
        Err(CallError::Gone | CallError::Foreign(_)) => Answer::Gone,
    }
}

/// Every export of every one of these processes.
pub(super) fn targets(servers: &[Server]) -> impl Iterator<Item = Target<'_>> + Clone {
    servers
        .iter()
        .flat_map(|server| server.instance.exports.iter().map(move |export| Target { server, export }))
}

impl Servers {
    /// Every export of every process.
    pub(super) fn targets(&self) -> impl Iterator<Item = Target<'_>> + Clone {
        targets(&self.servers)
    }

    /// Those that `text` means: all exports of a process where it is the number of one, else as [`Servers::find`].
    ///
    /// # Errors
    /// As [`Servers::find`].
    pub(super) fn find_all(&self, text: &OsStr) -> Result<Vec<Target<'_>>> {
        let is_name = self.targets().any(|target| *target.export.name == *text);
        let all = if is_name { Vec::new() } else { self.of_process(text) };
        if all.is_empty() { Ok(vec![self.find(text)?]) } else { Ok(all) }
    }

    /// The exports of the process with this number; none where it is no such number.
    fn of_process(&self, text: &OsStr) -> Vec<Target<'_>> {
        let pid = text.to_str().and_then(|text| text.parse::<u32>().ok());
        self.targets().filter(|target| pid == Some(target.server.instance.pid)).collect()
    }

    /// The one that `text` means.
    ///
    /// # Errors
    /// One line that says what there is, where it means none or several.
    pub(super) fn find(&self, text: &OsStr) -> Result<Target<'_>> {
        let path = std::path::absolute(text).ok().map(PathBuf::into_os_string);
        // Compared as bytes: what differs in a slash is another name, and what is not UTF-8 is a name too.
        let is_path =
            |other: &OsText| other.as_os_str() == text || path.as_deref() == Some(other.as_os_str());
        let found_at = |target: &Target<'_>| {
            let mut places = target.server.instance.doors.iter().flat_map(|door| &door.places);
            places.any(|place| place.export == target.export.name && is_path(&place.at))
        };
        let ways: [&dyn Fn(&Target<'_>) -> bool; 4] = [
            &|target| *target.export.name == *text,
            &|target| target.is_numbered(text),
            &found_at,
            &|target| is_path(&target.export.source),
        ];
        let shown = text.display();
        for way in ways {
            let found: Vec<_> = self.targets().filter(way).collect();
            match &found[..] {
                [] => {}
                [one] => return Ok(*one),
                many => bail!("`{shown}` is served {} times; say which: {}", many.len(), list(many)),
            }
        }
        let several = self.of_process(text);
        if !several.is_empty() {
            bail!("process {shown} has {} exports; say which: {}", several.len(), list(&several));
        }
        let claims = |target: &Target<'_>| {
            *target.export.name == *text
                || target.is_numbered(text)
                || *target.server.instance.pid.to_string() == *text
        };
        if let Some(other) = targets(&self.foreign).find(claims) {
            let Server { user, instance, .. } = other.server;
            bail!(
                "`{shown}`: process {} of user {user} says that it serves that; run this as that user",
                instance.pid
            );
        }
        let all: Vec<_> = self.targets().collect();
        match (&all[..], &self.silent[..]) {
            ([], []) => bail!("no export `{shown}`: {}", nobody()),
            (all, [first, ..]) => bail!("no export `{shown}` among {}; {first}", list(all)),
            (all, []) => bail!("no export `{shown}`; there is {}", list(all)),
        }
    }
}

/// Says that no server is here.
pub(super) fn nobody() -> String {
    let folder = folder::path();
    format!("no nbdbridge is running that this user can see (sockets are in {})", folder.display())
}

impl Target<'_> {
    /// The name that means this export and no other.
    pub(super) fn id(&self) -> String {
        let Instance { pid, exports, .. } = &self.server.instance;
        match (&self.export.name, exports.len()) {
            (name, 1) if name.is_empty() => pid.to_string(),
            (name, _) => format!("{pid}:{name}"),
        }
    }

    fn is_numbered(&self, text: &OsStr) -> bool {
        let Some(text) = text.to_str() else { return false };
        let (pid, name) = text.split_once(':').unwrap_or((text, ""));
        let Instance { pid: own, exports, .. } = &self.server.instance;
        pid.parse() == Ok(*own) && (name == self.export.name || name.is_empty() && (exports.len() == 1))
    }
}

/// A few of them by name.
fn list(targets: &[Target<'_>]) -> String {
    let mut names: Vec<String> = targets
        .iter()
        .take(LISTED)
        .map(|target| format!("{} ({})", target.id(), target.export.source))
        .collect();
    if targets.len() > LISTED {
        names.push(format!("and {} more", targets.len() - LISTED));
    }
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::wire::{DoorInfo, Place};

    fn server(pid: u32, exports: &[(&str, &str, &str)]) -> Server {
        let places = exports.iter().map(|(name, _, at)| Place { export: (*name).into(), at: (*at).into() });
        let door = DoorInfo { kind: "ublk".into(), places: places.collect(), report: Default::default() };
        let exports = exports.iter().map(|(name, source, _)| ExportInfo {
            name: (*name).into(),
            description: None,
            source: (*source).into(),
            size: 1,
            read_only: false,
            loss_after_crash: None,
            limits: Default::default(),
            groups: Default::default(),
        });
        let instance =
            Instance { pid, version: "1".into(), started: 0, exports: exports.collect(), doors: vec![door] };
        Server { socket: PathBuf::new(), user: 0, instance }
    }

    #[test]
    fn every_way_to_say_which() {
        let cwd = std::env::current_dir().unwrap();
        let here = cwd.join("x.img").to_str().unwrap().to_owned();
        let servers = Servers {
            servers: vec![
                server(10, &[("a", "/srv/a.img", "/dev/ublkb0"), ("b", "mem:1", "nbd://h/b")]),
                server(11, &[("a", "/srv/c.img", "/dev/ublkb1")]),
                server(12, &[("", &here, "nbd+unix:///?socket=/s")]),
                server(13, &[("10", "/srv/c.img", "/mnt/file"), ("", "null:1", "")]),
                server(14, &[("a", "mem:5", ""), ("c", "mem:6", "")]),
            ],
            ..Servers::default()
        };
        for (text, id) in [
            ("b", "10:b"),
            ("10:a", "10:a"),
            ("11", "11:a"),
            ("11:", "11:a"),
            ("12", "12"),
            ("13:", "13:"),
            ("10", "13:10"),
            ("/dev/ublkb1", "11:a"),
            ("nbd://h/b", "10:b"),
            ("/mnt/../mnt/file", "none"),
            ("/srv/a.img", "10:a"),
            ("x.img", "12"),
            (&here, "12"),
            ("mem:1", "10:b"),
            ("a", "10:a (/srv/a.img), 11:a (/srv/c.img), 14:a (mem:5)"),
            ("", "12 ("),
            ("/srv/c.img", "11:a (/srv/c.img), 13:10 (/srv/c.img)"),
            ("13", "13:"),
            ("10:c", "there is 10:a"),
            ("14", "process 14 has 2 exports; say which: 14:a (mem:5), 14:c (mem:6)"),
        ] {
            match servers.find(OsStr::new(text)) {
                Ok(target) => assert_eq!(target.id(), id, "{text}"),
                Err(error) => {
                    let line = error.to_string();
                    assert!(
                        line.contains(id) || id == "none" && line.contains("no export"),
                        "{text}: {line}"
                    );
                }
            }
        }
        for (text, ids) in
            [("14", &["14:a", "14:c"][..]), ("13", &["13:10", "13:"]), ("11", &["11:a"]), ("10", &["13:10"])]
        {
            let found: Vec<_> = servers.find_all(OsStr::new(text)).unwrap().iter().map(Target::id).collect();
            assert_eq!(found, ids, "{text}");
        }
        assert!(servers.find_all(OsStr::new("a")).is_err());
    }

    #[test]
    fn services_have_folders_of_their_own() {
        let run = tempfile::tempdir().unwrap();
        for name in ["nbdbridge-b", "nbdbridge-a", "nbdbridge", "other"] {
            std::fs::create_dir(run.path().join(name)).unwrap();
        }
        std::fs::write(run.path().join("nbdbridge-c"), "").unwrap();
        assert_eq!(of_services(run.path()), ["nbdbridge-a", "nbdbridge-b"].map(|name| run.path().join(name)));
        assert!(of_services(&run.path().join("none")).is_empty());
    }

    #[test]
    fn what_is_said_where_there_is_nothing() {
        let line = Servers::default().find(OsStr::new("x")).unwrap_err().to_string();
        assert!(line.contains("no nbdbridge is running"), "{line}");
        let silent = Servers { silent: vec!["process 7 does not answer".into()], ..Servers::default() };
        let line = silent.find(OsStr::new("x")).unwrap_err().to_string();
        assert!(line.contains("process 7") && line.contains("none"), "{line}");
        let exports: Vec<(String, &str, &str)> = (0..20).map(|n| (format!("e{n}"), "s", "")).collect();
        let exports: Vec<_> = exports.iter().map(|(name, s, at)| (name.as_str(), *s, *at)).collect();
        let many = Servers { servers: vec![server(1, &exports)], ..Servers::default() };
        let line = many.find(OsStr::new("x")).unwrap_err().to_string();
        assert!(line.contains("and 12 more"), "{line}");
    }
}
