//! Between the pipeline and the wire: shape, flags, errors and extents, each in one table.

use nbd_proto::{CommandFlags, ExportInfo, NbdError, Negotiated, TransmissionFlags};

use super::options::Reconnect;
use crate::{Capabilities, Error, ErrorKind, ExtentKind, Flags, Geometry};

/// The metadata context that block status is asked in.
pub(super) const BASE_ALLOCATION: &str = "base:allocation";

/// Largest part of a trim, zeroes or cache request: so that each is answered within a time that can be limited, and
/// fits compact headers.
pub(super) const MAX_PART_BYTES: u64 = 1 << 30;

/// Largest payload of one request that we send; the doors know none that is larger.
const MAX_PAYLOAD_BYTES: u32 = nbd_proto::MAX_PAYLOAD_BYTES;

/// What an export is, as it was when it was opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub(super) geometry: Geometry,
    pub(super) max_payload: u32,
    /// The server tells what is allocated.
    pub(super) allocation: bool,
    flags: TransmissionFlags,
}

impl Shape {
    pub(super) fn new(negotiated: &Negotiated) -> Self {
        let info = &negotiated.info;
        Shape {
            geometry: geometry(info),
            max_payload: info.max_payload.min(MAX_PAYLOAD_BYTES),
            allocation: negotiated.contexts.iter().any(|context| context.name == BASE_ALLOCATION),
            flags: info.flags,
        }
    }

    /// Whether the server has FUA and no flush: then every change is sent with FUA, and a flush has nothing to do.
    pub(super) fn flushes_by_fua(&self) -> bool {
        self.flags.contains(TransmissionFlags::SEND_FUA)
            && !self.flags.contains(TransmissionFlags::SEND_FLUSH)
    }

    /// Whether there may be more than one connection.
    pub(super) fn multi_conn(&self) -> bool {
        self.flags.contains(TransmissionFlags::CAN_MULTI_CONN)
    }

    /// Why an export that was reached again is not the one that was opened; None if it can stand in for it. It may
    /// have grown, and can do more.
    pub(super) fn difference(&self, negotiated: &Negotiated) -> Option<String> {
        let now = Shape::new(negotiated);
        let lost = self.flags.without(now.flags);
        if now.geometry.size < self.geometry.size {
            Some(format!("it has {} bytes now, and had {}", now.geometry.size, self.geometry.size))
        } else if now.geometry.read_only() && !self.geometry.read_only() {
            Some("it is read-only now, and was not".into())
        } else if lost.intersects(RELIED_ON) {
            Some(format!("it has lost {:?}", lost & RELIED_ON))
        } else if self.allocation && !now.allocation {
            Some(format!("it has lost {BASE_ALLOCATION}"))
        } else if now.geometry.min_block > self.geometry.min_block {
            let (now, before) = (now.geometry.min_block, self.geometry.min_block);
            Some(format!("its smallest block has {now} bytes now, and had {before}"))
        } else if now.max_payload < self.max_payload {
            Some(format!("it takes {} bytes at once now, and took {}", now.max_payload, self.max_payload))
        } else {
            None
        }
    }

    /// What `reconnect` needs and the export does not have.
    pub(super) fn lacks(&self, reconnect: Reconnect) -> Option<&'static str> {
        let strict = reconnect == Reconnect::Strict;
        let caps = self.geometry.capabilities;
        (strict && !self.geometry.read_only() && !caps.contains(Capabilities::FUA)).then_some("FUA")
    }
}

/// What cannot go away under those who were told that it is there.
const RELIED_ON: TransmissionFlags = TransmissionFlags(
    TransmissionFlags::SEND_FLUSH.0
        | TransmissionFlags::SEND_FUA.0
        | TransmissionFlags::SEND_TRIM.0
        | TransmissionFlags::SEND_WRITE_ZEROES.0
        | TransmissionFlags::CAN_MULTI_CONN.0
        | TransmissionFlags::SEND_CACHE.0
        | TransmissionFlags::SEND_FAST_ZERO.0,
);

fn geometry(info: &ExportInfo) -> Geometry {
    let table = [
        (TransmissionFlags::READ_ONLY, Capabilities::READ_ONLY),
        (TransmissionFlags::SEND_FLUSH, Capabilities::FLUSH),
        (TransmissionFlags::SEND_FUA, Capabilities::FUA),
        (TransmissionFlags::ROTATIONAL, Capabilities::ROTATIONAL),
        (TransmissionFlags::SEND_TRIM, Capabilities::TRIM),
        (TransmissionFlags::SEND_WRITE_ZEROES, Capabilities::WRITE_ZEROES),
        (TransmissionFlags::SEND_CACHE, Capabilities::CACHE),
        (TransmissionFlags::SEND_FAST_ZERO, Capabilities::FAST_ZERO),
        // Where the server does not have it, one connection carries all there is, and its flush covers all.
        (TransmissionFlags::SEND_FLUSH, Capabilities::MULTI_CONN),
    ];
    let mut capabilities = Capabilities::NONE;
    for (flag, capability) in table {
        if info.flags.contains(flag) {
            capabilities = capabilities | capability;
        }
    }
    // See `Shape::flushes_by_fua`.
    if capabilities.contains(Capabilities::FUA) {
        capabilities = capabilities | Capabilities::FLUSH | Capabilities::MULTI_CONN;
    }
    if capabilities.contains(Capabilities::READ_ONLY) {
        let changes =
            Capabilities::TRIM | Capabilities::WRITE_ZEROES | Capabilities::FAST_ZERO | Capabilities::FUA;
        capabilities = capabilities.without(changes);
    }
    // What a server prefers may be larger than what a door can take at once.
    let preferred = info.preferred_block.clamp(info.min_block.max(512), MAX_PAYLOAD_BYTES);
    Geometry {
        version: 0,
        size: info.size,
        min_block: info.min_block,
        preferred_block: preferred,
        capabilities,
    }
}

/// The wire's flags for a request.
pub(super) fn command_flags(flags: Flags) -> CommandFlags {
    if flags == Flags::NONE {
        return CommandFlags::empty();
    }
    let table = [
        (Flags::FUA, CommandFlags::FUA),
        (Flags::NO_HOLE, CommandFlags::NO_HOLE),
        (Flags::FAST_ZERO, CommandFlags::FAST_ZERO),
        (Flags::REQ_ONE, CommandFlags::REQ_ONE),
    ];
    table.into_iter().fold(
        CommandFlags::empty(),
        |wire, (flag, bit)| {
            if flags.contains(flag) { wire | bit } else { wire }
        },
    )
}

/// What a server's error means to the pipeline.
pub(super) fn error(error: NbdError) -> Error {
    let kind = match error {
        NbdError::Perm => ErrorKind::ReadOnly,
        NbdError::Io => ErrorKind::Io,
        NbdError::NoMem => ErrorKind::NoMemory,
        NbdError::Inval => ErrorKind::InvalidInput,
        NbdError::NoSpc => ErrorKind::NoSpace,
        NbdError::Overflow => ErrorKind::Overflow,
        NbdError::NotSup => ErrorKind::NotSupported,
        NbdError::Shutdown => ErrorKind::ShuttingDown,
    };
    let text = match error {
        NbdError::Perm => "the server answered EPERM",
        NbdError::Io => "the server answered EIO",
        NbdError::NoMem => "the server answered ENOMEM",
        NbdError::Inval => "the server answered EINVAL",
        NbdError::NoSpc => "the server answered ENOSPC",
        NbdError::Overflow => "the server answered EOVERFLOW",
        NbdError::NotSup => "the server answered ENOTSUP",
        NbdError::Shutdown => "the server answered ESHUTDOWN",
    };
    Error::new(kind, text)
}

/// Returns the kind of a run of `base:allocation`.
pub(super) fn allocation(state: u64) -> ExtentKind {
    /// `NBD_STATE_HOLE` and `NBD_STATE_ZERO`.
    const HOLE: u64 = 1 << 0;
    const ZERO: u64 = 1 << 1;
    match state & (HOLE | ZERO) {
        0 => ExtentKind::Data,
        HOLE => ExtentKind::HoleNotZero,
        ZERO => ExtentKind::Zero,
        _ => ExtentKind::Hole,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nbd_proto::{ClientFlags, ReplyStyle};

    fn told(size: u64, flags: TransmissionFlags, blocks: [u32; 3]) -> Negotiated {
        let [min_block, preferred_block, max_payload] = blocks;
        Negotiated {
            export: String::new(),
            info: ExportInfo { size, flags, description: None, min_block, preferred_block, max_payload },
            style: ReplyStyle::Simple,
            contexts: Vec::new(),
            client_flags: ClientFlags::empty(),
            honours_block_size: true,
            encrypted: false,
        }
    }

    const BLOCKS: [u32; 3] = [512, 4096, 1 << 25];

    #[test]
    fn an_export_that_comes_back_may_grow_and_learn_but_not_lose() {
        let flags =
            TransmissionFlags::HAS_FLAGS | TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_FUA;
        let shape = Shape::new(&told(1 << 20, flags, BLOCKS));
        let more = flags | TransmissionFlags::SEND_TRIM | TransmissionFlags::ROTATIONAL;
        assert_eq!(shape.difference(&told(2 << 20, more, [1, 512, 1 << 26])), None);
        for (now, word) in [
            (told((1 << 20) - 512, flags, BLOCKS), "bytes now"),
            (told(1 << 20, flags | TransmissionFlags::READ_ONLY, BLOCKS), "read-only"),
            (told(1 << 20, flags.without(TransmissionFlags::SEND_FUA), BLOCKS), "SEND_FUA"),
            (told(1 << 20, TransmissionFlags::empty(), BLOCKS), "SEND_FLUSH"),
            (told(1 << 20, flags, [1024, 4096, 1 << 25]), "smallest block"),
            (told(1 << 20, flags, [512, 4096, 1 << 20]), "at once"),
        ] {
            let difference = shape.difference(&now).unwrap();
            assert!(difference.contains(word), "{difference}");
        }
    }

    #[test]
    fn geometry_keeps_what_the_doors_rely_on() {
        let all = TransmissionFlags(0xffff);
        let shape = Shape::new(&told(1 << 20, all, [1 << 16, 1 << 31, u32::MAX]));
        let geometry = shape.geometry;
        assert!(geometry.read_only() && !geometry.capabilities.contains(Capabilities::TRIM));
        assert_eq!((geometry.min_block, geometry.preferred_block), (1 << 16, 1 << 25));
        assert_eq!(shape.max_payload, 1 << 25);
        let none = Shape::new(&told(7, TransmissionFlags::HAS_FLAGS, [1, 1, 1]));
        assert_eq!(none.geometry.capabilities, Capabilities::NONE);
        assert_eq!(none.geometry.preferred_block, 512);
        assert_eq!(none.lacks(Reconnect::Strict), Some("FUA"));
        assert_eq!(none.lacks(Reconnect::Trust), None);
    }

    #[test]
    fn every_error_keeps_its_meaning() {
        for (wire, kind) in [
            (1, ErrorKind::ReadOnly),
            (5, ErrorKind::Io),
            (12, ErrorKind::NoMemory),
            (22, ErrorKind::InvalidInput),
            (28, ErrorKind::NoSpace),
            (75, ErrorKind::Overflow),
            (95, ErrorKind::NotSupported),
            (108, ErrorKind::ShuttingDown),
            (4711, ErrorKind::InvalidInput),
        ] {
            assert_eq!(error(NbdError::from_wire(wire).unwrap()).kind(), kind, "{wire}");
        }
    }

    #[test]
    fn extents_and_flags() {
        assert_eq!(
            [0, 1, 2, 3, 7].map(allocation),
            [ExtentKind::Data, ExtentKind::HoleNotZero, ExtentKind::Zero, ExtentKind::Hole, ExtentKind::Hole]
        );
        let all = Flags::FUA | Flags::NO_HOLE | Flags::FAST_ZERO | Flags::REQ_ONE;
        assert_eq!(command_flags(all | Flags::CONTINUED | Flags::WHOLE).0, 0b1_1011);
        assert_eq!(command_flags(Flags::NO_HOLE), CommandFlags::NO_HOLE);
    }
}
