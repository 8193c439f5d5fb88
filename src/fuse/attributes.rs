//! What stat(2) shows: size, space, times, mode and owner. The file is its mount's root, and the only one there.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bridge::{Export, Flags, Operation};
use fuser::{FileAttr, FileType, INodeNo};

/// What block status is asked at once, in bytes.
const STEP: u64 = 64 << 30;

/// Space that took so long to count is not counted to the end.
const PATIENCE: Duration = Duration::from_millis(500);

/// A count that took less is made anew after each change.
const CHEAP: Duration = Duration::from_millis(20);

/// A dearer one is kept for so many times what it cost.
const KEEP_FOR: u32 = 50;

/// What a file has besides its data.
pub(super) struct Attributes {
    state: Mutex<State>,
}

struct State {
    perm: u16,
    uid: u32,
    gid: u32,
    atime: SystemTime,
    mtime: SystemTime,
    ctime: SystemTime,
    /// What [`changes`] said when `mtime` was set.
    changes: u64,
    counted: Option<Counted>,
}

/// Space that was counted by block status.
#[derive(Clone, Copy)]
struct Counted {
    bytes: u64,
    changes: u64,
    size: u64,
    until: Instant,
}

/// What a setattr changes; the size is not among it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Change {
    pub(super) mode: Option<u32>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    pub(super) atime: Option<SystemTime>,
    pub(super) mtime: Option<SystemTime>,
}

impl Attributes {
    /// Those of a file with this mode and owner.
    pub(super) fn new(mode: u32, uid: u32, gid: u32, export: &Export) -> Self {
        let now = SystemTime::now();
        let state = State {
            perm: perm(mode),
            uid,
            gid,
            atime: now,
            mtime: now,
            ctime: now,
            changes: changes(export),
            counted: None,
        };
        Attributes { state: Mutex::new(state) }
    }

    /// The attributes, where they can be told without waiting; else [`Attributes::count`] is needed first.
    pub(super) fn now(&self, export: &Export) -> Option<FileAttr> {
        let bytes = match export.allocated() {
            Some(bytes) => bytes,
            None => self.counted(export)?,
        };
        Some(self.with_space(export, bytes))
    }

    /// The attributes, with space counted by block status. What cannot be looked at in time counts as taken.
    pub(super) async fn count(&self, export: &Export) -> FileAttr {
        let begun = Instant::now();
        let (changes, size) = (changes(export), export.geometry().size);
        let mut bytes = 0;
        let walk = walk(export, size, &mut bytes);
        let whole = tokio::time::timeout(PATIENCE, walk).await.is_ok();
        if !whole {
            tracing::debug!("the space of the export takes long to count: the rest counts as taken");
        }
        let cost = begun.elapsed();
        let keep = if cost < CHEAP { Duration::ZERO } else { cost * KEEP_FOR };
        let until = Instant::now() + keep;
        self.state().counted = Some(Counted { bytes, changes, size, until });
        self.with_space(export, bytes)
    }

    /// Takes a change over.
    pub(super) fn change(&self, change: Change) {
        let mut state = self.state();
        state.perm = change.mode.map_or(state.perm, perm);
        state.uid = change.uid.unwrap_or(state.uid);
        state.gid = change.gid.unwrap_or(state.gid);
        state.atime = change.atime.unwrap_or(state.atime);
        state.mtime = change.mtime.unwrap_or(state.mtime);
        state.ctime = SystemTime::now();
    }

    fn counted(&self, export: &Export) -> Option<u64> {
        let counted = self.state().counted?;
        let same = counted.size == export.geometry().size
            && (counted.changes == changes(export) || Instant::now() < counted.until);
        same.then_some(counted.bytes)
    }

    /// A change of the data is dated when it is noticed: it may have come through another door.
    fn with_space(&self, export: &Export, bytes: u64) -> FileAttr {
        let geometry = export.geometry();
        let changes = changes(export);
        let mut state = self.state();
        if state.changes != changes {
            state.changes = changes;
            state.mtime = SystemTime::now();
            state.ctime = state.mtime;
        }
        FileAttr {
            ino: INodeNo::ROOT,
            size: geometry.size,
            blocks: bytes.div_ceil(512),
            atime: state.atime,
            mtime: state.mtime,
            ctime: state.ctime,
            crtime: state.ctime,
            kind: FileType::RegularFile,
            perm: state.perm,
            nlink: 1,
            uid: state.uid,
            gid: state.gid,
            rdev: 0,
            blksize: geometry.preferred_block.max(4096),
            flags: 0,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds up what is no hole, into `bytes`: at first all of it, less with each hole that is found.
async fn walk(export: &Export, size: u64, bytes: &mut u64) {
    *bytes = size;
    let mut offset = 0;
    while offset < size {
        let len = (size - offset).min(STEP);
        let Ok(extents) = export.extents(offset, len, Flags::NONE, Instant::now()).await else { return };
        let before = offset;
        for extent in extents {
            if !extent.kind.is_allocated() {
                *bytes -= extent.len.min(*bytes);
            }
            offset += extent.len;
        }
        if offset == before {
            return;
        }
        // A source that answers at once must not keep the worker.
        tokio::task::yield_now().await;
    }
}

/// Grows with each change of the data or the size, through whichever door.
fn changes(export: &Export) -> u64 {
    let requests = [Operation::Write, Operation::Trim, Operation::WriteZeroes]
        .map(|operation| export.stats().count(operation));
    requests.iter().sum::<u64>() + export.geometry().version
}

fn perm(mode: u32) -> u16 {
    u16::try_from(mode & 0o7777).unwrap_or(0o600)
}
