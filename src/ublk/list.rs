//! `nbdbridge devices` and `nbdbridge detach`: what there is, and how it ends. They work on the driver and on what is
//! remembered, so that they need no process to be alive.

use std::fmt::Write;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::abi::{Described, Features, State};
use super::control::{self, Control, block_path};
use super::device;
use super::holders;
use super::state;
use super::wait::is_alive;
use crate::devices::Row;
use crate::stop::SECOND_AFTER;

/// How long a device that is ending may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Our devices, a row each; forgets those that are gone.
///
/// # Errors
/// As [`Control::open`], where there is something to ask about.
pub(crate) fn devices() -> Result<Vec<Row>> {
    let (records, mut rows) = (state::all(), Vec::new());
    if records.is_empty() {
        return Ok(rows);
    }
    let mut control = Control::open()?;
    for record in records {
        let info = match control.info(record.id) {
            Ok(info) => info,
            Err(error) if error.errno() == Some(rustix::io::Errno::NODEV) => {
                state::remove(record.id);
                continue;
            }
            Err(error) => return Err(anyhow!(error).context(block_path(record.id))),
        };
        let state = match info.state() {
            // The driver notices the end of a process a moment later.
            State::Live if !is_alive(info.ublksrv_pid) => "orphan".to_owned(),
            State::Dead => "orphan".to_owned(),
            state => state.to_string(),
        };
        rows.push(Row {
            path: block_path(record.id).into(),
            door: "ublk",
            size: Some(record.size),
            pid: (state == "live").then_some(record.pid),
            state: state.into(),
            recoverable: record.recoverable,
            loss_after_crash: None,
            source: record.source,
        });
    }
    Ok(rows)
}

/// Who serves a device of ours.
pub(crate) struct Server {
    /// The process; while it is dead, the one that was.
    pub(crate) pid: u32,
    /// It is there. A dead one may have a successor soon.
    pub(crate) live: bool,
    /// What tells the device from an earlier one of its number.
    pub(crate) mark: String,
}

/// Who serves the device of this path; None where there is none of ours any more.
pub(crate) fn server(name: &str) -> Option<Server> {
    let id = control::parse_id(name).ok()?;
    let info = Control::open().ok()?.info(id).ok()?;
    let record = state::read(id)?;
    // The kernel's own number for the disk (sysfs-block, diskseq): it outlives each process, and is used once.
    let number = std::fs::read_to_string(format!("/sys/block/ublkb{id}/diskseq")).ok()?;
    Some(Server {
        pid: u32::try_from(info.ublksrv_pid).unwrap_or(record.pid),
        live: info.state() == State::Live && is_alive(info.ublksrv_pid),
        mark: format!("{} {}", record.source, number.trim()),
    })
}

/// What this kernel's driver can do, and what of it is used.
///
/// # Errors
/// As [`Control::open`].
pub(crate) fn features() -> Result<String> {
    let features = Control::open()?.features();
    let mut text = String::new();
    for (bit, name, use_of_it) in Features::NAMES {
        let has = if features.contains(Features(1 << bit)) { "yes" } else { "no" };
        let _ = writeln!(text, "{name:<24}{has:<5}{use_of_it}");
    }
    Ok(text)
}

/// User and group that own a device, for udev.
///
/// # Errors
/// One line where there is no such device.
pub(crate) fn owner(name: &str) -> Result<String> {
    let id = control::parse_id(&name.replace("ublkc", "ublkb"))?;
    let info = Control::open()?.find(id)?;
    Ok(format!("{} {}\n", info.owner_uid, info.owner_gid))
}

/// Ends a device: flushes, stops and deletes it. One that is in use only with `force`.
///
/// # Errors
/// One line: no such device, not ours, in use.
pub(crate) fn detach(name: &str, force: bool) -> Result<()> {
    let id = control::parse_id(name)?;
    let path = block_path(id);
    let mut control = Control::open()?;
    let info = control.find(id)?;
    ensure!(
        force || state::read(id).is_some(),
        "{path}: was not made by nbdbridge; --force ends it all the same"
    );
    let live = info.state() == State::Live && is_alive(info.ublksrv_pid);
    if !force && let Some(uses) = holders::of(id, live) {
        bail!("{path}: in use ({uses}); unmount or close it first, or end it with --force");
    }
    if !live {
        return device::bury(&mut control, id);
    }
    let server = Pid::from_raw(info.ublksrv_pid).with_context(|| format!("{path}: has no process"))?;
    kill_process(server, Signal::TERM).with_context(|| format!("{path}: process {}", info.ublksrv_pid))?;
    let started = Instant::now();
    let mut forced = false;
    while control.exists(id)? {
        thread::sleep(Duration::from_millis(10));
        let waited = started.elapsed();
        if !is_alive(info.ublksrv_pid) {
            // A mount on a device that is dead keeps its number, and nothing else.
            return if Path::new(&path).exists() { device::bury(&mut control, id) } else { Ok(()) };
        }
        if force && !forced && waited > SECOND_AFTER {
            // The first was for a device that is free; a second one ends it although it is not.
            let _ = kill_process(server, Signal::TERM);
            forced = true;
        }
        if !force
            && waited > Duration::from_secs(1)
            // Not by opening it: the server, which looks as well, would find us there.
            && let Some(uses) = holders::of(id, false)
        {
            bail!("{path}: came into use ({uses}); it ends when it is released");
        }
        ensure!(waited < PATIENCE, "{path}: does not end; its process is {}", info.ublksrv_pid);
    }
    Ok(())
}
