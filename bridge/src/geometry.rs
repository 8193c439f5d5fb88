//! What a source is and can do: a snapshot, computed bottom-up through the layers, from which each door derives
//! what it advertises.

use std::ops::BitOr;

/// What a source can do and is; a set of bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(u16);

impl Capabilities {
    /// No capability.
    pub const NONE: Capabilities = Capabilities(0);
    /// Changes are refused.
    pub const READ_ONLY: Capabilities = Capabilities(1 << 0);
    /// Flush means something.
    pub const FLUSH: Capabilities = Capabilities(1 << 1);
    /// `Flags::FUA` is honoured.
    pub const FUA: Capabilities = Capabilities(1 << 2);
    /// Trim is accepted.
    pub const TRIM: Capabilities = Capabilities(1 << 3);
    /// Write-zeroes is accepted.
    pub const WRITE_ZEROES: Capabilities = Capabilities(1 << 4);
    /// `Flags::FAST_ZERO` is answered truthfully.
    pub const FAST_ZERO: Capabilities = Capabilities(1 << 5);
    /// Cache does something.
    pub const CACHE: Capabilities = Capabilities(1 << 6);
    /// A flush on one connection covers answered writes of all others.
    pub const MULTI_CONN: Capabilities = Capabilities(1 << 7);
    /// Seeks are slow.
    pub const ROTATIONAL: Capabilities = Capabilities(1 << 8);
    /// `Backend::file_range` may answer; lost in any layer that changes data.
    pub const FILE_RANGE: Capabilities = Capabilities(1 << 9);
    /// `Backend::grow` makes the source longer.
    pub const GROW: Capabilities = Capabilities(1 << 10);
    /// `Backend::allocate` reserves space.
    pub const ALLOCATE: Capabilities = Capabilities(1 << 11);
    /// `Backend::shrink` makes the source shorter.
    pub const SHRINK: Capabilities = Capabilities(1 << 12);
    /// What was answered and not flushed may be lost when this process is killed.
    pub const VOLATILE: Capabilities = Capabilities(1 << 13);

    /// Whether all bits of `other` are set.
    pub const fn contains(self, other: Capabilities) -> bool {
        self.0 & other.0 == other.0
    }

    /// The set without the bits of `other`.
    #[must_use]
    pub const fn without(self, other: Capabilities) -> Capabilities {
        Capabilities(self.0 & !other.0)
    }
}

impl BitOr for Capabilities {
    type Output = Capabilities;

    fn bitor(self, other: Capabilities) -> Capabilities {
        Capabilities(self.0 | other.0)
    }
}

/// A snapshot of a source's shape. `version` grows when the source is resized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Grows with each change, so that a door can tell an old snapshot.
    pub version: u64,
    /// Size in bytes; not necessarily a multiple of any block.
    pub size: u64,
    /// Smallest unit and alignment a request may have; a power of two, 1 where there is no such demand.
    pub min_block: u32,
    /// The size and alignment that is served best; a power of two.
    pub preferred_block: u32,
    /// What the source can do.
    pub capabilities: Capabilities,
}

impl Geometry {
    /// Whether changes are refused.
    pub fn read_only(&self) -> bool {
        self.capabilities.contains(Capabilities::READ_ONLY)
    }
}
