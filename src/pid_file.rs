//! The file with the process number (`--pid-file`). Scripts take it for the sign that clients can connect, so that it is
//! checked before the first door opens, and written when the last one is open.
//!
//! Others may be able to write to its folder. The new content is written to a file whose name cannot be guessed and that
//! must not exist (O_EXCL), which is renamed to the path at the end: no link at any of the names is followed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};
use tempfile::NamedTempFile;

/// A process number is shorter than this.
const LONGEST: u64 = 32;

/// A pid file of this process, or of one that is about to start. Removed when dropped.
#[derive(Debug)]
pub(crate) struct PidFile {
    path: PathBuf,
    content: String,
}

impl PidFile {
    /// Checks that the number of this process can be written to `path`, and writes nothing there yet. After a fork, to be
    /// called in the child.
    ///
    /// # Errors
    /// One line that names the path: no ordinary file, something else than a process number in it, the number of a server
    /// that runs, a folder that cannot be written to.
    pub(crate) fn prepare(path: &Path) -> Result<Self> {
        let path = std::path::absolute(path).with_context(|| format!("--pid-file {}", path.display()))?;
        let file = PidFile { path, content: format!("{}\n", std::process::id()) };
        check_old(&file.path)?;
        // Written and removed again: a start that is killed leaves nothing.
        file.draft().map(drop)?;
        Ok(file)
    }

    /// Writes the file. Readers see what was there before, or the whole number.
    ///
    /// # Errors
    /// As [`PidFile::prepare`].
    pub(crate) fn publish(&self) -> Result<()> {
        check_old(&self.path)?;
        let draft = self.draft()?;
        draft.persist(&self.path).map_err(|error| error.error).with_context(|| self.cannot())?;
        Ok(())
    }

    /// The content in a file beside the path, removed when dropped.
    fn draft(&self) -> Result<NamedTempFile<File>> {
        // The umask applies, as for every file.
        let open = |path: &Path| File::options().write(true).create_new(true).mode(0o666).open(path);
        let draft = || {
            let folder = self.path.parent().unwrap_or(Path::new("/"));
            let mut draft = tempfile::Builder::new().prefix(".nbdbridge-pid-").make_in(folder, open)?;
            draft.as_file_mut().write_all(self.content.as_bytes())?;
            Ok::<_, io::Error>(draft)
        };
        draft().with_context(|| self.cannot())
    }

    fn cannot(&self) -> String {
        format!("{}: cannot write the process number there", self.path.display())
    }
}

/// Refuses to replace what is no ordinary file, what holds no process number, and the number of a server that runs.
fn check_old(path: &Path) -> Result<()> {
    let shown = path.display();
    let found = match path.symlink_metadata() {
        Ok(found) => found,
        // Other errors come back when the draft is written.
        Err(_) => return Ok(()),
    };
    // A rename would replace it, and nobody wants to lose /dev/null, or an image.
    if !found.is_file() {
        let kind = if found.is_symlink() { "a symbolic link" } else { "not an ordinary file" };
        bail!("{shown}: is {kind}; give --pid-file another name");
    }
    let text = read_old(path).unwrap_or_else(|| "?".to_owned());
    let number = text.trim();
    if !number.bytes().all(|byte| byte.is_ascii_digit()) {
        bail!("{shown}: exists and holds no process number; give --pid-file another name");
    }
    let name = std::fs::read_to_string(format!("/proc/{number}/comm")).unwrap_or_default();
    if !number.is_empty()
        && name.trim_end() == env!("CARGO_PKG_NAME")
        && number != std::process::id().to_string()
    {
        bail!("{shown}: process {number} runs with it; give --pid-file another name");
    }
    Ok(())
}

/// What an ordinary file holds; None where that is too long, no text, or not there.
pub(crate) fn read_old(path: &Path) -> Option<String> {
    // NONBLOCK: somebody may have put a FIFO there a moment ago.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut text = String::new();
    file.take(LONGEST + 1).read_to_string(&mut text).ok()?;
    (text.len() as u64 <= LONGEST).then_some(text)
}

impl Drop for PidFile {
    fn drop(&mut self) {
        // A successor may have put its own number there.
        if read_old(&self.path).is_some_and(|content| content == self.content) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn names(folder: &Path) -> usize {
        std::fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn the_file_comes_when_it_is_published_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pid");
        let file = PidFile::prepare(&path).unwrap();
        assert_eq!(names(folder.path()), 0, "it is there before the server is ready");
        file.publish().unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), format!("{}\n", std::process::id()));
        assert_eq!(names(folder.path()), 1);
        drop(file);
        assert_eq!(names(folder.path()), 0);
    }

    #[test]
    fn an_old_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pid");
        for old in ["99999999\n", ""] {
            std::fs::write(&path, old).unwrap();
            let file = PidFile::prepare(&path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), old);
            file.publish().unwrap();
            drop(file);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_successors_file_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pid");
        let file = PidFile::prepare(&path).unwrap();
        file.publish().unwrap();
        std::fs::write(&path, "1\n").unwrap();
        drop(file);
        assert!(path.exists());
    }

    #[test]
    fn what_is_no_process_number_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        for content in ["precious\n".to_owned(), "12 34".to_owned(), "7".repeat(100)] {
            std::fs::write(&path, &content).unwrap();
            let error = format!("{:#}", PidFile::prepare(&path).unwrap_err());
            assert!(error.contains("holds no process number"), "{error}");
            assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
        }
    }

    #[test]
    fn links_are_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, target) = (folder.path().join("x.pid"), folder.path().join("target"));
        std::fs::write(&target, "1\n").unwrap();
        for target in [&target, &folder.path().join("none")] {
            symlink(target, &path).unwrap();
            let error = format!("{:#}", PidFile::prepare(&path).unwrap_err());
            assert!(error.contains("is a symbolic link; give --pid-file"), "{error}");
            std::fs::remove_file(&path).unwrap();
        }
        // One that comes between the check and the end, too.
        let file = PidFile::prepare(&path).unwrap();
        symlink(&target, &path).unwrap();
        assert!(file.publish().is_err());
        drop(file);
        assert_eq!(std::fs::read_to_string(&target).unwrap(), "1\n");
        assert_eq!(names(folder.path()), 2);
    }

    #[test]
    fn a_folder_that_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        for path in [folder.path().join("no/x.pid"), folder.path().to_owned(), "/dev/null".into()] {
            let error = format!("{:#}", PidFile::prepare(&path).unwrap_err());
            assert!(error.starts_with(path.to_str().unwrap()), "{error}");
            assert!(!error.contains(".nbdbridge-pid-"), "{error}");
        }
        assert_eq!(names(folder.path()), 0);
    }
}
