//! Block status: runs of bytes that are data, zeroes or holes.

/// What a run of bytes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Allocated, content unknown.
    Data,
    /// Allocated, and reads as zeroes.
    Zero,
    /// Not allocated, and reads as zeroes.
    Hole,
    /// Not allocated, content unknown: a remote export's `NBD_STATE_HOLE` without `NBD_STATE_ZERO`.
    HoleNotZero,
}

impl ExtentKind {
    /// Whether the run is known to read as zeroes.
    pub fn reads_as_zeroes(self) -> bool {
        matches!(self, ExtentKind::Zero | ExtentKind::Hole)
    }

    /// Whether the run takes up space.
    pub fn is_allocated(self) -> bool {
        matches!(self, ExtentKind::Data | ExtentKind::Zero)
    }
}

/// A run of bytes of one kind. Its place follows from the runs before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// What it is.
    pub kind: ExtentKind,
}

/// A run of bytes that lie at one level of a chain of overlays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// 1 for the source itself, one more for each overlay above what holds the bytes; 0 where nothing does.
    pub level: u32,
}

/// Most extents that one block-status request answers with.
pub const MAX_EXTENTS: usize = 4096;

/// Returns the part of `extents` between `skip` and `skip + len` bytes from their start.
pub fn part_of(extents: &[Extent], mut skip: u64, mut len: u64) -> Vec<Extent> {
    let mut part = Vec::new();
    for extent in extents {
        let skipped = skip.min(extent.len);
        let kept = (extent.len - skipped).min(len);
        push_extent(&mut part, kept, extent.kind);
        skip -= skipped;
        len -= kept;
    }
    part
}

/// Appends a run, joining it with the last one where the kinds agree.
pub fn push_extent(extents: &mut Vec<Extent>, len: u64, kind: ExtentKind) {
    if len == 0 {
        return;
    }
    match extents.last_mut() {
        Some(last) if last.kind == kind => last.len += len,
        _ => extents.push(Extent { len, kind }),
    }
}

/// Appends a run, joining it with the last one where the levels agree.
pub fn push_depth(depths: &mut Vec<Depth>, len: u64, level: u32) {
    match depths.last_mut() {
        _ if len == 0 => {}
        Some(last) if last.level == level => last.len += len,
        _ => depths.push(Depth { len, level }),
    }
}
