//! The one request type that every door translates to.

use std::ops::{BitOr, BitOrAssign};

/// What is asked of a block source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Operation {
    /// Fill a buffer from the source.
    Read = 0,
    /// Store a buffer.
    Write = 1,
    /// Make every write that was answered before this request durable.
    Flush = 2,
    /// The range's content is no longer needed.
    Trim = 3,
    /// Make the range read as zeroes.
    WriteZeroes = 4,
    /// The range will be read soon.
    Cache = 5,
    /// Which parts are data, holes, zeroes.
    BlockStatus = 6,
}

impl Operation {
    /// How many operations there are: the length of per-operation tables.
    pub const COUNT: usize = 7;

    /// Every operation, in the order of its number.
    pub const ALL: [Operation; Self::COUNT] = [
        Operation::Read,
        Operation::Write,
        Operation::Flush,
        Operation::Trim,
        Operation::WriteZeroes,
        Operation::Cache,
        Operation::BlockStatus,
    ];

    /// The name used in statistics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Trim => "trim",
            Operation::WriteZeroes => "write-zeroes",
            Operation::Cache => "cache",
            Operation::BlockStatus => "block-status",
        }
    }

    /// Whether the operation can change data.
    pub fn changes_data(self) -> bool {
        matches!(self, Operation::Write | Operation::Trim | Operation::WriteZeroes)
    }
}

/// Modifiers of a request; a set of bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Flags(u8);

impl Flags {
    /// No modifier.
    pub const NONE: Flags = Flags(0);
    /// Write, trim, zeroes: durable before the answer (force unit access).
    pub const FUA: Flags = Flags(1 << 0);
    /// Zeroes: the space stays allocated.
    pub const NO_HOLE: Flags = Flags(1 << 1);
    /// Zeroes: fail with `NotSupported`, data untouched, when it would be no faster than writing.
    pub const FAST_ZERO: Flags = Flags(1 << 2);
    /// Block status: one extent is enough.
    pub const REQ_ONE: Flags = Flags(1 << 3);
    /// This is a later piece of a request whose first piece was counted: it costs bytes, but no operation.
    pub const CONTINUED: Flags = Flags(1 << 4);
    /// A read that can only be answered in one piece: `Backend::file_range` gives the whole range or nothing.
    pub const WHOLE: Flags = Flags(1 << 5);
    /// A write on the fast path whose thread serves nothing else meanwhile: it may take a moment, which is cheaper for
    /// much data than to hand it over.
    pub const PATIENT: Flags = Flags(1 << 6);

    /// Whether all bits of `other` are set.
    pub const fn contains(self, other: Flags) -> bool {
        self.0 & other.0 == other.0
    }

    /// The set without the bits of `other`.
    #[must_use]
    pub const fn without(self, other: Flags) -> Flags {
        Flags(self.0 & !other.0)
    }
}

impl BitOr for Flags {
    type Output = Flags;

    fn bitor(self, other: Flags) -> Flags {
        Flags(self.0 | other.0)
    }
}

impl BitOrAssign for Flags {
    fn bitor_assign(&mut self, other: Flags) {
        self.0 |= other.0;
    }
}

/// One request: an operation on a range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What to do.
    pub operation: Operation,
    /// Modifiers.
    pub flags: Flags,
    /// First byte. 0 for a flush.
    pub offset: u64,
    /// Number of bytes. 0 for a flush.
    pub len: u64,
}

impl Request {
    /// A request without modifiers.
    pub fn new(operation: Operation, offset: u64, len: u64) -> Self {
        Request { operation, flags: Flags::NONE, offset, len }
    }

    /// A flush of the whole source.
    pub fn flush() -> Self {
        Request::new(Operation::Flush, 0, 0)
    }

    /// The same with these modifiers.
    #[must_use]
    pub fn with_flags(mut self, flags: Flags) -> Self {
        self.flags = flags;
        self
    }
}
