//! The qcow2 header, read and judged before anything is opened by its word: sizes are bounded, names are short, and
//! what cannot be served is refused with the way out.
//!
//! Source: QEMU, docs/interop/qcow2.txt. The limits are QEMU's own (block/qcow2.h).

use std::ffi::OsString;
use std::fs::File;
use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::OpenError;

const MAGIC: [u8; 4] = *b"QFI\xfb";
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;

/// Largest tables, in bytes: QCOW_MAX_L1_SIZE and QCOW_MAX_REFTABLE_SIZE.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFTABLE_BYTES: u64 = 8 << 20;

const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const MAX_REFCOUNT_ORDER: u32 = 6;
const MAX_BACKING_NAME: u32 = 1023;

/// Offset of the size of the disk, in bytes.
pub(super) const SIZE_OFFSET: u64 = 24;

/// Longest header with its extensions that is read, in bytes.
const MAX_HEADER: usize = 64 << 10;

const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const LAZY_REFCOUNTS: u64 = 1 << 0;

/// The autoclear bit of ours that an image has while mapping changes of it may be in a journal. Another program that
/// writes to the image has to clear it, so that the bit tells that no other program has.
pub(super) const IN_USE: u64 = 1 << 47;

/// Offset of the autoclear bits, in bytes.
pub(super) const AUTOCLEAR_AT: usize = 88;

/// Offset of the marks for dirty and corrupt in a header of version 3, in bytes: the last of eight.
pub(super) const MARKS_AT: u64 = 79;
/// The marks in that byte.
pub(super) const MARKS: u8 = 0b11;

/// What a qcow2 header says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) version: u32,
    /// Size of the disk in bytes.
    pub(super) size: u64,
    pub(super) cluster_bits: u32,
    /// Number of entries.
    pub(super) l1_entries: u32,
    pub(super) l1_offset: u64,
    pub(super) reftable_offset: u64,
    pub(super) reftable_clusters: u32,
    pub(super) refcount_order: u32,
    pub(super) snapshots: u32,
    pub(super) snapshots_offset: u64,
    pub(super) crypt: u32,
    pub(super) incompatible: u64,
    pub(super) compatible: u64,
    pub(super) autoclear: u64,
    /// Length of the header without its extensions, in bytes.
    pub(super) length: usize,
    pub(super) backing: Option<OsString>,
    pub(super) backing_format: Option<String>,
    pub(super) data_file: Option<OsString>,
    /// Names that are not UTF-8: their places in the file in bytes, and what is there.
    pub(super) odd_names: Vec<(Range<usize>, Vec<u8>)>,
    pub(super) bitmaps: u32,
}

impl Header {
    pub(super) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Whether guest data lies in a file of its own.
    pub(super) fn external_data(&self) -> bool {
        self.incompatible & DATA_FILE != 0
    }

    /// Returns true if a server of this program has the image in use, or died without closing it.
    pub(super) fn is_in_use(&self) -> bool {
        self.autoclear & IN_USE != 0
    }

    /// The features that are set, by qemu-img's names.
    pub(super) fn features(&self) -> Vec<&'static str> {
        let named = [
            (self.incompatible & DIRTY != 0, "dirty"),
            (self.incompatible & CORRUPT != 0, "corrupt"),
            (self.external_data(), "external data file"),
            (self.incompatible & COMPRESSION != 0, "zstd"),
            (self.incompatible & EXTENDED_L2 != 0, "extended L2"),
            (self.compatible & LAZY_REFCOUNTS != 0, "lazy refcounts"),
            (self.crypt != 0, "encrypted"),
            (self.snapshots > 0, "internal snapshots"),
            (self.bitmaps > 0, "dirty bitmaps"),
            (self.is_in_use(), "in use or not closed"),
        ];
        named.into_iter().filter_map(|(set, name)| set.then_some(name)).collect()
    }

    /// Returns the mark that says that the image is not in order.
    pub(super) fn mark(&self) -> Option<&'static str> {
        match () {
            () if self.incompatible & CORRUPT != 0 => Some("corrupt"),
            () if self.incompatible & DIRTY != 0 => Some("dirty"),
            () => None,
        }
    }

    /// Returns why the image cannot be served, with the way out. An image that is only read may be marked dirty or
    /// corrupt.
    pub(super) fn refusal(&self, path: &Path, read_only: bool) -> Option<String> {
        let path = path.display();
        let convert = format!("`qemu-img convert -O qcow2 {path} NEW` makes one without");
        let check = format!("`qemu-img check -r all {path}` repairs it, and --read-only serves it as it is");
        let unknown = self.incompatible & !(DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2);
        match () {
            () if self.crypt != 0 => Some(format!("is encrypted, which is not supported; {convert}")),
            () if unknown != 0 => {
                Some(format!("has features that are not known (incompatible bits {unknown:#x}); {convert}"))
            }
            () if self.incompatible & CORRUPT != 0 && !read_only => {
                Some(format!("is marked corrupt; {check}"))
            }
            () if self.incompatible & DIRTY != 0 && !read_only => {
                Some(format!("is marked dirty: it was not closed in good order; {check}"))
            }
            () if self.incompatible & COMPRESSION != 0 => {
                Some(format!("is compressed with zstd, which is not supported; {convert}"))
            }
            () if self.incompatible & EXTENDED_L2 != 0 => {
                Some(format!("has extended L2 entries, which are not supported; {convert}"))
            }
            () => None,
        }
    }
}

/// Reads and judges the header of the image at `path`.
///
/// # Errors
/// One line: not readable, or malformed.
pub(super) fn load(path: &Path) -> Result<Header, OpenError> {
    let os = |action| move |source| OpenError::Os { path: path.to_owned(), action, error: source };
    // A backing image's name comes from a stranger, and may lead to a FIFO, whose other end nobody waits for.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty());
    let file = File::from(file.map_err(|errno| os("cannot open it")(errno.into()))?);
    let kind = file.metadata().map_err(os("cannot look at it"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::Unsupported {
            path: path.to_owned(),
            reason: "is neither a file nor a block device".into(),
        });
    }
    let mut bytes = vec![0; MAX_HEADER];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(os("cannot read it")(error)),
        }
    }
    bytes.truncate(filled);
    parse(&bytes).map_err(|reason| OpenError::Unsupported {
        path: path.to_owned(),
        reason: format!("{reason}; `qemu-img check {}` tells more", path.display()),
    })
}

/// Reads a header from the first bytes of a file.
pub(super) fn parse(bytes: &[u8]) -> Result<Header, String> {
    let fields = Fields(bytes);
    let mut header = parse_numbers(bytes)?;
    let backing = (fields.u64(8)?, fields.u32(16)?);
    if backing.0 != 0 {
        if backing.1 == 0 || backing.1 > MAX_BACKING_NAME {
            return Err(malformed(&format!("a backing file's name of {} bytes", backing.1)));
        }
        let start = usize::try_from(backing.0).map_err(|_| malformed("the backing file's name"))?;
        header.backing =
            Some(name(&fields, start, index(backing.1), "the backing file's name", &mut header.odd_names)?);
    }
    if header.version == 3 {
        extensions(&fields, &mut header)?;
    }
    Ok(header)
}

/// Reads what has a fixed place: the first 112 bytes are enough.
pub(super) fn parse_numbers(bytes: &[u8]) -> Result<Header, String> {
    let fields = Fields(bytes);
    if bytes.get(..4) != Some(&MAGIC) {
        return Err("is not a qcow2 image".into());
    }
    let mut header = Header {
        version: fields.u32(4)?,
        size: fields.u64(24)?,
        cluster_bits: fields.u32(20)?,
        crypt: fields.u32(32)?,
        l1_entries: fields.u32(36)?,
        l1_offset: fields.u64(40)?,
        reftable_offset: fields.u64(48)?,
        reftable_clusters: fields.u32(56)?,
        snapshots: fields.u32(60)?,
        snapshots_offset: fields.u64(64)?,
        refcount_order: 4,
        length: V2_BYTES,
        ..Header::default()
    };
    match header.version {
        2 => {}
        3 => {
            header.incompatible = fields.u64(72)?;
            header.compatible = fields.u64(80)?;
            header.autoclear = fields.u64(AUTOCLEAR_AT)?;
            header.refcount_order = fields.u32(96)?;
            header.length = index(fields.u32(100)?);
        }
        version => return Err(format!("is qcow2 version {version}, and only 2 and 3 are known")),
    }
    judge(&header)?;
    Ok(header)
}

/// Sets or clears the bit [`IN_USE`] in the first bytes of a version 3 image.
pub(super) fn mark_in_use(bytes: &mut [u8], in_use: bool) {
    if let Some(word) = bytes.get_mut(AUTOCLEAR_AT..AUTOCLEAR_AT + 8) {
        let mask = IN_USE.to_be_bytes();
        for (byte, mask) in word.iter_mut().zip(mask) {
            *byte = if in_use { *byte | mask } else { *byte & !mask };
        }
    }
}

fn judge(header: &Header) -> Result<(), String> {
    let length = header.length;
    if !CLUSTER_BITS.contains(&header.cluster_bits) {
        return Err(malformed(&format!("clusters of 2^{} bytes", header.cluster_bits)));
    }
    let cluster = header.cluster_size();
    if header.version == 3 && length < V3_BYTES || length as u64 > cluster {
        return Err(malformed(&format!("a length of {length} bytes")));
    }
    if header.refcount_order > MAX_REFCOUNT_ORDER {
        return Err(malformed(&format!("refcounts of 2^{} bits", header.refcount_order)));
    }
    let l1_bytes = u64::from(header.l1_entries) * 8;
    let reftable_bytes = u64::from(header.reftable_clusters) * cluster;
    for (what, offset, bytes, limit) in [
        ("L1 table", header.l1_offset, l1_bytes, MAX_L1_BYTES),
        ("refcount table", header.reftable_offset, reftable_bytes, MAX_REFTABLE_BYTES),
    ] {
        if bytes > limit {
            return Err(malformed(&format!("{what}: {bytes} bytes, more than {limit}")));
        }
        if offset % cluster != 0 || offset.checked_add(bytes).is_none_or(|end| end > 1 << 56) {
            return Err(malformed(&format!("{what}: at {offset:#x}")));
        }
    }
    if header.reftable_clusters == 0 {
        return Err(malformed("no refcount table"));
    }
    // As many L1 entries as the size needs.
    let covered = u128::from(header.l1_entries) * u128::from(cluster / 8) * u128::from(cluster);
    if covered < u128::from(header.size) {
        return Err(malformed(&format!(
            "a size of {} bytes, for which the L1 table is too small",
            header.size
        )));
    }
    Ok(())
}

fn extensions(fields: &Fields<'_>, header: &mut Header) -> Result<(), String> {
    let mut at = header.length;
    let end = index(u32::try_from(header.cluster_size()).unwrap_or(u32::MAX));
    // An end marker may be missing where the cluster ends.
    while at + 8 <= end {
        let (kind, len) = (fields.u32(at)?, index(fields.u32(at + 4)?));
        let data = at + 8;
        if kind == 0 {
            break;
        }
        if data.checked_add(len).is_none_or(|stop| stop > end) {
            return Err(malformed("an extension that does not end"));
        }
        match kind {
            EXTENSION_BACKING_FORMAT => {
                header.backing_format = Some(text(fields.bytes(data, len)?, "the backing file's format")?);
            }
            EXTENSION_DATA_FILE => {
                header.data_file =
                    Some(name(fields, data, len, "the data file's name", &mut header.odd_names)?);
            }
            EXTENSION_BITMAPS if len >= 4 => header.bitmaps = fields.u32(data)?,
            _ => {}
        }
        at = data + len.next_multiple_of(8);
    }
    Ok(())
}

/// The bytes of a file's start; numbers are big-endian.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes(&self, at: usize, len: usize) -> Result<&[u8], String> {
        let end = at.checked_add(len).ok_or_else(|| malformed("an offset"))?;
        self.0.get(at..end).ok_or_else(|| "has a header that is cut off".to_owned())
    }

    fn u32(&self, at: usize) -> Result<u32, String> {
        let bytes = self.bytes(at, 4)?;
        Ok(bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }

    fn u64(&self, at: usize) -> Result<u64, String> {
        Ok(u64::from(self.u32(at)?) << 32 | u64::from(self.u32(at + 4)?))
    }
}

/// Reads the name of a file, which is bytes to the system.
fn name(
    fields: &Fields<'_>,
    at: usize,
    len: usize,
    what: &str,
    odd: &mut Vec<(Range<usize>, Vec<u8>)>,
) -> Result<OsString, String> {
    let bytes = fields.bytes(at, len)?;
    if bytes.contains(&0) {
        return Err(malformed(what));
    }
    if std::str::from_utf8(bytes).is_err() {
        odd.push((at..at + len, bytes.to_vec()));
    }
    Ok(OsString::from_vec(bytes.to_vec()))
}

fn text(bytes: &[u8], what: &str) -> Result<String, String> {
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(malformed(what)),
    }
}

fn malformed(what: &str) -> String {
    format!("has a malformed header ({what})")
}

fn index(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
