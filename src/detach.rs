//! `nbdbridge detach`: ends what `ublk`, `attach` or `fuse` has made, by what it is: a kernel device, which `ublk` ends, a loop
//! device or a FUSE file.
//!
//! A living server is asked to end, and waited for; what a dead one has left is cleared away.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Signal, kill_process};

use crate::attach::{backing_file, describe_use, detach_loop, in_use};
use crate::attachment::Attachment;
use crate::cli::DetachArgs;
use crate::fuse::{self, Mounted, Unmounted};
use crate::patience::lasts;
use crate::stop::SECOND_AFTER;
use crate::ublk;

/// A server that takes longer to end is left alone.
const PATIENCE: Duration = Duration::from_secs(60);

/// Programs that look at every device have it open for less.
const LOOKERS: Duration = Duration::from_secs(1);

/// Ends the attachment at a device or file.
///
/// # Errors
/// One line: it is not ours, or in use.
pub(crate) fn run(args: &DetachArgs) -> Result<()> {
    let target = &args.target;
    if let Some(name) = target.to_str().filter(|name| ublk::is_name(name)) {
        return ublk::detach(name, args.force);
    }
    let is_device = std::fs::metadata(target).is_ok_and(|found| found.file_type().is_block_device());
    if is_device {
        let device = target.canonicalize().with_context(|| target.display().to_string())?;
        detach_device(&device, args.force)
    } else {
        let path = fuse::resolve(target)
            .with_context(|| format!("{}: there is nothing to detach", target.display()))?;
        detach_file(&path, args.force)
    }
}

/// A loop device over a file of ours.
fn detach_device(device: &Path, force: bool) -> Result<()> {
    let file = backing_file(device);
    let found = Attachment::all().into_iter().find(|(attachment, _)| {
        attachment.device.as_deref() == Some(device) && Some(&attachment.file) == file.as_ref()
    });
    let Some((attachment, note)) = found else {
        bail!("{}: was not attached by nbdbridge (`nbdbridge devices` lists what was)", device.display());
    };
    ensure!(
        force || !lasts(LOOKERS, || in_use(device)),
        "{}: is in use ({}); end that first, or add --force",
        device.display(),
        describe_use(device)
    );
    if attachment.is_alive() {
        return end(&attachment, force);
    }
    detach_loop(device).with_context(|| format!("{}: cannot detach it", device.display()))?;
    unmount(&attachment.file, true)?;
    attachment.forget(&note);
    Ok(())
}

/// A FUSE file of ours.
fn detach_file(path: &Path, force: bool) -> Result<()> {
    let found = Attachment::all().into_iter().find(|(attachment, _)| attachment.file == path);
    let mounted = Mounted::at(path).context("cannot learn what is mounted")?;
    let is_mounted = mounted.last().is_some_and(Mounted::is_ours);
    if let Some((Attachment { device: Some(device), .. }, _)) = &found {
        bail!("{}: is attached as {}; detach that", path.display(), device.display());
    }
    let Some((attachment, note)) = found else {
        ensure!(
            is_mounted,
            "{}: is no device or file of nbdbridge's (`nbdbridge devices` lists them)",
            path.display()
        );
        return unmount(path, force || fuse::is_dead(path));
    };
    if !attachment.is_alive() {
        if is_mounted {
            unmount(path, true)?;
        }
        attachment.forget(&note);
        return Ok(());
    }
    if is_mounted && !force {
        // Unmounted by us, it is known to be free; and its server ends by itself.
        unmount(path, false)?;
        return wait_for(&attachment);
    }
    end(&attachment, force)
}

fn unmount(path: &Path, lazily: bool) -> Result<()> {
    match fuse::unmount(path, lazily)? {
        Unmounted::Yes => Ok(()),
        Unmounted::Busy => bail!(
            "{}: is in use by {}; end that first, or add --force",
            path.display(),
            fuse::describe_users(path)
        ),
    }
}

/// Asks the server to end, and waits for that. With `force` it is asked a second time where its device is in use: that ends
/// it all the same, but would cut short the end of one that is free.
fn end(attachment: &Attachment, force: bool) -> Result<()> {
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
