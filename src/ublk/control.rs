//! /dev/ublk-control: the commands that make, start, stop, recover and delete devices. Each goes through an io_uring of
//! 128-byte entries and is waited for: call them where a thread may wait.
//! A leaf file: memory goes to the kernel here.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use io_uring::squeue::Entry128;
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;

use super::abi::{self, Command, DeviceInfo, Features, Params};

/// The way to the driver.
const PATH: &str = "/dev/ublk-control";

/// The control device and a ring for its commands.
pub(super) struct Control {
    file: File,
    ring: IoUring<Entry128>,
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
        let ring =
            IoUring::<Entry128>::builder().dontfork().build(4).map_err(|error| match error.kind() {
                io::ErrorKind::PermissionDenied => {
                    anyhow!(
                        "ublk needs io_uring, which is denied here (kernel.io_uring_disabled, or seccomp)"
                    )
                }
                _ => anyhow!(error).context("ublk needs io_uring, and the kernel refuses one"),
            })?;
        let mut control = Control { file, ring, encoded: true, features: Features::default() };
        let mut features = [0; 8];
        let asked = Payload { buffer: &mut features, ..Payload::default() };
        match control.execute(abi::GET_FEATURES, 0, asked) {
            Ok(()) => control.features = Features(u64::from_ne_bytes(features)),
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
    /// became: features that the kernel does not have are missing.
    pub(super) fn add(&mut self, wish: &DeviceInfo) -> Result<DeviceInfo, Errno> {
        let mut bytes = info_bytes(wish);
        let id = wish.dev_id;
        self.execute(abi::ADD_DEV, id, Payload { buffer: &mut bytes, ..Payload::default() })?;
        Ok(info_from(&bytes))
    }

    /// A device as the kernel sees it.
    ///
    /// # Errors
    /// NODEV where there is none of that number.
    pub(super) fn info(&mut self, id: u32) -> Result<DeviceInfo, Errno> {
        let mut bytes = [0; size_of::<DeviceInfo>()];
        let with_path = Payload { buffer: &mut bytes, path: Some(character_path(id)), ..Payload::default() };
        match self.execute(abi::GET_DEV_INFO2, id, with_path) {
            // Kernels before 6.4 do not know it; nor does it work where the node is still being made.
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOENT) => {
                self.execute(abi::GET_DEV_INFO, id, Payload { buffer: &mut bytes, ..Payload::default() })?;
            }
            other => other?,
        }
        Ok(info_from(&bytes))
    }

    /// Sets size and limits; before the start.
    pub(super) fn set_params(&mut self, device: &DeviceInfo, params: &Params) -> Result<(), Errno> {
        let mut bytes = params_bytes(params);
        self.execute(abi::SET_PARAMS, device.dev_id, Payload { buffer: &mut bytes, ..of(device) })
    }

    /// Size and limits as they are.
    pub(super) fn params(&mut self, device: &DeviceInfo) -> Result<Params, Errno> {
        let mut bytes = params_bytes(&Params::default());
        self.execute(abi::GET_PARAMS, device.dev_id, Payload { buffer: &mut bytes, ..of(device) })?;
        Ok(params_from(&bytes))
    }

    /// Starts the device, for this process. Waits until every tag of every queue has been fetched.
    pub(super) fn start(&mut self, device: &DeviceInfo) -> Result<(), Errno> {
        let data = u64::from(std::process::id());
        self.execute(abi::START_DEV, device.dev_id, Payload { data, ..of(device) })
    }

    /// Stops the device. What is dirty in the page cache is written first, and requests in flight are waited for.
    pub(super) fn stop(&mut self, device: &DeviceInfo) -> Result<(), Errno> {
        self.execute(abi::STOP_DEV, device.dev_id, of(device))
    }

    /// Deletes the device, stopping it where it is not. Where a file system on it is still mounted, the number is free
    /// once that is gone; kernels that can do nothing else (before 6.9) wait for it here.
    pub(super) fn delete(&mut self, device: &DeviceInfo) -> Result<(), Errno> {
        match self.execute(abi::DEL_DEV_ASYNC, device.dev_id, of(device)) {
            Ok(()) => {}
            Err(Errno::NODEV) => return Err(Errno::NODEV),
            Err(_) => return self.execute(abi::DEL_DEV, device.dev_id, of(device)),
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
    pub(super) fn start_recovery(&mut self, device: &DeviceInfo) -> Result<(), Errno> {
        self.execute(abi::START_USER_RECOVERY, device.dev_id, of(device))
    }

    /// Ends it: requests flow again, to this process.
    pub(super) fn end_recovery(&mut self, device: &DeviceInfo) -> Result<(), Errno> {
        let data = u64::from(std::process::id());
        self.execute(abi::END_USER_RECOVERY, device.dev_id, Payload { data, ..of(device) })
    }

    /// Gives a started device another size, in bytes.
    pub(super) fn update_size(&mut self, device: &DeviceInfo, bytes: u64) -> Result<(), Errno> {
        self.execute(abi::UPDATE_SIZE, device.dev_id, Payload { data: bytes / abi::SECTOR, ..of(device) })
    }

    fn execute(&mut self, command: Command, id: u32, payload: Payload<'_>) -> Result<(), Errno> {
        let path = payload.path.map(|path| [path.into_bytes(), vec![0]].concat()).unwrap_or_default();
        let mut memory = [path.as_slice(), &*payload.buffer].concat();
        let length = |len: usize| u16::try_from(len).map_err(|_| Errno::INVAL);
        // struct ublksrv_ctrl_cmd
        let mut words = [0; 80];
        words[0..4].copy_from_slice(&id.to_ne_bytes());
        words[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
        if !memory.is_empty() {
            words[6..8].copy_from_slice(&length(memory.len())?.to_ne_bytes());
            words[8..16].copy_from_slice(&(memory.as_mut_ptr() as u64).to_ne_bytes());
        }
        words[16..24].copy_from_slice(&payload.data.to_ne_bytes());
        words[24..26].copy_from_slice(&length(path.len())?.to_ne_bytes());
        let op = command.op(self.encoded);
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), op).cmd(words).build();
        // SAFETY: the command holds the address of `memory`, which is neither moved nor freed before its completion
        // has come: this function does not return earlier.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Errno::BUSY)?;
        let result = loop {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(error) if Errno::from_io_error(&error) == Some(Errno::INTR) => {}
                Err(error) => {
                    // Whether the kernel has the command is not known: the memory must stay.
                    std::mem::forget(memory);
                    return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
                }
            }
            if let Some(completion) = self.ring.completion().next() {
                break completion.result();
            }
        };
        if result < 0 {
            return Err(Errno::from_raw_os_error(-result));
        }
        payload.buffer.copy_from_slice(&memory[path.len()..]);
        Ok(())
    }
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

fn info_bytes(info: &DeviceInfo) -> [u8; size_of::<DeviceInfo>()] {
    // SAFETY: a repr(C) structure of integers without padding (its size is tested) has no byte that is not set.
    unsafe { std::mem::transmute::<DeviceInfo, [u8; size_of::<DeviceInfo>()]>(*info) }
}

fn info_from(bytes: &[u8; size_of::<DeviceInfo>()]) -> DeviceInfo {
    // SAFETY: any bytes are such integers.
    unsafe { std::mem::transmute::<[u8; size_of::<DeviceInfo>()], DeviceInfo>(*bytes) }
}

/// Bytes of `Params` that are fields; four of padding follow.
const PARAMS_LEN: usize = 76;

fn params_bytes(params: &Params) -> [u8; PARAMS_LEN] {
    let len = u32::try_from(PARAMS_LEN).unwrap_or_default();
    let params = Params { len, ..*params };
    let mut bytes = [0; PARAMS_LEN];
    // SAFETY: the first 76 bytes of Params are its fields, all of them integers, with no padding between.
    unsafe {
        std::ptr::copy_nonoverlapping((&raw const params).cast::<u8>(), bytes.as_mut_ptr(), PARAMS_LEN)
    };
    bytes
}

fn params_from(bytes: &[u8; PARAMS_LEN]) -> Params {
    let mut params = Params::default();
    // SAFETY: as above, the other way; any bytes are such integers.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut params).cast::<u8>(), PARAMS_LEN) };
    params
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
    fn structures_survive_their_bytes() {
        let info =
            DeviceInfo { dev_id: 7, ublksrv_pid: -1, flags: 1 << 40, owner_gid: 9, ..Default::default() };
        let back = info_from(&info_bytes(&info));
        assert_eq!((back.dev_id, back.ublksrv_pid, back.flags, back.owner_gid), (7, -1, 1 << 40, 9));
        let params = Params { dev_sectors: 1 << 50, disk_minor: 3, ..Default::default() };
        assert_eq!(params_from(&params_bytes(&params)), Params { len: 76, ..params });
    }
}
