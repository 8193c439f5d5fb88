//! One command to the driver: its bytes, the ring that it goes through, and its failure.
//!
//! The ring is libublk's control ring, which libublk has once for each thread. It is lent for a command and taken back, so
//! that no thread keeps one, a handle can be used on any thread, and no fork inherits one. Waiting is ours, because libublk
//! knows no limit and takes an interrupted command for a failed one.
//!
//! A ring is used again only after its last command was answered. After a command without an answer, or a failed
//! submission, the ring is given up: the kernel may still hold the command, and a late answer must not be taken for that
//! of the next one.
//! A leaf file: memory goes to the kernel here.
#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::squeue::Entry128;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, types};
use libublk::{sys, ublk_init_ctrl_task_ring, with_ctrl_ring_mut};
use rustix::io::Errno;

use super::abi::{self, Command, DeviceInfo};
use super::plain::Plain;

/// A command as the kernel takes it (`struct ublksrv_ctrl_cmd`), with the memory that it names.
#[derive(Clone, Debug)]
pub(super) struct Call {
    /// The command.
    pub(super) command: Command,
    /// Commands are encoded (6.4 and later).
    pub(super) encoded: bool,
    /// The device's number.
    pub(super) id: u32,
    /// Inline data.
    pub(super) data: u64,
    /// A path of this many bytes, with its zero, and behind it the bytes that the kernel reads or fills.
    pub(super) memory: Vec<u8>,
    /// Bytes of the path in `memory`.
    pub(super) path_len: usize,
}

impl Call {
    /// Returns the call that asks about the same device, with the same rights.
    pub(super) fn question(&self) -> Call {
        let path = self.memory.get(..self.path_len).unwrap_or_default();
        let memory = [path, DeviceInfo::default().bytes()].concat();
        Call { command: abi::GET_DEV_INFO, data: 0, memory, ..*self }
    }

    /// Returns the submission for this call; it names the memory.
    fn entry(&mut self, device: BorrowedFd<'_>) -> Result<Entry128, Errno> {
        let length = |len: usize| u16::try_from(len).map_err(|_| Errno::INVAL);
        let header = sys::ublksrv_ctrl_cmd {
            dev_id: self.id,
            queue_id: u16::MAX,
            len: length(self.memory.len())?,
            addr: if self.memory.is_empty() { 0 } else { self.memory.as_mut_ptr() as u64 },
            data: [self.data],
            dev_path_len: length(self.path_len)?,
            ..Default::default()
        };
        let mut words = [0; 80];
        words[..size_of_val(&header)].copy_from_slice(header.bytes());
        let op = self.command.op(self.encoded);
        Ok(opcode::UringCmd80::new(types::Fd(device.as_raw_fd()), op).cmd(words).build())
    }
}

/// The failure of a command. Its text names the command.
#[derive(Debug)]
pub(super) struct CommandError {
    command: Command,
    cause: Cause,
}

/// The cause of a command's failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// The kernel's answer, or its refusal to take the command.
    Refused(Errno),
    /// No answer for this long. The kernel may still carry the command out.
    Unanswered(Duration),
    /// The process that waited for the answer is gone.
    Lost,
}

impl CommandError {
    pub(super) fn new(command: Command, cause: Cause) -> Self {
        CommandError { command, cause }
    }

    /// Returns the kernel's error number, where the kernel has answered.
    pub(super) fn errno(&self) -> Option<Errno> {
        match self.cause {
            Cause::Refused(errno) => Some(errno),
            Cause::Unanswered(_) | Cause::Lost => None,
        }
    }

    /// Returns whether the kernel has not answered in time.
    pub(super) fn is_unanswered(&self) -> bool {
        matches!(self.cause, Cause::Unanswered(_))
    }
}

impl fmt::Display for CommandError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.command.name();
        match self.cause {
            Cause::Refused(errno) => write!(f, "{name}: {}", io::Error::from(errno)),
            Cause::Unanswered(limit) => write!(
                f,
                "{name}: the kernel has not answered for {limit:?}; look for a fault of ublk_drv in `dmesg` (Linux \
                 6.18.4 and 6.18.5 have one): another kernel and a restart of this host help"
            ),
            Cause::Lost => write!(f, "{name}: the process that waited for the answer was killed; try again"),
        }
    }
}

impl std::error::Error for CommandError {}

/// A control ring of libublk.
pub(super) type Ring = IoUring<Entry128>;

/// Sends commands one after another.
#[derive(Default)]
pub(super) struct CommandRing {
    /// None at first, and after a command whose end is not known.
    ring: Option<Ring>,
    /// The number of the last command: its answer carries it.
    last: u64,
}

impl CommandRing {
    /// Makes the ring, where there is none.
    ///
    /// # Errors
    /// The kernel's refusal: EPERM where io_uring is denied.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        self.take().map(|ring| self.ring = Some(ring))
    }

    /// Sends a call and waits for its answer, for `limit` at most; without one, for as long as it takes. What the kernel
    /// has filled is in the call's memory afterwards.
    ///
    /// # Errors
    /// Refused: the kernel's error. Unanswered: no answer in time.
    pub(super) fn run(
        &mut self,
        device: BorrowedFd<'_>,
        call: &mut Call,
        limit: Option<Duration>,
    ) -> Result<(), Cause> {
        let entry = call.entry(device).map_err(Cause::Refused)?;
        let memory = std::mem::take(&mut call.memory);
        call.memory = self.run_entry(entry, memory, limit)?;
        Ok(())
    }

    /// Lends the ring to libublk, as this thread's control ring, for `work`. Returns what `work` does, and the ring.
    ///
    /// # Errors
    /// There is no ring and the kernel refuses one.
    pub(super) fn lend<T>(&mut self, work: impl FnOnce() -> T) -> Result<(T, Option<Ring>), Errno> {
        let ring = self.take().map_err(|error| errno_of(&error))?;
        place_of_libublk(Some(ring));
        let done = work();
        Ok((done, place_of_libublk(None)))
    }

    /// Runs an entry that names no memory but `memory`, which comes back with the answer.
    fn run_entry(
        &mut self,
        entry: Entry128,
        memory: Vec<u8>,
        limit: Option<Duration>,
    ) -> Result<Vec<u8>, Cause> {
        self.last += 1;
        let (entry, number) = (entry.user_data(self.last), self.last);
        let (answer, ring) = self
            .lend(|| with_ctrl_ring_mut(|ring| wait(ring, &entry, number, limit)))
            .map_err(Cause::Refused)?;
        let result = match answer {
            Ok(result) => result,
            Err(cause) => {
                // The kernel may write to it until it has answered. The ring is given up.
                std::mem::forget(memory);
                return Err(cause);
            }
        };
        self.ring = ring;
        if result < 0 { Err(Cause::Refused(Errno::from_raw_os_error(-result))) } else { Ok(memory) }
    }

    fn take(&mut self) -> io::Result<Ring> {
        match self.ring.take() {
            Some(ring) => Ok(ring),
            None => IoUring::builder().dontfork().build(4),
        }
    }
}

/// Puts a ring where libublk has this thread's control ring, and returns the one that was there.
fn place_of_libublk(ring: Option<Ring>) -> Option<Ring> {
    let mut before = None;
    let _ = ublk_init_ctrl_task_ring(|place| {
        before = std::mem::replace(place, ring);
        Ok(())
    });
    before
}

/// Submits an entry and waits for the answer that carries its number.
fn wait(ring: &mut Ring, entry: &Entry128, number: u64, limit: Option<Duration>) -> Result<i32, Cause> {
    let until = limit.map(|limit| Instant::now() + limit);
    // SAFETY: the entry names the memory that `run_entry` has, which frees it only after the answer. The descriptor in
    // the entry is open during the submission, which is all that the kernel needs it for.
    if unsafe { ring.submission().push(entry) }.is_err() {
        return Err(Cause::Refused(Errno::BUSY));
    }
    loop {
        let answer = ring.completion().find(|answer| answer.user_data() == number);
        if let Some(answer) = answer {
            return Ok(answer.result());
        }
        let waited = match until.map(|until| until.saturating_duration_since(Instant::now())) {
            None => ring.submit_and_wait(1),
            Some(left) if left.is_zero() => return Err(Cause::Unanswered(limit.unwrap_or_default())),
            Some(left) => {
                let left = Timespec::from(left);
                ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&left))
            }
        };
        match waited {
            Ok(_) => {}
            Err(error) if matches!(errno_of(&error), Errno::INTR | Errno::TIME) => {}
            Err(error) => return Err(Cause::Refused(errno_of(&error))),
        }
    }
}

fn errno_of(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::OwnedFd;

    const SHORT: Duration = Duration::from_millis(50);

    fn ring() -> Option<CommandRing> {
        let mut ring = CommandRing::default();
        match ring.prepare() {
            Ok(()) => Some(ring),
            Err(error) => {
                eprintln!("SKIP: ublk::command: no io_uring: {error}");
                None
            }
        }
    }

    fn pipe() -> (OwnedFd, File) {
        let (reader, writer) = io::pipe().unwrap();
        (reader.into(), OwnedFd::from(writer).into())
    }

    /// A read of a pipe stands in for a command: it is answered when the test says so.
    fn read(ring: &mut CommandRing, from: &OwnedFd, limit: Option<Duration>) -> Result<Vec<u8>, Cause> {
        let mut memory = vec![0; 4];
        let entry = opcode::Read::new(types::Fd(from.as_raw_fd()), memory.as_mut_ptr(), 4).build();
        ring.run_entry(entry.into(), memory, limit)
    }

    #[test]
    fn a_command_without_an_answer_ends_in_time() {
        let Some(mut ring) = ring() else { return };
        let (reader, mut writer) = pipe();
        let before = Instant::now();
        assert_eq!(read(&mut ring, &reader, Some(SHORT)), Err(Cause::Unanswered(SHORT)));
        assert!((SHORT..Duration::from_secs(10)).contains(&before.elapsed()));
        assert!(ring.ring.is_none(), "the ring still has the command");
        // A late answer is not taken for that of the next command.
        let (other, mut other_writer) = pipe();
        writer.write_all(b"late").unwrap();
        other_writer.write_all(b"mine").unwrap();
        assert_eq!(read(&mut ring, &other, Some(Duration::from_secs(10))).as_deref(), Ok(b"mine".as_slice()));
        assert!(ring.ring.is_some());
    }

    #[test]
    fn answers_of_other_commands_are_passed_over() {
        let Some(mut ring) = ring() else { return };
        let stale: Entry128 = opcode::Nop::new().build().user_data(u64::MAX).into();
        // SAFETY: a no-operation names no memory.
        unsafe { ring.ring.as_mut().unwrap().submission().push(&stale) }.unwrap();
        let (reader, mut writer) = pipe();
        writer.write_all(b"mine").unwrap();
        assert_eq!(read(&mut ring, &reader, None).as_deref(), Ok(b"mine".as_slice()));
    }

    #[test]
    fn a_failed_submission_gives_the_ring_up() {
        let Some(mut ring) = ring() else { return };
        let (reader, mut writer) = pipe();
        writer.write_all(b"mine").unwrap();
        // A ring that is not enabled takes nothing.
        ring.ring = Some(IoUring::builder().setup_r_disabled().build(4).unwrap());
        assert_eq!(read(&mut ring, &reader, None), Err(Cause::Refused(Errno::BADFD)));
        assert!(ring.ring.is_none());
        assert_eq!(read(&mut ring, &reader, None).as_deref(), Ok(b"mine".as_slice()));
    }

    #[test]
    fn a_handle_moves_between_threads_and_leaves_no_ring_behind() {
        let Some(mut ring) = ring() else { return };
        let asked = |ring: &mut CommandRing| {
            let (reader, mut writer) = pipe();
            writer.write_all(b"mine").unwrap();
            assert_eq!(read(ring, &reader, None).as_deref(), Ok(b"mine".as_slice()));
            assert!(place_of_libublk(None).is_none(), "libublk keeps a ring");
        };
        asked(&mut ring);
        let moved = std::thread::spawn(move || {
            asked(&mut ring);
            ring
        });
        asked(&mut moved.join().unwrap());
    }

    #[test]
    fn signals_do_not_cut_an_answer_short() {
        extern "C" fn noticed(_: libc::c_int) {}
        let Some(mut ring) = ring() else { return };
        let (reader, mut writer) = pipe();
        // SAFETY: the handler does nothing; without SA_RESTART the wait is interrupted.
        let waiting = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = noticed as *const () as usize;
            libc::sigaction(libc::SIGURG, &raw const action, std::ptr::null_mut());
            libc::pthread_self()
        };
        let disturber = std::thread::spawn(move || {
            for _ in 0..50 {
                std::thread::sleep(Duration::from_millis(2));
                // SAFETY: the thread waits until this one has ended.
                unsafe { libc::pthread_kill(waiting, libc::SIGURG) };
            }
            writer.write_all(b"mine").unwrap();
        });
        assert_eq!(
            read(&mut ring, &reader, Some(Duration::from_secs(60))).as_deref(),
            Ok(b"mine".as_slice())
        );
        disturber.join().unwrap();
    }

    #[test]
    fn a_question_has_the_rights_of_its_call() {
        let memory = [b"/dev/ublkc7\0".as_slice(), &[1; 8]].concat();
        let call = Call { command: abi::STOP_DEV, encoded: true, id: 7, data: 9, memory, path_len: 12 };
        let question = call.question();
        assert_eq!((question.command, question.id, question.data), (abi::GET_DEV_INFO, 7, 0));
        assert_eq!((&question.memory[..12], question.memory.len()), (b"/dev/ublkc7\0".as_slice(), 12 + 64));
    }

    #[test]
    fn failures_name_the_command_and_the_way_out() {
        let text = |cause| CommandError::new(super::super::abi::ADD_DEV, cause).to_string();
        assert_eq!(text(Cause::Refused(Errno::NODEV)), "ADD_DEV: No such device (os error 19)");
        let unanswered = text(Cause::Unanswered(Duration::from_secs(15)));
        assert!(unanswered.starts_with("ADD_DEV: the kernel has not answered for 15s; "), "{unanswered}");
        assert!(unanswered.contains("6.18.4"), "{unanswered}");
    }
}
