//! One thread of load: its connections, and the waiting for whichever has something to do.

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use rustix::event::{PollFlags, Timespec, epoll};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::connection::Connection;
use super::plan::Plan;
use super::socket::TICK;
use super::tally::Tally;

/// A server that answers nothing for so long is given up.
const STALL: Duration = Duration::from_secs(30);

/// What all threads share.
pub(super) struct Shared {
    /// Somebody wants the run to end.
    pub(super) stop: AtomicBool,
    /// Requests that were answered, for whoever watches.
    pub(super) answered: AtomicU64,
    /// Between the load and reading back: all threads have stopped writing.
    pub(super) written: Barrier,
}

/// Runs one thread's connections to their end; what was counted, and what ended it early.
pub(super) fn run(
    mut connections: Vec<Connection<'_>>,
    plan: &Plan,
    deadline: Option<Instant>,
    shared: &Shared,
) -> (Tally, Result<()>) {
    let mut tally = Tally::new();
    let began = Instant::now();
    let mut ended = drive(&mut connections, deadline, shared, &mut tally);
    tally.elapsed_ns = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
    tally.cpu_ns = thread_cpu_ns();
    if ended.is_err() {
        shared.stop.store(true, Relaxed);
    }
    if plan.written.is_some() {
        shared.written.wait();
        if ended.is_ok() && !shared.stop.load(Relaxed) {
            let mut check = Tally::new();
            connections.iter_mut().for_each(Connection::read_back);
            ended = drive(&mut connections, None, shared, &mut check);
            tally.add_check(check);
        }
    }
    (tally, ended)
}

/// Makes requests and takes answers until every connection has done its part.
fn drive(
    connections: &mut [Connection<'_>],
    deadline: Option<Instant>,
    shared: &Shared,
    tally: &mut Tally,
) -> Result<()> {
    for connection in connections.iter_mut() {
        connection.issue()?;
    }
    let mut waiter = Waiter::new(connections)?;
    let mut last_answer = Instant::now();
    let mut answered = tally.requests();
    while !connections.iter().all(Connection::is_done) {
        let progress = waiter.turn(connections, tally)?;
        let now = Instant::now();
        if deadline.is_some_and(|deadline| now >= deadline) || shared.stop.load(Relaxed) {
            connections.iter_mut().for_each(Connection::finish);
        }
        if progress {
            last_answer = now;
            let before = std::mem::replace(&mut answered, tally.requests());
            shared.answered.fetch_add(answered - before, Relaxed);
        } else if now - last_answer > STALL {
            bail!("the server has not answered for {} s", STALL.as_secs());
        }
    }
    Ok(())
}

/// How a thread waits. One connection is waited for in its receive, which saves a system call.
enum Waiter {
    One,
    Many {
        queue: rustix::fd::OwnedFd,
        events: Vec<epoll::Event>,
        /// Whether it is waited for room to send; one for each connection.
        blocked: Vec<bool>,
    },
}

impl Waiter {
    fn new(connections: &[Connection<'_>]) -> Result<Self> {
        if connections.len() == 1 {
            return Ok(Waiter::One);
        }
        let queue = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (n, connection) in connections.iter().enumerate() {
            let data = epoll::EventData::new_u64(n as u64);
            epoll::add(&queue, &connection.socket, data, wanted(connection.is_blocked()))?;
        }
        let blocked = connections.iter().map(Connection::is_blocked).collect();
        Ok(Waiter::Many { queue, events: Vec::with_capacity(connections.len()), blocked })
    }

    /// Waits a little for something to do, and does it; whether something was received.
    fn turn(&mut self, connections: &mut [Connection<'_>], tally: &mut Tally) -> Result<bool> {
        match self {
            Waiter::One => {
                let connection = &mut connections[0];
                let blocked = connection.is_blocked();
                if blocked {
                    connection.socket.wait(PollFlags::IN | PollFlags::OUT)?;
                }
                serve(connection, !blocked, tally)
            }
            Waiter::Many { queue, events, blocked } => {
                let tick = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
                events.clear();
                match epoll::wait(&mut *queue, rustix::buffer::spare_capacity(events), Some(&tick)) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                let mut progress = false;
                for event in events {
                    let n = usize::try_from(event.data.u64()).unwrap_or(0);
                    let connection = &mut connections[n];
                    progress |= serve(connection, false, tally)?;
                    if connection.is_blocked() != blocked[n] {
                        blocked[n] = connection.is_blocked();
                        epoll::modify(&mut *queue, &connection.socket, event.data, wanted(blocked[n]))?;
                    }
                }
                Ok(progress)
            }
        }
    }
}

/// What to wait for.
fn wanted(blocked: bool) -> epoll::EventFlags {
    if blocked { epoll::EventFlags::IN | epoll::EventFlags::OUT } else { epoll::EventFlags::IN }
}

fn serve(connection: &mut Connection<'_>, wait: bool, tally: &mut Tally) -> Result<bool> {
    let received = connection.receive(wait, tally)?;
    if received {
        connection.issue()?;
    } else {
        connection.send()?;
    }
    Ok(received)
}

/// Processor time of this thread.
fn thread_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    part(time.tv_sec) * 1_000_000_000 + part(time.tv_nsec)
}
