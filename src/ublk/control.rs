//! /dev/ublk-control: the commands that make, start, stop, recover and delete devices. Each is waited for, for a limited
//! time: call them where a thread may wait.
//!
//! Commands that only ask go out from this process. Those that change something go out from a child (`apart`), because
//! where the kernel does not answer, the process that has sent the command cannot even end.
//!
//! | sent by | commands | because |
//! |---|---|---|
//! | `UblkCtrl`, in a child (`library`) | STOP, DEL, START_USER_RECOVERY, UPDATE_SIZE | it does them as they are wanted |
//! | an entry on its control ring, in a child | ADD | it would delete somebody else's device |
//! | the same | START, END_USER_RECOVERY | it would name the child as the server |
//! | the same | SET_PARAMS | its parameters end before the limit on segments |
//! | an entry on its control ring, here | those that only ask | it waits without a limit |

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::io::Errno;

use super::abi::{self, Command, Described, DeviceInfo, Features, Params};
use super::apart;
use super::command::{Call, Cause, CommandError, CommandRing};
use super::plain::Plain;

/// The way to the driver.
const PATH: &str = "/dev/ublk-control";

/// How long the kernel may take to answer a command.
pub(super) const ANSWER: Duration = Duration::from_secs(15);

/// How long it may take to end a device: dirty pages are written first, and requests in flight are waited for.
const ENDING: Duration = Duration::from_secs(60);

/// How long it may take to begin a recovery: libublk asks for half a minute while the dead process has the device open.
const RECOVERING: Duration = Duration::from_secs(45);

/// How long it may take to start a device: kernels that scan for partitions wait for the source.
const STARTING: Duration = Duration::from_secs(600);

/// The control device and a ring for its commands.
pub(super) struct Control {
    file: File,
    ring: CommandRing,
    /// Commands are encoded (6.4 and later).
    encoded: bool,
    features: Features,
}

/// What a command carries.
#[derive(Default)]
struct Payload<'a> {
    /// Inline data.
    data: u64,
    /// What the kernel reads or fills.
    buffer: &'a mut [u8],
    /// The character device's path, which the kernel wants in front of the buffer where users own devices.
    path: Option<String>,
}

impl Control {
    /// Opens the control device, and asks the driver what it can do.
    ///
    /// # Errors
    /// One line that says why this kernel or this user has no ublk, and the way out.
    pub(super) fn open() -> Result<Self> {
        let file = File::options().read(true).write(true).open(PATH).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => anyhow!(
                "this kernel has no ublk ({PATH} is missing): load it with `modprobe ublk_drv` (Linux 6.0 or later), \
                 or serve a file with `nbdbridge fuse`"
            ),
            io::ErrorKind::PermissionDenied => anyhow!(
                "no permission for {PATH}: run as root, or install contrib/udev's rule and use --unprivileged"
            ),
            _ => anyhow!(error).context(format!("cannot open {PATH}")),
        })?;
        let mut ring = CommandRing::default();
        ring.prepare().map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => {
                anyhow!("ublk needs io_uring, which is denied here (kernel.io_uring_disabled, or seccomp)")
            }
            _ => anyhow!(error).context("ublk needs io_uring, and the kernel refuses one"),
        })?;
        let mut control = Control { file, ring, encoded: true, features: Features::default() };
        let mut features = [0; 8];
        let asked = Payload { buffer: &mut features, ..Payload::default() };
        match control.ask(abi::GET_FEATURES, 0, asked) {
            Ok(()) => control.features = Features(u64::from_ne_bytes(features)),
            Err(error) if error.is_unanswered() => return Err(error.into()),
            // Before 6.5 nobody can ask; bare numbers and the first features are what all of those have.
            Err(_) => {
                control.encoded = false;
                control.features = Features::USER_RECOVERY.with(Features::USER_RECOVERY_REISSUE);
            }
        }
        Ok(control)
    }

    /// What the driver can do.
    pub(super) fn features(&self) -> Features {
        self.features
    }

    /// Makes a device; where `dev_id` is `u32::MAX`, the kernel chooses the number. The answer is the device as it
    /// became: features that the kernel does not have are missing. `adopt` notes that the device is ours. A device that
    /// comes too late, or is not noted, is deleted, also when this process is killed meanwhile.
    ///
    /// # Errors
    /// The kernel's refusal or silence, and the error of `adopt`.
    pub(super) fn add(
        &mut self,
        wish: &DeviceInfo,
        adopt: impl FnOnce(&DeviceInfo) -> Result<()>,
    ) -> Result<DeviceInfo> {
        let mut bytes = wish.bytes().to_vec();
        let mut call =
            self.call(abi::ADD_DEV, wish.dev_id, Payload { buffer: &mut bytes, ..Payload::default() });
        let answered = self.apart(&mut call, ANSWER)?;
        let added = info_in(&call).context("ADD_DEV: a short answer")?;
        adopt(&added)?;
        if !answered.accept() {
            return Err(CommandError::new(abi::ADD_DEV, Cause::Lost).into());
        }
        Ok(added)
    }

    /// A device as the kernel sees it.
    ///
    /// # Errors
    /// NODEV where there is none of that number.
    pub(super) fn info(&mut self, id: u32) -> Result<DeviceInfo, CommandError> {
        let mut bytes = DeviceInfo::default().bytes().to_vec();
        let with_path = Payload { buffer: &mut bytes, path: Some(character_path(id)), ..Payload::default() };
        match self.ask(abi::GET_DEV_INFO2, id, with_path) {
            // Kernels before 6.4 do not know it; nor does it work where the node is still being made.
            Err(error) if matches!(error.errno(), Some(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOENT)) => {
                self.ask(abi::GET_DEV_INFO, id, Payload { buffer: &mut bytes, ..Payload::default() })?;
            }
            other => other?,
        }
        Ok(DeviceInfo::from_bytes(&bytes).unwrap_or_default())
    }

    /// Returns a device as the kernel sees it.
    ///
    /// # Errors
    /// There is no device of that number, or the kernel does not tell.
    pub(super) fn find(&mut self, id: u32) -> Result<DeviceInfo> {
        self.info(id).map_err(|error| match error.errno() {
            Some(Errno::NODEV) => anyhow!("{}: no such ublk device", block_path(id)),
            _ => anyhow!(error).context(block_path(id)),
        })
    }

    /// Returns whether there is a device of this number.
    ///
    /// # Errors
    /// The kernel has not answered.
    pub(super) fn exists(&mut self, id: u32) -> Result<bool, CommandError> {
        match self.info(id) {
            Err(error) if error.is_unanswered() => Err(error),
            answered => Ok(answered.is_ok()),
        }
    }

    /// Sets size and limits; before the start.
    pub(super) fn set_params(&mut self, device: &DeviceInfo, params: &Params) -> Result<(), CommandError> {
        let mut bytes = with_len(*params).bytes().to_vec();
        self.order(abi::SET_PARAMS, device, Payload { buffer: &mut bytes, ..of(device) })
    }

    /// Size and limits as they are.
    pub(super) fn params(&mut self, device: &DeviceInfo) -> Result<Params, CommandError> {
        let mut bytes = with_len(Params::default()).bytes().to_vec();
        self.ask(abi::GET_PARAMS, device.dev_id, Payload { buffer: &mut bytes, ..of(device) })?;
        Ok(Params::from_bytes(&bytes).unwrap_or_default())
    }

    /// Starts the device, for this process. Waits until every tag of every queue has been fetched.
    pub(super) fn start(&mut self, device: &DeviceInfo) -> Result<(), CommandError> {
        let data = u64::from(std::process::id());
        self.order(abi::START_DEV, device, Payload { data, ..of(device) })
    }

    /// Stops the device. What is dirty in the page cache is written first, and requests in flight are waited for.
    pub(super) fn stop(&mut self, device: &DeviceInfo) -> Result<(), CommandError> {
        self.order(abi::STOP_DEV, device, of(device))
    }

    /// Deletes the device, stopping it where it is not. Where a file system on it is still mounted, the number is free
    /// once that is gone; kernels that can do nothing else (before 6.9) wait for it here.
    pub(super) fn delete(&mut self, device: &DeviceInfo) -> Result<(), CommandError> {
        match self.order(abi::DEL_DEV_ASYNC, device, of(device)) {
            Ok(()) => {}
            Err(error) if error.errno() == Some(Errno::NODEV) || error.is_unanswered() => return Err(error),
            Err(_) => return self.order(abi::DEL_DEV, device, of(device)),
        }
        // The usual case is over in a moment, and then the number can be used again.
        let until = Instant::now() + Duration::from_millis(500);
        while self.info(device.dev_id).is_ok() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Begins to take a device over whose process is gone.
    ///
    /// # Errors
    /// BUSY while the old process still has it open.
    pub(super) fn start_recovery(&mut self, device: &DeviceInfo) -> Result<(), CommandError> {
        self.order(abi::START_USER_RECOVERY, device, of(device))
    }

    /// Ends it: requests flow again, to this process.
    pub(super) fn end_recovery(&mut self, device: &DeviceInfo) -> Result<(), CommandError> {
        let data = u64::from(std::process::id());
        self.order(abi::END_USER_RECOVERY, device, Payload { data, ..of(device) })
    }

    /// Gives a started device another size, in bytes.
    pub(super) fn update_size(&mut self, device: &DeviceInfo, bytes: u64) -> Result<(), CommandError> {
        self.order(abi::UPDATE_SIZE, device, Payload { data: bytes / abi::SECTOR, ..of(device) })
    }

    /// Sends a command that only asks.
    fn ask(&mut self, command: Command, id: u32, payload: Payload<'_>) -> Result<(), CommandError> {
        let mut call = self.call(command, id, Payload { buffer: &mut *payload.buffer, ..payload });
        let asked = self.ring.run(self.file.as_fd(), &mut call, Some(ANSWER));
        asked.map_err(|cause| CommandError::new(command, cause))?;
        payload.buffer.copy_from_slice(call.memory.get(call.path_len..).unwrap_or_default());
        Ok(())
    }

    /// Sends a command that changes a device, from a child.
    fn order(&self, command: Command, device: &DeviceInfo, payload: Payload<'_>) -> Result<(), CommandError> {
        let limit = match command {
            abi::START_DEV => STARTING,
            abi::START_USER_RECOVERY => RECOVERING,
            abi::STOP_DEV | abi::DEL_DEV | abi::DEL_DEV_ASYNC => ENDING,
            _ => ANSWER,
        };
        let answered = self.apart(&mut self.call(command, device.dev_id, payload), limit)?;
        answered.accept();
        Ok(())
    }

    fn apart(&self, call: &mut Call, limit: Duration) -> Result<apart::Answered, CommandError> {
        let answered = apart::run(self.file.as_fd(), call, limit, undo);
        answered.map_err(|cause| CommandError::new(call.command, cause))
    }

    fn call(&self, command: Command, id: u32, payload: Payload<'_>) -> Call {
        let path = payload.path.map(|path| [path.into_bytes(), vec![0]].concat()).unwrap_or_default();
        Call {
            command,
            encoded: self.encoded,
            id,
            data: payload.data,
            memory: [path.as_slice(), &*payload.buffer].concat(),
            path_len: path.len(),
        }
    }
}

/// The call that undoes an answered one which nobody wants any more: a device that was made is deleted.
fn undo(call: &Call) -> Option<Call> {
    let added = info_in(call).filter(|_| call.command == abi::ADD_DEV)?;
    let Payload { path, .. } = of(&added);
    let path = path.map(|path| [path.into_bytes(), vec![0]].concat()).unwrap_or_default();
    let path_len = path.len();
    Some(Call {
        command: abi::DEL_DEV,
        encoded: call.encoded,
        id: added.dev_id,
        data: 0,
        memory: path,
        path_len,
    })
}

/// The device that the kernel has filled in.
fn info_in(call: &Call) -> Option<DeviceInfo> {
    DeviceInfo::from_bytes(call.memory.get(call.path_len..)?)
}

/// /dev/ublkcN: where requests come from.
pub(super) fn character_path(id: u32) -> String {
    format!("/dev/ublkc{id}")
}

/// /dev/ublkbN: the disk.
pub(super) fn block_path(id: u32) -> String {
    format!("/dev/ublkb{id}")
}

/// The number in `/dev/ublkbN`, `ublkbN` or `N`.
pub(super) fn parse_id(text: &str) -> Result<u32> {
    let name = text.rsplit('/').next().unwrap_or(text);
    let digits = name.strip_prefix("ublkb").unwrap_or(name);
    match digits.parse() {
        Ok(id) => Ok(id),
        Err(_) if digits.contains('p') => bail!("{text}: is a partition; give the whole disk"),
        Err(error) => Err(error).with_context(|| format!("{text}: not a ublk device; write /dev/ublkb0")),
    }
}

fn of(device: &DeviceInfo) -> Payload<'static> {
    let owned = device.features().contains(Features::UNPRIVILEGED_DEV);
    Payload { path: owned.then(|| character_path(device.dev_id)), ..Payload::default() }
}

fn with_len(params: Params) -> Params {
    Params { len: u32::try_from(size_of::<Params>()).unwrap_or_default(), ..params }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_devices() {
        for (text, id) in
            [("/dev/ublkb0", Some(0)), ("ublkb12", Some(12)), ("7", Some(7)), ("/dev/sda", None)]
        {
            assert_eq!(parse_id(text).ok(), id, "{text}");
        }
        let error = format!("{:#}", parse_id("/dev/ublkb0p1").unwrap_err());
        assert!(error.contains("whole disk"), "{error}");
    }

    #[test]
    fn a_device_that_nobody_wants_is_deleted() {
        let added = DeviceInfo { dev_id: 7, ..Default::default() };
        let call = |command| Call {
            command,
            encoded: true,
            id: u32::MAX,
            data: 0,
            memory: added.bytes().to_vec(),
            path_len: 0,
        };
        let undone = undo(&call(abi::ADD_DEV)).unwrap();
        assert_eq!((undone.command, undone.id), (abi::DEL_DEV, 7));
        assert!(undo(&call(abi::GET_DEV_INFO)).is_none());
    }
}
