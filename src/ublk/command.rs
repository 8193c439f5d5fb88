//! One command to the driver: its bytes, the io_uring of 128-byte entries that it goes through, and its failure.
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
use rustix::io::Errno;

use super::abi::Command;

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
    /// Returns the submission for this call; it names the memory.
    fn entry(&mut self, device: BorrowedFd<'_>) -> Result<Entry128, Errno> {
        let length = |len: usize| u16::try_from(len).map_err(|_| Errno::INVAL);
        let mut words = [0; 80];
        words[0..4].copy_from_slice(&self.id.to_ne_bytes());
        words[4..6].copy_from_slice(&u16::MAX.to_ne_bytes());
        if !self.memory.is_empty() {
            words[6..8].copy_from_slice(&length(self.memory.len())?.to_ne_bytes());
            words[8..16].copy_from_slice(&(self.memory.as_mut_ptr() as u64).to_ne_bytes());
        }
        words[16..24].copy_from_slice(&self.data.to_ne_bytes());
        words[24..26].copy_from_slice(&length(self.path_len)?.to_ne_bytes());
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

/// Sends commands one after another.
#[derive(Default)]
pub(super) struct CommandRing {
    /// None at first, and after a command whose end is not known.
    ring: Option<IoUring<Entry128>>,
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

    /// Runs an entry that names no memory but `memory`, which comes back with the answer.
    fn run_entry(
        &mut self,
        entry: Entry128,
        memory: Vec<u8>,
        limit: Option<Duration>,
    ) -> Result<Vec<u8>, Cause> {
        let until = limit.map(|limit| Instant::now() + limit);
        // Taken out: it comes back only after this command's answer.
        let mut ring = self.take().map_err(|error| Cause::Refused(errno_of(&error)))?;
        self.last += 1;
        let entry = entry.user_data(self.last);
        // SAFETY: the kernel may read and write `memory` until it has answered. On each return before that, `memory` is
        // leaked and never freed; nothing touches it meanwhile. The descriptor in the entry is open during the submission,
        // which is all that the kernel needs it for.
        if unsafe { ring.submission().push(&entry) }.is_err() {
            return Err(Cause::Refused(Errno::BUSY));
        }
        loop {
            let answer = ring.completion().find(|answer| answer.user_data() == self.last);
            if let Some(answer) = answer {
                self.ring = Some(ring);
                return match answer.result() {
                    refused if refused < 0 => Err(Cause::Refused(Errno::from_raw_os_error(-refused))),
                    _ => Ok(memory),
                };
            }
            let waited = match until.map(|until| until.saturating_duration_since(Instant::now())) {
                None => ring.submit_and_wait(1),
                Some(left) if left.is_zero() => {
                    std::mem::forget(memory);
                    return Err(Cause::Unanswered(limit.unwrap_or_default()));
                }
                Some(left) => {
                    let left = Timespec::from(left);
                    ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&left))
                }
            };
            match waited {
                Ok(_) => {}
                Err(error) if matches!(errno_of(&error), Errno::INTR | Errno::TIME) => {}
                Err(error) => {
                    std::mem::forget(memory);
                    return Err(Cause::Refused(errno_of(&error)));
                }
            }
        }
    }

    fn take(&mut self) -> io::Result<IoUring<Entry128>> {
        match self.ring.take() {
            Some(ring) => Ok(ring),
            None => IoUring::builder().dontfork().build(4),
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
    fn failures_name_the_command_and_the_way_out() {
        let text = |cause| CommandError::new(super::super::abi::ADD_DEV, cause).to_string();
        assert_eq!(text(Cause::Refused(Errno::NODEV)), "ADD_DEV: No such device (os error 19)");
        let unanswered = text(Cause::Unanswered(Duration::from_secs(15)));
        assert!(unanswered.starts_with("ADD_DEV: the kernel has not answered for 15s; "), "{unanswered}");
        assert!(unanswered.contains("6.18.4"), "{unanswered}");
    }
}
