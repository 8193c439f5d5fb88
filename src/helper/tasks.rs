//! The helper process: one task from its command line, the system calls for it, and one answer.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;

use super::{Task, framed};
use crate::attach::{self, LoopDevice};
use crate::fuse::{self, Mounted, Unmounted};

impl<'a> Task<'a> {
    /// The words of the command line that mean this task.
    pub(super) fn words(&self) -> Vec<OsString> {
        let yes = |flag: bool| OsStr::new(if flag { "yes" } else { "no" });
        let words: Vec<&OsStr> = match self {
            Task::Stat(path) => vec!["stat".as_ref(), path.as_os_str()],
            Task::Open(path) => vec!["open".as_ref(), path.as_os_str()],
            Task::Flush(path) => vec!["flush".as_ref(), path.as_os_str()],
            Task::Unmount { file, number, lazily } => {
                vec!["unmount".as_ref(), file.as_os_str(), number.as_ref(), yes(*lazily)]
            }
            Task::LoopAttach { file, read_only } => {
                vec!["loop-attach".as_ref(), file.as_os_str(), yes(*read_only)]
            }
            Task::LoopDetach { device, file } => {
                vec!["loop-detach".as_ref(), device.as_os_str(), file.as_os_str()]
            }
            Task::LoopSize { device, file } => {
                vec!["loop-size".as_ref(), device.as_os_str(), file.as_os_str()]
            }
            Task::Uses(device) => vec!["uses".as_ref(), device.as_os_str()],
        };
        words.into_iter().map(OsStr::to_owned).collect()
    }

    /// The task that these words mean.
    fn parse(words: &'a [OsString]) -> Option<Self> {
        let flag = |word: &OsString| word == "yes";
        let task = match words {
            [task, path] if task == "stat" => Task::Stat(Path::new(path)),
            [task, path] if task == "open" => Task::Open(Path::new(path)),
            [task, path] if task == "flush" => Task::Flush(Path::new(path)),
            [task, path] if task == "uses" => Task::Uses(Path::new(path)),
            [task, file, number, lazily] if task == "unmount" => {
                Task::Unmount { file: Path::new(file), number: number.to_str()?, lazily: flag(lazily) }
            }
            [task, file, read_only] if task == "loop-attach" => {
                Task::LoopAttach { file: Path::new(file), read_only: flag(read_only) }
            }
            [task, device, file] if task == "loop-detach" => {
                Task::LoopDetach { device: Path::new(device), file: Path::new(file) }
            }
            [task, device, file] if task == "loop-size" => {
                Task::LoopSize { device: Path::new(device), file: Path::new(file) }
            }
            _ => return None,
        };
        Some(task)
    }
}

/// Runs the task of a helper's command line, and answers on stdout.
///
/// # Errors
/// The words mean no task; nobody reads the answer.
pub(crate) fn run(words: &[OsString]) -> Result<ExitCode> {
    let task = Task::parse(words).context("this command is for nbdbridge itself")?;
    let mut undecided = None;
    let result = perform(&task, &mut undecided);
    let answer = match result {
        Ok(result) => [b"+".as_slice(), &result].concat(),
        Err(error) => {
            let errno = error.chain().find_map(errno_of).unwrap_or(0);
            format!("-{errno} {error:#}").into_bytes()
        }
    };
    // A frame for the process that started this one, and no text for people.
    #[expect(clippy::disallowed_methods)]
    let told = io::stdout().write_all(&framed(&answer)).and_then(|()| io::stdout().flush());
    if let Some(device) = undecided {
        // The end of the pipe is the end of the process that would have served the device.
        let mut word = [0];
        if told.is_ok() && matches!(io::stdin().read(&mut word), Ok(1)) {
            device.keep();
        }
    }
    told.context("nobody reads the answer")?;
    Ok(ExitCode::SUCCESS)
}

fn errno_of(cause: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let of_io = cause.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    of_io.or_else(|| cause.downcast_ref::<Errno>().map(|errno| errno.raw_os_error()))
}

fn perform(task: &Task<'_>, undecided: &mut Option<LoopDevice>) -> Result<Vec<u8>> {
    match task {
        Task::Stat(path) => {
            std::fs::metadata(path)?;
            Ok(Vec::new())
        }
        Task::Open(path) => {
            let found = open(path)?.metadata()?;
            ensure!(found.is_file(), "is no regular file");
            Ok(found.len().to_string().into_bytes())
        }
        Task::Flush(path) => {
            let file = open(path)?;
            if file.metadata()?.is_dir() {
                rustix::fs::syncfs(&file)?;
            } else {
                rustix::fs::fsync(&file)?;
            }
            Ok(Vec::new())
        }
        Task::Unmount { file, number, lazily } => unmount(file, number, *lazily),
        Task::LoopAttach { file, read_only } => {
            let device = LoopDevice::attach(file, *read_only)?;
            let path = device.path().as_os_str().as_bytes().to_vec();
            *undecided = Some(device);
            Ok(path)
        }
        Task::LoopDetach { device, file } => {
            let backing = attach::backing_file(device);
            if backing.is_some_and(|backing| backing == *file || backing == Path::new("/")) {
                attach::detach(device)?;
            }
            Ok(Vec::new())
        }
        Task::LoopSize { device, file } => {
            attach::tell_size(device, file)?;
            Ok(Vec::new())
        }
        Task::Uses(device) => Ok(attach::uses(device).unwrap_or_default().into_bytes()),
    }
}

fn open(path: &Path) -> io::Result<File> {
    // Neither a terminal nor a FIFO is waited for.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    File::options().read(true).custom_flags(flags).open(path)
}

fn unmount(file: &Path, number: &str, lazily: bool) -> Result<Vec<u8>> {
    let mounted = Mounted::at(file).context("cannot learn what is mounted")?;
    match mounted.last() {
        Some(there) if there.device == number => {}
        // Somebody has unmounted it; what may be there now is another's.
        _ => return Ok(Vec::new()),
    }
    match fuse::unmount(file, lazily)? {
        Unmounted::Yes => Ok(Vec::new()),
        Unmounted::Busy if lazily => bail!("{}: is in use", file.display()),
        Unmounted::Busy => Ok(b"busy".to_vec()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_and_tasks() {
        let (file, device) = (Path::new("/a b"), Path::new("/dev/loop7"));
        for task in [
            Task::Stat(file),
            Task::Open(file),
            Task::Flush(file),
            Task::Unmount { file, number: "0:52", lazily: true },
            Task::Unmount { file, number: "0:52", lazily: false },
            Task::LoopAttach { file, read_only: true },
            Task::LoopDetach { device, file },
            Task::LoopSize { device, file },
            Task::Uses(device),
        ] {
            let words = task.words();
            assert_eq!(Task::parse(&words).as_ref(), Some(&task));
            assert_eq!(Task::parse(&words[..1]), None);
        }
    }

    #[test]
    fn tasks_on_plain_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        std::fs::write(&path, "four").unwrap();
        let run = |task: Task<'_>| perform(&task, &mut None);
        assert_eq!(run(Task::Open(&path)).unwrap(), b"4");
        run(Task::Flush(&path)).unwrap();
        run(Task::Flush(folder.path())).unwrap();
        run(Task::Stat(&path)).unwrap();
        let error = run(Task::Stat(&folder.path().join("none"))).unwrap_err();
        assert_eq!(error.chain().find_map(errno_of), Some(libc::ENOENT));
        assert!(run(Task::Open(folder.path())).is_err());
        // Nothing of ours is mounted there.
        assert_eq!(run(Task::Unmount { file: &path, number: "0:0", lazily: false }).unwrap(), b"");
    }
}
