//! The engine's side of the journal: changes of the mapping are noted before the request that made them is answered.
//!
//! Whoever notes has passed the gate, and a commit passes it alone: so a record belongs to the generation in which its
//! change is not committed yet. No place is used twice within a generation, since what is freed is committed before the
//! next allocation.

use super::engine::Engine;
use super::journal::{Change, Record};

impl Engine {
    /// Notes that whole clusters have another mapping. Without it they are committed before the request is answered.
    pub(super) async fn note(&self, offset: u64, len: u64, change: Change) {
        let Some(journal) = &self.journal else { return };
        // Past the end of the disk nothing is answered: a disk that grows is committed before it has its new size.
        let (first, end) = (offset / self.cluster, (offset + len).min(self.size()).div_ceil(self.cluster));
        if first >= end {
            return;
        }
        let record = Record { first, count: end - first, change };
        // The file is marked before the first record can count.
        let marked = self.marked.get_or_try_init(|| self.top.mark_in_use(true)).await;
        if let Err(error) = marked.and_then(|()| journal.note(record)) {
            self.must_commit.set(true);
            journal.warn_once(&error);
        }
    }

    /// Whether the next change would find no room in the journal.
    pub(super) fn is_journal_full(&self) -> bool {
        self.journal.as_ref().is_some_and(|journal| journal.is_nearly_full())
    }

    /// Begins anew: all that was noted is committed, and the caller keeps changes away. A journal that cannot be begun
    /// anew is given up: its records would undo what is changed from now on.
    pub(super) async fn reset_journal(&self) {
        self.must_commit.set(false);
        let Some(journal) = &self.journal else { return };
        let Err(error) = journal.reset() else { return };
        let is_gone = journal.give_up();
        self.shared.note_loss(format!("its journal cannot be written: {error}"));
        tracing::warn!(
            %error,
            "{}: the journal cannot be written and is given up: writes that are answered and not flushed will not survive \
             a crash of this process",
            self.top
        );
        // Nobody believes records of an image without the mark. Else it stays, and tells the next open what may be missing.
        if !is_gone && let Err(error) = self.top.mark_in_use(false).await {
            tracing::error!(%error, "{}: cannot be marked as closed", self.top);
        }
    }

    /// Marks the image as closed, if all that was noted is committed.
    pub(super) async fn close(&self) {
        let committed = self.journal.as_ref().is_some_and(|journal| !journal.has_records());
        if committed
            && self.marked.initialized()
            && let Err(error) = self.top.mark_in_use(false).await
        {
            tracing::warn!(%error, "an image cannot be marked as closed");
        }
    }
}
