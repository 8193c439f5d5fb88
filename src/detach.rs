//! `nbdbridge detach`: ends what `ublk`, `attach` or `fuse` has made, by what it is: a kernel device, which `ublk` ends, a loop
//! device or a FUSE file.
//!
//! A living server flushes, is asked to end, and waited for; what a dead one has left is cleared away. Every wait has an
//! end, also where the server is stopped.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Signal, kill_process};

use crate::attach::{describe_use, detach as detach_loop, in_use, loops_over};
use crate::attachment::{Attachment, is_stopped};
use crate::cli::DetachArgs;
use crate::fuse::{self, Answer, Mounted, Unmounted};
use crate::helper::{self, Failure, Task};
use crate::patience::lasts;
use crate::stop::SECOND_AFTER;
use crate::{end_report, ublk};

/// A server that takes longer to end is left alone.
const PATIENCE: Duration = Duration::from_secs(60);

/// Programs that look at every device have it open for less.
const LOOKERS: Duration = Duration::from_secs(1);

/// Flushing may take so long; a forced end does not wait for more than the second.
const FLUSH_LIMIT: Duration = Duration::from_secs(120);
const FORCED_FLUSH_LIMIT: Duration = Duration::from_secs(5);

/// How a disk has ended.
#[derive(Debug)]
#[must_use]
pub(crate) enum Ended {
    /// All that was written is durable.
    Whole,
    /// What was written since the last flush may be lost. The line says so, and why.
    Lost(String),
}

/// Ends the attachment at a device or file.
///
/// # Errors
/// One line: it is not ours, it is in use, it does not answer. Or it has ended, and its last flush failed.
pub(crate) fn run(args: &DetachArgs) -> Result<()> {
    match end(&args.target, args.force)? {
        Ended::Whole => Ok(()),
        Ended::Lost(line) => bail!("{line}"),
    }
}

/// Ends the attachment at a device or file, and tells how it ended.
///
/// # Errors
/// One line, and the attachment stays: it is not ours, it is in use, it does not answer.
pub(crate) fn end(target: &Path, force: bool) -> Result<Ended> {
    if let Some(name) = target.to_str().filter(|name| ublk::is_name(name)) {
        return detach_ublk(name, force);
    }
    let is_device =
        fuse::look(target, AtFlags::empty()).is_ok_and(|found| fuse::kind(&found).is_block_device());
    if is_device {
        let device = target.canonicalize().with_context(|| target.display().to_string())?;
        detach_device(&device, force)
    } else {
        let path = fuse::resolve(target)
            .with_context(|| format!("{}: there is nothing to detach", target.display()))?;
        detach_file(&path, force)
    }
}

/// Clears what dead processes have left of the attachments that `which` means, but for devices in use.
pub(crate) fn sweep(which: impl Fn(&Attachment) -> bool) {
    for (attachment, note) in Attachment::all() {
        if !attachment.is_alive()
            && which(&attachment)
            && let Err(error) = clear(&attachment, &note, false)
        {
            tracing::info!("what process {} has left stays: {error:#}", attachment.pid);
        }
    }
}

/// A device of ublk's. Its server tells of a failed flush.
fn detach_ublk(name: &str, force: bool) -> Result<Ended> {
    let server = ublk::server(name).filter(|server| server.live);
    let flushed = match server {
        Some(_) => flush(Path::new(name), force)?,
        None => Ok(()),
    };
    let since = server.as_ref().and_then(|server| crate::attachment::started(server.pid));
    ublk::detach(name, force)?;
    let server = server.map(|server| server.pid).zip(since);
    if let Some((pid, since)) = server {
        // The report is written after the device is gone.
        let alive = || crate::attachment::started(pid) == Some(since);
        ensure!(!lasts(PATIENCE, alive), "{name}: process {pid} does not end; look at its log");
    }
    Ok(ended(Path::new(name), flushed, server))
}

/// A loop device over a file of ours.
fn detach_device(device: &Path, force: bool) -> Result<Ended> {
    let Some((attachment, note)) = Attachment::of_device(device) else {
        bail!("{}: was not attached by nbdbridge (`nbdbridge devices` lists what was)", device.display());
    };
    let _alone = alone(device, &note)?;
    if !attachment.is_alive() {
        return clear(&attachment, &note, force).map(|()| Ended::Whole);
    }
    check_answers(&attachment)?;
    ensure!(
        force || !lasts(LOOKERS, || in_use(device)),
        "{}: is in use ({}); end that first, or add --force",
        device.display(),
        describe_use(device)
    );
    let flushed = flush(device, force)?;
    stop(&attachment, force)?;
    Ok(ended_noted(device, flushed, &attachment, &note))
}

/// A FUSE file of ours.
fn detach_file(path: &Path, force: bool) -> Result<Ended> {
    let mut all = Attachment::all();
    all.retain(|(attachment, _)| attachment.file == path);
    // A dead one may have been at the same path before. Asked once for each: what changes in between must not change the
    // order.
    all.sort_by_cached_key(|(attachment, _)| !(attachment.is_alive() && attachment.is_mounted()));
    let mounted = Mounted::at(path).context("cannot learn what is mounted")?;
    let is_mounted = mounted.last().is_some_and(Mounted::is_ours);
    let Some((attachment, note)) = all.into_iter().next() else {
        ensure!(
            is_mounted,
            "{}: is no device or file of nbdbridge's (`nbdbridge devices` lists them)",
            path.display()
        );
        return detach_unknown(path, force);
    };
    let _alone = alone(path, &note)?;
    if let Some(device) = &attachment.device {
        bail!("{}: is attached as {}; detach that", path.display(), device.display());
    }
    if !attachment.is_alive() {
        return clear(&attachment, &note, force).map(|()| Ended::Whole);
    }
    check_answers(&attachment)?;
    if !attachment.is_mounted() {
        if attachment.number.is_some() && !force {
            // Unmounted by somebody else. Its server ends as soon as nobody has it open.
            ensure!(
                !lasts(LOOKERS, || attachment.is_alive()),
                "{}: is unmounted, but still in use by {}; end that first, or add --force",
                path.display(),
                fuse::describe_users(path, attachment.number.as_deref())
            );
        }
        stop(&attachment, force)?;
        return Ok(ended_noted(path, Ok(()), &attachment, &note));
    }
    let flushed = flush(path, force)?;
    if force {
        stop(&attachment, force)?;
    } else {
        // Unmounted by us, it is known to be free; and its server ends by itself.
        unmount(path, false)?;
        wait_for(&attachment)?;
    }
    Ok(ended_noted(path, flushed, &attachment, &note))
}

/// Waits until nobody else ends the attachment: two at a time would take each other's steps for failures. None where its note
/// cannot be opened: it is another user's, whose process cannot be told either.
///
/// # Errors
/// One line: somebody else has ended it, or does not come to an end.
fn alone(place: &Path, note: &Path) -> Result<Option<File>> {
    let by_another = || format!("{}: was detached by another process meanwhile", place.display());
    let lock = match File::open(note) {
        Ok(lock) => lock,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(by_another()),
        Err(_) => return Ok(None),
    };
    let until = Instant::now() + PATIENCE + FLUSH_LIMIT;
    while flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        ensure!(Instant::now() < until, "{}: another process does not come to detach it", place.display());
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(note.exists(), by_another());
    Ok(Some(lock))
}

/// A mounted file of which nothing is written down: its server could not, or is another user's.
fn detach_unknown(path: &Path, force: bool) -> Result<Ended> {
    match fuse::ask(path) {
        Answer::Dead => {
            for device in loops_over(path) {
                detach_loop(&device).with_context(|| format!("{}: cannot detach it", device.display()))?;
            }
            unmount(path, true).map(|()| Ended::Whole)
        }
        Answer::Silent => {
            ensure!(force, "{}: its server does not answer; add --force", path.display());
            unmount(path, true).map(|()| Ended::Whole)
        }
        Answer::Lives => {
            let flushed = flush(path, force)?;
            unmount(path, force)?;
            Ok(ended(path, flushed, None))
        }
    }
}

/// Refuses to wait for a server that does not answer.
fn check_answers(attachment: &Attachment) -> Result<()> {
    let (place, pid) = (attachment.device.as_ref().unwrap_or(&attachment.file).display(), attachment.pid);
    ensure!(
        !is_stopped(pid),
        "{place}: process {pid}, which serves it, is stopped; let it go on (kill -CONT {pid}), or end it: kill -9 {pid}"
    );
    let silent = attachment.is_mounted() && fuse::ask(&attachment.file) == Answer::Silent;
    ensure!(
        !silent || !attachment.is_alive(),
        "{place}: process {pid}, which serves it, does not answer; look at its log, or end it: kill -9 {pid}"
    );
    Ok(())
}

/// Flushes through the server. The inner result is the flush's own.
fn flush(path: &Path, force: bool) -> Result<std::result::Result<(), Failure>> {
    let limit = if force { FORCED_FLUSH_LIMIT } else { FLUSH_LIMIT };
    match helper::run(&Task::Flush(path), limit) {
        Ok(_) | Err(Failure::NotStarted(_)) => Ok(Ok(())),
        // Another user's file, or one that is gone by now: its server flushes by itself.
        Err(Failure::Refused(Some(Errno::ACCESS | Errno::PERM | Errno::NOENT | Errno::NXIO), _)) => {
            Ok(Ok(()))
        }
        Err(Failure::Silent(_)) if !force => {
            bail!("{}: does not flush within {limit:?}; try again later, or add --force", path.display())
        }
        Err(failure) => Ok(Err(failure)),
    }
}

/// How an attachment has ended whose process is gone.
fn ended_noted(
    place: &Path,
    flushed: std::result::Result<(), Failure>,
    attachment: &Attachment,
    note: &Path,
) -> Ended {
    match ended(place, flushed, Some((attachment.pid, attachment.started))) {
        // A server that ends in order removes its file last.
        Ended::Whole if note.exists() => Ended::Lost(format!(
            "{}: process {} ended without its last flush; what was written since the last one may be lost",
            place.display(),
            attachment.pid
        )),
        ended => ended,
    }
}

fn ended(place: &Path, flushed: std::result::Result<(), Failure>, server: Option<(u32, u64)>) -> Ended {
    let reported = server.and_then(|(pid, started)| end_report::take(pid, started));
    match (reported, flushed) {
        (None, Ok(())) => Ended::Whole,
        (Some(why), _) => Ended::Lost(lost(place, &why)),
        (None, Err(failure)) => Ended::Lost(lost(place, &failure)),
    }
}

fn lost(place: &Path, why: &dyn std::fmt::Display) -> String {
    let place = place.display();
    format!(
        "{place}: has ended, but its last flush failed: {why}; what was written since the last one may be lost"
    )
}

/// Clears what a dead process has left.
fn clear(attachment: &Attachment, note: &Path, force: bool) -> Result<()> {
    let devices: Vec<PathBuf> = attachment.devices();
    for device in &devices {
        ensure!(
            force || !lasts(LOOKERS, || in_use(device)),
            "{}: is in use ({}); end that first, or add --force",
            device.display(),
            describe_use(device)
        );
        detach_loop(device).with_context(|| format!("{}: cannot detach it", device.display()))?;
    }
    if attachment.is_mounted() {
        unmount(&attachment.file, true)?;
    }
    attachment.forget(note);
    Ok(())
}

fn unmount(path: &Path, lazily: bool) -> Result<()> {
    match fuse::unmount(path, lazily)? {
        Unmounted::Yes => Ok(()),
        Unmounted::Busy => bail!(
            "{}: is in use by {}; end that first, or add --force",
            path.display(),
            fuse::describe_users(path, None)
        ),
    }
}

/// Asks the server to end, and waits for that. With `force` it is asked a second time where its device is in use: that ends
/// it all the same, but would cut short the end of one that is free.
fn stop(attachment: &Attachment, force: bool) -> Result<()> {
    let ask = || match attachment.process() {
        Some(process) => kill_process(process, Signal::TERM)
            .with_context(|| format!("cannot end process {}", attachment.pid)),
        None => Ok(()),
    };
    ask()?;
    if force {
        let until = Instant::now() + SECOND_AFTER;
        while attachment.is_alive() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        if attachment.is_alive() && attachment.device.as_deref().is_none_or(in_use) {
            ask()?;
        }
    }
    wait_for(attachment)
}

fn wait_for(attachment: &Attachment) -> Result<()> {
    let begun = Instant::now();
    while attachment.is_alive() {
        ensure!(
            begun.elapsed() < PATIENCE,
            "process {} does not end; look at its log, or end it: kill -9 {}",
            attachment.pid,
            attachment.pid
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
