//! The kernel's ublk interface as numbers and structures (linux/ublk_cmd.h, Linux 6.0 to 7.x), as far as it is used
//! here. Names are the header's, less their prefix. What is done with them is `control`'s and `channel`'s business.

use std::fmt;

/// Bytes of a sector, whatever the device's logical block is.
pub(super) const SECTOR: u64 = 512;

/// `_IOC` directions of an encoded command.
const READ: u32 = 2;
const READ_WRITE: u32 = 3;

/// A command: its name and number, and what its encoded form tells about its argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Command {
    name: &'static str,
    number: u32,
    direction: u32,
    argument: u32,
}

impl Command {
    const fn control(name: &'static str, number: u32, direction: u32) -> Self {
        // sizeof(struct ublksrv_ctrl_cmd)
        Command { name, number, direction, argument: 32 }
    }

    const fn io(name: &'static str, number: u32) -> Self {
        // sizeof(struct ublksrv_io_cmd)
        Command { name, number, direction: READ_WRITE, argument: 16 }
    }

    /// Returns the header's name.
    pub(super) const fn name(self) -> &'static str {
        self.name
    }

    /// As `cmd_op` of a submission: encoded like an ioctl (6.4 and later), or the bare number of older kernels.
    pub(super) const fn op(self, encoded: bool) -> u32 {
        if encoded {
            self.direction << 30 | self.argument << 16 | (b'u' as u32) << 8 | self.number
        } else {
            self.number
        }
    }
}

pub(super) const GET_DEV_INFO: Command = Command::control("GET_DEV_INFO", 0x02, READ);
pub(super) const ADD_DEV: Command = Command::control("ADD_DEV", 0x04, READ_WRITE);
pub(super) const DEL_DEV: Command = Command::control("DEL_DEV", 0x05, READ_WRITE);
pub(super) const START_DEV: Command = Command::control("START_DEV", 0x06, READ_WRITE);
pub(super) const STOP_DEV: Command = Command::control("STOP_DEV", 0x07, READ_WRITE);
pub(super) const SET_PARAMS: Command = Command::control("SET_PARAMS", 0x08, READ_WRITE);
pub(super) const GET_PARAMS: Command = Command::control("GET_PARAMS", 0x09, READ);
pub(super) const START_USER_RECOVERY: Command = Command::control("START_USER_RECOVERY", 0x10, READ_WRITE);
pub(super) const END_USER_RECOVERY: Command = Command::control("END_USER_RECOVERY", 0x11, READ_WRITE);
pub(super) const GET_DEV_INFO2: Command = Command::control("GET_DEV_INFO2", 0x12, READ);
pub(super) const GET_FEATURES: Command = Command::control("GET_FEATURES", 0x13, READ);
pub(super) const DEL_DEV_ASYNC: Command = Command::control("DEL_DEV_ASYNC", 0x14, READ);
pub(super) const UPDATE_SIZE: Command = Command::control("UPDATE_SIZE", 0x15, READ_WRITE);

pub(super) const FETCH_REQ: Command = Command::io("FETCH_REQ", 0x20);
pub(super) const COMMIT_AND_FETCH_REQ: Command = Command::io("COMMIT_AND_FETCH_REQ", 0x21);
pub(super) const REGISTER_IO_BUF: Command = Command::io("REGISTER_IO_BUF", 0x23);
pub(super) const UNREGISTER_IO_BUF: Command = Command::io("UNREGISTER_IO_BUF", 0x24);

/// `UBLK_IO_RES_ABORT`: the device is going away, and the tag will see no more requests.
pub(super) const IO_RES_ABORT: i32 = -libc::ENODEV;

/// Where the requests' data is in /dev/ublkcN, for pread(2) and pwrite(2) with `USER_COPY`.
pub(super) const IO_BUF_OFFSET: u64 = 0x8000_0000;
/// `UBLK_TAG_OFF` and `UBLK_QID_OFF`: places of tag and queue in such an offset.
pub(super) const TAG_SHIFT: u32 = 25;
pub(super) const QUEUE_SHIFT: u32 = 41;

/// `UBLK_MAX_QUEUE_DEPTH`.
pub(super) const MAX_QUEUE_DEPTH: u16 = 4096;

/// A set of `UBLK_F_*`: what a driver can do, or what a device was made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Features(pub(super) u64);

impl Features {
    pub(super) const SUPPORT_ZERO_COPY: Features = Features(1 << 0);
    pub(super) const USER_RECOVERY: Features = Features(1 << 3);
    pub(super) const USER_RECOVERY_REISSUE: Features = Features(1 << 4);
    pub(super) const UNPRIVILEGED_DEV: Features = Features(1 << 5);
    pub(super) const CMD_IOCTL_ENCODE: Features = Features(1 << 6);
    pub(super) const USER_COPY: Features = Features(1 << 7);
    pub(super) const UPDATE_SIZE: Features = Features(1 << 10);
    pub(super) const BUF_REG_OFF_DAEMON: Features = Features(1 << 14);
    pub(super) const NO_AUTO_PART_SCAN: Features = Features(1 << 18);

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

/// `struct ublksrv_ctrl_dev_info`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct DeviceInfo {
    pub(super) nr_hw_queues: u16,
    pub(super) queue_depth: u16,
    pub(super) state: u16,
    pub(super) pad0: u16,
    pub(super) max_io_buf_bytes: u32,
    pub(super) dev_id: u32,
    pub(super) ublksrv_pid: i32,
    pub(super) pad1: u32,
    pub(super) flags: u64,
    pub(super) ublksrv_flags: u64,
    pub(super) owner_uid: u32,
    pub(super) owner_gid: u32,
    pub(super) reserved: [u64; 2],
}

impl DeviceInfo {
    pub(super) fn features(&self) -> Features {
        Features(self.flags)
    }

    pub(super) fn state(&self) -> State {
        match self.state {
            0 => State::Dead,
            1 => State::Live,
            2 => State::Quiesced,
            3 => State::FailIo,
            other => State::Other(other),
        }
    }
}

/// `UBLK_ATTR_*` and `UBLK_PARAM_TYPE_*`.
pub(super) const ATTR_READ_ONLY: u32 = 1 << 0;
pub(super) const ATTR_ROTATIONAL: u32 = 1 << 1;
pub(super) const ATTR_VOLATILE_CACHE: u32 = 1 << 2;
pub(super) const ATTR_FUA: u32 = 1 << 3;
pub(super) const PARAM_TYPE_BASIC: u32 = 1 << 0;
pub(super) const PARAM_TYPE_DISCARD: u32 = 1 << 1;
pub(super) const PARAM_TYPE_SEGMENT: u32 = 1 << 5;

/// `struct ublk_params`, up to what is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(super) struct Params {
    pub(super) len: u32,
    pub(super) types: u32,
    pub(super) attrs: u32,
    pub(super) logical_bs_shift: u8,
    pub(super) physical_bs_shift: u8,
    pub(super) io_opt_shift: u8,
    pub(super) io_min_shift: u8,
    pub(super) max_sectors: u32,
    pub(super) chunk_sectors: u32,
    pub(super) dev_sectors: u64,
    pub(super) virt_boundary_mask: u64,
    pub(super) discard_alignment: u32,
    pub(super) discard_granularity: u32,
    pub(super) max_discard_sectors: u32,
    pub(super) max_write_zeroes_sectors: u32,
    pub(super) max_discard_segments: u16,
    pub(super) reserved0: u16,
    pub(super) char_major: u32,
    pub(super) char_minor: u32,
    pub(super) disk_major: u32,
    pub(super) disk_minor: u32,
    pub(super) zoned: [u32; 8],
    pub(super) dma_alignment: [u32; 2],
    pub(super) pad0: u32,
    pub(super) seg_boundary_mask: u64,
    pub(super) max_segment_size: u32,
    pub(super) max_segments: u16,
    pub(super) pad1: u16,
}

/// `UBLK_IO_OP_*`.
pub(super) const IO_OP_READ: u32 = 0;
pub(super) const IO_OP_WRITE: u32 = 1;
pub(super) const IO_OP_FLUSH: u32 = 2;
pub(super) const IO_OP_DISCARD: u32 = 3;
pub(super) const IO_OP_WRITE_ZEROES: u32 = 5;
/// `UBLK_IO_F_FUA` and `UBLK_IO_F_NOUNMAP`.
pub(super) const IO_F_FUA: u32 = 1 << 13;
pub(super) const IO_F_NOUNMAP: u32 = 1 << 15;

/// `struct ublksrv_io_desc`: a request as the kernel describes it.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(super) struct IoDescriptor {
    pub(super) op_flags: u32,
    pub(super) nr_sectors: u32,
    pub(super) start_sector: u64,
    pub(super) addr: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_and_numbers_are_the_kernels() {
        assert_eq!(size_of::<DeviceInfo>(), 64);
        assert_eq!(size_of::<Params>(), 136);
        assert_eq!(std::mem::offset_of!(Params, seg_boundary_mask), 120);
        assert_eq!(std::mem::offset_of!(Params, discard_alignment), 40);
        assert_eq!(std::mem::offset_of!(Params, char_major), 60);
        assert_eq!(size_of::<IoDescriptor>(), 24);
        // From the header, through a C compiler.
        assert_eq!(ADD_DEV.op(true), 0xc020_7504);
        assert_eq!(GET_FEATURES.op(true), 0x8020_7513);
        assert_eq!(FETCH_REQ.op(true), 0xc010_7520);
        assert_eq!(FETCH_REQ.op(false), 0x20);
    }
}
