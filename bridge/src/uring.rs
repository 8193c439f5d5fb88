//! Operations that may wait for storage: what they own ([`Op`]), and the io_uring of each thread that runs them.
//!
//! Knows nothing of backends; what to do where no ring is allowed is the caller's.

mod op;

pub(crate) use op::{Call, Op};

/// Whether this process may make a ring.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn allowed() -> std::io::Result<()> {
    io_uring::IoUring::new(2).map(drop)
}
