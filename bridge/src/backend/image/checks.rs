//! What stands between a place that a table names and its use: is it within the file, is no structure there, and does
//! none come there while it is written to.

use super::damage::DAMAGED;
use super::engine::{Engine, malformed};
use super::host::Host;
use crate::backend::file::length;
use crate::ranges::{Mode, RangeLock};
use crate::{Error, Result};

/// How far past the end of the file a new cluster may lie, in bytes: others are on their way there.
const MAX_AHEAD: u64 = 1 << 30;

impl Engine {
    /// Refuses places that no image in good order has.
    pub(super) fn check_place(&self, storage: &Host, offset: u64, count: u64) -> Result<()> {
        if offset >= DAMAGED {
            storage.tell("an entry of an L2 table is damaged");
            return Err(malformed("a damaged entry in an L2 table"));
        }
        let end = offset.checked_add(count).ok_or_else(|| malformed("an offset out of bounds"))?;
        let Some(backend) = self.shared.files.get(usize::from(storage.number())) else {
            return Err(malformed("a file that was not opened"));
        };
        // The last cluster may be there in part.
        let past_end = match storage.is_written() {
            true => end > self.seen_length.get() && end > self.look_at_length(),
            false => end > storage.end(),
        };
        if past_end || end > backend.geometry().size {
            storage.tell("it has data past the end of its file");
            return Err(malformed("data past the end of its file"));
        }
        self.check_structures(storage.number(), offset, end)
    }

    /// What the file with the data has room for, in whole clusters.
    pub(super) fn look_at_length(&self) -> u64 {
        let length = match &self.shared.data_descriptor {
            // In a file of its own, data lies where the disk has it.
            Some(_) if self.data_file.is_some() => self.image.size(),
            Some(file) => length(file).unwrap_or(0),
            None => self.data().file().geometry().size,
        };
        self.seen_length.set(length.checked_next_multiple_of(self.cluster).unwrap_or(length));
        self.seen_length.get()
    }

    /// Refuses the place of a structure.
    fn check_structures(&self, file: u8, start: u64, end: u64) -> Result<()> {
        if file == self.top.number() && self.top.places().is_some_and(|places| places.meets(start, end)) {
            self.top.tell(&format!("it has data in the place of a table, at {start:#x}"));
            return Err(malformed("data in the place of a table"));
        }
        Ok(())
    }

    /// Looks at the place of a new cluster. Nothing that imago has in mind may go to the file where it is wrong.
    pub(super) fn check_new_place(&self, file: u8, start: u64, end: u64) -> Result<()> {
        let held = self.look_at_length();
        if self.data().device_end().is_some_and(|size| end > size) {
            return Err(Error::from_errno(
                rustix::io::Errno::NOSPC,
                "the device that the image is on is full",
            ));
        }
        let far = held.saturating_add(MAX_AHEAD);
        if end > far {
            self.top.give_up("it has space reserved far past the end of its file");
            return Err(malformed("space past the end of its file"));
        }
        self.check_structures(file, start, end).inspect_err(|_| {
            self.top.give_up("its refcounts give a table's place away");
        })
    }

    /// Holds a place that is about to be written to: no table comes there meanwhile.
    ///
    /// # Errors
    /// One has come there since it was looked up.
    pub(super) async fn hold(&self, file: u8, offset: u64, len: u64) -> Result<Option<RangeLock<'_>>> {
        if file != self.top.number() {
            return Ok(None);
        }
        let lock = self.in_use.lock(offset, offset + len, Mode::Shared).await;
        self.check_structures(file, offset, offset + len)?;
        Ok(Some(lock))
    }

    /// Has nobody write to where new tables come, before these are in the file.
    pub(super) async fn make_way(&self) {
        let mut fresh = self.top.places().map_or(Vec::new(), |mut places| places.take_fresh());
        if fresh.is_empty() {
            return;
        }
        fresh.sort_unstable();
        self.shared.map.forget_places(self.top.number(), &fresh);
        for table in fresh {
            drop(self.in_use.lock(table, table + self.cluster, Mode::Exclusive).await);
        }
    }
}
