//! Between the wire and the pipeline: requests, errors, flags and extents, each in one table.

use bridge::{
    Capabilities, Depth, Error, ErrorKind, Export, Extent, ExtentKind, Flags, Geometry, Operation, Request,
};
use nbd_proto::{
    Command, CommandFlags, ExportInfo, MAX_PAYLOAD_BYTES, NbdError, ReplyStyle, Request as WireRequest,
    TransmissionFlags,
};

/// The metadata context that every export has.
pub(super) const BASE_ALLOCATION: &str = "base:allocation";

/// QEMU's context, offered on demand: the number of the layer that holds the bytes, from 1 at the top; 0 for none.
pub(super) const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";

/// `NBD_STATE_HOLE` and `NBD_STATE_ZERO` of `base:allocation`.
const STATE_HOLE: u32 = 1 << 0;
const STATE_ZERO: u32 = 1 << 1;

/// What a request on the wire asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// To be executed.
    Execute(Request),
    /// The peer says goodbye.
    Disconnect,
    /// Wrong in itself: to be answered with this, after its payload was skipped.
    Refuse(NbdError),
}

/// Turns a wire request into the pipeline's. `granted` are the flags the client was told, `contexts` says whether
/// block status was negotiated.
#[inline]
pub(super) fn request(
    wire: &WireRequest,
    style: ReplyStyle,
    granted: TransmissionFlags,
    contexts: bool,
) -> Asked {
    let operation = match wire.command {
        Command::Read => Operation::Read,
        Command::Write => Operation::Write,
        Command::Disconnect => return Asked::Disconnect,
        Command::Flush => Operation::Flush,
        Command::Trim => Operation::Trim,
        Command::Cache => Operation::Cache,
        Command::WriteZeroes => Operation::WriteZeroes,
        Command::BlockStatus => Operation::BlockStatus,
        _ => return Asked::Refuse(NbdError::Inval),
    };
    if let Err(error) = wire.check_flags(style.extended(), granted) {
        return Asked::Refuse(error);
    }
    let sound = match operation {
        // With extended headers a write should set PAYLOAD_LEN, but QEMU 10's client does not.
        Operation::Read | Operation::Write => wire.length <= u64::from(MAX_PAYLOAD_BYTES),
        Operation::Flush => wire.offset == 0 && wire.length == 0,
        Operation::BlockStatus => contexts && wire.length != 0,
        _ => true,
    };
    if !sound {
        return Asked::Refuse(NbdError::Inval);
    }
    Asked::Execute(
        Request::new(operation, wire.offset, wire.length).with_flags(pipeline_flags(operation, wire.flags)),
    )
}

#[inline]
fn pipeline_flags(operation: Operation, wire: CommandFlags) -> Flags {
    if wire.is_empty() {
        return Flags::NONE;
    }
    let table = [
        (CommandFlags::FUA, Flags::FUA),
        (CommandFlags::NO_HOLE, Flags::NO_HOLE),
        (CommandFlags::FAST_ZERO, Flags::FAST_ZERO),
        (CommandFlags::REQ_ONE, Flags::REQ_ONE),
    ];
    let mut flags = Flags::NONE;
    for (from, to) in table {
        if wire.contains(from) {
            flags |= to;
        }
    }
    if operation.changes_data() { flags } else { flags.without(Flags::FUA) }
}

/// The protocol's errno for a failed request.
pub(super) fn error(error: &Error) -> NbdError {
    match error.kind() {
        ErrorKind::InvalidInput => NbdError::Inval,
        ErrorKind::NoSpace => NbdError::NoSpc,
        ErrorKind::ReadOnly => NbdError::Perm,
        ErrorKind::NotSupported => NbdError::NotSup,
        ErrorKind::Overflow => NbdError::Overflow,
        ErrorKind::NoMemory => NbdError::NoMem,
        ErrorKind::ShuttingDown => NbdError::Shutdown,
        _ => NbdError::Io,
    }
}

/// `base:allocation` for a run of bytes.
pub(super) fn allocation(extent: &Extent) -> (u64, u32) {
    let state = match extent.kind {
        ExtentKind::Data => 0,
        ExtentKind::Zero => STATE_ZERO,
        ExtentKind::Hole => STATE_HOLE | STATE_ZERO,
        ExtentKind::HoleNotZero => STATE_HOLE,
    };
    (extent.len, state)
}

/// `qemu:allocation-depth` for a run of bytes.
pub(super) fn depth(depth: &Depth) -> (u64, u32) {
    (depth.len, depth.level)
}

/// What the handshake tells of an export.
pub(super) fn export_info(export: &Export) -> ExportInfo {
    let geometry = export.geometry();
    ExportInfo {
        size: geometry.size,
        flags: transmission_flags(&geometry),
        description: export.description().map(str::to_owned),
        min_block: geometry.min_block,
        preferred_block: geometry.preferred_block,
        max_payload: MAX_PAYLOAD_BYTES,
    }
}

fn transmission_flags(geometry: &Geometry) -> TransmissionFlags {
    let table = [
        (Capabilities::READ_ONLY, TransmissionFlags::READ_ONLY),
        (Capabilities::FLUSH, TransmissionFlags::SEND_FLUSH),
        (Capabilities::FUA, TransmissionFlags::SEND_FUA),
        (Capabilities::ROTATIONAL, TransmissionFlags::ROTATIONAL),
        (Capabilities::TRIM, TransmissionFlags::SEND_TRIM),
        (Capabilities::WRITE_ZEROES, TransmissionFlags::SEND_WRITE_ZEROES),
        (Capabilities::MULTI_CONN, TransmissionFlags::CAN_MULTI_CONN),
        (Capabilities::CACHE, TransmissionFlags::SEND_CACHE),
        (Capabilities::FAST_ZERO, TransmissionFlags::SEND_FAST_ZERO),
    ];
    table.into_iter().fold(TransmissionFlags::HAS_FLAGS, |flags, (capability, flag)| {
        if geometry.capabilities.contains(capability) { flags | flag } else { flags }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: TransmissionFlags = TransmissionFlags(!TransmissionFlags::BLOCK_STATUS_PAYLOAD.0);

    fn wire(command: Command, flags: CommandFlags, offset: u64, length: u64) -> WireRequest {
        WireRequest { flags, command, cookie: 7, offset, length }
    }

    fn asked(wire: &WireRequest, style: ReplyStyle) -> Asked {
        request(wire, style, ALL, true)
    }

    #[test]
    fn every_error_kind_has_its_errno() {
        let table = [
            (ErrorKind::InvalidInput, 22),
            (ErrorKind::NoSpace, 28),
            (ErrorKind::ReadOnly, 1),
            (ErrorKind::NotSupported, 95),
            (ErrorKind::Overflow, 75),
            (ErrorKind::NoMemory, 12),
            (ErrorKind::ShuttingDown, 108),
            (ErrorKind::Io, 5),
        ];
        for (kind, errno) in table {
            assert_eq!(error(&Error::new(kind, "")).wire(), errno, "{kind:?}");
        }
        for (os, errno) in
            [(libc::EDQUOT, 28), (libc::EFBIG, 28), (libc::EROFS, 1), (libc::ENXIO, 5), (libc::EINTR, 5)]
        {
            let os = rustix::io::Errno::from_raw_os_error(os);
            assert_eq!(error(&Error::from_errno(os, "")).wire(), errno, "{os:?}");
        }
    }

    #[test]
    fn flags_that_do_not_apply_are_refused() {
        use CommandFlags as F;
        let legal = [
            (Command::Read, F::DF | F::FUA),
            (Command::Write, F::FUA),
            (Command::Flush, F::FUA),
            (Command::Trim, F::FUA),
            (Command::Cache, F::FUA),
            (Command::WriteZeroes, F::FUA | F::NO_HOLE | F::FAST_ZERO),
            (Command::BlockStatus, F::FUA | F::REQ_ONE),
        ];
        for (command, allowed) in legal {
            for bit in 0..16 {
                let flags = F(1 << bit);
                let len = if command == Command::Flush { 0 } else { 512 };
                let asked = asked(&wire(command, flags, 0, len), ReplyStyle::Structured);
                let expected = allowed.contains(flags);
                assert_eq!(matches!(asked, Asked::Execute(_)), expected, "{command:?} {flags:?}");
            }
        }
        let write = wire(Command::Write, F::PAYLOAD_LEN, 0, 512);
        assert!(matches!(asked(&write, ReplyStyle::Extended), Asked::Execute(_)));
        assert_eq!(asked(&write, ReplyStyle::Structured), Asked::Refuse(NbdError::Inval));
        // As QEMU 10's client has it.
        let bare = wire(Command::Write, F::empty(), 0, 512);
        assert!(matches!(asked(&bare, ReplyStyle::Extended), Asked::Execute(_)));
    }

    #[test]
    fn lengths_and_contexts() {
        let none = CommandFlags::empty();
        let max = u64::from(MAX_PAYLOAD_BYTES);
        let style = ReplyStyle::Structured;
        assert!(matches!(asked(&wire(Command::Read, none, 0, max), style), Asked::Execute(_)));
        for refused in [
            wire(Command::Read, none, 0, max + 1),
            wire(Command::Write, none, 0, max + 1),
            wire(Command::Flush, none, 0, 1),
            wire(Command::BlockStatus, none, 0, 0),
            wire(Command::Unknown(99), none, 0, 0),
        ] {
            assert_eq!(asked(&refused, style), Asked::Refuse(NbdError::Inval), "{refused:?}");
        }
        // A command without payload may be longer than the largest payload.
        assert!(matches!(asked(&wire(Command::Trim, none, 0, 1 << 32), style), Asked::Execute(_)));
        let status = wire(Command::BlockStatus, none, 0, 512);
        assert_eq!(request(&status, style, ALL, false), Asked::Refuse(NbdError::Inval));
    }
}
