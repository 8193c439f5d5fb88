//! The header of a journal: the image and the boot that its records belong to, and which of them count.
//!
//! ```text
//!   0    8 bytes   magic, with the version of the format
//!   8    16 bytes  number of the boot
//!   24   u64 x 6   device and inode of the image, its birth (see below), device and inode of its data file
//!   72   u64       bits of the image's cluster size
//!   80   u64       nonce of this journal
//!   88   u64       generation: only records with this number count
//!   96   u64       length of the image's path
//!   104  u64       checksum of all of the above and of the path
//!   112            the image's path, for the removal of stale journals
//! ```

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::record::checksum;
use crate::boot::{BootId, boot_id};

/// Size of a header slot in bytes.
pub(super) const HEADER_BYTES: u64 = 4096;

const SLOT: usize = 4096;
const MAGIC: [u8; 8] = *b"NBDBJNL1";
const FIXED: usize = 112;

/// The image that a journal belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::backend::image) struct Identity {
    boot: BootId,
    device: u64,
    inode: u64,
    /// Seconds and nanoseconds; zero where the file system does not keep it. For a block device its number and that of
    /// its disk, which the kernel uses once.
    birth: (u64, u64),
    data_file: (u64, u64),
    cluster_bits: u64,
    path: PathBuf,
}

/// Returns two numbers that differ between this file and a later one that gets the same inode number: the time at which a
/// file was created, in seconds and nanoseconds; the device number and disk sequence number of a block device.
fn birth(file: &File, found: &Metadata) -> io::Result<(u64, u64)> {
    if found.file_type().is_block_device() {
        // A node of /dev stays when another disk comes behind it (loop devices).
        return Ok((found.rdev(), crate::sys::disk_sequence(file)?));
    }
    let since = found.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(since.map_or((0, 0), |since| (since.as_secs(), u64::from(since.subsec_nanos()))))
}

impl Identity {
    /// The identity of the image that `file` is open on.
    ///
    /// # Errors
    /// The reason why it cannot be told.
    pub(in crate::backend::image) fn of(
        path: &Path,
        file: &File,
        data_file: Option<&File>,
        cluster_bits: u32,
    ) -> Result<Identity, String> {
        let look = |error: io::Error| format!("{}: cannot look at it: {error}", path.display());
        let found = file.metadata().map_err(look)?;
        let birth = birth(file, &found).map_err(look)?;
        let data = data_file.map(File::metadata).transpose().map_err(look)?;
        Ok(Identity {
            boot: boot_id().ok_or("the kernel does not tell the number of this boot")?,
            device: found.dev(),
            inode: found.ino(),
            birth,
            data_file: data.map_or((0, 0), |data| (data.dev(), data.ino())),
            cluster_bits: cluster_bits.into(),
            path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
        })
    }

    /// The name of the journal's file.
    pub(super) fn file_name(&self) -> String {
        format!("qcow2-{:x}-{:x}.journal", self.device, self.inode)
    }

    /// Whether two identities mean one image on one boot, wherever it was moved to.
    fn is_image_of(&self, other: &Identity) -> bool {
        Identity { path: PathBuf::new(), ..self.clone() }
            == Identity { path: PathBuf::new(), ..other.clone() }
    }

    /// Whether the journal is of this boot.
    pub(super) fn is_of_this_boot(&self) -> bool {
        boot_id() == Some(self.boot)
    }

    /// Whether the image is where it was.
    pub(super) fn is_image_there(&self) -> bool {
        std::fs::metadata(&self.path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (self.device, self.inode))
    }
}

/// A header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) identity: Identity,
    pub(super) nonce: u64,
    pub(super) generation: u64,
}

impl Header {
    /// The header of a journal file that belongs to the image; None where the file is new, damaged or another image's.
    ///
    /// # Errors
    /// The file's.
    pub(super) fn read(file: &File, identity: &Identity) -> io::Result<Option<Header>> {
        Ok(Header::read_any(file)?.filter(|header| header.identity.is_image_of(identity)))
    }

    /// The valid header with the highest generation.
    ///
    /// # Errors
    /// The file's.
    pub(super) fn read_any(file: &File) -> io::Result<Option<Header>> {
        let mut newest: Option<Header> = None;
        for slot in 0..2 {
            let mut bytes = [0; SLOT];
            let found = match file.read_exact_at(&mut bytes, slot * HEADER_BYTES) {
                Ok(()) => Header::decode(&bytes),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => None,
                Err(error) => return Err(error),
            };
            if let Some(found) = found
                && newest.as_ref().is_none_or(|newest| newest.generation < found.generation)
            {
                newest = Some(found);
            }
        }
        Ok(newest)
    }

    /// Writes the header to the slot of its generation: the slot of the generation before stays as it is.
    ///
    /// # Errors
    /// The file's.
    pub(super) fn write(&self, file: &File) -> io::Result<()> {
        file.write_all_at(&self.encode(), self.generation % 2 * HEADER_BYTES)
    }

    fn encode(&self) -> Vec<u8> {
        let Identity { boot, device, inode, birth, data_file, cluster_bits, path } = &self.identity;
        // A path that does not fit is never found, and its journal is kept until the next boot.
        let path = Some(path.as_os_str().as_bytes()).filter(|path| path.len() <= SLOT - FIXED).unwrap_or(b"");
        let mut bytes = [&MAGIC[..], boot].concat();
        let numbers = [*device, *inode, birth.0, birth.1, data_file.0, data_file.1, *cluster_bits];
        for word in numbers.into_iter().chain([self.nonce, self.generation, path.len() as u64]) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let sum = checksum(words(&bytes).chain(words(path)));
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes.extend_from_slice(path);
        bytes
    }

    fn decode(bytes: &[u8; SLOT]) -> Option<Header> {
        let (fixed, rest) = bytes.split_at(FIXED);
        let (covered, sum) = fixed.split_at(FIXED - 8);
        let mut numbers = words(&covered[24..]);
        let mut next = || numbers.next();
        let (device, inode) = (next()?, next()?);
        let (birth, data_file) = ((next()?, next()?), (next()?, next()?));
        let (cluster_bits, nonce, generation) = (next()?, next()?, next()?);
        let path = rest.get(..usize::try_from(next()?).ok()?)?;
        if covered[..8] != MAGIC || words(sum).next()? != checksum(words(covered).chain(words(path))) {
            return None;
        }
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(path));
        let boot = covered[8..24].try_into().ok()?;
        let identity = Identity { boot, device, inode, birth, data_file, cluster_bits, path };
        Some(Header { identity, nonce, generation })
    }
}

/// Bytes as little-endian words, the last one filled up with zeroes.
fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(8).map(|part| {
        let mut word = [0; 8];
        word[..part.len()].copy_from_slice(part);
        u64::from_le_bytes(word)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(generation: u64) -> Header {
        let file = tempfile::NamedTempFile::new().unwrap();
        let identity = Identity::of(file.path(), file.as_file(), None, 16).unwrap();
        Header { identity, nonce: 5, generation }
    }

    #[test]
    fn the_newest_valid_slot_counts() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(Header::read_any(&file).unwrap(), None);
        let first = header(8);
        first.write(&file).unwrap();
        file.set_len(2 * HEADER_BYTES).unwrap();
        assert_eq!(Header::read(&file, &first.identity).unwrap(), Some(first.clone()));
        let second = Header { generation: 9, ..first.clone() };
        second.write(&file).unwrap();
        assert_eq!(Header::read_any(&file).unwrap(), Some(second));
        // The newer one was written in part.
        file.write_all_at(&[0xff], HEADER_BYTES + 90).unwrap();
        assert_eq!(Header::read_any(&file).unwrap(), Some(first.clone()));
        let moved = Identity { path: "/elsewhere".into(), ..first.identity.clone() };
        assert_eq!(Header::read(&file, &moved).unwrap(), Some(first.clone()));
        for other in [
            Identity { inode: 1, ..first.identity.clone() },
            Identity { boot: [1; 16], ..first.identity.clone() },
            Identity { birth: (1, 1), ..first.identity.clone() },
            Identity { data_file: (1, 1), ..first.identity.clone() },
        ] {
            assert_eq!(Header::read(&file, &other).unwrap(), None);
        }
    }

    #[test]
    fn a_long_path_is_left_out() {
        let mut header = header(1);
        header.identity.path = "x".repeat(4000).into();
        let file = tempfile::tempfile().unwrap();
        header.write(&file).unwrap();
        file.set_len(2 * HEADER_BYTES).unwrap();
        header.identity.path = PathBuf::new();
        assert_eq!(Header::read_any(&file).unwrap(), Some(header));
    }
}
