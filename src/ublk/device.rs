//! A device's life: made or taken over, started, seen to work, stopped and deleted. Everything here waits for the kernel:
//! not for threads that serve.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use bridge::Export;
use libublk::io::UblkDev;
use libublk::sys;
use rustix::io::Errno;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::watch;

use super::abi::{self, Described, DeviceInfo, Features, State};
use super::channel::Channel;
use super::command::{Cause, CommandError};
use super::control::{ANSWER, Control, block_path};
use super::library;
use super::queue;
use super::state::{self, Record};
use super::supervise::{self, Message};
use super::task::Common;
use super::translate;
use super::wait::{PATIENCE, in_background, node_is_there, retry, wait_until_it_works, wait_until_left};
use crate::cli::UblkArgs;

/// Threads of one queue's blocking pool at most.
const BLOCKING_THREADS: usize = 16;

/// How long the start of a device is waited for where the kernel reads its partition table.
const START_PATIENCE: Duration = Duration::from_secs(10);

/// Why a device keeps its size.
const FIXED: &str =
    "this kernel cannot grow a ublk device in use (Linux 6.16 can): stop it, and start it again";

/// A device that is served by this process.
pub(super) struct Device {
    info: DeviceInfo,
    common: Arc<Common>,
    /// /dev/ublkcN, which must be closed before the device can be deleted.
    character: Arc<UblkDev>,
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
        let logical = translate::logical_block(&geometry, args.block_size)
            .map_err(|why| anyhow!("{}: no ublk device can show it: {why}", record.source))?;
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
        let adopt = |info: &DeviceInfo| {
            supervise::tell(Message::Device(info.dev_id));
            record.clone().of(info.dev_id, size).write()
        };
        let info = control.add(&wish(&control, args)?, adopt).map_err(|error| {
            match (error.downcast_ref().and_then(CommandError::errno), args.id) {
                (Some(Errno::EXIST), Some(id)) => {
                    anyhow!("ublk device {id} exists already; choose another --id")
                }
                (Some(Errno::PERM | Errno::ACCESS), _) => {
                    anyhow!("no permission to make a ublk device: run as root, or with --unprivileged")
                }
                (Some(Errno::NOSPC | Errno::USERS), _) => {
                    anyhow!("the kernel makes no more ublk devices (module parameter ublks_max)")
                }
                _ => error.context("the kernel makes no ublk device"),
            }
        })?;
        let params = translate::params(&geometry, size, logical, args.io_size);
        // A user's device may be used by its user once udev has made him the node's owner.
        let started = retry(PATIENCE, || control.set_params(&info, &params))
            .context("the kernel refuses the device's size or limits")
            .and_then(|()| Self::serve(info, export, args))
            .and_then(|device| match device.start(size) {
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

    /// Starts the device, and sees it work. A kernel that reads the partition table meanwhile, of a source that does not
    /// answer, is not waited for: the device is there.
    fn start(&self, size: u64) -> Result<()> {
        let (info, id) = (self.info, self.info.dev_id);
        let started = in_background(move || {
            Control::open()?.start(&info).context("the kernel does not start the device")
        });
        match started.recv_timeout(START_PATIENCE) {
            Ok(done) => {
                done?;
                wait_until_it_works(id, size)?;
            }
            Err(_) if node_is_there(id).is_ok() => {
                tracing::warn!(
                    "{}: the kernel still reads the partition table, and the source does not answer: the device can be \
                     opened once it does; --scan-partitions=off leaves the table alone",
                    block_path(id)
                );
                watch_late_start(id, started)?;
            }
            Err(_) => {
                let error = CommandError::new(abi::START_DEV, Cause::Unanswered(START_PATIENCE));
                return Err(anyhow!(error).context("the kernel does not start the device"));
            }
        }
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
        let size = params.basic.dev_sectors * abi::SECTOR;
        let geometry = export.geometry();
        ensure!(
            geometry.size >= size,
            "{}: has {} bytes, fewer than the {size} of {}",
            record.source,
            geometry.size,
            block_path(id)
        );
        let read_only = params.basic.attrs & sys::UBLK_ATTR_READ_ONLY != 0;
        ensure!(
            read_only || !geometry.read_only(),
            "{}: can only be read, and {} is written",
            record.source,
            block_path(id)
        );
        supervise::tell(Message::Device(id));
        match retry(PATIENCE, || control.start_recovery(&info)) {
            // A successor has begun, and died before it fetched anything: the kernel begins once.
            Err(error) if error.errno() == Some(Errno::INVAL) && info.state() == State::Quiesced => {
                tracing::debug!(%error, "the recovery has begun already");
            }
            begun => begun.with_context(|| format!("{}: cannot be taken over", block_path(id)))?,
        }
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
        let quiet =
            args.scan_partitions == Some(false) && !info.features().contains(Features::NO_AUTO_PART_SCAN);
        let character = Arc::new(library::open(&info, ANSWER)?);
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
                    run_queue(&character, queue, common, quiet, &ready);
                    drop(character);
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
        let size = translate::device_size(&self.common.export.geometry(), 1 << params.basic.logical_bs_shift);
        if size <= params.basic.dev_sectors * abi::SECTOR {
            return Ok(());
        }
        ensure!(control.features().contains(Features::UPDATE_SIZE), FIXED);
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
        // Somebody else may have been quicker.
        let stopped = in_background(move || {
            unless_gone(Control::open()?.stop(&info)).context("cannot stop the device")
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
        let deleted = in_background(move || {
            unless_gone(Control::open()?.delete(&info)).context("cannot delete the device")
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

/// Removes a device whose start fails after all.
fn watch_late_start(id: u32, started: mpsc::Receiver<Result<()>>) -> Result<()> {
    let watch = move || {
        let Ok(Err(error)) = started.recv() else { return };
        tracing::error!("{}: {error:#}", block_path(id));
        if let Err(error) = Control::open().and_then(|mut control| bury(&mut control, id)) {
            tracing::error!("{error:#}");
        }
    };
    thread::Builder::new().name("ublk-start".into()).spawn(watch).context("cannot start a thread")?;
    Ok(())
}

/// Counts a device that is not there as ended.
fn unless_gone(ended: Result<(), CommandError>) -> Result<(), CommandError> {
    match ended {
        Err(error) if matches!(error.errno(), Some(Errno::NODEV | Errno::NOENT)) => Ok(()),
        other => other,
    }
}

/// Why devices keep their size on this kernel; None where they can grow.
pub(super) fn fixed_size() -> Option<&'static str> {
    let grows = Control::open().is_ok_and(|control| control.features().contains(Features::UPDATE_SIZE));
    (!grows).then_some(FIXED)
}

/// Stops and deletes a device that nobody serves, and forgets it.
pub(super) fn bury(control: &mut Control, id: u32) -> Result<()> {
    if !control.exists(id)? {
        state::remove(id);
        return Ok(());
    }
    let info = control.find(id)?;
    control.stop(&info).with_context(|| format!("{}: cannot be stopped", block_path(id)))?;
    control.delete(&info).with_context(|| format!("{}: cannot be deleted", block_path(id)))?;
    state::remove(id);
    Ok(())
}

fn wish(control: &Control, args: &UblkArgs) -> Result<DeviceInfo> {
    let mut flags = Features::CMD_IOCTL_ENCODE.with(Features::USER_COPY);
    // On earlier kernels, what an io_uring holds of a request when its process dies was not always given back.
    if args.zero_copy && control.features().contains(Features::BUF_REG_OFF_DAEMON) {
        flags = flags.with(Features::SUPPORT_ZERO_COPY);
    }
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
    if args.scan_partitions != Some(true) {
        flags = flags.with(Features::NO_AUTO_PART_SCAN);
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
    device: &UblkDev,
    queue: u16,
    common: Arc<Common>,
    quiet: bool,
    ready: &mpsc::Sender<io::Result<()>>,
) {
    let mut serving = false;
    let serve = || -> io::Result<()> {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name(format!("pool-{}-{queue}", device.dev_info.dev_id))
            .build_local(LocalOptions::default())?;
        let channel = Channel::new(device, queue)?;
        runtime.block_on(queue::serve(channel, common, quiet, || {
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
