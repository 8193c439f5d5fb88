//! `nbdbridge volume`: does what the command line wants, and shows a person, or a program, what came of it.

mod storage;

use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::anyhow;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::json;

use super::{Created, Error, Health, Name, Pool, Progress, Result, Settings, Share, Status, Verdict, Volume};
use crate::cli::{PoolWish, UsageError, VolumeAction, VolumeWish};
use crate::control::command::{json_text, loss_text, table};
use crate::os_text::OsText;
use crate::output;
use crate::size;

/// Does it.
///
/// # Errors
/// One line.
pub(crate) fn run(action: &VolumeAction) -> anyhow::Result<()> {
    match &action.wish {
        VolumeWish::Create { .. } => Pool::make(&action.pool, false).map_err(explain)?,
        VolumeWish::Pool(PoolWish { make: true, .. }) => Pool::make(&action.pool, true).map_err(explain)?,
        _ => {}
    }
    let mut pool = Pool::open(&action.pool).map_err(explain)?;
    if let Some(folder) = &action.mount_root {
        pool.set_mount_root(folder).map_err(explain)?;
    }
    let text = act(&mut pool, action).map_err(explain)?;
    if action.json { output::json(&text) } else { output::text(&text) }
}

fn act(pool: &mut Pool, action: &VolumeAction) -> Result<String> {
    let (json, bar) = (action.json, Bar::new());
    match &action.wish {
        VolumeWish::Create { name, options } => {
            let created = pool.create(name, options, &bar)?;
            let status = pool.status(name)?;
            let word = if created == Created::New { "made" } else { "is there, with equal options" };
            say(json, &status, || format!("{name}: {word}: {} of {}\n", size::human(status.size), status.fs))
        }
        VolumeWish::List => list(pool, json),
        VolumeWish::Inspect { names } => {
            let all = names.iter().map(|name| pool.status(name)).collect::<Result<Vec<_>>>()?;
            say(json, &all, || all.iter().map(describe).collect::<Vec<_>>().join("\n"))
        }
        VolumeWish::Remove { names, force } => {
            // One that stays keeps none of the others.
            let (mut removed, mut failed) = (Vec::new(), None);
            for name in names {
                match pool.remove(name, *force) {
                    Ok(()) => removed.push(name),
                    Err(error) => {
                        if let Some(before) = failed.replace(error) {
                            crate::cli::report(&explain(before));
                        }
                    }
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
            say(json, &json!({ "removed": removed }), String::new)
        }
        VolumeWish::Mount { name } => mount(pool, name, &bar, json),
        VolumeWish::Unmount { name } => unmount(pool, name, json),
        VolumeWish::Limit { name, change } => {
            let limits = match change.as_deref() {
                Some("") => pool.status(name)?.limits,
                change => pool.limit(name, change)?.settings().into_iter().collect(),
            };
            say(json, &json!({ "name": name, "limits": limits }), || limits_text(&limits))
        }
        VolumeWish::Set { name, options } => {
            pool.set(name, options)?;
            let mount = &options.mount;
            say(json, &json!({ "name": name, "mount-options": mount }), || {
                format!("{name}: mount-options={mount}\n")
            })
        }
        VolumeWish::Check { name, repair } => {
            let verdict = pool.fsck(name, *repair, &bar)?;
            let word = if verdict == Verdict::Clean { "clean" } else { "repaired" };
            say(json, &json!({ "name": name, "verdict": word }), || format!("{name}: {word}\n"))
        }
        VolumeWish::Resize { name, size } => storage::resize(pool, name, *size, &bar, json),
        VolumeWish::Snapshots { name } => storage::snapshots(pool, name, json),
        VolumeWish::Snapshot { name, snapshot, freeze_limit } => {
            let taken = pool.snapshot(name, snapshot, *freeze_limit, &bar)?;
            storage::taken(name, &taken, json)
        }
        VolumeWish::RemoveSnapshot { name, snapshot } => {
            pool.remove_snapshot(name, snapshot)?;
            say(json, &json!({ "removed": format!("{name}@{snapshot}") }), String::new)
        }
        VolumeWish::Pool(wish) => settings(pool, wish, json),
    }
}

/// Mounts a volume and prints where it is. Where that cannot be printed, the volume is as it was before.
fn mount(pool: &Pool, name: &Name, bar: &Bar, json: bool) -> Result<String> {
    let was_held = pool.state(name)?.holders.contains_key(Volume::BY_HAND);
    let path = pool.mount(name, Volume::BY_HAND, bar)?;
    let printed = if json {
        let text = json_text(&json!({ "name": name, "path": OsText::from(&path) }))?;
        output::result(output::escape_json(&text))
    } else {
        output::places(&[path.into()])
    };
    if let Err(error) = printed {
        if !was_held {
            pool.unmount(name, Volume::BY_HAND)?;
        }
        return Err(error.into());
    }
    Ok(String::new())
}

fn unmount(pool: &Pool, name: &Name, json: bool) -> Result<String> {
    pool.unmount(name, Volume::BY_HAND)?;
    let state = pool.state(name)?;
    if !state.holders.is_empty() {
        return Err(Error::InUse(format!("volume `{name}` stays: {}", super::remove::describe(&state))));
    }
    say(json, &json!({ "name": name, "unmounted": true }), String::new)
}

/// A row for each volume, the broken ones too.
fn list(pool: &Pool, json: bool) -> Result<String> {
    #[derive(Serialize)]
    #[serde(untagged)]
    enum Entry {
        Well(Box<Status>),
        Broken { name: Name, health: Health },
    }
    let mut entries = Vec::new();
    for name in pool.names()? {
        entries.push(match pool.status(&name) {
            Ok(status) => Entry::Well(Box::new(status)),
            Err(Error::NotFound { .. }) => continue,
            Err(error) => Entry::Broken { name, health: Health::Bad(error.to_string()) },
        });
    }
    say(json, &entries, || {
        let head = ["NAME", "SIZE", "ALLOCATED", "FS", "DOOR", "HELD BY", "HEALTH", "MOUNTED AT"];
        let mut rows = vec![head.map(str::to_owned).to_vec()];
        for entry in &entries {
            let row = match entry {
                Entry::Well(status) => row(status),
                Entry::Broken { name, health } => {
                    let dash = || "-".to_owned();
                    vec![
                        name.to_string(),
                        dash(),
                        dash(),
                        dash(),
                        dash(),
                        dash(),
                        health_text(health),
                        dash(),
                    ]
                }
            };
            rows.push(row);
        }
        table(&rows)
    })
}

fn row(status: &Status) -> Vec<String> {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let holders = status.holders.len();
    vec![
        status.name.to_string(),
        size::human(status.size),
        size::human(status.allocated),
        status.fs.to_string(),
        or_dash(status.door.map(str::to_owned)),
        or_dash((holders > 0).then(|| holders.to_string())),
        health_and_loss(status),
        or_dash(status.mounted.as_ref().map(|path| path.display().to_string())),
    ]
}

/// The health of a volume, and that a crash would lose writes.
fn health_and_loss(status: &Status) -> String {
    let health = health_text(&status.health);
    status
        .loss_after_crash
        .as_ref()
        .map_or(health.clone(), |reason| format!("{health}; {}", loss_text(reason)))
}

fn health_text(health: &Health) -> String {
    match health {
        Health::Ok => "ok".to_owned(),
        Health::Bad(line) => line.clone(),
    }
}

/// All that is known, a line each.
fn describe(status: &Status) -> String {
    let mut rows = Vec::new();
    let mut put = |key: &str, value: Option<String>| {
        if let Some(value) = value {
            rows.push(vec![format!("{key}:"), value]);
        }
    };
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|path| path.display().to_string());
    put("name", Some(status.name.to_string()));
    put("health", Some(health_text(&status.health)));
    put("size", Some(format!("{} ({} bytes)", size::human(status.size), status.size)));
    put("allocated", status.format.map(|_| size::human(status.allocated)));
    put("file system", Some(status.fs.to_string()));
    put("format", status.format.map(|format| format.to_string()));
    put(
        "usage",
        status.usage.map(|usage| {
            let [used, total, free] = [usage.used, usage.total, usage.available].map(size::human);
            format!("{used} of {total}, {free} available")
        }),
    );
    put("door", status.door.map(str::to_owned));
    put("guarantee", status.guarantee.map(str::to_owned));
    put("after a crash", status.loss_after_crash.as_deref().map(loss_text));
    put("device", path(&status.device));
    put("mounted at", path(&status.mounted));
    for (holder, count) in &status.holders {
        put("held by", Some(if *count == 1 { holder.clone() } else { format!("{holder} ({count} times)") }));
    }
    for (key, value) in &status.limits {
        put("limit", Some(format!("{key}={value}")));
    }
    put("parent", status.parent.as_ref().map(ToString::to_string));
    for snapshot in &status.snapshots {
        put("snapshot", Some(format!("{} of {}", snapshot.name, size::human(snapshot.size))));
    }
    for (key, value) in status.options.pairs() {
        put("option", Some(format!("{key}={value}")));
    }
    table(&rows)
}

fn limits_text(limits: &std::collections::BTreeMap<String, u64>) -> String {
    if limits.is_empty() {
        return "no limits\n".to_owned();
    }
    limits.iter().map(|(key, value)| format!("{key}={value}\n")).collect()
}

fn settings(pool: &Pool, wish: &PoolWish, json: bool) -> Result<String> {
    let before = pool.settings()?;
    let mut settings = before.clone();
    settings.reserve = wish.reserve.unwrap_or(settings.reserve);
    settings.overcommit = wish.overcommit.unwrap_or(settings.overcommit);
    settings.default_size = wish.default_size.unwrap_or(settings.default_size);
    settings.allow = wish.allow.clone().unwrap_or(settings.allow);
    if settings != before {
        pool.change(&settings)?;
    }
    let (space, folder) = (pool.space()?, pool.folder());
    say(json, &json!({ "pool": OsText::from(folder), "settings": settings, "space": space }), || {
        pool_text(folder, &settings, &space)
    })
}

fn pool_text(folder: &Path, settings: &Settings, space: &super::Space) -> String {
    let Settings { reserve, overcommit, default_size, allow } = settings;
    let allow = allow.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let reserve = match reserve {
        Share::Bytes(_) => size::human(space.reserve),
        Share::Percent(percent) => format!("{percent}% ({})", size::human(space.reserve)),
    };
    let rows = [
        ("pool:", folder.display().to_string()),
        ("capacity:", size::human(space.capacity)),
        ("free:", size::human(space.free)),
        ("reserve:", reserve),
        ("overcommit:", overcommit.to_string()),
        ("promised:", format!("{} of {}", size::human(space.promised), size::human(space.promisable))),
        ("default size:", size::human(*default_size)),
        ("allowed:", if allow.is_empty() { "neither suid nor dev".to_owned() } else { allow }),
    ];
    table(&rows.map(|(key, value)| vec![key.to_owned(), value]))
}

/// JSON, or text for a person.
fn say(json: bool, value: &impl Serialize, text: impl FnOnce() -> String) -> Result<String> {
    if json { Ok(json_text(value)?) } else { Ok(text()) }
}

/// Usage errors are told apart by their exit status.
fn explain(error: Error) -> anyhow::Error {
    match error {
        Error::Usage(line) => UsageError::new(line).into(),
        error => anyhow!("{error}"),
    }
}

/// Long work on a terminal: what is being done, and how far it is.
struct Bar(Mutex<Option<ProgressBar>>);

impl Bar {
    /// Shows nothing where nobody looks.
    fn new() -> Self {
        let bar = output::stderr_is_terminal().then(ProgressBar::new_spinner);
        if let Some(bar) = &bar {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Bar(Mutex::new(bar))
    }

    fn show(&self, change: impl FnOnce(&ProgressBar)) {
        if let Ok(bar) = self.0.lock()
            && let Some(bar) = &*bar
        {
            change(bar);
        }
    }
}

impl Progress for Bar {
    fn step(&self, what: &str) {
        self.show(|bar| {
            bar.set_style(ProgressStyle::default_spinner());
            bar.set_message(what.to_owned());
        });
    }

    fn bytes(&self, done: u64, of: u64) {
        self.show(|bar| {
            if bar.length() != Some(of) {
                let style = ProgressStyle::with_template("{msg} {bar:30} {bytes}/{total_bytes} {eta}");
                bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.set_length(of);
            }
            bar.set_position(done);
        });
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.show(ProgressBar::finish_and_clear);
    }
}
