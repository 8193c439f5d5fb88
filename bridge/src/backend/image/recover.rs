//! What an open does about the journal of a process that has died: its records are brought to the image, or laid over
//! it in memory where the image is only read.
//!
//! A record is believed only if nothing has changed the image since it was written. The proof is an autoclear bit in the
//! image's header ([`super::header::IN_USE`]): another program that writes to the image clears it. Besides, the places
//! that records name must be free, or in use once, which they are if the process died within a commit. All records are
//! looked at before the first one is applied.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::path::Path;

use super::commit;
use super::header::Header;
use super::host::Host;
use super::journal::{Change, Identity, Journal, Left, Record};
use super::places::Places;
use super::tables::Tables;

/// An image whose journal is looked for.
pub(super) struct Subject<'a> {
    pub(super) path: &'a Path,
    pub(super) header: &'a Header,
    pub(super) host: &'a Host,
    pub(super) data_file: Option<&'a Host>,
    /// The files, as they are open.
    pub(super) file: &'a File,
    pub(super) data: Option<&'a File>,
}

/// The journal of an image that is opened for writing.
pub(super) struct Opened {
    pub(super) journal: Option<Journal>,
    /// Why there is none.
    pub(super) loss: Option<String>,
    /// The image's header may have changed.
    pub(super) replayed: bool,
}

impl Subject<'_> {
    fn identity(&self) -> Result<Identity, String> {
        Identity::of(self.path, self.file, self.data, self.header.cluster_bits)
    }

    /// Opens the journal for writing, and brings to the image what a dead process has left in it.
    ///
    /// # Errors
    /// The image's files': what was answered would be missing, so the image must not be served.
    pub(super) async fn open_journal(&self, folder: Option<&Path>) -> io::Result<Opened> {
        let path = self.path.display();
        let without = |loss| Ok(Opened { journal: None, loss: Some(loss), replayed: false });
        let Some(folder) = folder else { return without("no folder for its journal was given".to_owned()) };
        if self.header.version < 3 {
            let loss = format!(
                "an image of version 2 has no journal; `qemu-img amend -o compat=1.1 {path}` makes it version 3"
            );
            self.warn_of_loss(&loss);
            return without(loss);
        }
        let (journal, left) = match self.identity().and_then(|identity| Journal::open(folder, identity)) {
            Ok(opened) => opened,
            Err(reason) => {
                let loss = format!("no journal: {reason}");
                self.warn_of_loss(&loss);
                self.warn_of_missing(folder);
                return without(loss);
            }
        };
        let mut replayed = false;
        match left {
            Left::Nothing => self.warn_of_missing(folder),
            Left::Records(records) if records.is_empty() => {}
            Left::Records(records) => {
                match self.apply(&records).await? {
                    Ok(()) => {
                        commit::commit(self.host, self.data_file).await?;
                        replayed = true;
                        tracing::info!(
                            "{path}: {} changes of a server that died were brought in",
                            records.len()
                        );
                    }
                    Err(reason) => self.warn_of_discarded(&records, &reason),
                }
                journal.reset()?;
            }
        }
        Ok(Opened { journal: Some(journal), loss: None, replayed })
    }

    /// Lays what a dead process has left in its journal over an image that is only read.
    ///
    /// # Errors
    /// The image's files'.
    pub(super) async fn overlay_journal(&self, folder: Option<&Path>) -> io::Result<()> {
        let (Some(folder), true) = (folder, self.header.is_in_use()) else { return Ok(()) };
        let left = self.identity().map_or(Left::Nothing, |identity| Journal::peek(folder, &identity));
        match left {
            Left::Nothing => self.warn_of_missing(folder),
            Left::Records(records) => {
                if let Err(reason) = self.apply(&records).await? {
                    self.warn_of_discarded(&records, &reason);
                }
            }
        }
        Ok(())
    }

    fn warn_of_loss(&self, reason: &str) {
        tracing::warn!(
            "{}: writes that are answered and not flushed will not survive a crash of this process: {reason}",
            self.path.display()
        );
    }

    fn warn_of_missing(&self, folder: &Path) {
        if self.header.is_in_use() {
            tracing::warn!(
                "{}: was not closed in good order, and {} has no journal of it: what was written last and not \
                 flushed may be missing",
                self.path.display(),
                folder.display()
            );
        }
    }

    fn warn_of_discarded(&self, records: &[Record], reason: &str) {
        tracing::warn!(
            "{}: {} changes of a server that died are lost: {reason}",
            self.path.display(),
            records.len()
        );
    }

    /// Keeps the changes that the records say back in the host. The inner error says why they do not fit the image.
    async fn apply(&self, records: &[Record]) -> io::Result<Result<(), String>> {
        if !self.header.is_in_use() {
            return Ok(Err("another program has written to the image since".into()));
        }
        let places = match Places::load(self.host, self.header).await? {
            Ok(places) => places,
            Err(fault) => return Ok(Err(format!("the image {fault}"))),
        };
        let external = self.header.external_data();
        let cluster = self.header.cluster_size();
        let length = self.data.unwrap_or(self.file).seek(SeekFrom::End(0))?.next_multiple_of(cluster);
        let clusters = self.header.size.div_ceil(cluster);
        let end_of = |record: &Record| match record.change {
            Change::Map(place) => {
                record.count.checked_mul(cluster).and_then(|bytes| place.checked_add(bytes))
            }
            _ => Some(0),
        };
        let end = if external { 0 } else { records.iter().filter_map(end_of).max().unwrap_or(0) };
        let mut tables = Tables::load(self.host, self.header.clone(), end).await?;
        for record in records {
            let fits = record.first.checked_add(record.count).is_some_and(|end| end <= clusters)
                && end_of(record).is_some_and(|end| end <= length);
            if !fits {
                return Ok(Err("a change lies outside of the image".into()));
            }
            let (Change::Map(place), false) = (record.change, external) else { continue };
            if !place.is_multiple_of(cluster) || places.meets(place, place + record.count * cluster) {
                return Ok(Err(format!("a table is where they have data, at {place:#x}")));
            }
            for n in 0..record.count {
                if tables.refcount(place + n * cluster).await? > 1 {
                    return Ok(Err(format!("a place of theirs is in use, at {place:#x}")));
                }
            }
        }
        for record in records {
            for n in 0..record.count {
                let change = match record.change {
                    Change::Map(place) => Change::Map(place + n * cluster),
                    other => other,
                };
                tables.change(record.first + n, change).await?;
            }
        }
        tables.finish().await.map(Ok)
    }
}
