//! File systems: made, looked for, checked. The work is that of their own programs; what they are called, how they are
//! asked and what their answers mean is told here.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use anyhow::{Context, anyhow};

use super::{Error, FsKind, Result, bounded, private};
use crate::helper::Task;

/// Where root's programs are, besides $PATH.
const PLACES: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin";

/// The package of btrfs's programs.
const BTRFS: &str = "btrfs-progs";

/// The device that e2fsck takes for a journal which is not in the file system itself, in place of one that it would look
/// for on the host by what the superblock says.
const NO_JOURNAL: &str = "/dev/null";

/// What is found on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// A file system that we know.
    Known(FsKind),
    /// Zeroes, at both ends.
    Blank,
    /// Something else.
    Stranger,
}

/// How a check goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Check {
    /// What is safe to repair is repaired; as before a mount.
    Preen,
    /// All of it is looked at, and what is safe to repair is repaired.
    Thorough,
    /// All of it is looked at, and nothing changed.
    Look,
    /// All of it is looked at, and whatever is wrong put right.
    Repair,
}

/// What a check found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Clean,
    Repaired,
}

impl FsKind {
    /// The program that makes it, and its package; None where nothing is made.
    fn maker(self) -> Option<(&'static str, &'static str)> {
        match self {
            FsKind::Ext4 => Some(("mkfs.ext4", "e2fsprogs")),
            FsKind::Xfs => Some(("mkfs.xfs", "xfsprogs")),
            FsKind::Btrfs => Some(("mkfs.btrfs", BTRFS)),
            FsKind::None => None,
        }
    }

    /// Sees to it that it can be made here.
    ///
    /// # Errors
    /// A line that names the missing program and its package.
    pub(super) fn check_maker(self) -> Result<()> {
        self.maker().map_or(Ok(()), |(program, package)| find(program, package))
    }

    /// Makes one on a device, durably.
    ///
    /// # Errors
    /// What the program says; a word that is not allowed.
    pub(super) fn make(self, device: &Path, words: &[String], keep_space: bool) -> Result<()> {
        let Some((program, package)) = self.maker() else { return Ok(()) };
        self.check_mkfs_options(words)?;
        let quiet: &[&str] = match (self, keep_space) {
            (FsKind::Ext4, false) => &["-q", "-F"],
            (FsKind::Ext4, true) => &["-q", "-F", "-E", "nodiscard"],
            (FsKind::Xfs, true) => &["-q", "-f", "-K"],
            (FsKind::Btrfs, true) => &["-q", "-f", "-K"],
            _ => &["-q", "-f"],
        };
        // Names without a folder lead nowhere there.
        let output = run(program, package, device, |command| {
            command.args(quiet).args(words).arg(device).current_dir("/proc/self/task")
        })?;
        if !output.status.success() {
            return Err(Error::Other(anyhow!("{program}: {}", said(&output))));
        }
        sync(device)
    }

    /// Checks one that is not mounted. `name` is for people.
    ///
    /// # Errors
    /// [`Error::Broken`], where more is wrong than this check may put right; what keeps the program from its work.
    pub(super) fn check(self, device: &Path, how: Check) -> Result<Verdict> {
        let (program, package, words): (_, _, &[&str]) = match (self, how) {
            (FsKind::None, _) => return Ok(Verdict::Clean),
            (FsKind::Ext4, Check::Preen) => ("e2fsck", "e2fsprogs", &["-j", NO_JOURNAL, "-p"]),
            (FsKind::Ext4, Check::Thorough) => ("e2fsck", "e2fsprogs", &["-j", NO_JOURNAL, "-f", "-p"]),
            (FsKind::Ext4, Check::Look) => ("e2fsck", "e2fsprogs", &["-j", NO_JOURNAL, "-f", "-n"]),
            (FsKind::Ext4, Check::Repair) => ("e2fsck", "e2fsprogs", &["-j", NO_JOURNAL, "-f", "-y"]),
            // Their logs are replayed by the kernel, at the mount.
            (FsKind::Xfs | FsKind::Btrfs, Check::Preen | Check::Thorough) => return Ok(Verdict::Clean),
            (FsKind::Xfs, Check::Look) => ("xfs_repair", "xfsprogs", &["-n"]),
            (FsKind::Xfs, Check::Repair) => ("xfs_repair", "xfsprogs", &[]),
            (FsKind::Btrfs, Check::Look) => ("btrfs", BTRFS, &["check", "--readonly"]),
            (FsKind::Btrfs, Check::Repair) => ("btrfs", BTRFS, &["check", "--repair", "--force"]),
        };
        let output = run(program, package, device, |command| command.args(words).arg(device))?;
        sync(device)?;
        let code = output.status.code();
        match (self, code) {
            (_, Some(0)) => Ok(if self == FsKind::Ext4 || how != Check::Repair {
                Verdict::Clean
            } else {
                Verdict::Repaired
            }),
            // e2fsck(8): 1 and 2 say that errors were corrected.
            (FsKind::Ext4, Some(1..=3)) => Ok(Verdict::Repaired),
            _ => Err(Error::Broken(format!("{program}: {}", said(&output)))),
        }
    }
}

/// Looks what is on a disk of `size` bytes. What cannot be read is an error, never a blank disk.
///
/// # Errors
/// The operating system's.
pub(super) fn probe(device: &Path, size: u64) -> Result<Found> {
    const END: usize = 1 << 20;
    let shown = device.display();
    let disk = File::open(device).with_context(|| format!("{shown}: cannot open it"))?;
    let len = usize::try_from(size).unwrap_or(usize::MAX).min(END);
    let read = |offset: u64| -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        disk.read_exact_at(&mut bytes, offset)
            .with_context(|| format!("{shown}: cannot read what is there"))?;
        Ok(bytes)
    };
    let (start, end) = (read(0)?, read(size - len as u64)?);
    let has = |offset: usize, magic: &[u8]| start.get(offset..offset + magic.len()) == Some(magic);
    if has(1080, &[0x53, 0xef]) {
        return Ok(Found::Known(FsKind::Ext4));
    }
    if has(0, b"XFSB") {
        return Ok(Found::Known(FsKind::Xfs));
    }
    if has(0x1_0040, b"_BHRfS_M") {
        return Ok(Found::Known(FsKind::Btrfs));
    }
    let blank = start.iter().chain(&end).all(|byte| *byte == 0);
    Ok(if blank { Found::Blank } else { Found::Stranger })
}

/// Makes durable what was written to a device.
pub(super) fn sync(device: &Path) -> Result<()> {
    bounded::done(device, &Task::Flush(device)).map(drop)
}

/// Sees to it that a program is here.
///
/// # Errors
/// A line that names it and its package.
pub(super) fn find(program: &str, package: &str) -> Result<()> {
    let found = std::env::split_paths(&search_path()).any(|folder| folder.join(program).is_file());
    if found { Ok(()) } else { Err(missing(program, package)) }
}

/// Runs a program of a package that works on a device, to its end.
///
/// # Errors
/// It is missing, or cannot be started; the device's data plane is stopped.
pub(super) fn run(
    program: &str,
    package: &str,
    device: &Path,
    args: impl FnOnce(&mut Command) -> &mut Command,
) -> Result<Output> {
    let mut command = Command::new(program);
    // Messages are read here.
    command.env("PATH", search_path()).env("LC_ALL", "C").stdin(Stdio::null());
    args(&mut command);
    // Those of btrfs look at the files of all loop devices that are mounted, and fail where one has a dead server.
    let output = match package {
        BTRFS => private::apart(device, || bounded::output(device, &mut command))?,
        _ => bounded::output(device, &mut command),
    };
    match output? {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(missing(program, package)),
        other => Ok(other.with_context(|| format!("{program}: cannot be started"))?),
    }
}

/// What a program said, in one line of bearable length.
pub(super) fn said(output: &Output) -> String {
    const MOST: usize = 300;
    let text = [&output.stderr[..], &output.stdout[..]].map(String::from_utf8_lossy).join("\n");
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    // All that may be said is no help against what was wrong.
    let lines: Vec<_> = lines.take_while(|line| !line.starts_with("Usage:")).collect();
    // Some begin each line with their own name, which the reader has been told.
    let bare = |line: &&str| {
        line.split_once(": ").filter(|(name, _)| name.starts_with("mkfs.")).map(|(_, rest)| rest.to_owned())
    };
    let lines: Vec<_> = lines.iter().map(|line| bare(line).unwrap_or_else(|| (*line).to_owned())).collect();
    let line: String = lines.join("; ").chars().filter(|c| !c.is_control()).take(MOST).collect();
    if line.is_empty() { output.status.to_string() } else { line }
}

fn missing(program: &str, package: &str) -> Error {
    Error::Other(anyhow!("there is no {program} here; install its package: apt-get install {package}"))
}

fn search_path() -> std::ffi::OsString {
    match std::env::var_os("PATH") {
        Some(path) if !path.is_empty() => [path, PLACES.into()].join(":".as_ref()),
        _ => PLACES.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_is_on_a_disk() {
        const SIZE: usize = 3 << 20;
        let found = |places: &[(usize, &[u8])]| {
            let mut disk = vec![0; SIZE];
            for (offset, bytes) in places {
                disk[*offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            let mut file = tempfile::NamedTempFile::new().unwrap();
            file.write_all(&disk).unwrap();
            probe(file.path(), SIZE as u64).unwrap()
        };
        assert_eq!(found(&[]), Found::Blank);
        assert_eq!(found(&[(1080, &[0x53, 0xef])]), Found::Known(FsKind::Ext4));
        assert_eq!(found(&[(0, b"XFSB")]), Found::Known(FsKind::Xfs));
        assert_eq!(found(&[(0x1_0040, b"_BHRfS_M")]), Found::Known(FsKind::Btrfs));
        for place in [0, 512, (1 << 20) - 1, SIZE - (1 << 20), SIZE - 1] {
            assert_eq!(found(&[(place, b"!")]), Found::Stranger, "{place}");
        }
        let short = tempfile::NamedTempFile::new().unwrap();
        assert!(probe(short.path(), 512).is_err(), "what cannot be read is not blank");
        assert_eq!(probe(short.path(), 0).unwrap(), Found::Blank);
    }

    #[test]
    fn what_programs_say_is_one_line() {
        let output =
            Command::new("sh").args(["-c", "echo 'mkfs.x: a\n\n  b' >&2; echo c; exit 3"]).output().unwrap();
        assert_eq!(said(&output), "a; b; c");
        let silent = Command::new("sh").args(["-c", "exit 3"]).output().unwrap();
        assert_eq!(said(&silent), "exit status: 3");
        let error = run("mkfs.no-such", "no-such-progs", Path::new("/dev/null"), |command| command)
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "there is no mkfs.no-such here; install its package: apt-get install no-such-progs"
        );
    }
}
