//! The engine's thread. It begins with the first job, so that it has what its process has by then (user, namespaces),
//! and so that an image which only its map serves has none.

use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::runtime::{Builder, LocalOptions, LocalRuntime};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::engine::Engine;
use super::{Parts, Shared};
use crate::{Error, ErrorKind, OpenError, Result};

/// Threads of the engine's pool at most, for what has no asynchronous form.
const POOL_THREADS: usize = 16;

/// Metadata does not wait for longer than this to be committed, whether or not anybody flushes.
const COMMIT_EVERY: Duration = Duration::from_secs(5);

type Job = Box<dyn FnOnce(Rc<Engine>) -> Pin<Box<dyn Future<Output = ()>>> + Send>;

/// Runs jobs on the engine. Dropped, it waits until they have ended and all is committed.
pub(super) struct EngineThread {
    state: Mutex<State>,
}

enum State {
    Waiting(Box<(Parts, Arc<Shared>)>),
    Running(mpsc::UnboundedSender<Job>, JoinHandle<()>),
    Gone,
}

impl EngineThread {
    pub(super) fn new(parts: Parts, shared: Arc<Shared>) -> Self {
        EngineThread { state: Mutex::new(State::Waiting(Box::new((parts, shared)))) }
    }

    /// Runs a job to its end, also where the caller stops waiting.
    pub(super) fn run<T, F, J>(&self, job: J) -> impl Future<Output = Result<T>> + use<T, F, J>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + 'static,
        J: FnOnce(Rc<Engine>) -> F + Send + 'static,
    {
        let (done, result) = oneshot::channel();
        let job: Job = Box::new(move |engine| {
            Box::pin(async move {
                let _room = engine.room().await;
                let _ = done.send(job(engine.clone()).await);
            })
        });
        let sent = self.send(job);
        async move {
            sent?;
            // Without an answer where the job has panicked: the answer was dropped then.
            result.await.unwrap_or_else(|_| Err(gone()))
        }
    }

    fn send(&self, job: Job) -> Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Waiting(_) = &*state
            && let State::Waiting(parts) = std::mem::replace(&mut *state, State::Gone)
        {
            let (jobs, queue) = mpsc::unbounded_channel();
            let (parts, shared) = *parts;
            let thread = std::thread::Builder::new()
                .name("image".into())
                .spawn(move || serve(parts, shared, queue))
                .map_err(|error| {
                    Error::new(ErrorKind::NoMemory, format!("no thread for an image: {error}"))
                })?;
            *state = State::Running(jobs, thread);
        }
        match &*state {
            State::Running(jobs, _) => jobs.send(job).map_err(|_| gone()),
            State::Waiting(_) | State::Gone => Err(gone()),
        }
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let State::Running(jobs, thread) = std::mem::replace(state, State::Gone) {
            drop(jobs);
            if thread.join().is_err() {
                tracing::error!("an image's thread has panicked");
            }
        }
    }
}

fn gone() -> Error {
    Error::new(ErrorKind::Io, "the image's engine has failed; the log says why")
}

fn runtime() -> std::io::Result<LocalRuntime> {
    Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(POOL_THREADS)
        .thread_name("image-pool")
        .build_local(LocalOptions::default())
}

fn serve(parts: Parts, shared: Arc<Shared>, mut queue: mpsc::UnboundedReceiver<Job>) {
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => {
            // The queue goes, and with it all who wait.
            tracing::error!(%error, "no event queue for an image");
            return;
        }
    };
    runtime.block_on(async move {
        let engine = Engine::new(parts, shared);
        let mut jobs = JoinSet::new();
        let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + COMMIT_EVERY, COMMIT_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                job = queue.recv() => match job {
                    Some(job) => drop(jobs.spawn_local(job(engine.clone()))),
                    None => break,
                },
                ended = jobs.join_next(), if !jobs.is_empty() => heed(ended),
                _ = tick.tick() => {
                    if engine.dirty() {
                        let engine = engine.clone();
                        drop(jobs.spawn_local(async move { commit(&engine).await }));
                    }
                }
            }
        }
        while !jobs.is_empty() {
            heed(jobs.join_next().await);
        }
        commit(&engine).await;
        engine.close().await;
    });
}

fn heed(ended: Option<std::result::Result<(), tokio::task::JoinError>>) {
    if let Some(Err(error)) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a request to an image has panicked: it is answered with EIO");
    }
}

async fn commit(engine: &Engine) {
    // That it was given up has been said, once.
    if let Err(error) = engine.commit().await
        && engine.top.is_sound().is_ok()
    {
        tracing::error!(%error, "an image's metadata cannot be brought to its file");
    }
}

/// Waits for a future on a thread of its own: the caller may be within a runtime.
///
/// # Errors
/// Its own, or that there is no thread.
pub(super) fn wait_for<T: Send>(
    path: &Path,
    work: impl AsyncFnOnce() -> std::result::Result<T, OpenError> + Send,
) -> std::result::Result<T, OpenError> {
    let os =
        |source| OpenError::Os { path: path.to_owned(), action: "cannot begin to open it", error: source };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("image-open".into())
            .spawn_scoped(scope, || runtime().map_err(os)?.block_on(work()))
            .map_err(os)?;
        thread.join().unwrap_or_else(|_| {
            Err(OpenError::Unsupported {
                path: path.to_owned(),
                reason: format!("is malformed; `qemu-img check {}` tells more", path.display()),
            })
        })
    })
}
