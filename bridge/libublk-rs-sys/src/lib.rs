//! The kernel's ublk interface (linux/ublk_cmd.h) as libublk 0.4.8 expects it from `libublk-rs-sys` 0.1.2. The bindings are
//! made beforehand, by `contrib/libublk-bindings`, so that no build needs libclang.

#![allow(non_upper_case_globals, non_camel_case_types, non_snake_case, dead_code)]

include!("ublk_cmd.rs");

/// Returns the registration that the `addr` field of a submission holds: bits 0 to 15 are the buffer's index, bits 16 to
/// 23 flags.
#[inline(always)]
pub fn ublk_sqe_addr_to_auto_buf_reg(sqe_addr: u64) -> ublk_auto_buf_reg {
    ublk_auto_buf_reg { index: sqe_addr as u16, flags: (sqe_addr >> 16) as u8, ..Default::default() }
}

/// Returns a registration as the `addr` field of a submission holds it, reserved fields included.
#[inline(always)]
pub fn ublk_auto_buf_reg_to_sqe_addr(buf: &ublk_auto_buf_reg) -> u64 {
    buf.index as u64
        | (buf.flags as u64) << 16
        | (buf.reserved0 as u64) << 24
        | (buf.reserved1 as u64) << 32
}
