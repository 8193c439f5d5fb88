//! The kernel's words and the pipeline's: descriptors to requests, errors to errno, geometry to limits. Pure functions.

use bridge::{Capabilities, Error, ErrorKind, Flags, Geometry, Operation, Request};
use libublk::sys;

use super::abi::{Params, SECTOR};

/// Largest discard and zeroes that the kernel may send at once. They cost a file system little, other sources more.
const MAX_DISCARD_BYTES: u64 = 1 << 30;

/// Smallest and largest logical block that every kernel takes.
const MIN_BLOCK: u32 = 512;
const MAX_BLOCK: u32 = 4096;

/// What a descriptor asks for; None for an operation that was not announced.
pub(super) fn request(descriptor: &sys::ublksrv_io_desc) -> Option<Request> {
    let operation = match descriptor.op_flags & 0xff {
        sys::UBLK_IO_OP_READ => Operation::Read,
        sys::UBLK_IO_OP_WRITE => Operation::Write,
        sys::UBLK_IO_OP_FLUSH => return Some(Request::flush()),
        sys::UBLK_IO_OP_DISCARD => Operation::Trim,
        sys::UBLK_IO_OP_WRITE_ZEROES => Operation::WriteZeroes,
        _ => return None,
    };
    let mut flags = Flags::NONE;
    if operation.changes_data() && descriptor.op_flags & sys::UBLK_IO_F_FUA != 0 {
        flags |= Flags::FUA;
    }
    if operation == Operation::WriteZeroes && descriptor.op_flags & sys::UBLK_IO_F_NOUNMAP != 0 {
        flags |= Flags::NO_HOLE;
    }
    let offset = descriptor.start_sector.checked_mul(SECTOR)?;
    let len = u64::from(descriptor.nr_sectors) * SECTOR;
    Some(Request::new(operation, offset, len).with_flags(flags))
}

/// The answer to a request that succeeded.
pub(super) fn success(request: &Request) -> i32 {
    match request.operation {
        Operation::Read | Operation::Write => i32::try_from(request.len).unwrap_or(i32::MAX),
        _ => 0,
    }
}

/// The answer to one that failed, negative.
pub(super) fn error(error: &Error) -> i32 {
    -match error.kind() {
        ErrorKind::InvalidInput => libc::EINVAL,
        ErrorKind::NoSpace => libc::ENOSPC,
        ErrorKind::ReadOnly => libc::EPERM,
        ErrorKind::NotSupported => libc::EOPNOTSUPP,
        ErrorKind::Overflow => libc::EOVERFLOW,
        ErrorKind::NoMemory => libc::ENOMEM,
        // The block layer has no word for an end.
        _ => libc::EIO,
    }
}

/// Returns the device's logical block in bytes: what was asked for, else the smallest the source can do.
///
/// # Errors
/// Why no device can show a source of such blocks.
pub(super) fn logical_block(geometry: &Geometry, wish: Option<u32>) -> Result<u32, String> {
    let (least, logical) = (geometry.min_block, wish.unwrap_or(geometry.min_block).max(MIN_BLOCK));
    if least > MAX_BLOCK {
        return Err(format!(
            "its smallest block is {least} bytes, and a ublk device's is at most {MAX_BLOCK}; use nbdbridge attach \
             --door fuse, or nbdbridge fuse"
        ));
    }
    if logical < least {
        return Err(format!("its smallest block is {least} bytes; use --block-size {least}"));
    }
    Ok(logical)
}

/// Whether a device can show a source whose smallest block has so many bytes.
pub(super) fn can_show(min_block: u32) -> bool {
    min_block <= MAX_BLOCK
}

/// Size and limits of a device of `size` bytes that serves this geometry.
pub(super) fn params(geometry: &Geometry, size: u64, logical: u32, io_size: u32) -> Params {
    let caps = geometry.capabilities;
    let physical = geometry.preferred_block.clamp(logical, MAX_BLOCK);
    let attrs = [
        (Capabilities::READ_ONLY, sys::UBLK_ATTR_READ_ONLY),
        (Capabilities::ROTATIONAL, sys::UBLK_ATTR_ROTATIONAL),
        (Capabilities::FLUSH, sys::UBLK_ATTR_VOLATILE_CACHE),
        // FUA means something only beside a cache.
        (Capabilities::FLUSH | Capabilities::FUA, sys::UBLK_ATTR_FUA),
    ];
    let attrs = attrs.iter().filter(|(need, _)| caps.contains(*need)).fold(0, |all, (_, attr)| all | attr);
    let at_once = |able| if able { sectors(MAX_DISCARD_BYTES) } else { 0 };
    let (trim, zeroes) = (caps.contains(Capabilities::TRIM), caps.contains(Capabilities::WRITE_ZEROES));
    let changes = !geometry.read_only() && (trim || zeroes);
    let mut params = Params {
        types: sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_SEGMENT,
        basic: sys::ublk_param_basic {
            attrs,
            logical_bs_shift: shift(logical),
            physical_bs_shift: shift(physical),
            io_opt_shift: shift(physical),
            io_min_shift: shift(physical),
            max_sectors: sectors(u64::from(io_size)),
            dev_sectors: size / SECTOR,
            ..Default::default()
        },
        segment: sys::ublk_param_segment {
            seg_boundary_mask: u64::from(u32::MAX),
            max_segment_size: u32::MAX,
            max_segments: segments(io_size),
            ..Default::default()
        },
        ..Params::default()
    };
    if changes {
        params.types |= sys::UBLK_PARAM_TYPE_DISCARD;
        params.discard = sys::ublk_param_discard {
            discard_granularity: physical,
            max_discard_sectors: at_once(trim),
            max_write_zeroes_sectors: at_once(zeroes),
            max_discard_segments: 1,
            ..Default::default()
        };
    }
    params
}

/// Parts of memory that a request of `io_size` bytes is made of at most: its pages, and one more where it begins within
/// one. Without a limit (before 6.15) the kernel announces 65535, and programs that size their buffers by limits
/// (blktests' block/042: half of `max_segments` times `max_sectors_kb`) want gigabytes.
fn segments(io_size: u32) -> u16 {
    u16::try_from(io_size / 4096 + 1).unwrap_or(u16::MAX)
}

/// The part of a source that a device of such blocks can show.
pub(super) fn device_size(geometry: &Geometry, logical: u32) -> u64 {
    geometry.size - geometry.size % u64::from(logical)
}

fn sectors(bytes: u64) -> u32 {
    u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX)
}

fn shift(block: u32) -> u8 {
    u8::try_from(block.trailing_zeros()).unwrap_or(9)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(op_flags: u32, start_sector: u64, nr_sectors: u32) -> sys::ublksrv_io_desc {
        sys::ublksrv_io_desc { op_flags, nr_sectors, start_sector, addr: 0 }
    }

    #[test]
    fn descriptors_are_requests() {
        let fua = sys::UBLK_IO_F_FUA;
        let table = [
            (sys::UBLK_IO_OP_READ | fua, Request::new(Operation::Read, 4096, 8192)),
            (sys::UBLK_IO_OP_WRITE, Request::new(Operation::Write, 4096, 8192)),
            (sys::UBLK_IO_OP_WRITE | fua, Request::new(Operation::Write, 4096, 8192).with_flags(Flags::FUA)),
            (sys::UBLK_IO_OP_FLUSH, Request::flush()),
            (sys::UBLK_IO_OP_DISCARD, Request::new(Operation::Trim, 4096, 8192)),
            (
                sys::UBLK_IO_OP_WRITE_ZEROES | sys::UBLK_IO_F_NOUNMAP,
                Request::new(Operation::WriteZeroes, 4096, 8192).with_flags(Flags::NO_HOLE),
            ),
        ];
        for (op_flags, expected) in table {
            assert_eq!(request(&descriptor(op_flags, 8, 16)), Some(expected), "{op_flags:#x}");
        }
        // Zoned commands, and a place that no device has.
        assert_eq!(request(&descriptor(13, 8, 16)), None);
        assert_eq!(request(&descriptor(sys::UBLK_IO_OP_READ, u64::MAX / 2, 16)), None);
    }

    #[test]
    fn every_error_kind_has_its_errno() {
        use ErrorKind::{
            InvalidInput, Io, NoMemory, NoSpace, NotSupported, Overflow, ReadOnly, ShuttingDown,
        };
        let kinds = [InvalidInput, NoSpace, ReadOnly, NotSupported, Overflow, NoMemory, ShuttingDown, Io];
        let errnos = kinds.map(|kind| -error(&Error::new(kind, "")));
        assert_eq!(errnos, [22, 28, 1, 95, 75, 12, 5, 5]);
    }

    #[test]
    fn limits_follow_the_geometry() {
        let all = Capabilities::FLUSH | Capabilities::FUA | Capabilities::TRIM | Capabilities::WRITE_ZEROES;
        let geometry =
            Geometry { version: 0, size: 10_000, min_block: 1, preferred_block: 65536, capabilities: all };
        let logical = logical_block(&geometry, None).unwrap();
        assert_eq!((logical, logical_block(&geometry, Some(4096))), (512, Ok(4096)));
        for (min_block, wish, expected) in [
            (4096, None, Ok(4096)),
            (2048, Some(4096), Ok(4096)),
            (4096, Some(512), Err("--block-size 4096")),
            (8192, None, Err("at most 4096")),
            (1 << 16, Some(4096), Err("at most 4096")),
        ] {
            let found = logical_block(&Geometry { min_block, ..geometry }, wish);
            match (&found, expected) {
                (Err(text), Err(part)) => assert!(text.contains(part), "{text}"),
                (found, expected) => assert_eq!(found.as_ref().ok(), expected.ok().as_ref(), "{min_block}"),
            }
            assert_eq!(can_show(min_block), min_block <= 4096);
        }
        let size = device_size(&geometry, logical);
        assert_eq!(size, 9728);
        let params = params(&geometry, size, logical, 512 << 10);
        let basic = params.basic;
        assert_eq!((basic.dev_sectors, basic.max_sectors), (19, 1024));
        assert_eq!((basic.logical_bs_shift, basic.physical_bs_shift), (9, 12));
        assert_eq!(basic.attrs, sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA);
        assert_eq!((params.types, params.discard.max_discard_segments), (1 | 2 | 32, 1));
        assert_eq!((params.segment.max_segments, params.segment.max_segment_size), (129, u32::MAX));
        assert_eq!((params.discard.max_discard_sectors, params.discard.discard_granularity), (2 << 20, 4096));

        let plain = Geometry { capabilities: Capabilities::READ_ONLY | all, ..geometry };
        let params = super::params(&plain, size, logical, 512 << 10);
        assert_eq!(params.types, sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_SEGMENT);
        assert_eq!(params.basic.attrs & sys::UBLK_ATTR_READ_ONLY, sys::UBLK_ATTR_READ_ONLY);
        let unsafe_cache = Geometry { capabilities: Capabilities::FUA, ..geometry };
        assert_eq!(super::params(&unsafe_cache, size, logical, 512 << 10).basic.attrs, 0);
    }
}
