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

    /// Returns the longest length, at most `most` bytes, at which a request that begins at `offset` may be cut in two:
    /// the second part begins on a block. 0 if no block ends within `most` bytes.
    pub fn cut(&self, offset: u64, most: u64) -> u64 {
        let block = u64::from(self.min_block.max(1));
        let end = offset.saturating_add(most);
        (end - end % block).saturating_sub(offset)
    }

    /// Returns a range that is widened to whole blocks, as its start and its end. Where the size is no multiple of
    /// the block, the last block is a shorter one.
    pub fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        let mask = u64::from(self.min_block.max(1)) - 1;
        let end = offset.saturating_add(len);
        let up = end.checked_add(mask).map_or(u64::MAX, |end| end & !mask);
        (offset & !mask, up.min(self.size.max(end)))
    }

    /// Returns the length of pieces that a request is done in: whole blocks, at most `most` bytes of them. A block that
    /// is longer than `most` is a piece of its own.
    pub fn piece(&self, most: u32) -> u32 {
        let block = self.min_block.max(1);
        (most - most % block).max(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cut_is_at_a_block() {
        let geometry = |min_block| Geometry {
            version: 0,
            size: 1 << 30,
            min_block,
            preferred_block: 1 << 16,
            capabilities: Capabilities::NONE,
        };
        for (min_block, offset, most, cut, piece) in [
            (1, 7, 1000, 1000, 1000),
            (512, 512, 1000, 512, 512),
            (4096, 8192, 4095, 0, 4096),
            (4096, 8192, 15 << 10, 12 << 10, 12 << 10),
            (1 << 16, 1 << 16, 15 << 10, 0, 1 << 16),
            (1 << 16, 1 << 16, (1 << 20) + 5, 1 << 20, 1 << 20),
        ] {
            let geometry = geometry(min_block);
            assert_eq!(geometry.cut(offset, most), cut, "{min_block} {offset} {most}");
            assert_eq!(geometry.piece(u32::try_from(most).unwrap()), piece, "{min_block} {most}");
        }
        assert_eq!(geometry(4096).cut(u64::MAX - 4095, 8192), 0, "no overflow");
    }
}
