//! A process through which this host's kernel writes must not wait, for memory, for the kernel to write through it.
//! A leaf file: the only `unsafe` is prctl(2).
#![allow(unsafe_code)]

use std::io;

/// prctl(2)'s PR_SET_IO_FLUSHER, Linux 5.6.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that this thread, and those that it starts from now on, carry such writes. To be called before
/// threads are made.
///
/// # Errors
/// EPERM without CAP_SYS_RESOURCE, EINVAL before Linux 5.6.
pub(crate) fn mark() -> io::Result<()> {
    // SAFETY: PR_SET_IO_FLUSHER takes integers and touches no memory.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The same where it is no condition: the data is as safe without, but under great need of memory a writer on this host
/// could come to stand still.
pub(crate) fn become_one() {
    let Err(error) = mark() else { return };
    match error.raw_os_error() {
        // Users and containers have it rarely: no news for them.
        Some(libc::EPERM) => {
            tracing::info!(
                "no CAP_SYS_RESOURCE: not marked as an I/O flusher (prctl), which matters when memory runs out"
            );
        }
        // Before Linux 5.6.
        Some(libc::EINVAL) => {}
        _ => tracing::warn!("cannot be marked as an I/O flusher: {error}"),
    }
}
