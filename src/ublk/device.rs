//! A device's life: made or taken over, started, seen to work, stopped and deleted. Everything here waits for the kernel:
//! not for threads that serve.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use bridge::{Buffer, Export};
use rustix::fs::{major, minor};
use rustix::io::Errno;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::watch;

use super::abi::{self, DeviceInfo, Features, State};
use super::channel::Channel;
use super::control::{self, Control, block_path, character_path};
use super::queue::{self, Common};
use super::state::{self, Record};
use super::supervise::{self, Message};
use super::translate;
use crate::cli::UblkArgs;

/// How long nodes in /dev may take to come, and an ending device to go.
const PATIENCE: Duration = Duration::from_secs(10);

/// Threads of one queue's blocking pool at most.
const BLOCKING_THREADS: usize = 16;

/// A device that is served by this process.
pub(super) struct Device {
    info: DeviceInfo,
    common: Arc<Common>,
    /// /dev/ublkcN, which must be closed before the device can be deleted.
    character: Arc<File>,
    queues: Vec<JoinHandle<()>>,
    /// Queues that are served.
    running: watch::Receiver<usize>,
}

impl Device {
    /// Makes a device for the export, and starts it. When this returns, it serves.
    ///
    /// # Errors
    /// One line that says what the kernel did not like. Nothing is left behind.
    pub(super) fn create(export: Arc<Export>, args: &UblkArgs, record: Record) -> Result<Self> {
        let mut control = Control::open()?;
        let geometry = export.geometry();
        let logical = translate::logical_block(&geometry, args.block_size);
        let size = translate::device_size(&geometry, logical);
        ensure!(size > 0, "{}: too small for a block device of {logical}-byte blocks", record.source);
        if size < geometry.size {
            tracing::warn!(
                "{}: {} bytes are no multiple of {logical}: the device ends before the last {}",
                record.source,
                geometry.size,
                geometry.size - size
            );
        }
        let info = control.add(&wish(&control, args)?).map_err(|errno| match (errno, args.id) {
            (Errno::EXIST, Some(id)) => anyhow!("ublk device {id} exists already; choose another --id"),
            (Errno::PERM | Errno::ACCESS, _) => {
                anyhow!("no permission to make a ublk device: run as root, or with --unprivileged")
            }
            (Errno::NOSPC | Errno::USERS, _) => {
                anyhow!("the kernel makes no more ublk devices (module parameter ublks_max)")
            }
            _ => anyhow!(errno).context("the kernel makes no ublk device"),
        })?;
        supervise::tell(Message::Device(info.dev_id));
        let params = translate::params(&geometry, size, logical, args.io_size);
        // A user's device may be used by its user once udev has made him the node's owner.
        let started = retry(PATIENCE, || control.set_params(&info, &params))
            .context("the kernel refuses the device's size or limits")
            .and_then(|()| Self::serve(info, export, args))
            .and_then(|device| match device.start(&mut control, record.of(info.dev_id, size)) {
                Ok(()) => Ok(device),
                Err(error) => {
                    device.stop(Duration::ZERO);
                    Err(error)
                }
            });
        if started.is_err() {
            let _ = control.delete(&info);
            state::remove(info.dev_id);
        }
        started
    }

    fn start(&self, control: &mut Control, record: Record) -> Result<()> {
        let size = record.size;
        record.write()?;
        control.start(&self.info).context("the kernel does not start the device")?;
        wait_until_it_works(self.info.dev_id, size)?;
        supervise::tell(Message::Live);
        Ok(())
    }

    /// Takes a device over whose process is gone. Requests that it had not answered come again.
    ///
    /// # Errors
    /// One line; the device is left as it was.
    pub(super) fn recover(id: u32, export: Arc<Export>, args: &UblkArgs, record: Record) -> Result<Self> {
        let mut control = Control::open()?;
        let info = wait_until_left(&mut control, id)?;
        let params = control.params(&info).context("the kernel does not tell the device's size")?;
        let size = params.dev_sectors * abi::SECTOR;
        let geometry = export.geometry();
        ensure!(
            geometry.size >= size,
            "{}: has {} bytes, fewer than the {size} of {}",
            record.source,
            geometry.size,
            block_path(id)
        );
        let read_only = params.attrs & abi::ATTR_READ_ONLY != 0;
        ensure!(
            read_only || !geometry.read_only(),
            "{}: can only be read, and {} is written",
            record.source,
            block_path(id)
        );
        supervise::tell(Message::Device(id));
        retry(PATIENCE, || control.start_recovery(&info))
            .with_context(|| format!("{}: cannot be taken over", block_path(id)))?;
        let device = Self::serve(info, export, args)?;
        record.of(id, size).write()?;
        control
            .end_recovery(&info)
            .with_context(|| format!("{}: the kernel does not go on with it", block_path(id)))?;
        supervise::tell(Message::Live);
        Ok(device)
    }

    /// Starts the threads that serve the queues.
    fn serve(info: DeviceInfo, export: Arc<Export>, args: &UblkArgs) -> Result<Self> {
        let path = character_path(info.dev_id);
        let character = retry(PATIENCE, || {
            let opened = File::options().read(true).write(true).open(&path);
            opened.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
        });
        let character = Arc::new(character.with_context(|| format!("cannot open {path}"))?);
        let common = Arc::new(Common::new(export, args.io_timeout));
        let (running, watching) = watch::channel(usize::from(info.nr_hw_queues));
        let running = Arc::new(running);
        let (ready, results) = mpsc::channel();
        let mut device = Device { info, common, character, queues: Vec::new(), running: watching };
        for queue in 0..info.nr_hw_queues {
            let (ready, running) = (ready.clone(), running.clone());
            let (character, common) = (device.character.clone(), device.common.clone());
            let thread = thread::Builder::new()
                .name(format!("ublk-{}-{queue}", info.dev_id))
                .spawn(move || {
                    run_queue(&info, queue, character, common, &ready);
                    running.send_modify(|count| *count -= 1);
                })
                .context("cannot start a queue's thread")?;
            device.queues.push(thread);
        }
        drop(ready);
        let failed = results.iter().take(usize::from(info.nr_hw_queues)).find_map(Result::err);
        match failed {
            None => Ok(device),
            Some(error) => {
                device.stop(Duration::ZERO);
                Err(anyhow!(error).context("cannot fetch the device's requests"))
            }
        }
    }

    /// The device's number.
    pub(super) fn id(&self) -> u32 {
        self.info.dev_id
    }

    /// How many queues are served; 0 when the device has been ended from outside.
    pub(super) fn running(&self) -> watch::Receiver<usize> {
        self.running.clone()
    }

    /// The device's size becomes that of the source, where the kernel can do that (6.16) and it has grown.
    pub(super) fn update_size(&self) -> Result<()> {
        let mut control = Control::open()?;
        let params = control.params(&self.info).context("the kernel does not tell the device's size")?;
        let size = translate::device_size(&self.common.export.geometry(), 1 << params.logical_bs_shift);
        if size <= params.dev_sectors * abi::SECTOR {
            return Ok(());
        }
        ensure!(
            control.features().contains(Features::UPDATE_SIZE),
            "this kernel cannot grow a ublk device in use (Linux 6.16 can): stop it, and start it again"
        );
        control.update_size(&self.info, size).context("the kernel does not grow the device")?;
        if let Some(record) = state::read(self.id()) {
            record.of(self.id(), size).write()?;
        }
        Ok(())
    }

    /// Ends the device: writes what is dirty, answers what is in flight within `patience` and with EIO after it, deletes
    /// it and forgets it. False where that was not possible.
    pub(super) fn stop(self, patience: Duration) -> bool {
        let Device { info, common, character, queues, mut running } = self;
        let id = info.dev_id;
        let stopped = in_background(move || match Control::open()?.stop(&info) {
            // Somebody else was quicker.
            Ok(()) | Err(Errno::NODEV | Errno::NOENT) => Ok(()),
            Err(errno) => Err(anyhow!(errno).context("cannot stop the device")),
        });
        let in_time = match stopped.recv_timeout(patience.max(Duration::from_millis(100))) {
            Ok(done) => done,
            Err(_) => {
                tracing::warn!("requests still in flight after {patience:?}: the device says EIO");
                common.give_up();
                stopped.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(anyhow!("the device does not stop")))
            }
        };
        if let Err(error) = &in_time {
            tracing::error!("{}: {error:#}", block_path(id));
        }
        let until = Instant::now() + PATIENCE;
        while *running.borrow_and_update() > 0 && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        if *running.borrow() == 0 {
            for queue in queues {
                let _ = queue.join();
            }
        }
        drop(character);
        let deleted = in_background(move || match Control::open()?.delete(&info) {
            Ok(()) | Err(Errno::NODEV | Errno::NOENT) => Ok(()),
            Err(errno) => Err(anyhow!(errno).context("cannot delete the device")),
        });
        let deleted =
            deleted.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(anyhow!("the device does not go")));
        match &deleted {
            Ok(()) => {
                state::remove(id);
                supervise::tell(Message::Gone);
            }
            Err(error) => tracing::error!("{}: {error:#}", block_path(id)),
        }
        in_time.is_ok() && deleted.is_ok()
    }
}

/// Stops and deletes a device that nobody serves, and forgets it.
pub(super) fn bury(control: &mut Control, id: u32) -> Result<()> {
    let info = match control.info(id) {
        Ok(info) => info,
        Err(_) => {
            state::remove(id);
            return Ok(());
        }
    };
    control.stop(&info).with_context(|| format!("{}: cannot be stopped", block_path(id)))?;
    control.delete(&info).with_context(|| format!("{}: cannot be deleted", block_path(id)))?;
    state::remove(id);
    Ok(())
}

/// Whether a process of this number exists. The kernel says -1 once it has noticed a server's end.
pub(super) fn is_alive(pid: i32) -> bool {
    let pid = Some(pid).filter(|pid| *pid > 0).and_then(rustix::process::Pid::from_raw);
    pid.is_some_and(|pid| !matches!(rustix::process::test_kill_process(pid), Err(Errno::SRCH)))
}

fn wish(control: &Control, args: &UblkArgs) -> Result<DeviceInfo> {
    let mut flags = Features::CMD_IOCTL_ENCODE.with(Features::USER_COPY);
    if args.recoverable {
        flags = flags.with(Features::USER_RECOVERY).with(Features::USER_RECOVERY_REISSUE);
    }
    if args.unprivileged {
        ensure!(
            control.features().contains(Features::UNPRIVILEGED_DEV),
            "this kernel has no ublk devices for users (Linux 6.3 and later); run as root"
        );
        flags = flags.with(Features::UNPRIVILEGED_DEV);
    }
    // The kernel lets no user's process fill others' memory by itself.
    if args.kernel_copy || args.unprivileged {
        flags = Features(flags.0 & !Features::USER_COPY.0);
    }
    Ok(DeviceInfo {
        nr_hw_queues: args.queues,
        queue_depth: args.depth,
        max_io_buf_bytes: args.io_size,
        dev_id: args.id.unwrap_or(u32::MAX),
        ublksrv_pid: i32::try_from(std::process::id()).unwrap_or_default(),
        flags: flags.both(control.features()).0,
        ..DeviceInfo::default()
    })
}

fn run_queue(
    info: &DeviceInfo,
    queue: u16,
    character: Arc<File>,
    common: Arc<Common>,
    ready: &mpsc::Sender<io::Result<()>>,
) {
    let mut serving = false;
    let serve = || -> io::Result<()> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name(format!("pool-{}-{queue}", info.dev_id))
            .build_local(LocalOptions::default())?;
        let channel = Channel::new(character, info, queue)?;
        runtime.block_on(queue::serve(channel, common, || {
            serving = true;
            ready.send(Ok(())).is_ok()
        }))
    };
    let ended = catch_unwind(AssertUnwindSafe(serve));
    match ended {
        Ok(Ok(())) => {}
        Ok(Err(error)) if !serving => {
            let _ = ready.send(Err(error));
        }
        // A queue that nobody serves hangs whoever uses the device. Without the process, a successor can take over.
        Ok(Err(error)) => {
            tracing::error!(queue, %error, "the queue cannot be served any more");
            std::process::abort();
        }
        Err(_) => std::process::abort(),
    }
}

/// Waits until the node is there, with the device's number and size, and a read comes through.
fn wait_until_it_works(id: u32, size: u64) -> Result<()> {
    let path = block_path(id);
    let numbers = std::fs::read_to_string(format!("/sys/block/ublkb{id}/dev")).unwrap_or_default();
    let look = || -> Result<(), Errno> {
        let raw = |error: io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
        let mut disk = File::options().read(true).custom_flags(libc::O_DIRECT).open(&path).map_err(raw)?;
        let there = disk.metadata().map_err(raw)?;
        let number = format!("{}:{}", major(there.rdev()), minor(there.rdev()));
        if !there.file_type().is_block_device() || number != numbers.trim() {
            return Err(Errno::NOENT);
        }
        if io::Seek::seek(&mut disk, io::SeekFrom::End(0)).map_err(raw)? != size {
            return Err(Errno::NXIO);
        }
        let mut first = Buffer::new(usize::try_from(size.min(4096)).unwrap_or(4096));
        rustix::io::pread(&disk, &mut first[..], 0).map(drop)
    };
    match retry(PATIENCE, look) {
        Ok(()) => Ok(()),
        // A source that cannot read its first block makes a poor device, but one it is.
        Err(Errno::IO) => {
            tracing::warn!("{path}: its first block cannot be read");
            Ok(())
        }
        Err(Errno::ACCESS | Errno::PERM) => {
            bail!("{path}: no permission to read it: its owner is set by contrib/udev's rule")
        }
        Err(errno) => Err(anyhow!(errno).context(format!("{path}: does not work"))),
    }
}

/// Whether a device can be taken over as far as is known before anything is opened.
///
/// # Errors
/// One line: it is gone, or somebody serves it.
pub(super) fn check_left(id: u32) -> Result<()> {
    let mut control = Control::open()?;
    let info = control.info(id).map_err(|_| anyhow!("{}: no such ublk device", block_path(id)))?;
    ensure!(
        info.state() != State::Live || !is_alive(info.ublksrv_pid),
        "{}: is served by process {}",
        block_path(id),
        info.ublksrv_pid
    );
    Ok(())
}

/// Waits until the process that had the device is gone and the kernel knows it.
fn wait_until_left(control: &mut Control, id: u32) -> Result<DeviceInfo> {
    let until = Instant::now() + PATIENCE;
    loop {
        let info = control.info(id).map_err(|_| anyhow!("{}: no such ublk device", block_path(id)))?;
        ensure!(
            info.features().contains(Features::USER_RECOVERY),
            "{}: was made without --recoverable; `nbdbridge detach` removes it",
            block_path(id)
        );
        match info.state() {
            State::Quiesced | State::FailIo => return Ok(info),
            State::Live if is_alive(info.ublksrv_pid) && Instant::now() >= until => {
                bail!("{}: is served by process {}", block_path(id), info.ublksrv_pid)
            }
            state if Instant::now() >= until => {
                bail!("{}: cannot be taken over while it is {state}", block_path(id))
            }
            _ => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Tries again what may succeed later.
fn retry<T>(patience: Duration, mut attempt: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let until = Instant::now() + patience;
    loop {
        match attempt() {
            Err(Errno::NOENT | Errno::ACCESS | Errno::BUSY | Errno::NXIO | Errno::NODEV)
                if Instant::now() < until =>
            {
                thread::sleep(Duration::from_millis(10));
            }
            other => return other,
        }
    }
}

/// Runs what may not come back, where that hurts nobody.
fn in_background<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> mpsc::Receiver<Result<T>> {
    let (done, result) = mpsc::channel();
    let thread = thread::Builder::new().name("ublk-control".into());
    let failed = done.clone();
    let started = thread.spawn(move || {
        let _ = done.send(work());
    });
    if let Err(error) = started {
        let _ = failed.send(Err(anyhow!(error).context("cannot start a thread")));
    }
    result
}

/// A device's number by its name.
pub(super) use control::parse_id;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_alive() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(is_alive(own));
        // Neither "everybody" nor "my group" is a process.
        assert!(!is_alive(-1) && !is_alive(0) && !is_alive(i32::MAX));
    }
}
