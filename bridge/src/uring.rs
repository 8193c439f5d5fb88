//! Operations that may wait for storage: what they own ([`Op`]), and the io_uring of each thread that runs them.
//!
//! ```text
//!   submit ──op──> ring ──one system call for all that came in this tick──> kernel
//!   Completion <── driver, a task of the thread's runtime, woken by the ring's descriptor
//! ```
//!
//! A ring is made when its thread first needs one, and lives as long as its driver: when the runtime ends, the driver
//! waits for what the kernel still has. What to do where no ring is allowed is the caller's.

mod driver;
mod op;
mod ring;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::sync::{Arc, Weak};

use rustix::io::Errno;
use tokio::runtime::Handle;

use driver::{Completion, Shared};
pub(crate) use op::{Call, Op};

thread_local! {
    static MINE: RefCell<Mine> = const { RefCell::new(Mine::Untried) };
}

/// What this thread knows of its ring.
enum Mine {
    Untried,
    Denied,
    Made(tokio::runtime::Id, Weak<Shared>),
}

/// Starts an operation on this thread's ring; gives it back where there is none. It must be called on a runtime
/// with an I/O driver, and the future be polled there.
pub(crate) fn submit(op: Op) -> Result<Completion, Op> {
    match current() {
        Some(shared) => shared.submit(op),
        None => Err(op),
    }
}

/// Whether this thread may make a ring.
///
/// # Errors
/// The kernel's refusal.
pub(crate) fn allowed() -> std::io::Result<()> {
    ring::Ring::new().map(drop)
}

fn current() -> Option<Arc<Shared>> {
    let handle = Handle::try_current().ok()?;
    MINE.with_borrow_mut(|mine| {
        match mine {
            Mine::Denied => return None,
            Mine::Made(id, shared) if *id == handle.id() => {
                if let Some(shared) = shared.upgrade().filter(|shared| shared.open()) {
                    return Some(shared);
                }
            }
            Mine::Made(..) | Mine::Untried => {}
        }
        match driver::start(&handle) {
            Ok(shared) => {
                *mine = Mine::Made(handle.id(), Arc::downgrade(&shared));
                Some(shared)
            }
            Err(error) => {
                // EPERM: seccomp (the default of container engines) or a sysctl. ENOSYS, EINVAL: the kernel. ENOMEM:
                // RLIMIT_MEMLOCK before 5.12. What may pass (EMFILE) is tried again.
                let errno = Errno::from_io_error(&error);
                if matches!(errno, Some(Errno::PERM | Errno::NOSYS | Errno::INVAL | Errno::NOMEM)) {
                    tracing::info!(%error, "no io_uring on this thread: threads do its work");
                    *mine = Mine::Denied;
                }
                None
            }
        }
    })
}
