//! Between the kernel and the pipeline: fallocate(2)'s modes and errors, each in one table.

use bridge::{Error, ErrorKind};
use fuser::Errno;

/// What fallocate(2) asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Space {
    /// Reads as zeroes, and gives its space back.
    Punch,
    /// Reads as zeroes, and keeps its space.
    Zero,
    /// Keeps its data, and gets its space.
    Allocate,
}

/// A mode of fallocate(2), and whether the file keeps its size; None for those that we do not have (collapse, insert,
/// unshare).
pub(super) fn fallocate_mode(mode: i32) -> Option<(Space, bool)> {
    let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    let space = match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Space::Allocate,
        libc::FALLOC_FL_PUNCH_HOLE if keep_size => Space::Punch,
        libc::FALLOC_FL_ZERO_RANGE => Space::Zero,
        _ => return None,
    };
    Some((space, keep_size))
}

/// The errno that a program gets for a failed request: the storage's own where there is one.
pub(super) fn errno(error: &Error) -> Errno {
    match error.errno() {
        // To the kernel it means that we do not know the operation, which it then never asks for again; for fsync that
        // would be success for ever. Numbers from 512 on are the kernel's own.
        Some(libc::ENOSYS | i32::MIN..=0 | 512..) => Errno::EIO,
        Some(errno) => Errno::from_i32(errno),
        None => match error.kind() {
            ErrorKind::InvalidInput => Errno::EINVAL,
            ErrorKind::NoSpace => Errno::ENOSPC,
            ErrorKind::ReadOnly => Errno::EROFS,
            ErrorKind::NotSupported => Errno::EOPNOTSUPP,
            ErrorKind::Overflow => Errno::EOVERFLOW,
            ErrorKind::NoMemory => Errno::ENOMEM,
            _ => Errno::EIO,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mode_of_fallocate() {
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        for (mode, expected) in [
            (0, Some((Space::Allocate, false))),
            (keep, Some((Space::Allocate, true))),
            (keep | libc::FALLOC_FL_PUNCH_HOLE, Some((Space::Punch, true))),
            (libc::FALLOC_FL_ZERO_RANGE, Some((Space::Zero, false))),
            (keep | libc::FALLOC_FL_ZERO_RANGE, Some((Space::Zero, true))),
            (libc::FALLOC_FL_PUNCH_HOLE, None),
            (libc::FALLOC_FL_COLLAPSE_RANGE, None),
            (libc::FALLOC_FL_INSERT_RANGE, None),
            (libc::FALLOC_FL_UNSHARE_RANGE, None),
            (1 << 20, None),
        ] {
            assert_eq!(fallocate_mode(mode), expected, "{mode:#x}");
        }
    }

    #[test]
    fn every_error_has_its_errno() {
        for (kind, expected) in [
            (ErrorKind::InvalidInput, libc::EINVAL),
            (ErrorKind::NoSpace, libc::ENOSPC),
            (ErrorKind::ReadOnly, libc::EROFS),
            (ErrorKind::NotSupported, libc::EOPNOTSUPP),
            (ErrorKind::Overflow, libc::EOVERFLOW),
            (ErrorKind::NoMemory, libc::ENOMEM),
            (ErrorKind::ShuttingDown, libc::EIO),
            (ErrorKind::Io, libc::EIO),
        ] {
            assert_eq!(errno(&Error::new(kind, "test")).code(), expected, "{kind:?}");
        }
        let from = |errno| Error::from_errno(rustix::io::Errno::from_raw_os_error(errno), "test");
        for (number, expected) in [
            (libc::EDQUOT, libc::EDQUOT),
            (libc::ETIMEDOUT, libc::ETIMEDOUT),
            (libc::ENOSYS, libc::EIO),
            (512, libc::EIO),
        ] {
            assert_eq!(errno(&from(number)).code(), expected, "{number}");
        }
    }
}
