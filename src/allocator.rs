//! How glibc's allocator keeps memory: less than by itself.
//!
//! Left alone it raises its mmap threshold with each large buffer that is freed, and then keeps the buffers of a
//! burst for ever. With a fixed threshold large buffers go back to the system when they are freed; the pipeline
//! keeps a few itself (`bridge::buffer`).
//! A leaf file: the only `unsafe` is mallopt(3).
#![allow(unsafe_code)]

/// Buffers from this size on are mapped by themselves; so much free memory is kept at the end of a heap.
#[cfg(target_env = "gnu")]
const THRESHOLD_BYTES: libc::c_int = 128 << 10;

/// Sets the limits. To be called before threads are made.
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    for setting in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: mallopt takes two integers and changes nothing but the allocator's settings; refused, it
        // returns 0 and the defaults stay.
        unsafe { libc::mallopt(setting, THRESHOLD_BYTES) };
    }
}
