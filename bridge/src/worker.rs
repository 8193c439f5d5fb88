//! Thread-per-core workers: each a tokio current-thread runtime on a thread of its own. What is spawned on a
//! worker stays there, and so need not be `Send`.

use std::future::Future;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread::JoinHandle;

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::mpsc;

/// Threads of one worker's blocking pool at most: it serves what has no asynchronous form.
const BLOCKING_THREADS: usize = 16;

type Job = Box<dyn FnOnce() + Send>;

/// The workers of a process. Dropping it ends them, with whatever still runs on them.
pub struct Workers {
    workers: Vec<Worker>,
    next: AtomicUsize,
}

struct Worker {
    jobs: Option<mpsc::UnboundedSender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` workers, at least one.
    ///
    /// # Errors
    /// The operating system's, where no thread or no event queue could be made.
    pub fn start(count: usize) -> io::Result<Self> {
        let workers = (0..count.max(1)).map(start_worker).collect::<io::Result<_>>()?;
        Ok(Workers { workers, next: AtomicUsize::new(0) })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.workers.len()
    }

    /// The number of the worker whose turn it is.
    pub fn next(&self) -> usize {
        self.next.fetch_add(1, Relaxed) % self.workers.len()
    }

    /// Runs a future on worker `index`. It is made there, and need not be `Send`.
    pub fn spawn<F, T>(&self, index: usize, make: F)
    where
        F: FnOnce() -> T + Send + 'static,
        T: Future<Output = ()> + 'static,
    {
        let job: Job = Box::new(move || {
            tokio::task::spawn_local(make());
        });
        if let Some(jobs) = &self.workers[index % self.workers.len()].jobs {
            // A worker that has ended takes no jobs; then the process is ending too.
            let _ = jobs.send(job);
        }
    }

    /// Runs a future on worker `index` and waits for its result; None where the worker has ended. Nothing begins
    /// before the first poll.
    pub async fn run<F, T, R>(&self, index: usize, make: F) -> Option<R>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Future<Output = R> + 'static,
        R: Send + 'static,
    {
        let (done, result) = tokio::sync::oneshot::channel();
        self.spawn(index, move || {
            let future = make();
            async move {
                let _ = done.send(future.await);
            }
        });
        result.await.ok()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            worker.jobs = None;
        }
        for worker in &mut self.workers {
            if let Some(thread) = worker.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

fn start_worker(index: usize) -> io::Result<Worker> {
    let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
    let (ready, started) = std::sync::mpsc::channel();
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(BLOCKING_THREADS)
            .thread_name(format!("pool-{index}"))
            .build_local(LocalOptions::default());
        match runtime {
            Ok(runtime) => {
                let _ = ready.send(Ok(()));
                runtime.block_on(async move {
                    while let Some(job) = queue.recv().await {
                        job();
                    }
                });
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    })?;
    match started.recv() {
        Ok(Ok(())) => Ok(Worker { jobs: Some(jobs), thread: Some(thread) }),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(io::Error::other("a worker thread ended at its start")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn futures_that_are_not_send_run_on_their_worker() {
        let workers = Workers::start(2).unwrap();
        let runtime = Builder::new_current_thread().build().unwrap();
        let names: Vec<String> = (0..2)
            .map(|index| {
                runtime
                    .block_on(workers.run(index, || async {
                        let local = Rc::new(1);
                        tokio::task::yield_now().await;
                        assert_eq!(*local, 1);
                        std::thread::current().name().unwrap_or_default().to_owned()
                    }))
                    .unwrap()
            })
            .collect();
        assert_eq!(names, ["worker-0", "worker-1"]);
    }
}
