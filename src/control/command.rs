//! `nbdbridge ps`, `stats`, `throttle`, `resize`: ask the servers that are here, and show a person what they say.

use std::ffi::OsStr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use bridge::Operation;
use bytes::Bytes;
use hyper::Method;
use serde::Serialize;
use serde_json::json;

use super::client::{self, CallError};
use super::find::{self, Server, Servers, Target};
use super::wire::{
    ClientReport, ExportStats, Instance, LAST_BOUND_US, Limits, OperationCount, ResizeWish, Resized, Throttle,
};
use crate::cli::{AskAction, LimitsWish, UsageError};
use crate::output::{self, plain};
use crate::size::{self, NewSize};

/// Does it.
///
/// # Errors
/// One line.
pub(crate) fn run(action: &AskAction) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the event loop")?;
    runtime.block_on(async {
        let servers = find::servers().await?;
        match action {
            AskAction::Ps { json } => ps(&servers, *json),
            AskAction::Stats { export, json } => stats(&servers, export.as_deref(), *json).await,
            AskAction::Throttle { export, group, wish, json } => {
                throttle(servers.find(export)?, group.as_deref(), wish, *json).await
            }
            AskAction::Resize { export, size, json } => resize(servers.find(export)?, *size, *json).await,
        }
    })
}

/// A list of all there is: one line for each export.
fn ps(servers: &Servers, json: bool) -> Result<()> {
    complain(servers);
    if json {
        let all = servers.servers.iter().chain(&servers.foreign);
        let all: Vec<_> = all.map(|server| PsRow { user: server.user, instance: &server.instance }).collect();
        return print_json(&all);
    }
    if servers.servers.is_empty() && servers.foreign.is_empty() {
        if servers.silent.is_empty() {
            output::note(&find::nobody());
        }
        return Ok(());
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let head = ["PID", "EXPORT", "SIZE", "MODE", "CLIENTS", "UP", "SOURCE", "AT"].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    // Only then is it worth a column.
    let others = !servers.foreign.is_empty();
    if others {
        rows[0].insert(1, "USER".to_owned());
    }
    for target in servers.targets().chain(find::targets(&servers.foreign)) {
        let instance = &target.server.instance;
        let name = &target.export.name;
        let places = instance.doors.iter().flat_map(|door| &door.places);
        let at: Vec<_> =
            places.filter(|place| place.export == *name).map(|place| place.at.to_string()).collect();
        let mut row = vec![
            instance.pid.to_string(),
            if name.is_empty() { "-".to_owned() } else { name.clone() },
            size::human(target.export.size),
            if target.export.read_only { "ro" } else { "rw" }.to_owned(),
            count_clients(target),
            time(now.saturating_sub(instance.started)),
            target.export.source.to_string(),
            if at.is_empty() { "-".to_owned() } else { at.join(" ") },
        ];
        if others {
            row.insert(1, target.server.user.to_string());
        }
        rows.push(row);
    }
    let mut text = table(&rows);
    for target in servers.targets().chain(find::targets(&servers.foreign)) {
        if let Some(reason) = &target.export.loss_after_crash {
            let (pid, name) = (target.server.instance.pid, &target.export.name);
            text.push_str(&format!("{pid}:{}: {}\n", plain(name), plain(&loss_text(reason))));
        }
    }
    output::text(&text)
}

/// Says that a crash loses writes, and why.
pub(crate) fn loss_text(reason: &str) -> String {
    format!("writes that are answered and not flushed do not survive a crash of its server: {reason}")
}

/// How many, and a mark where not everybody has been asked.
fn count_clients(target: Target<'_>) -> String {
    let reports = || target.server.instance.doors.iter().map(|door| &door.report);
    let of = |report: &ClientReport| {
        report.clients.iter().filter(|client| client.export == target.export.name).count()
    };
    let sum: usize = reports().map(of).sum();
    let unsure = reports().any(|report| report.silent_workers > 0);
    if unsure { format!("{sum}+?") } else { sum.to_string() }
}

#[derive(Serialize)]
struct PsRow<'a> {
    /// The number of the user who runs it. All else is what that user says, if it is another one.
    user: u32,
    #[serde(flatten)]
    instance: &'a Instance,
}

#[derive(Serialize)]
struct StatsRow<'a> {
    pid: u32,
    #[serde(flatten)]
    stats: &'a ExportStats,
}

async fn stats(servers: &Servers, export: Option<&OsStr>, json: bool) -> Result<()> {
    let targets: Vec<Target<'_>> = match export {
        Some(text) => servers.find_all(text)?,
        None => {
            complain(servers);
            servers.targets().collect()
        }
    };
    let mut all = Vec::new();
    for target in &targets {
        match client::get::<Vec<ExportStats>>(&target.server.socket, &path("stats", &target.export.name))
            .await
        {
            Ok(stats) => all.extend(stats.into_iter().map(|stats| (*target, stats))),
            // Among many, one may just have ended.
            Err(CallError::Gone) if export.is_none() => {}
            Err(error) => return Err(explain(target.server, error)),
        }
    }
    if json {
        let rows: Vec<_> =
            all.iter().map(|(target, stats)| StatsRow { pid: target.server.instance.pid, stats }).collect();
        return print_json(&rows);
    }
    if all.is_empty() && servers.silent.is_empty() {
        output::note(&find::nobody());
    }
    let blocks: Vec<_> = all.iter().map(|(target, stats)| stats_text(*target, stats)).collect();
    output::text(&blocks.join("\n"))
}

fn stats_text(target: Target<'_>, stats: &ExportStats) -> String {
    let head = ["", "COUNT", "BYTES", "ERRORS", "P50 <", "P99 <", "P99.9 <"].map(str::to_owned);
    let mut rows = vec![head.to_vec()];
    for operation in Operation::ALL {
        let Some(count) = stats.operations.get(operation.name()) else { continue };
        if count.count > 0 || count.errors > 0 {
            rows.push(stats_row(operation.name(), count));
        }
    }
    let title = format!("{}  {}\n", plain(&target.id()), plain(&target.export.source.to_string()));
    if rows.len() == 1 { title + "no requests yet\n" } else { title + &table(&rows) }
}

fn stats_row(name: &str, count: &OperationCount) -> Vec<String> {
    let bound = |us: Option<u64>| us.map_or_else(|| format!("> {}", latency(LAST_BOUND_US)), latency);
    let latencies = [count.latency_us.p50, count.latency_us.p99, count.latency_us.p999].map(bound);
    let mut row = vec![name.to_owned(), count.count.to_string(), size::human(count.bytes)];
    row.push(count.errors.to_string());
    row.extend(latencies);
    row
}

async fn throttle(target: Target<'_>, group: Option<&str>, wish: &LimitsWish, json: bool) -> Result<()> {
    let (socket, mut path) = (&target.server.socket, path("throttle", &target.export.name));
    if let Some(group) = group {
        path.push_str("&group=");
        path.extend(form_urlencoded::byte_serialize(group.as_bytes()));
    }
    let answer: Result<Throttle, _> = match wish {
        LimitsWish::Show => client::get(socket, &path).await,
        LimitsWish::Off => client::call(socket, Method::DELETE, &path, Bytes::new()).await,
        LimitsWish::Change(pairs) => {
            let body: serde_json::Map<_, _> =
                pairs.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
            client::send(socket, Method::PATCH, &path, &body).await
        }
    };
    let answer = answer.map_err(|error| explain(target.server, error))?;
    if json { print_json(&answer) } else { output::text(&limits_text(&answer)) }
}

/// Lines that read like the words that make them so.
fn limits_text(throttle: &Throttle) -> String {
    let lines = |prefix: &str, limits: &Limits| -> String {
        if limits.is_empty() {
            return format!("{prefix}no limits\n");
        }
        limits.iter().map(|(key, value)| format!("{prefix}{key}={value}\n")).collect()
    };
    let groups = throttle.groups.iter();
    let shared = groups.map(|(name, limits)| lines(&format!("group={} ", plain(name)), limits));
    let own = match (throttle.limits.is_empty(), throttle.groups.is_empty()) {
        (true, false) => "no limits of its own\n".to_owned(),
        _ => lines("", &throttle.limits),
    };
    own + &shared.collect::<String>()
}

async fn resize(target: Target<'_>, size: NewSize, json: bool) -> Result<()> {
    let size = size.after(target.export.size).map_err(|error| UsageError::new(error.to_string()))?;
    let (socket, path) = (&target.server.socket, path("resize", &target.export.name));
    let answer = client::send(socket, Method::POST, &path, &ResizeWish { size }).await;
    let resized: Resized = answer.map_err(|error| explain(target.server, error))?;
    if json {
        return print_json(&resized);
    }
    let (size, was) = (size::human(resized.size), size::human(resized.old_size));
    let id = plain(&target.id());
    let by_nbd = target.server.instance.doors.iter().any(|door| door.kind == "net");
    let seen = if by_nbd { "; NBD clients see it when they connect again" } else { "" };
    let fixed: String = resized.fixed.iter().map(|line| plain(line) + "\n").collect();
    output::text(&format!("{id} is {size} now (was {was}){seen}\n{fixed}"))
}

/// Where `export` is asked about `what`.
pub(super) fn path(what: &str, export: &str) -> String {
    let name: String = form_urlencoded::byte_serialize(export.as_bytes()).collect();
    format!("/v1/{what}?export={name}")
}

fn explain(server: &Server, error: CallError) -> anyhow::Error {
    let pid = server.instance.pid;
    match error {
        CallError::Refused(line) => anyhow!("process {pid}: {line}"),
        CallError::Gone => anyhow!("process {pid} has just ended"),
        CallError::Silent(why) => {
            anyhow!("process {pid} does not answer at {}: {why}", server.socket.display())
        }
        CallError::Foreign(peer) => {
            anyhow!("{}: user {} listens there now, and is not asked", server.socket.display(), peer.uid)
        }
    }
}

/// Says on stderr who does not answer.
fn complain(servers: &Servers) {
    for line in &servers.silent {
        output::note(&format!("nbdbridge: {line}"));
    }
}

fn print_json(value: &impl Serialize) -> Result<()> {
    output::json(&json_text(value)?)
}

/// JSON for programs, and for people who look at it.
pub(crate) fn json_text(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// Columns as wide as they must be, two blanks apart. Line breaks and other control characters in cells are escaped.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| plain(cell)).collect()).collect();
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// A power of two in microseconds, for people.
fn latency(us: u64) -> String {
    match us {
        0..1024 => format!("{us} us"),
        1024..1_000_000 => format!("{} ms", us / 1000),
        _ => format!("{} s", us / 1_000_000),
    }
}

/// How long something has been there, in its largest unit.
fn time(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_latencies_for_people() {
        for (seconds, text) in [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172_800, "2d")] {
            assert_eq!(time(seconds), text);
        }
        for (us, text) in
            [(1, "1 us"), (512, "512 us"), (1024, "1 ms"), (1 << 19, "524 ms"), (1 << 22, "4 s")]
        {
            assert_eq!(latency(us), text);
        }
    }

    #[test]
    fn tables_are_aligned_and_harmless() {
        let rows = [vec!["A".to_owned(), "B".to_owned()], vec!["x\x1b[2J".to_owned(), "y".to_owned()]];
        assert_eq!(table(&rows), "A           B\nx\\u{1b}[2J  y\n");
        let limits = |pairs: &[(&str, u64)]| pairs.iter().map(|(key, n)| ((*key).to_owned(), *n)).collect();
        let groups = [("g", limits(&[("bps-read", 7)])), ("h\n", limits(&[]))];
        let throttle = Throttle {
            export: "x".to_owned(),
            limits: limits(&[("iops-read", 1), ("iops-write", 2)]),
            groups: groups.map(|(name, limits)| (name.to_owned(), limits)).into(),
        };
        let text = "iops-read=1\niops-write=2\ngroup=g bps-read=7\ngroup=h\\n no limits\n";
        assert_eq!(limits_text(&throttle), text);
    }
}
