//! What this door needs of the kernel's ublk interface and libublk lacks. Structures and numbers are `libublk::sys`'s
//! (linux/ublk_cmd.h); here are the commands' names for messages, the features with their use, a device's state, and the
//! parameters behind those that libublk knows. What is done with them is `control`'s and `channel`'s business.

use std::fmt;

use libublk::sys;

/// A device as the kernel describes it.
pub(super) type DeviceInfo = sys::ublksrv_ctrl_dev_info;

/// Bytes of a sector, whatever the device's logical block is.
pub(super) const SECTOR: u64 = 512;

/// A control command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Command {
    name: &'static str,
    op: u32,
}

impl Command {
    /// Returns the header's name.
    pub(super) const fn name(self) -> &'static str {
        self.name
    }

    /// Returns `cmd_op` of a submission: encoded like an ioctl (6.4 and later), or the bare number of older kernels.
    pub(super) const fn op(self, encoded: bool) -> u32 {
        if encoded { self.op } else { self.op & 0xff }
    }
}

const fn command(name: &'static str, op: u32) -> Command {
    Command { name, op }
}

pub(super) const GET_DEV_INFO: Command = command("GET_DEV_INFO", sys::UBLK_U_CMD_GET_DEV_INFO);
pub(super) const ADD_DEV: Command = command("ADD_DEV", sys::UBLK_U_CMD_ADD_DEV);
pub(super) const DEL_DEV: Command = command("DEL_DEV", sys::UBLK_U_CMD_DEL_DEV);
pub(super) const START_DEV: Command = command("START_DEV", sys::UBLK_U_CMD_START_DEV);
pub(super) const STOP_DEV: Command = command("STOP_DEV", sys::UBLK_U_CMD_STOP_DEV);
pub(super) const SET_PARAMS: Command = command("SET_PARAMS", sys::UBLK_U_CMD_SET_PARAMS);
pub(super) const GET_PARAMS: Command = command("GET_PARAMS", sys::UBLK_U_CMD_GET_PARAMS);
pub(super) const START_USER_RECOVERY: Command =
    command("START_USER_RECOVERY", sys::UBLK_U_CMD_START_USER_RECOVERY);
pub(super) const END_USER_RECOVERY: Command = command("END_USER_RECOVERY", sys::UBLK_U_CMD_END_USER_RECOVERY);
pub(super) const GET_DEV_INFO2: Command = command("GET_DEV_INFO2", sys::UBLK_U_CMD_GET_DEV_INFO2);
pub(super) const GET_FEATURES: Command = command("GET_FEATURES", sys::UBLK_U_CMD_GET_FEATURES);
pub(super) const DEL_DEV_ASYNC: Command = command("DEL_DEV_ASYNC", sys::UBLK_U_CMD_DEL_DEV_ASYNC);
pub(super) const UPDATE_SIZE: Command = command("UPDATE_SIZE", sys::UBLK_U_CMD_UPDATE_SIZE);

/// A set of `UBLK_F_*`: what a driver can do, or what a device was made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Features(pub(super) u64);

impl Features {
    pub(super) const SUPPORT_ZERO_COPY: Features = Features(sys::UBLK_F_SUPPORT_ZERO_COPY as u64);
    pub(super) const USER_RECOVERY: Features = Features(sys::UBLK_F_USER_RECOVERY as u64);
    pub(super) const USER_RECOVERY_REISSUE: Features = Features(sys::UBLK_F_USER_RECOVERY_REISSUE as u64);
    pub(super) const UNPRIVILEGED_DEV: Features = Features(sys::UBLK_F_UNPRIVILEGED_DEV as u64);
    pub(super) const CMD_IOCTL_ENCODE: Features = Features(sys::UBLK_F_CMD_IOCTL_ENCODE as u64);
    pub(super) const USER_COPY: Features = Features(sys::UBLK_F_USER_COPY as u64);
    pub(super) const UPDATE_SIZE: Features = Features(sys::UBLK_F_UPDATE_SIZE as u64);
    pub(super) const BUF_REG_OFF_DAEMON: Features = Features(sys::UBLK_F_BUF_REG_OFF_DAEMON as u64);
    pub(super) const NO_AUTO_PART_SCAN: Features = Features(sys::UBLK_F_NO_AUTO_PART_SCAN as u64);

    /// Every feature by its bit: its name in the kernel, and what it is here.
    pub(super) const NAMES: [(u32, &'static str, &'static str); 20] = [
        (0, "SUPPORT_ZERO_COPY", "used with --zero-copy, where BUF_REG_OFF_DAEMON is there too"),
        (1, "URING_CMD_COMP_IN_TASK", "not used: for measurements"),
        (2, "NEED_GET_DATA", "not used: USER_COPY does it better"),
        (3, "USER_RECOVERY", "used: a device outlives its process"),
        (4, "USER_RECOVERY_REISSUE", "used: the successor gets what was in flight"),
        (5, "UNPRIVILEGED_DEV", "used with --unprivileged"),
        (6, "CMD_IOCTL_ENCODE", "used"),
        (7, "USER_COPY", "used: data is copied once, where it is wanted"),
        (8, "ZONED", "not used: no zoned sources"),
        (9, "USER_RECOVERY_FAIL_IO", "not used: requests wait for the successor"),
        (10, "UPDATE_SIZE", "used: the device grows while it is in use"),
        (11, "AUTO_BUF_REG", "not used: small requests are cheaper without"),
        (12, "QUIESCE", "not used: an end is a stop, or unexpected"),
        (13, "PER_IO_DAEMON", "not used: a thread for each queue"),
        (14, "BUF_REG_OFF_DAEMON", "not used; a sign that SUPPORT_ZERO_COPY has come of age"),
        (15, "BATCH_IO", "not used"),
        (16, "INTEGRITY", "not used: sources have no metadata"),
        (17, "SAFE_STOP_DEV", "not used: who holds the device is said by name"),
        (18, "NO_AUTO_PART_SCAN", "used, except with --scan-partitions"),
        (19, "SHMEM_ZC", "not used"),
    ];

    pub(super) const fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    #[must_use]
    pub(super) const fn with(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }

    /// Those of `self` that `other` has too.
    #[must_use]
    pub(super) const fn both(self, other: Features) -> Features {
        Features(self.0 & other.0)
    }
}

/// `UBLK_S_DEV_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Not started, or stopped.
    Dead,
    /// Served.
    Live,
    /// Its process is gone; requests wait for a successor.
    Quiesced,
    /// Its process is gone; requests fail.
    FailIo,
    /// A kernel newer than this program knows it.
    Other(u16),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            State::Dead => f.write_str("dead"),
            State::Live => f.write_str("live"),
            State::Quiesced => f.write_str("waiting"),
            State::FailIo => f.write_str("failing"),
            State::Other(number) => write!(f, "state {number}"),
        }
    }
}

/// What a device's description means.
pub(super) trait Described {
    /// Returns the features that the device was made with.
    fn features(&self) -> Features;

    /// Returns the device's state.
    fn state(&self) -> State;
}

impl Described for DeviceInfo {
    fn features(&self) -> Features {
        Features(self.flags)
    }

    fn state(&self) -> State {
        match u32::from(self.state) {
            sys::UBLK_S_DEV_DEAD => State::Dead,
            sys::UBLK_S_DEV_LIVE => State::Live,
            sys::UBLK_S_DEV_QUIESCED => State::Quiesced,
            sys::UBLK_S_DEV_FAIL_IO => State::FailIo,
            _ => State::Other(self.state),
        }
    }
}

/// `struct ublk_params` of Linux 6.15 and later, up to what is used: `sys::ublk_params` ends before the last two parts.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct Params {
    pub(super) len: u32,
    pub(super) types: u32,
    pub(super) basic: sys::ublk_param_basic,
    pub(super) discard: sys::ublk_param_discard,
    pub(super) devt: sys::ublk_param_devt,
    pub(super) zoned: sys::ublk_param_zoned,
    pub(super) dma: sys::ublk_param_dma_align,
    pub(super) pad: u32,
    pub(super) segment: sys::ublk_param_segment,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn parameters_continue_those_of_libublk() {
        assert_eq!(size_of::<Params>(), 136);
        assert_eq!(offset_of!(Params, basic), offset_of!(sys::ublk_params, basic));
        assert_eq!(offset_of!(Params, discard), offset_of!(sys::ublk_params, discard));
        assert_eq!(offset_of!(Params, devt), offset_of!(sys::ublk_params, devt));
        assert_eq!(offset_of!(Params, zoned), offset_of!(sys::ublk_params, zoned));
        assert_eq!((offset_of!(Params, dma), offset_of!(Params, segment)), (108, 120));
    }

    #[test]
    fn structures_and_numbers_are_the_kernels() {
        // From the kernel's header, through a C compiler: the bindings were not.
        assert_eq!(size_of::<DeviceInfo>(), 64);
        assert_eq!(size_of::<sys::ublksrv_ctrl_cmd>(), 32);
        assert_eq!(size_of::<sys::ublksrv_io_desc>(), 24);
        assert_eq!(ADD_DEV.op(true), 0xc020_7504);
        assert_eq!(GET_FEATURES.op(true), 0x8020_7513);
        assert_eq!(ADD_DEV.op(false), 0x04);
        assert_eq!(sys::UBLK_U_IO_FETCH_REQ, 0xc010_7520);
        for (bit, name, _) in Features::NAMES {
            let known = [
                ("USER_COPY", sys::UBLK_F_USER_COPY),
                ("UPDATE_SIZE", sys::UBLK_F_UPDATE_SIZE),
                ("NO_AUTO_PART_SCAN", sys::UBLK_F_NO_AUTO_PART_SCAN),
            ];
            assert!(known.iter().all(|(known, flag)| (*known == name) == (*flag == 1 << bit)), "{name}");
        }
    }
}
