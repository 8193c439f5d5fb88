//! Commands that run in a process of their own.
//!
//! A kernel that has a fault never answers, and lets no process end that waits for an answer: not even by SIGKILL. So the
//! command goes out from a child, which this process can leave behind:
//!
//! ```text
//!   this process ──fork──> child: closes every other file, sends the command, waits without a limit
//!        │ <──── answer ─────┤
//!        └───── accepted ──> ends
//!   no answer in time, or killed: the socket closes, and a late answer is undone: no half device stays
//! ```
//!
//! The child holds no lock, pipe or terminal of ours, takes no signals, and its standard streams lead nowhere: libublk, which
//! sends some of the commands there (`library`), is interrupted by signals and prints. An open of our own device, which can
//! wait for our own answer, is made in a child as well.
//! A leaf file: the `unsafe` is fork(2), _exit(2) and close_range(2).
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, kill_process, pidfd_open, waitpid};

use super::command::{Call, Cause, CommandRing};
use super::{library, signals};

/// An answered command whose effect is undone unless it is accepted.
pub(super) struct Answered {
    socket: OwnedFd,
    child: Pid,
}

/// Sends a call from a child of this process, and waits for its answer, for `limit` at most. What the kernel has filled is
/// in the call's memory afterwards. Where the answer is not accepted, the call that `undo` makes of it is sent.
///
/// # Errors
/// Refused: the kernel's error, or no child can be made. Unanswered: no answer in time. Lost: the child was killed.
pub(super) fn run(
    device: BorrowedFd<'_>,
    call: &mut Call,
    limit: Duration,
    undo: fn(&Call) -> Option<Call>,
) -> Result<Answered, Cause> {
    let refused = |errno| Cause::Refused(errno);
    let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(refused)?;
    let (ours, theirs) = pair;
    // SAFETY: the process may have other threads, of which the child has none. The child allocates, which the C library
    // allows after fork(2), takes no lock that another thread can hold (no logging, no standard streams), and leaves by
    // _exit(2), without running what is registered for this process's end.
    let child = match unsafe { libc::fork() } {
        0 => {
            let served = catch_unwind(AssertUnwindSafe(|| serve(device, &theirs, call, undo)));
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(i32::from(served.is_err())) }
        }
        number => Pid::from_raw(number).ok_or_else(|| refused(last_errno()))?,
    };
    drop(theirs);
    let answered = Answered { socket: ours, child };
    match receive(&answered.socket, call.memory.len(), limit) {
        Ok((0, memory)) => {
            call.memory = memory;
            Ok(answered)
        }
        Ok((refusal, _)) => {
            answered.accept();
            Err(refused(Errno::from_raw_os_error(-refusal)))
        }
        Err(cause) => Err(cause),
    }
}

impl Answered {
    /// Keeps the command's effect. False where the child is gone.
    pub(super) fn accept(self) -> bool {
        send(&self.socket, &[1], SendFlags::NOSIGNAL).is_ok()
    }
}

impl Drop for Answered {
    /// Lets the child go: it ends soon, or when the kernel lets it.
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let _ = reap(self.child);
    }
}

/// Waits a moment for the end of a child, and then lets a thread wait.
fn reap(child: Pid) -> Option<WaitStatus> {
    let until = Instant::now() + Duration::from_millis(200);
    loop {
        match waitpid(Some(child), WaitOptions::NOHANG) {
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(1)),
            Err(Errno::INTR) => {}
            Ok(None) => break,
            ended => return ended.ok().flatten().map(|(_, status)| status),
        }
    }
    // This thread's end is not waited for when the process ends.
    let reaper = std::thread::Builder::new().name("ublk-reap".into());
    let _ = reaper.spawn(move || retry_on_intr(|| waitpid(Some(child), WaitOptions::empty())));
    None
}

/// Opens a device and closes it again, for this user alone, in a child: where the kernel reads the partition table of a
/// source that does not answer, an open waits, and the process that serves the device could not end. Returns the refusal;
/// None where there is none, or no answer within `limit`.
pub(super) fn open_exclusively(path: &str, limit: Duration) -> Option<Errno> {
    let path = CString::new(path).ok()?;
    // SAFETY: as in `run`; the child makes four system calls, none of which needs memory.
    let child = match unsafe { libc::fork() } {
        0 => {
            let _ = rustix::thread::set_name(c"nbdbridge-look");
            // SAFETY: this process uses none of these descriptors again.
            unsafe { libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) };
            let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
            let opened = rustix::fs::open(path.as_c_str(), flags, Mode::empty());
            let code = opened.err().map_or(0, Errno::raw_os_error);
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) }
        }
        number => Pid::from_raw(number)?,
    };
    let handle = pidfd_open(child, PidfdFlags::empty()).ok();
    let limit = Timespec::try_from(limit).ok()?;
    if let Some(handle) = &handle {
        let _ = retry_on_intr(|| poll(&mut [PollFd::new(handle, PollFlags::IN)], Some(&limit)));
    }
    let _ = kill_process(child, Signal::KILL);
    let status = reap(child)?;
    status.exit_status().filter(|code| *code != 0).map(Errno::from_raw_os_error)
}

/// Receives a child's answer: the result, and the memory.
fn receive(socket: &OwnedFd, len: usize, limit: Duration) -> Result<(i32, Vec<u8>), Cause> {
    let until = Instant::now() + limit;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Cause::Refused(Errno::INVAL))?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&left)) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(Cause::Refused(errno)),
            Ok(0) => return Err(Cause::Unanswered(limit)),
            Ok(_) => break,
        }
    }
    let mut answer = vec![0; 4 + len];
    let count = retry_on_intr(|| recv(socket, &mut answer, RecvFlags::empty())).map(|(count, _)| count);
    match answer.split_first_chunk() {
        Some((result, memory)) if count == Ok(answer.len()) => {
            Ok((i32::from_ne_bytes(*result), memory.to_vec()))
        }
        _ => Err(Cause::Lost),
    }
}

/// The child: sends the command, tells its answer, and undoes what nobody wants any more.
fn serve(device: BorrowedFd<'_>, socket: &OwnedFd, call: &mut Call, undo: fn(&Call) -> Option<Call>) {
    // Ctrl-C is for the process that waits, and the command is not left half done.
    signals::block_all();
    let _ = rustix::thread::set_name(c"nbdbridge-ctl");
    close_all_but(device, socket.as_fd());
    if let Err(errno) = library::silence() {
        let _ = send(socket, &answer_of(-errno.raw_os_error(), &[], call.memory.len()), SendFlags::NOSIGNAL);
        return;
    }
    let mut ring = CommandRing::default();
    let len = call.memory.len();
    let result = match execute(&mut ring, device, call) {
        Ok(()) => 0,
        Err(Cause::Refused(errno)) => -errno.raw_os_error(),
        Err(Cause::Unanswered(_) | Cause::Lost) => return,
    };
    let told = send(socket, &answer_of(result, &call.memory, len), SendFlags::NOSIGNAL).is_ok();
    let accepted =
        told && matches!(retry_on_intr(|| recv(socket, &mut [0; 1], RecvFlags::empty())), Ok((1, _)));
    if result == 0
        && !accepted
        && let Some(mut undo) = undo(call)
    {
        let _ = execute(&mut ring, device, &mut undo);
    }
}

/// Sends a command, by libublk or on the ring.
fn execute(ring: &mut CommandRing, device: BorrowedFd<'_>, call: &mut Call) -> Result<(), Cause> {
    if !library::sends(call.command, call.id) {
        return ring.run(device, call, None);
    }
    // The kernel's own word on a device that is not there, or not ours.
    let mut question = call.question();
    ring.run(device, &mut question, None)?;
    match library::send(ring, call) {
        Err(Errno::OPNOTSUPP) => {
            ring.run(device, &mut question, None).and(Err(Cause::Refused(Errno::OPNOTSUPP)))
        }
        done => done.map_err(Cause::Refused),
    }
}

/// An answer's bytes: the result, and the memory; after a refusal there is none.
fn answer_of(result: i32, memory: &[u8], len: usize) -> Vec<u8> {
    let mut answer = [result.to_ne_bytes().as_slice(), memory].concat();
    answer.resize(4 + len, 0);
    answer
}

/// Closes what the child has from its parent: locks, pipes and sockets, whose ends others wait for.
fn close_all_but(one: BorrowedFd<'_>, other: BorrowedFd<'_>) {
    let number = |fd: BorrowedFd<'_>| fd.as_raw_fd().unsigned_abs();
    let (low, high) = (number(one).min(number(other)), number(one).max(number(other)));
    let ranges = [(0, low.checked_sub(1)), (low + 1, high.checked_sub(1)), (high + 1, Some(u32::MAX))];
    for (first, last) in ranges {
        if let Some(last) = last.filter(|last| first <= *last) {
            // SAFETY: this process uses none of these descriptors again: it ends by _exit(2), without destructors.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ublk::abi;
    use std::fs::File;

    fn call(command: abi::Command) -> Call {
        Call { command, encoded: true, id: 7, data: 0, memory: vec![9; 8], path_len: 0 }
    }

    #[test]
    fn a_refusal_comes_back_from_the_child() {
        // A plain file takes no commands.
        let file = tempfile::tempfile().unwrap();
        let before = Instant::now();
        let answered = run(file.as_fd(), &mut call(abi::STOP_DEV), Duration::from_secs(60), |_| None);
        match answered.err() {
            Some(Cause::Refused(_)) => {}
            other => panic!("{other:?}"),
        }
        assert!(before.elapsed() < Duration::from_secs(50));
    }

    #[test]
    fn a_child_that_does_not_answer_is_left() {
        let (socket, _other) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let limit = Duration::from_millis(50);
        assert_eq!(receive(&socket, 8, limit).unwrap_err(), Cause::Unanswered(limit));
        drop(_other);
        assert_eq!(receive(&socket, 8, limit).unwrap_err(), Cause::Lost);
    }

    #[test]
    fn an_open_that_waits_ends_in_time() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let before = Instant::now();
        assert_eq!(open_exclusively(fifo.to_str().unwrap(), Duration::from_millis(50)), None);
        assert!(before.elapsed() < Duration::from_secs(30));
        let file = folder.path().join("file");
        File::create(&file).unwrap();
        assert_eq!(open_exclusively(file.to_str().unwrap(), Duration::from_secs(30)), None);
        let missing = folder.path().join("missing");
        assert_eq!(open_exclusively(missing.to_str().unwrap(), Duration::from_secs(30)), Some(Errno::NOENT));
    }
}
