//! What the plugin does to volumes: one thing at a time for each, in the order of coming, on threads that may block. A
//! volume that hangs holds up who asks for it, and nobody else.
//!
//! Work that has begun is done, whether or not its client still listens; but a mount that nobody was told of is undone:
//! podman waits for five seconds, and then knows of no mount that it would have to end.

use std::collections::HashMap;
use std::mem;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::anyhow;
use tokio::sync::{Mutex as Turn, mpsc};

use crate::volume::{Error, Name, Pool, Result, Silent};

/// Requests that wait for one volume at most.
const WAITING: usize = 64;

/// At the end, work that has begun is waited for so long.
const PATIENCE: Duration = Duration::from_secs(30);

/// While one of these is there, the process does not end.
pub(super) type Stay = mpsc::Sender<()>;

/// The pool, and who works on which of its volumes.
pub(super) struct Work {
    pool: Pool,
    turns: Mutex<HashMap<Name, Arc<Turn<()>>>>,
    /// Looks at a volume wait for each other only: one that hangs costs one thread.
    looks: Mutex<HashMap<Name, Arc<Turn<()>>>>,
    running: Mutex<Option<Stay>>,
    ended: Turn<mpsc::Receiver<()>>,
}

impl Work {
    pub(super) fn new(pool: Pool) -> Arc<Self> {
        let (running, ended) = mpsc::channel(1);
        Arc::new(Work {
            pool,
            turns: Mutex::default(),
            looks: Mutex::default(),
            running: Mutex::new(Some(running)),
            ended: Turn::new(ended),
        })
    }

    /// Starts what has died together with an earlier daemon.
    pub(super) fn recover(&self) {
        self.pool.recover();
    }

    /// Does something to a volume when it is its turn, even if the caller does not wait for it.
    pub(super) async fn change<T, F>(self: &Arc<Self>, name: Name, what: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Pool, &Name) -> Result<T> + Send + 'static,
    {
        let work = Arc::clone(self);
        self.keep(async move { work.in_turn(&work.turns, &name, what).await }).await
    }

    /// Looks at a volume, also while something is done to it.
    pub(super) async fn look<T, F>(self: &Arc<Self>, name: Name, what: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Pool, &Name) -> Result<T> + Send + 'static,
    {
        self.in_turn(&self.looks, &name, what).await
    }

    /// Looks at the pool.
    pub(super) async fn look_at_all<T, F>(self: &Arc<Self>, what: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Pool) -> Result<T> + Send + 'static,
    {
        let work = Arc::clone(self);
        block(move || what(&work.pool)).await
    }

    /// Mounts a volume for a client, and undoes that where the client has gone meanwhile.
    pub(super) async fn mount(
        self: &Arc<Self>,
        name: Name,
        id: String,
        client: Arc<Client>,
    ) -> Result<PathBuf> {
        self.change(name, move |pool, name| {
            if client.is_gone() {
                return Err(gone());
            }
            let path = pool.mount(name, &id, &Silent)?;
            if !client.tell_of(name, &id) {
                tracing::warn!("volume `{name}`: who wanted it mounted has gone; undone");
                pool.unmount(name, &id)?;
                return Err(gone());
            }
            Ok(path)
        })
        .await
    }

    /// Undoes a mount whose client did not get the answer.
    pub(super) fn take_back(self: &Arc<Self>, name: Name, id: String) {
        tracing::warn!("volume `{name}`: who wanted it mounted has gone before the answer; undone");
        let work = Arc::clone(self);
        tokio::spawn(async move {
            let undone = work.change(name, move |pool, name| pool.unmount(name, &id)).await;
            if let Err(error) = undone {
                tracing::warn!("{error}");
            }
        });
    }

    /// Keeps the process; None where it is about to end.
    pub(super) fn stay(&self) -> Option<Stay> {
        lock(&self.running).clone()
    }

    /// Waits for what has begun, for a while.
    pub(super) async fn finish(&self) {
        *lock(&self.running) = None;
        let mut ended = self.ended.lock().await;
        if tokio::time::timeout(PATIENCE, ended.recv()).await.is_err() {
            tracing::warn!("work that does not end within {} s is left", PATIENCE.as_secs());
        }
    }

    /// Runs a piece of work to its end, though the caller may stop waiting for it.
    async fn keep<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let Some(stay) = self.stay() else {
            return Err(anyhow!("nbdbridge volumed is about to end").into());
        };
        let done = tokio::spawn(async move {
            let result = work.await;
            drop(stay);
            result
        });
        done.await.unwrap_or_else(|error| Err(anyhow!("it failed: {error}").into()))
    }

    async fn in_turn<T, F>(
        self: &Arc<Self>,
        turns: &Mutex<HashMap<Name, Arc<Turn<()>>>>,
        name: &Name,
        what: F,
    ) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(&Pool, &Name) -> Result<T> + Send + 'static,
    {
        let turn = {
            let mut turns = lock(turns);
            // Those of volumes that nobody works on.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            let turn = Arc::clone(turns.entry(name.clone()).or_default());
            if Arc::strong_count(&turn) > WAITING + 1 {
                return Err(anyhow!("volume `{name}`: {WAITING} requests wait for it already").into());
            }
            turn
        };
        let turn = turn.lock_owned().await;
        let (work, name) = (Arc::clone(self), name.clone());
        block(move || {
            // Held until it is done, though nobody may wait for that.
            let _turn = turn;
            what(&work.pool, &name)
        })
        .await
    }
}

async fn block<T: Send + 'static>(what: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(what).await;
    done.unwrap_or_else(|error| Err(anyhow!("it failed: {error}").into()))
}

fn gone() -> Error {
    anyhow!("the client has gone").into()
}

/// What a client, of one request, has to be told.
#[derive(Debug, Default)]
pub(super) struct Client(Mutex<Told>);

#[derive(Debug, Default)]
enum Told {
    #[default]
    Nothing,
    /// This volume is mounted for this ID.
    Mounted(Name, String),
    /// It does not listen any more.
    Gone,
}

impl Client {
    fn is_gone(&self) -> bool {
        matches!(*lock(&self.0), Told::Gone)
    }

    /// False where it does not listen any more.
    fn tell_of(&self, name: &Name, id: &str) -> bool {
        let mut told = lock(&self.0);
        if matches!(*told, Told::Gone) {
            return false;
        }
        *told = Told::Mounted(name.clone(), id.to_owned());
        true
    }

    /// It got its answer.
    pub(super) fn has_heard(&self) {
        *lock(&self.0) = Told::Nothing;
    }

    /// It has gone. Gives what it was not told of.
    pub(super) fn leave(&self) -> Option<(Name, String)> {
        match mem::replace(&mut *lock(&self.0), Told::Gone) {
            Told::Mounted(name, id) => Some((name, id)),
            Told::Nothing | Told::Gone => None,
        }
    }
}

/// Nothing that could be left half done panics with one of these locked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_hears_or_leaves() {
        let (name, id) = ("a".parse::<Name>().unwrap(), "x");
        let client = Client::default();
        assert!(!client.is_gone() && client.tell_of(&name, id));
        assert_eq!(client.leave(), Some((name.clone(), id.to_owned())));
        assert_eq!(client.leave(), None);
        assert!(client.is_gone() && !client.tell_of(&name, id));

        let client = Client::default();
        assert!(client.tell_of(&name, id));
        client.has_heard();
        assert_eq!(client.leave(), None);
    }
}
