//! The helper process: one task from its command line, the system calls for it, and one answer.

use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::{MAX_PART, Task, framed};
use crate::attach::{self, LoopDevice};
use crate::fuse::{self, Mounted, Unmounted};

impl<'a> Task<'a> {
    /// The words of the command line that mean this task.
    pub(super) fn words(&self) -> Vec<OsString> {
        let yes = |flag: bool| OsStr::new(if flag { "yes" } else { "no" });
        let numbers = |numbers: &[u64]| numbers.iter().map(|number| number.to_string().into()).collect();
        // Behind the other words.
        let more: Vec<OsString> = match self {
            Task::Read { offset, len, .. } => numbers(&[*offset, *len as u64]),
            Task::Mount { identity: (device, inode), flags, .. } => {
                numbers(&[*device, *inode, u64::from(*flags)])
            }
            _ => Vec::new(),
        };
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
            Task::Read { file, .. } => vec!["read".as_ref(), file.as_os_str()],
            Task::Mount { device, folder, fs, data, .. } => {
                vec!["mount".as_ref(), device.as_os_str(), folder.as_os_str(), fs.as_ref(), data.as_ref()]
            }
        };
        words.into_iter().map(OsStr::to_owned).chain(more).collect()
    }

    /// The task that these words mean.
    fn parse(words: &'a [OsString]) -> Option<Self> {
        let flag = |word: &OsString| word == "yes";
        let number = |word: &OsString| word.to_str()?.parse::<u64>().ok();
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
            [task, file, offset, len] if task == "read" => {
                let (offset, len) = (number(offset)?, usize::try_from(number(len)?).ok()?);
                Task::Read { file: Path::new(file), offset, len }
            }
            [task, device, folder, fs, data, number_of_device, inode, flags] if task == "mount" => {
                Task::Mount {
                    device: Path::new(device),
                    folder: Path::new(folder),
                    identity: (number(number_of_device)?, number(inode)?),
                    fs: fs.to_str()?,
                    flags: u32::try_from(number(flags)?).ok()?,
                    data: data.to_str()?,
                }
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
        Task::Read { file, offset, len } => {
            let mut bytes = vec![0; (*len).min(MAX_PART)];
            open(file)?.read_exact_at(&mut bytes, *offset)?;
            Ok(bytes)
        }
        Task::Mount { device, folder, identity, fs, flags, data } => {
            mount(device, folder, *identity, fs, MountFlags::from_bits_retain(*flags), data)?;
            Ok(Vec::new())
        }
    }
}

/// Mounts on the folder that the caller has looked at, whatever its name leads to by now.
fn mount(
    device: &Path,
    folder: &Path,
    identity: (u64, u64),
    fs: &str,
    flags: MountFlags,
    data: &str,
) -> Result<()> {
    let how = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let folder = File::from(rustix::fs::open(folder, how, Mode::empty())?);
    let found = folder.metadata()?;
    ensure!((found.dev(), found.ino()) == identity, "the mount point is another folder by now");
    let point = format!("/proc/self/fd/{}", folder.as_raw_fd());
    let data = CString::new(data).context("mount options")?;
    Ok(rustix::mount::mount(device, point, fs, flags, Some(data.as_c_str()))?)
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
            Task::Read { file, offset: 1 << 40, len: 512 },
            Task::Mount { device, folder: file, identity: (1, 2), fs: "ext4", flags: 6, data: "" },
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
        assert_eq!(run(Task::Read { file: &path, offset: 1, len: 2 }).unwrap(), b"ou");
        assert!(run(Task::Read { file: &path, offset: 1, len: 4 }).is_err(), "it is shorter");
        let other = Task::Mount {
            device: &path,
            folder: folder.path(),
            identity: (0, 0),
            fs: "ext4",
            flags: 0,
            data: "",
        };
        assert!(run(other).unwrap_err().to_string().contains("another folder"));
        let error = run(Task::Stat(&folder.path().join("none"))).unwrap_err();
        assert_eq!(error.chain().find_map(errno_of), Some(libc::ENOENT));
        assert!(run(Task::Open(folder.path())).is_err());
        // Nothing of ours is mounted there.
        assert_eq!(run(Task::Unmount { file: &path, number: "0:0", lazily: false }).unwrap(), b"");
    }
}
