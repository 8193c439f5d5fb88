//! A file that can become shorter: while that happens no other request is under way, for each was held against the length
//! that the file had. A file that only grows needs none of this, and pays for none.

use std::sync::Arc;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, RwLockReadGuard};

/// Held shared by requests, and alone by whoever makes the file shorter. Clones are the same one.
#[derive(Clone, Debug, Default)]
pub(super) struct Length(Option<Arc<RwLock<()>>>);

/// While it lives, the file does not become shorter.
pub(super) struct Steady<'a> {
    _shared: Option<RwLockReadGuard<'a, ()>>,
}

impl Length {
    /// That of a file that can become shorter.
    pub(super) fn may_shrink() -> Self {
        Length(Some(Arc::default()))
    }

    /// For a request that is made at once; None where it has to wait for its turn.
    pub(super) fn try_hold(&self) -> Option<Steady<'_>> {
        let _shared = match &self.0 {
            Some(lock) => Some(lock.try_read().ok()?),
            None => None,
        };
        Some(Steady { _shared })
    }

    /// For a request that may wait. Those that came before it may have changed the length.
    pub(super) async fn hold(&self) -> Option<OwnedRwLockReadGuard<()>> {
        Some(self.0.clone()?.read_owned().await)
    }

    /// For the one that makes the file shorter; None where that cannot be.
    pub(super) async fn change(&self) -> Option<OwnedRwLockWriteGuard<()>> {
        Some(self.0.clone()?.write_owned().await)
    }

    /// Whether there is anything to hold.
    pub(super) fn can_shrink(&self) -> bool {
        self.0.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_a_change_of_length_keep_apart() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let length = Length::may_shrink();
            let (one, other) = (length.try_hold(), length.hold().await);
            assert!(one.is_some() && other.is_some());
            let mut change = Box::pin(length.change());
            let soon = std::time::Duration::from_millis(1);
            assert!(tokio::time::timeout(soon, &mut change).await.is_err());
            assert!(length.try_hold().is_none(), "whoever comes now waits for its turn");
            drop((one, other));
            let change = change.await;
            assert!(change.is_some() && length.try_hold().is_none());
            drop(change);
            assert!(length.try_hold().is_some());
            let fixed = Length::default();
            assert!(
                fixed.try_hold().is_some() && fixed.hold().await.is_none() && fixed.change().await.is_none()
            );
        });
    }
}
