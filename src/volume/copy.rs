//! A second image with the same bytes: shared with the first where the file system can do that (FICLONE), else copied,
//! holes as holes. What is durable when, and what the copy is for, is its caller's business.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

/// How a copy was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// Both files share their blocks until one of them is written.
    Reflink,
    /// Each has its own.
    Copy,
}

/// How far a copy has come, in bytes of data: holes cost nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Copied.
    pub(crate) done: u64,
    /// To be copied.
    pub(crate) total: u64,
}

/// Is told how far it has come, again and again; an error ends the copy with it.
pub(crate) type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> io::Result<()>;

/// So much at a time, between two looks at what the caller says.
const PIECE: u64 = 8 << 20;

/// Where copy_file_range(2) cannot, so much is in memory.
const BUFFER: usize = 1 << 20;

/// Fills `to`, which is empty, with what `from` holds. Nobody may write `from` meanwhile. The new file is not synced.
///
/// # Errors
/// The operating system's, no room for one; what `on_progress` says.
pub(crate) fn fill(from: &File, to: &File, on_progress: OnProgress<'_>) -> io::Result<How> {
    match ioctl_ficlone(to, from) {
        Ok(()) => {
            on_progress(Progress { done: 0, total: 0 })?;
            return Ok(How::Reflink);
        }
        Err(errno) if cannot(errno) => {}
        Err(errno) => return Err(errno.into()),
    }
    fill_by_copying(from, to, on_progress)?;
    Ok(How::Copy)
}

/// Whether files in `folder` can share blocks with `from`.
pub(crate) fn can_reflink(from: &File, folder: &Path) -> bool {
    tempfile::tempfile_in(folder).is_ok_and(|to| ioctl_ficlone(&to, from).is_ok())
}

fn fill_by_copying(from: &File, to: &File, on_progress: OnProgress<'_>) -> io::Result<()> {
    let metadata = from.metadata()?;
    let len = metadata.len();
    to.set_len(len)?;
    let mut progress = Progress { done: 0, total: (metadata.blocks() * 512).min(len) };
    on_progress(progress)?;
    let mut buffer = None;
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at, len)? {
        at = start;
        while at < end {
            let piece = (end - at).min(PIECE);
            let copied = match &mut buffer {
                None => match by_kernel(from, to, at, piece) {
                    Err(errno) if cannot(errno) => {
                        buffer = Some(vec![0; BUFFER]);
                        continue;
                    }
                    other => other?,
                },
                Some(buffer) => by_hand(from, to, at, piece, buffer)?,
            };
            if copied == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter meanwhile"));
            }
            at += copied;
            progress.done += copied;
            // Space is counted in blocks, data is not.
            progress.total = progress.total.max(progress.done);
            on_progress(progress)?;
        }
    }
    Ok(())
}

/// Whether an errno says that this way is none here.
fn cannot(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS | Errno::PERM)
}

/// The next run of data from `at` on.
fn next_data(file: &File, at: u64, len: u64) -> io::Result<Option<(u64, u64)>> {
    if at >= len {
        return Ok(None);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start,
        // Nothing but a hole is left.
        Err(Errno::NXIO) => return Ok(None),
        // A file system without holes.
        Err(Errno::INVAL) => at,
        Err(errno) => return Err(errno.into()),
    };
    let end = match seek(file, SeekFrom::Hole(start)) {
        Ok(end) => end.min(len),
        Err(Errno::INVAL) => len,
        Err(errno) => return Err(errno.into()),
    };
    Ok((start < end).then_some((start, end)))
}

fn by_kernel(from: &File, to: &File, at: u64, piece: u64) -> Result<u64, Errno> {
    let (mut read_at, mut write_at) = (at, at);
    let piece = usize::try_from(piece).unwrap_or(usize::MAX);
    rustix::io::retry_on_intr(|| copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), piece))
        .map(|copied| copied as u64)
}

fn by_hand(from: &File, to: &File, at: u64, piece: u64, buffer: &mut [u8]) -> io::Result<u64> {
    let wanted = usize::try_from(piece).unwrap_or(usize::MAX).min(buffer.len());
    let count = loop {
        match from.read_at(&mut buffer[..wanted], at) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    to.write_all_at(&buffer[..count], at)?;
    Ok(count as u64)
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// Data, hole, data, hole; no whole number of blocks.
    fn sample(folder: &Path) -> File {
        let path = folder.join("from");
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.write_all_at(&[0x5a; 70_001], 0).unwrap();
        file.write_all_at(&[0xa5; 4096], 40 << 20).unwrap();
        file.set_len((64 << 20) + 13).unwrap();
        file.sync_all().unwrap();
        file
    }

    fn empty(folder: &Path) -> File {
        File::options().read(true).write(true).create(true).truncate(true).open(folder.join("to")).unwrap()
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = Vec::new();
        seek(file, SeekFrom::Start(0)).unwrap();
        Read::read_to_end(&mut &*file, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_byte_comes_and_holes_stay_holes() {
        let folder = tempfile::tempdir().unwrap();
        let from = sample(folder.path());
        let to = empty(folder.path());
        let mut told = Vec::new();
        fill(&from, &to, &mut |progress| {
            told.push(progress);
            Ok(())
        })
        .unwrap();
        assert!(bytes(&from) == bytes(&to));
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20, "the holes were filled");
        assert!(told.is_sorted_by_key(|progress| progress.done));
        let last = told.last().unwrap();
        assert_eq!(last.done, last.total);
    }

    #[test]
    fn by_hand_it_is_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let from = sample(folder.path());
        let to = empty(folder.path());
        let mut buffer = vec![0; 4096];
        let mut at = 0;
        while let Some((start, end)) = next_data(&from, at, from.metadata().unwrap().len()).unwrap() {
            at = start;
            while at < end {
                at += by_hand(&from, &to, at, end - at, &mut buffer).unwrap();
            }
        }
        to.set_len(from.metadata().unwrap().len()).unwrap();
        assert!(bytes(&from) == bytes(&to));
    }

    #[test]
    fn it_ends_when_told() {
        let folder = tempfile::tempdir().unwrap();
        let from = sample(folder.path());
        let to = empty(folder.path());
        let enough = |progress: Progress| {
            if progress.done > 0 { Err(io::Error::other("enough")) } else { Ok(()) }
        };
        let error = fill_by_copying(&from, &to, &mut { enough }).unwrap_err();
        assert_eq!(error.to_string(), "enough");
    }

    #[test]
    fn empty_and_all_holes() {
        let folder = tempfile::tempdir().unwrap();
        for len in [0, 1, 1 << 30] {
            let from = tempfile::tempfile_in(folder.path()).unwrap();
            from.set_len(len).unwrap();
            let to = empty(folder.path());
            fill(&from, &to, &mut |_| Ok(())).unwrap();
            assert_eq!(to.metadata().unwrap().len(), len);
            assert_eq!(to.metadata().unwrap().blocks(), 0);
        }
    }
}
