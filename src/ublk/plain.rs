//! The kernel's structures as bytes, and back.
//! A leaf file: the only `unsafe` is that.
#![allow(unsafe_code)]

use libublk::sys;

use super::abi::{DeviceInfo, Params};

/// A structure that the kernel reads or fills.
///
/// # Safety
/// It is `repr(C)` and made of integers without padding, so that it has no byte that is not set, and any bytes are one.
pub(super) unsafe trait Plain: Copy {
    /// Returns the structure's bytes.
    fn bytes(&self) -> &[u8] {
        // SAFETY: every byte of it is set.
        unsafe { std::slice::from_raw_parts(std::ptr::from_ref(self).cast(), size_of::<Self>()) }
    }

    /// Returns the structure of these bytes; None where they are too few or too many.
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        // SAFETY: any bytes are such integers; their number is checked, and their place need not be aligned.
        (bytes.len() == size_of::<Self>()).then(|| unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() })
    }
}

// SAFETY: 2 + 2 + 2 + 2 + 4 + 4 + 4 + 4 + 8 + 8 + 4 + 4 + 8 + 8 bytes.
unsafe impl Plain for DeviceInfo {}
// SAFETY: 4 + 4 bytes, parts of 32, 20, 16, 32 and 8 bytes, 4 bytes, a part of 16.
unsafe impl Plain for Params {}
// SAFETY: 4 + 2 + 2 + 8 + 8 + 2 + 2 + 4 bytes.
unsafe impl Plain for sys::ublksrv_ctrl_cmd {}
// SAFETY: 2 + 2 + 4 + 8 bytes.
unsafe impl Plain for sys::ublksrv_io_cmd {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_survive_their_bytes() {
        let info =
            DeviceInfo { dev_id: 7, ublksrv_pid: -1, flags: 1 << 40, owner_gid: 9, ..Default::default() };
        let back = DeviceInfo::from_bytes(info.bytes()).unwrap();
        assert_eq!((back.dev_id, back.ublksrv_pid, back.flags, back.owner_gid), (7, -1, 1 << 40, 9));
        let mut params = Params { len: 136, ..Default::default() };
        params.basic.dev_sectors = 1 << 50;
        params.segment.max_segments = 129;
        let back = Params::from_bytes(params.bytes()).unwrap();
        assert_eq!((back.len, back.basic.dev_sectors, back.segment.max_segments), (136, 1 << 50, 129));
        assert!(Params::from_bytes(&params.bytes()[1..]).is_none());
    }

    #[test]
    fn structures_have_no_padding() {
        let info = DeviceInfo::default();
        let DeviceInfo { nr_hw_queues, queue_depth, state, pad0, max_io_buf_bytes, dev_id, .. } = info;
        let DeviceInfo { ublksrv_pid, pad1, flags, ublksrv_flags, owner_uid, owner_gid, .. } = info;
        let halves = [nr_hw_queues, queue_depth, state, pad0].map(|field| size_of_val(&field));
        let words = [max_io_buf_bytes, dev_id, pad1, owner_uid, owner_gid].map(|field| size_of_val(&field));
        let longs = [flags, ublksrv_flags, info.reserved1, info.reserved2].map(|field| size_of_val(&field));
        let sum = |parts: &[usize]| parts.iter().sum::<usize>();
        assert_eq!(sum(&halves) + sum(&words) + sum(&longs) + size_of_val(&ublksrv_pid), size_of_val(&info));
        let Params { len, types, basic, discard, devt, zoned, dma, pad, segment } = Params::default();
        let parts = [size_of_val(&len), size_of_val(&types), size_of_val(&basic), size_of_val(&discard)];
        let more = [size_of_val(&devt), size_of_val(&zoned), size_of_val(&dma), size_of_val(&pad)];
        assert_eq!(sum(&parts) + sum(&more) + size_of_val(&segment), size_of::<Params>());
    }
}
